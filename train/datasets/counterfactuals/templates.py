"""What artefacts add to skin, cut from real images: the table MEDVIZ_DATA/dermatology-artefacts.

Katsch, Rinner, Tschandl 2022; each template is what is added to and taken from the skin under it.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq

from medviz.errors import InputError
from train.datasets.split import images_root

logger = logging.getLogger(__name__)

FOLDER = "dermatology-artefacts"
NOISE_LEVELS = (2.0, 7.0)
"""Differences below the first are compression noise of the cutting; those above the second count in full."""


@dataclass(frozen=True)
class Template:
    """One artefact. change: float32 RGB (h, w, 3) in grey levels, added to the skin of a 600 x 450 image."""

    image_id: str
    artefact: str
    change: np.ndarray


Templates = Mapping[str, list[Template]]
Painter = Callable[[np.ndarray, str, np.random.Generator, Templates], np.ndarray]
"""float32 RGB (S, S, 3) in grey levels, a place or "", rng, templates -> the picture with the artefact, unclipped."""


def third_of(image_id: str) -> int:
    """0, 1 or 2 by a hash of the source image: family "a" has 0 and 1, "b" has 2."""
    return hashlib.blake2b(image_id.encode(), digest_size=1).digest()[0] % 3


def read_templates(thirds: tuple[int, ...], root: str | Path | None = None) -> dict[str, list[Template]]:
    """artefact -> templates whose source image lies in `thirds`.

    Empty, with a warning, where the folder is not there: the families then draw every artefact themselves. Raises
    InputError where a picture cannot be decoded.
    """
    paths = sorted((images_root(root) / FOLDER).glob("*.parquet"))
    if not paths:
        logger.warning("no templates in %s: every artefact is drawn", images_root(root) / FOLDER)
    found: dict[str, list[Template]] = {}
    for path in paths:
        for row in pq.read_table(path, columns=["image_id", "artefact", "darker", "lighter"]).to_pylist():
            if third_of(row["image_id"]) in thirds:
                change = _levels(row, "lighter") - _levels(row, "darker")
                found.setdefault(row["artefact"], []).append(Template(row["image_id"], row["artefact"], _clean(change)))
    return found


def _levels(row: dict, column: str) -> np.ndarray:
    picture = cv2.imdecode(np.frombuffer(row[column]["bytes"], np.uint8), cv2.IMREAD_COLOR)
    if picture is None:
        raise InputError(f"the {column} picture of template {row['image_id']} cannot be decoded")
    return picture[..., ::-1].astype(np.float32)


def _clean(change: np.ndarray) -> np.ndarray:
    least, full = NOISE_LEVELS
    strength = np.abs(change).max(axis=2, keepdims=True)
    return change * np.clip((strength - least) / (full - least), 0, 1)
