"""Two pictures that differ in one thing alone: an image, and the same image with something added to it."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Protocol

import cv2
import numpy as np

from train.datasets.split import Split


@dataclass(frozen=True)
class Counterfactual:
    """An image and what was added to it.

    without, image: uint8 RGB (S, S, 3), equal wherever mask is 0. mask: float32 (S, S) in [0, 1], 1 where the addition
    is plain. without_record, record: the image's record with labels (and boxes) set to what each picture shows, so that
    `domain.caption(record, rng)` names the addition with its place and `domain.caption(without_record, rng)` does not.
    attribute: the head's name ("ruler", "opacity"). place: "lower edge", "right lower zone", or "" where none is known.
    """

    without: np.ndarray
    image: np.ndarray
    mask: np.ndarray
    without_record: dict[str, Any]
    record: dict[str, Any]
    attribute: str
    place: str


class Family(Protocol):
    """One way of drawing additions.

    Anything may learn from "a"; "b" serves acceptance alone: other drawing code, other templates, disjoint lesions or
    patients.
    """

    name: str
    attributes: tuple[str, ...]

    def add(
        self,
        split: Split,
        index: int,
        attribute: str,
        rng: np.random.Generator,
        size_px: int = 256,
        place: str | None = None,
    ) -> Counterfactual | None:
        """Image `index` with and without `attribute`, at `place` where one is given.

        None where the image does not allow it: it has one already, or the addition hardly changes it. All randomness
        comes from `rng`. Raises InputError on an attribute or place that the family does not draw.
        """

    def eligible(self, split: Split, attribute: str) -> np.ndarray:
        """Indices of the images that may take the attribute, int64 (N,), ascending."""


def relit(counterfactual: Counterfactual, rng: np.random.Generator) -> Counterfactual:
    """Both pictures under one random change of colour, brightness, contrast and tone; the mask stays.

    A grey picture stays grey. Equal pixels stay equal, because the change is a table of levels for each channel.
    """
    table = _level_table(rng, is_grey=_is_grey(counterfactual.without))
    return dataclasses.replace(
        counterfactual,
        without=cv2.LUT(counterfactual.without, table),
        image=cv2.LUT(counterfactual.image, table),
    )


def _is_grey(image: np.ndarray) -> bool:
    return bool(np.array_equal(image[..., 0], image[..., 1]) and np.array_equal(image[..., 0], image[..., 2]))


def _level_table(rng: np.random.Generator, is_grey: bool) -> np.ndarray:
    """uint8 (1, 256, 3): the new level of each level and channel."""
    gain = rng.uniform(0.82, 1.18, 3)
    gamma = np.exp(rng.uniform(-0.3, 0.3))
    contrast, offset = rng.uniform(0.8, 1.2), rng.uniform(-0.1, 0.1)
    if is_grey:
        gain[:] = 1.0
    levels = (np.arange(256) / 255)[:, None] ** gamma * gain
    levels = (levels - 0.5) * contrast + 0.5 + offset
    return np.clip(np.rint(levels * 255), 0, 255).astype(np.uint8)[None]
