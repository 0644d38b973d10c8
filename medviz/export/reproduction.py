"""manifest.json of a pair's archive: what was asked, what drew it, and the sha256 of every picture's pixels.

From it a pair is drawn again, and what differs is named: pictures, weights, versions or sampling settings.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from medviz.errors import InputError
from medviz.results import Request

if TYPE_CHECKING:
    from medviz.results import Pair

FORMAT, FORMAT_VERSION = "medviz pair", 1
MANIFEST_NAME = "manifest.json"
MAX_MANIFEST_BYTES = 2**20
PIXELS, MAPS = "pixels/", "maps/"  # values as they were drawn; the other pictures are made from these
_DAMAGED = (ValueError, KeyError, TypeError, AttributeError)


def manifest(pair: Pair, maps: Sequence[Mapping[str, str]], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the manifest of a pair.

    maps: for each word the names of its two maps. pictures: name -> PNG file.
    """
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "request": vars(pair.request),
        "models": dict(pair.models),
        "sampling": dict(pair.sampling),
        "versions": dict(pair.versions),
        "maps": [dict(each) for each in maps],
        "map_scale": "value / 65535 is the attention in [0, 1], on one scale for both images of a word",
        "pictures": {name: pixel_record(content) for name, content in pictures.items()},
    }


def pixel_record(png: bytes) -> dict[str, Any]:
    """Return a PNG's mode, size and the sha256 of its decoded pixels, row by row from the top left.

    RGB holds three bytes a pixel, I;16 two, the lower first.
    """
    with Image.open(io.BytesIO(png)) as image:
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return {"mode": image.mode, "width_px": image.width, "height_px": image.height, "sha256": digest}


@dataclass(frozen=True)
class Manifest:
    """A manifest that was read and checked. pictures: name -> what `pixel_record` returns."""

    request: Request
    models: Mapping[str, Any]
    sampling: Mapping[str, Any]
    versions: Mapping[str, Any]
    pictures: Mapping[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A manifest beside what was drawn from it, one line a difference.

    pictures, maps: names of images and of attention maps whose values differ; the maps of a stored example are rounded
    to 8 bits and always do. models, sampling, versions: what may be the reason.
    """

    pictures: tuple[str, ...]
    maps: tuple[str, ...]
    models: tuple[str, ...]
    sampling: tuple[str, ...]
    versions: tuple[str, ...]

    @property
    def identical(self) -> bool:
        """Whether both images have the recorded pixels."""
        return not self.pictures


def read_manifest(path: Path) -> Manifest:
    """Read a manifest.json, or that of a ZIP archive.

    Raises InputError for a file that is missing, too large, damaged, of another format or version, or whose request
    this version does not know.
    """
    path = Path(path)
    try:
        content = json.loads(_content(path))
        if content["format"] != FORMAT or content["format_version"] != FORMAT_VERSION:
            found = f"{str(content['format'])[:40]!r} {str(content['format_version'])[:10]}"
            raise InputError(f"{path} has the format {found}; {FORMAT!r} {FORMAT_VERSION} can be read")
        asked, known = dict(content["request"]), {each.name for each in fields(Request)}
        if set(asked) != known:
            raise InputError(
                f"{path} asks with {', '.join(sorted(asked))}; this version draws {', '.join(sorted(known))}"
            )
        parts = {name: dict(content[name]) for name in ("models", "sampling", "versions", "pictures")}
        if not any(name.startswith(PIXELS) for name in parts["pictures"]):
            raise InputError(f"{path} lists no picture under {PIXELS}; there is nothing to compare with")
    except InputError:
        raise
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    except _DAMAGED as error:
        raise InputError(f"{path} is no manifest of a pair, or damaged: {error!r}") from error
    return Manifest(Request(**asked), **parts)


def compared(recorded: Manifest, pair: Pair, files: Mapping[str, bytes]) -> Comparison:
    """Compare a manifest with a pair that was drawn from its request. files: as `medviz.export.archive.pair_files`."""
    wrong = [
        name
        for name, record in recorded.pictures.items()
        if name.startswith((PIXELS, MAPS)) and (name not in files or pixel_record(files[name]) != record)
    ]
    return Comparison(
        pictures=tuple(name for name in wrong if name.startswith(PIXELS)),
        maps=tuple(name for name in wrong if name.startswith(MAPS)),
        models=_differences(recorded.models, pair.models),
        sampling=_differences(recorded.sampling, pair.sampling),
        versions=_differences(recorded.versions, pair.versions),
    )


def _differences(recorded: Mapping[str, Any], here: Mapping[str, Any]) -> tuple[str, ...]:
    """One line for every name whose values differ, as JSON has them."""
    lines = []
    for name in sorted({*recorded, *here}):
        before, now = (json.dumps(values[name]) if name in values else "not recorded" for values in (recorded, here))
        if before != now:
            lines.append(f"{name}: {before} in the manifest, {now} here")
    return tuple(lines)


def _content(path: Path) -> bytes:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            _check_size(path, packed.getinfo(MANIFEST_NAME).file_size)
            return packed.read(MANIFEST_NAME)
    _check_size(path, path.stat().st_size)
    return path.read_bytes()


def _check_size(path: Path, size_bytes: int) -> None:
    if size_bytes > MAX_MANIFEST_BYTES:
        raise InputError(f"the manifest of {path} has {size_bytes} bytes; at most {MAX_MANIFEST_BYTES} are read")
