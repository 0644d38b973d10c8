"""Is the hair that a label speaks of to be seen in the picture?

Artefact labels describe the full frame and count the faintest vellus hair; the images are centre crops, read at low
resolution. Half of the dermatology images labelled "hair" show none: a generator cannot learn the word from them, and a
network learns nothing of hair (AUROC 0.61 on validation, where the plain filter below reaches 0.70 to 0.74). So a label
counts only where the picture agrees with it, and is unknown elsewhere.

The filter is the first step of DullRazor (Lee et al. 1997, doi 10.1016/S0010-4825(97)00020-6): a morphological closing
finds what is darker than its surroundings and thin; long and narrow parts of it are hair.
"""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

SIDE_PX = 256
"""Side at which the filter's sizes hold."""
CLOSING_PX, CONTRAST, LEAST_LENGTH_PX, NARROW = 11, 14, 20, 6.0
"""Widest line, least darkness in grey levels, least extent of a part, least extent squared over area."""
SEEN, UNSEEN = 0.4, 0.2
"""In sides of the image: at least so much hair to confirm a label, at most so much to confirm its absence."""
RULER = 0.8
"""What the line and the ticks of a ruler, which the filter cannot tell from hair, add to either bound."""


def hair_length(image: np.ndarray) -> float:
    """Summed extent of dark, long and narrow parts of uint8 RGB (256, 256, 3), in sides of the image."""
    grey = cv2.GaussianBlur(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (0, 0), 0.8)
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (CLOSING_PX, CLOSING_PX))
    thin = (cv2.morphologyEx(grey, cv2.MORPH_BLACKHAT, kernel) > CONTRAST).astype(np.uint8)
    parts = cv2.connectedComponentsWithStats(thin, connectivity=8)[2][1:].astype(np.float64)
    extent = np.hypot(parts[:, cv2.CC_STAT_WIDTH], parts[:, cv2.CC_STAT_HEIGHT])
    is_hair = (extent >= LEAST_LENGTH_PX) & (extent**2 > NARROW * parts[:, cv2.CC_STAT_AREA])
    return float(extent[is_hair].sum() / SIDE_PX)


def confirmed(label: float | None, ruler: float | None, length: float) -> float | None:
    """The hair label where the picture agrees with it, None where it does not.

    label, ruler: in [0, 1] or None where unknown; length: of :func:`hair_length`.
    """
    if label is None:
        return None
    allowance = RULER if (ruler or 0.0) >= 0.5 else 0.0
    agrees = length >= SEEN + allowance if label >= 0.5 else length <= UNSEEN + allowance
    return label if agrees else None


def hair_lengths(split: Any, cache: Path) -> np.ndarray:
    """:func:`hair_length` of every image of a split, float64 (N,), kept in `cache` under a digest of the pictures."""
    digest = hashlib.sha256(repr((CLOSING_PX, CONTRAST, LEAST_LENGTH_PX, NARROW)).encode())
    for picture in split.table["image"]:
        digest.update(picture.as_py()["bytes"])
    path = cache / f"hair-{split.name}-{digest.hexdigest()[:16]}.npy"
    if path.is_file():
        return np.load(path, allow_pickle=False)
    shown = tqdm(range(len(split)), unit="image", desc=f"hair {split.name}")
    lengths = np.array([hair_length(split.image(i, SIDE_PX)) for i in shown])
    cache.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{os.getpid()}-{path.name}")
    np.save(writing, lengths)
    os.replace(writing, path)
    return lengths


def confirm_hair(records: Sequence[dict[str, Any]], lengths: np.ndarray) -> int:
    """Forget, in place, the hair labels that the pictures do not bear out; returns how many."""
    forgotten = 0
    for record, length in zip(records, lengths, strict=True):
        label = record.get("artefact_hair")
        record["artefact_hair"] = confirmed(label, record.get("artefact_ruler"), float(length))
        forgotten += record["artefact_hair"] is None and label is not None
    return forgotten
