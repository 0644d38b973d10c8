"""Files that the server hands out: written once, whole, where gradio serves from, and named by their content."""

import os
import tempfile
from pathlib import Path

from gradio.processing_utils import hash_bytes
from gradio.utils import get_upload_folder
from PIL import Image

from medviz.images import png_bytes

_MARK = {"Synthetic": "yes", "Software": "medviz"}


def served(content: bytes, name: str) -> str:
    """Write bytes under a name of the program's choosing (never typed text) and return the path to serve.

    The same bytes have the same path. A file that a browser may be reading is never written again: gradio would
    truncate it first, and the picture would break.
    """
    path = Path(get_upload_folder()) / hash_bytes(content) / Path(name).name
    if path.exists():
        os.utime(path)  # old files are deleted, and this one is young again
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".")
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)
    Path(partial).replace(path)
    return str(path)


def served_picture(picture: Image.Image, name: str, *, synthetic: bool = True) -> str:
    """Write a picture for the screen as PNG, marked as synthetic unless it shows an upload, and return its path."""
    return served(png_bytes(picture, _MARK if synthetic else None), f"{name}.png")
