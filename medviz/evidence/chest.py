"""Where a finding lies in the lungs, and how wide the heart is, from masks. Sides are the patient's."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from medviz.domains.lung_places import LEVELS, LUNGS, MID_ENDS, SIDES, UPPER_ENDS, location_phrase, merged

Mask = NDArray[np.bool_]

ENLARGED_RATIO = 0.5
"""Cardiothoracic ratio of a postero-anterior film above which a heart counts as enlarged."""
LEAST_SHARE = 0.3
"""Share of a finding that must lie in a zone for the zone to be named beside the one that holds the most."""


def zone_shares(mask: np.ndarray, right: Mask, left: Mask) -> dict[str, float]:
    """Share of a finding's mask (H, W) in each zone of the lungs, "right upper zone" and so on; 0 of an empty mask.

    right, left: masks of the lungs (H, W); a pixel belongs to the side whose lung is nearer by column, so that a
    finding which hides the lung's border still has a side. Heights are those that name a box (`lung_places`).
    """
    total = float(mask.sum())
    middle = _midline(right, left)
    height, width = mask.shape
    columns = np.arange(width)[None, :] + 0.5
    edges = [0, *(round(end * height) for end in (UPPER_ENDS, MID_ENDS)), height]
    shares = {}
    for side, here in zip(SIDES, (columns < middle, columns >= middle), strict=True):
        weights = np.where(here, mask, 0.0).sum(axis=1)
        for number, level in enumerate(LEVELS):
            inside = float(weights[edges[number] : edges[number + 1]].sum())
            shares[f"{side} {level} zone"] = inside / total if total > 0 else 0.0
    return shares


def _midline(right: Mask, left: Mask) -> np.ndarray:
    """Column between the lungs on every row (H, 1); the image's middle where either lung is missing altogether."""
    height, width = right.shape
    if not right.any() or not left.any():
        return np.full((height, 1), width / 2)
    columns = np.arange(width)
    inner_right = np.where(right, columns, -1).max(axis=1)
    inner_left = np.where(left, columns, width).min(axis=1)
    rows = np.nonzero((inner_right >= 0) & (inner_left < width) & (inner_left > inner_right))[0]
    if len(rows) == 0:
        return np.full((height, 1), width / 2)
    middle = (inner_right[rows] + 1 + inner_left[rows]) / 2
    return np.interp(np.arange(height), rows, middle)[:, None]


def finding_place(mask: np.ndarray, right: Mask, left: Mask) -> str:
    """Where a finding lies, in words: "right lower zone", "both lower zones", "left lung"; "" of an empty mask."""
    shares = zone_shares(mask, right, left)
    most = max(shares.values())
    if most <= 0:
        return ""
    named = [zone for zone, share in shares.items() if share >= LEAST_SHARE or share == most]
    return location_phrase(merged(named)).replace("the ", "")


def side_place(mask: np.ndarray, right: Mask, left: Mask) -> str:
    """The lung a finding lies in, for findings that have a side and no zone: "right lung", "both lungs"."""
    shares = zone_shares(mask, right, left)
    sides = {side: sum(share for zone, share in shares.items() if zone.startswith(side)) for side in SIDES}
    most = max(sides.values())
    if most <= 0:
        return ""
    named = [f"{side} lung" for side, share in sides.items() if share >= LEAST_SHARE or share == most]
    return location_phrase(merged(named)).replace("the ", "")


def cardiothoracic_ratio(masks: Mapping[str, Mask]) -> float | None:
    """Greatest width of the heart over that of the chest inside the lungs' outer borders.

    masks: "heart", "right_lung" and "left_lung", bool (H, W). None where one of them is missing or empty.
    """
    heart, right, left = (masks.get(name) for name in ("heart", *LUNGS))
    if heart is None or right is None or left is None or not (heart.any() and right.any() and left.any()):
        return None
    chest = _width(right | left)
    return _width(heart) / chest


def _width(mask: Mask) -> float:
    """From the first to the last column of a mask, ends included."""
    columns = np.nonzero(mask.any(axis=0))[0]
    return float(columns[-1] - columns[0] + 1)
