"""Experiments that train many models the same way and set them side by side, one command and one table each."""
