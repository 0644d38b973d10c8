"""Errors that carry a message a person can act on: what was wrong and what is allowed."""


class MedvizError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(MedvizError, ValueError):
    """Something a person or a client sent is outside what is allowed; nothing was computed or lost."""


class ModelError(MedvizError):
    """A model folder is missing, damaged, incompatible or not to be trusted."""


class StartError(MedvizError):
    """The server cannot start as it is configured; nothing was served."""


class Cancelled(MedvizError):
    """The person who asked for the work took the request back."""
