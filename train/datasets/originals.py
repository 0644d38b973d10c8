"""What the readers of the publishers' folders share: tables, files, and how a picture becomes a square."""

import csv
import io
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np

from medviz.errors import InputError

logger = logging.getLogger(__name__)

SIDE_PX = 256
RAW_SIDE_PX, RAW_WHITEST = 2048, 4095
MAX_AGE_YEARS = 120.0
"""Published tables hold slips such as an age of 411 years; what is above counts as unknown."""

Fit = Literal["crop", "pad", "stretch"]
"""How a picture becomes a square: its centre, the whole with black bars, or the whole with its proportions given up."""


@dataclass(frozen=True)
class Original:
    """One image at its publisher's.

    row: the columns of the shard that are neither pictures nor boxes; absent ones become null.
    masks: mask column -> its files; pixels above 0 of any of them are inside.
    boxes: {label, x, y, w, h}, fractions of the whole picture, origin top left.
    """

    row: Mapping[str, Any]
    image: Path
    masks: Mapping[str, Path | tuple[Path, ...]] = field(default_factory=dict)
    boxes: tuple[Mapping[str, Any], ...] = ()

    @property
    def group(self) -> str:
        """The lesion or patient: what must stay on one side of a split."""
        return str(self.row.get("lesion_id") or self.row.get("patient_id") or self.row["image_id"])


