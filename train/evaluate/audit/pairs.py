"""Trials on counterfactual pairs: an addition is pasted, erased again by inpainting, and blurred away."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from train import seeding
from train.datasets.counterfactuals import Counterfactual, Family
from train.datasets.split import Split
from train.evaluate.audit.instruments import Instrument, Row, gate, scored
from train.evaluate.statistics import share_interval

BLUR_PX = 8.0
ERASED = 0.05
"""Mask value from which on a pixel is inpainted."""
ERASING_REACH_PX = 5
TRIES = 4


def pair_rows(instrument: Instrument, attribute: str, drawn_by: str, pairs: Sequence[Counterfactual]) -> list[Row]:
    """What the answer does when the attribute is pasted, erased again and blurred away."""
    head = instrument.head_of(attribute)
    if head is None or not pairs:
        return []
    column, threshold = instrument.heads.index(head), instrument.thresholds[head]

    def said(pictures: Sequence[np.ndarray]) -> np.ndarray:
        return scored(instrument, pictures)[:, column] >= threshold

    before, after = said([pair.without for pair in pairs]), said([pair.image for pair in pairs])
    turned = [pair for pair, was, now in zip(pairs, before, after, strict=True) if now and not was]
    erased = ~said([erase(pair) for pair in turned])
    blurred = ~said([cv2.GaussianBlur(pair.image, (0, 0), BLUR_PX) for pair in turned])
    counts = {"seen_before": int(before.sum()), "pairs": len(pairs)}
    found = {"paste": share_interval(after[~before]), "erase": share_interval(erased), "blur": share_interval(blurred)}
    return [
        Row(instrument.name, head, trial, f"family {drawn_by}", estimate, gate(trial, attribute), counts)
        for trial, estimate in found.items()
    ]


def drawn_pairs(
    drawn_by: Family, splits: Sequence[Split], attribute: str, count: int, size_px: int, seed: int
) -> list[Counterfactual]:
    """Up to `count` counterfactuals of an attribute, each on an image of its own while there are as many."""
    places = [(split, int(index)) for split in splits for index in drawn_by.eligible(split, attribute)]
    if not places:
        return []
    order = seeding.numpy_generator(seed, "audit", drawn_by.name, attribute).permutation(len(places))
    found: list[Counterfactual] = []
    for number in range(min(TRIES * count, max(count, len(places)))):
        if len(found) == count:
            break
        split, index = places[order[number % len(places)]]
        rng = seeding.numpy_generator(seed, "audit", drawn_by.name, attribute, number)
        if (pair := drawn_by.add(split, index, attribute, rng, size_px)) is not None:
            found.append(pair)
    return found


def erase(pair: Counterfactual) -> np.ndarray:
    """The picture with its addition inpainted from what lies around it (Telea 2004)."""
    mask = (pair.mask >= ERASED).astype(np.uint8)
    reach = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (ERASING_REACH_PX, ERASING_REACH_PX))
    return cv2.inpaint(pair.image, cv2.dilate(mask, reach), 3, cv2.INPAINT_TELEA)
