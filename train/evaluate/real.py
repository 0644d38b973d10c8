"""The real images that pictures are compared with, and the captions that pictures are drawn from."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np

from medviz.domains import Domain
from train import seeding
from train.datasets.split import Split


@dataclass(frozen=True)
class RealImages:
    """Two groups of one split that share no patient and no lesion: `prompted` (A images), whose captions are drawn, and
    `reference` (B images); uint8 (N, H, W, 3), with the captions (A,) of the prompted ones."""

    prompted: np.ndarray
    reference: np.ndarray
    captions: tuple[str, ...]


def real_images(split: Split, domain: Domain, captions: int, size_px: int, seed: int) -> RealImages:
    """Divide a split by group, in an order drawn from the seed, until `captions` images (at most half) are prompted."""
    groups: dict[str, list[int]] = {}
    for index, group in enumerate(split.groups):
        groups.setdefault(group, []).append(index)
    order = list(groups)
    seeding.numpy_generator(seed, "evaluate", "groups").shuffle(order)
    wanted, prompted, reference = min(captions, len(split) // 2), list[int](), list[int]()
    for group in order:
        (prompted if len(prompted) < wanted else reference).extend(groups[group])
    prompted = prompted[:wanted]
    texts = tuple(
        domain.caption(split.records[i], random.Random(seeding.key(seed, "evaluate", "words", i))) for i in prompted
    )
    return RealImages(split.images(size_px, prompted), split.images(size_px, reference), texts)