def mask_files(files: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    """The files of one mask column."""
    return files if isinstance(files, tuple) else (files,)


@dataclass(frozen=True)
class Frame:
    """The square window that `fit` cuts from a picture of width_px x height_px, for pictures, masks and boxes alike."""

    width_px: int
    height_px: int
    fit: Fit

    @property
    def window(self) -> tuple[int, int, int, int]:
        """Left, top, width and height in pixels of the picture; with "pad" the window reaches over its edges."""
        width, height = self.width_px, self.height_px
        if self.fit == "stretch":
            return 0, 0, width, height
        side = min(width, height) if self.fit == "crop" else max(width, height)
        return (width - side) // 2, (height - side) // 2, side, side

    def square(self, picture: np.ndarray, size_px: int = SIDE_PX) -> np.ndarray:
        """The window of `picture`, uint8 (height_px, width_px[, 3]), resized to (size_px, size_px[, 3])."""
        left, top, width, height = self.window
        if self.fit == "pad":
            bottom, right = height - self.height_px + top, width - self.width_px + left
            cut = cv2.copyMakeBorder(picture, -top, bottom, -left, right, cv2.BORDER_CONSTANT)
        else:
            cut = np.ascontiguousarray(picture[top : top + height, left : left + width])
        smaller = min(width, height) >= size_px
        return cv2.resize(cut, (size_px, size_px), interpolation=cv2.INTER_AREA if smaller else cv2.INTER_LINEAR)

    def box(self, box: Mapping[str, Any]) -> dict[str, Any] | None:
        """`box`, in fractions of the picture, as fractions of the square, clipped to it; None where nothing is left."""
        left, top, width, height = self.window
        window = left / self.width_px, top / self.height_px, width / self.width_px, height / self.height_px
        return moved_box(box, window)


def moved_box(box: Mapping[str, Any], window: tuple[float, float, float, float]) -> dict[str, Any] | None:
    """A box {label, x, y, w, h} as fractions of a window (left, top, width, height), clipped; None if nothing is left.

    Both are given in fractions of the same picture.
    """
    left, top, width, height = window
    x0, x1 = ((v - left) / width for v in (box["x"], box["x"] + box["w"]))
    y0, y1 = ((v - top) / height for v in (box["y"], box["y"] + box["h"]))
    x0, x1, y0, y1 = (min(max(v, 0.0), 1.0) for v in (x0, x1, y0, y1))
    if x1 <= x0 or y1 <= y0:
        return None
    sides = {"x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0}
    return {"label": box["label"], **{name: round(v, 4) for name, v in sides.items()}}


def read_picture(path: Path, grey: bool) -> np.ndarray:
    """The pixels as stored, uint8 BGR (H, W, 3) or grey (H, W); JSRT's headerless .IMG files too, air dark.

    An orientation tag is not obeyed: masks and boxes refer to the stored pixels, and left must stay left.
    """
    if path.suffix.lower() == ".img":
        return _read_raw(path)
    mode = (cv2.IMREAD_GRAYSCALE if grey else cv2.IMREAD_COLOR) | cv2.IMREAD_IGNORE_ORIENTATION
    try:
        picture = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), mode)
    except (OSError, cv2.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if picture is None:
        raise InputError(f"{path} cannot be decoded: expected a whole JPEG or PNG file")
    return picture


def _read_raw(path: Path) -> np.ndarray:
    """A JSRT image: 2048 x 2048 big-endian 16-bit numbers of 12 bits, 0 being white; uint8 grey (H, W)."""
    try:
        numbers = np.frombuffer(path.read_bytes(), ">u2")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if numbers.size != RAW_SIDE_PX**2:
        raise InputError(f"{path} holds {numbers.size} numbers; expected {RAW_SIDE_PX} x {RAW_SIDE_PX} of 16 bits")
    levels = 255.0 * (1 - np.minimum(numbers, RAW_WHITEST) / RAW_WHITEST)
    return np.rint(levels).astype(np.uint8).reshape(RAW_SIDE_PX, RAW_SIDE_PX)


def read_table(path: Path, required: Iterable[str]) -> list[dict[str, str]]:
    """The rows of a table separated by commas, semicolons or tabs, as column -> stripped text.

    Raises InputError for an unreadable file, a missing column (naming those found) or a row that ends early.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the table {path}: {error}") from error
    header = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
    missing = sorted(set(required) - set(reader.fieldnames))
    if missing:
        raise InputError(f"{path} lacks the columns {missing}; it has {reader.fieldnames}")
    rows = []
    for row in reader:
        if any(row[name] is None for name in required):
            raise InputError(f"{path}, line {reader.line_num}: the row ends before all of {sorted(required)}")
        rows.append({name: value.strip() for name, value in row.items() if isinstance(value, str)})
    return rows


def folder_in(folder: Path, pattern: str, what: str) -> Path:
    """The folder that `pattern` finds in `folder`, the last by name; InputError says `what` is expected there."""
    found = sorted(path for path in folder.glob(pattern) if path.is_dir())
    if not found:
        raise InputError(f"no {pattern} in {folder}: expected the folder of {what}")
    return found[-1]


def file_in(folder: Path, names: Sequence[str], what: str) -> Path:
    """The first of the glob patterns `names` that finds a file in `folder`; InputError says `what` is expected."""
    for name in names:
        found = sorted(path for path in folder.glob(name) if path.is_file())
        if found:
            return found[-1]
    raise InputError(f"no {' or '.join(names)} in {folder}: expected {what}")


def files_by_stem(folder: Path, pattern: str) -> dict[str, Path]:
    """Name without suffix -> file, for all files below `folder` that match and do not begin with a dot."""
    paths = sorted((path for path in folder.rglob(pattern) if not path.name.startswith(".")), reverse=True)
    return {path.stem: path for path in paths}


def complete(originals: Sequence[Original], allow_missing: bool) -> list[Original]:
    """The originals whose files are all there.

    Raises InputError naming the first missing file unless `allow_missing`, which leaves its image out and says so.
    """
    missing = {}
    for i, original in enumerate(originals):
        masks = [path for paths in original.masks.values() for path in mask_files(paths)]
        absent = [path for path in (original.image, *masks) if not path.is_file()]
        if absent:
            missing[i] = absent[0]
    if missing:
        first = next(iter(missing.values()))
        message = f"{len(missing)} of {len(originals)} images lack a file, the first of them {first}"
        if not allow_missing:
            raise InputError(f"{message}: complete the folder, or pass --allow-missing to leave such images out")
        logger.warning("%s: left out", message)
    return [original for i, original in enumerate(originals) if i not in missing]


def known(text: str) -> str | None:
    """`text`, or None for what the publishers write where they do not know."""
    return None if text.lower() in ("", "unknown", "nan", "na", "none") else text


def age_years(text: str) -> float | None:
    """An age as published, "45", "45.0", "045Y", "006M" or "013D", in years; None where unknown or above 120.

    Raises InputError for anything else.
    """
    if known(text) is None:
        return None
    units = {"Y": 1.0, "M": 12.0, "D": 365.25}
    amount, divisor = (text[:-1], units[text[-1].upper()]) if text[-1].upper() in units else (text, 1.0)
    try:
        years = float(amount) / divisor
    except ValueError as error:
        raise InputError(f"{text!r} is no age: expected years such as 45 or 045Y, months 006M or days 013D") from error
    return years if math.isfinite(years) and 0 <= years <= MAX_AGE_YEARS else None
