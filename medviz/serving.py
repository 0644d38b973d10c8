"""Where the app serves: address, port and a private folder for what passes through; checked before anything is built.

Knows no page, so that app.py can set gradio's environment before gradio is imported.
"""

import fcntl
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from medviz.errors import StartError

FOLDER_PREFIX = "medviz-served-"
_LOCK_NAME = ".lock"


def address() -> tuple[str, int]:
    """Host and port from HOST and PORT, or gradio's own variables; StartError for a port that is none or not free."""
    host = os.environ.get("HOST") or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    text = os.environ.get("PORT") or os.environ.get("GRADIO_SERVER_PORT") or "7860"
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535):
        raise StartError(f"PORT must be a whole number from 1 to 65535, got {text[:60]!r}")
    port = int(text)
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise StartError(
            f"cannot listen on {host} port {port}: {error.strerror}; HOST and PORT name another address"
        ) from error
    return host, port


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new folder (mode 0700) for uploads and served files; it is removed on exit.

    It lies in GRADIO_TEMP_DIR, or in the system's folder for temporary files. Folders of servers that no longer run are
    removed first, whatever ended them. Raises StartError when no folder can be made there.
    """
    parent = Path(os.environ.get("GRADIO_TEMP_DIR") or tempfile.gettempdir())
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        folder = Path(tempfile.mkdtemp(prefix=FOLDER_PREFIX, dir=parent))
        lock = (folder / _LOCK_NAME).open("wb")
    except OSError as error:
        raise StartError(
            f"the folder for temporary files {parent} cannot be written: {error.strerror}; GRADIO_TEMP_DIR or TMPDIR "
            "names another"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(parent: Path) -> None:
    """Remove folders of servers whose process has ended: the lock of a living one is held."""
    for folder in parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            lock = (folder / _LOCK_NAME).open("rb")
        except OSError:
            continue  # another user's, or one that is being made or removed
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            shutil.rmtree(folder, ignore_errors=True)
