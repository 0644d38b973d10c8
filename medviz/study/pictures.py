"""Images as a reader gets them: one size, one encoder, no metadata, so that nothing but the pixels tells them apart."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from medviz.errors import InputError, StudyError
from medviz.study.protocol import Protocol, RealImage

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".dcm"})


def plain_png(image: "Image.Image", size_px: int) -> bytes:
    """The central square of an image as an RGB PNG of size_px without metadata.

    Raises InputError for an image that would have to be enlarged: its blur would give it away.
    """
    from medviz.images import fit_square, png_bytes

    if min(image.size) < size_px:
        raise InputError(
            f"an image of {image.width} x {image.height} pixels is smaller than the study's {size_px} pixels"
        )
    return png_bytes(fit_square(image.convert("RGB"), size_px))


def find_real_images(folder: Path, size_px: int, prefix: str = "r") -> tuple[RealImage, ...]:
    """Name and hash every image under a folder, by name. Raises InputError for one that cannot be shown."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder of images")
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES
    )
    found = []
    for number, name in enumerate(names, 1):
        content = (folder / name).read_bytes()
        _real_png(content, name, size_px)
        found.append(RealImage(f"{prefix}{number:03d}", name, hashlib.sha256(content).hexdigest()))
    return tuple(found)


def load_pictures(protocol: Protocol, folder: Path, real_folder: Path | None) -> Mapping[tuple[str, str], bytes]:
    """Every PNG of a study by (key, arm), each checked against the protocol.

    Raises StudyError when a file is missing or has another hash, and where real images are needed and their folder is
    not given.
    """
    pictures = {}
    for case in (*protocol.cases, *protocol.practice):
        for arm, picture in (("baseline", case.baseline), ("aligned", case.aligned)):
            pictures[case.key, arm] = _checked(folder, picture.file, picture.sha256)
    real = (*protocol.real, *protocol.practice_real)
    if real and real_folder is None:
        raise StudyError(f"the study shows {len(real)} real images; name the folder that holds them")
    for image in real:
        content = _checked(Path(real_folder or folder), image.name, image.sha256)
        pictures[image.key, "real"] = _real_png(content, image.name, protocol.size_px)
    return pictures


def _checked(folder: Path, name: str, sha256: str) -> bytes:
    try:
        content = (folder / name).read_bytes()
    except OSError as error:
        raise StudyError(f"the image {name} of the study cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != sha256:
        raise StudyError(f"the image {name} was changed since the protocol was frozen")
    return content


def _real_png(content: bytes, name: str, size_px: int) -> bytes:
    from medviz.images import decode_image

    try:
        return plain_png(decode_image(content), size_px)
    except InputError as error:
        raise InputError(f"the real image {name}: {error}") from error
