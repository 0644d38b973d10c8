"""Images with, for each attribute, where it is known to be, known not to be, or not known."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import cv2
import numpy as np

from train import augment
from train.datasets.counterfactuals import Counterfactual, Family, relit
from train.datasets.split import Split

UNKNOWN = -1.0
"""Target of a pixel of which nothing is known."""
SOMEWHERE = -2.0
"""Target of the pixels among which the attribute is known to lie somewhere."""
TRIES = 12
BLANK_CELLS = (4, 12)
"""Side of the thumbnails, in pixels, that hold nothing to be seen."""


@dataclass(frozen=True)
class Example:
    """image: uint8 RGB (S, S, 3). targets: float32 (K, S, S), in [0, 1], or UNKNOWN, or SOMEWHERE.

    weights: float32 (K,), how much the demand counts that the attribute lies among its SOMEWHERE pixels.
    """

    image: np.ndarray
    targets: np.ndarray
    weights: np.ndarray


class Examples(Protocol):
    """Where a detector's examples come from; all randomness is that of `rng`."""

    attributes: tuple[str, ...]
    findings: tuple[bool, ...]
    """Whether each attribute is a finding, or anatomy."""

    def pair(self, rng: np.random.Generator) -> list[Example]:
        """An image without and with an attribute, in the same light and place."""

    def real(self, rng: np.random.Generator) -> Example:
        """A real image with what its record knows."""


def unknown(attributes: Sequence[str], size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Targets and weights of an image of which nothing is known."""
    return np.full((len(attributes), size_px, size_px), UNKNOWN, np.float32), np.zeros(len(attributes), np.float32)


def with_distractor(chosen: Counterfactual, other: Counterfactual) -> Counterfactual:
    """`chosen` with the addition of `other`, made on the same image, in both of its pictures."""
    change = other.image.astype(np.int16) - other.without
    both = [
        np.clip(picture.astype(np.int16) + change, 0, 255).astype(np.uint8)
        for picture in (chosen.without, chosen.image)
    ]
    return replace(chosen, without=both[0], image=both[1])


def drawn(
    family: Family,
    split: Split,
    eligible: Mapping[str, np.ndarray],
    attributes: Sequence[str],
    rng: np.random.Generator,
    size_px: int,
    distractors: float,
) -> tuple[Counterfactual, Counterfactual | None, int]:
    """A counterfactual of one of `attributes`, what else was added to both of its pictures, and the image's index.

    distractors: how often something else is added. Raises RuntimeError where no image takes an addition.
    """
    for _ in range(TRIES):
        attribute = attributes[int(rng.integers(len(attributes)))]
        index = int(rng.choice(eligible[attribute]))
        chosen = family.add(split, index, attribute, rng, size_px)
        if chosen is None:
            continue
        others = [name for name in attributes if name != attribute and index in eligible[name]]
        if not others or rng.random() >= distractors:
            return chosen, None, index
        other = family.add(split, index, others[int(rng.integers(len(others)))], rng, size_px)
        return (chosen, None, index) if other is None else (with_distractor(chosen, other), other, index)
    raise RuntimeError(f"family {family.name!r} added nothing in {TRIES} tries")


def changed(
    examples: Sequence[Example],
    changes: augment.Augmentation,
    rng: np.random.Generator,
    blank: float,
    findings: Sequence[bool],
) -> list[Example]:
    """The examples under one random change of place and light; with probability `blank`, shrunk to thumbnails.

    A thumbnail shows no finding: the targets of `findings`, one an attribute, become 0, those of anatomy UNKNOWN.
    """
    size = examples[0].image.shape[0]
    move = augment.draw(changes, size, rng)
    moved = [replace(each, image=move.image(each.image), targets=_moved(each.targets, move)) for each in examples]
    table = rng.integers(2**63)
    found = []
    for each in moved:
        lit = relit(_alone(each.image), np.random.default_rng(table))
        found.append(replace(each, image=lit.image))
    if rng.random() >= blank:
        return found
    cells = int(rng.integers(*BLANK_CELLS, endpoint=True))
    return [_blank(each, cells, findings) for each in found]


def halved(targets: np.ndarray) -> np.ndarray:
    """Targets (K, S, S) on half the side: the greatest of each 2x2, so that thin lines stay."""
    count, size, _ = targets.shape
    return targets.reshape(count, size // 2, 2, size // 2, 2).max(axis=(2, 4))


def _moved(targets: np.ndarray, move: augment.Draw) -> np.ndarray:
    planes = []
    for plane in targets:
        if plane.min() == plane.max():
            planes.append(plane)
        else:
            planes.append(move.mask(plane, interpolated=bool(plane.min() >= 0)))
    return np.stack(planes)


def _alone(image: np.ndarray) -> Counterfactual:
    return Counterfactual(image, image, np.zeros(image.shape[:2], np.float32), {}, {}, "", "")


def _blank(example: Example, cells: int, findings: Sequence[bool]) -> Example:
    size = example.image.shape[0]
    small = cv2.resize(example.image, (cells, cells), interpolation=cv2.INTER_AREA)
    kind = cv2.INTER_LINEAR if cells % 2 else cv2.INTER_CUBIC
    blurred = cv2.resize(small, (size, size), interpolation=kind)
    empty = np.where(np.asarray(findings)[:, None, None], 0.0, UNKNOWN).astype(np.float32)
    return Example(blurred, np.broadcast_to(empty, example.targets.shape), np.zeros_like(example.weights))
