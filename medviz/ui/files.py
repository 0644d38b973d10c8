"""Files that the server hands out, written where gradio serves from and named by their content."""

from pathlib import Path

from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder


def served(content: bytes, name: str) -> str:
    """Write bytes under a name of the program's choosing (never typed text) and return the path to serve."""
    return save_bytes_to_cache(content, Path(name).name, get_upload_folder())
