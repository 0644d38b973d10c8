"""Synthetic dermatology and chest X-ray images, what their words looked at, and what rewards and a judge say of them.

`from medviz import Studio` is the whole door; everything heavy is imported only when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from medviz.errors import Cancelled, InputError, MedvizError, ModelError

if TYPE_CHECKING:
    from medviz.studio import Studio

__version__ = "1.0.0"
__all__ = ["Cancelled", "InputError", "MedvizError", "ModelError", "Studio", "__version__"]


def __getattr__(name: str) -> Any:
    # Studio brings torch and diffusers; a person who only wants the errors or the version should not wait for them.
    if name == "Studio":
        from medviz.studio import Studio

        return Studio
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
