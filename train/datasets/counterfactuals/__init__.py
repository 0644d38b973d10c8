"""Counterfactual images: the same image with and without one addition, drawn by two families of code.

This module knows no domain's drawing code until a family is asked for.
"""
