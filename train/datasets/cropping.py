"""Random crops of films, so that borders (black corners, letters) tell no source from another."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import cv2
import numpy as np

from train.datasets.originals import moved_box
from train.datasets.split import boxes


def cropped_film(
    image: np.ndarray,
    masks: Sequence[np.ndarray],
    record: Mapping[str, Any],
    rng: np.random.Generator,
    share: float = 0.12,
) -> tuple[np.ndarray, list[np.ndarray], dict[str, Any]]:
    """A window of the film at the film's size, its masks and record with it: (image, masks, record).

    image: uint8 (S, S, 3); masks: float32 or bool (S, S). The window is up to `share` smaller on each axis on its own
    and anywhere in the film. Boxes are moved and cut. Places in words stay those of the whole film.
    """
    size = len(image)
    height, width = (round(size * (1 - rng.uniform(0, share))) for _ in range(2))
    top, left = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))

    def window(picture: np.ndarray) -> np.ndarray:
        part = np.ascontiguousarray(picture[top : top + height, left : left + width])
        return cv2.resize(part, (size, size), interpolation=cv2.INTER_LINEAR)

    moved = [moved_box(box, (left / size, top / size, width / size, height / size)) for box in boxes(record)]
    described = {**record, "boxes": json.dumps([box for box in moved if box])}
    cut = [window(mask.astype(np.float32)) for mask in masks]
    kept = [part >= 0.5 if mask.dtype == bool else part for part, mask in zip(cut, masks, strict=True)]
    return window(image), kept, described
