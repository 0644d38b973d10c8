"""How well a heat map falls on a region: CNR, mass, IoU, pointing game, pixel AUROC.

Definitions of CNR and mIoU: arXiv 2506.10633 (after arXiv 2204.09817). A heat map is (H, W), a region is a mask of
the same shape, true inside. Where a figure has no meaning (an empty region, no mass) it is NaN, never 0.
Every function raises InputError for shapes that differ, a mask that is not binary, or a value that is not finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata

from medviz.errors import InputError

MIOU_THRESHOLDS = (0.1, 0.2, 0.3, 0.4, 0.5)


def _check(heat_map: ArrayLike, region: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    heat, mask = np.asarray(heat_map, dtype=np.float64), np.asarray(region)
    if heat.ndim != 2 or heat.shape != mask.shape or heat.size == 0:
        raise InputError(f"heat map and region must be one (H, W), found {heat.shape} and {mask.shape}")
    if not np.isfinite(heat).all():
        raise InputError("the heat map holds values that are not finite")
    if mask.dtype != bool:
        if not np.isin(mask, (0, 1)).all():
            raise InputError(f"a region must be a boolean mask or hold 0 and 1 only, found dtype {mask.dtype}")
        mask = mask.astype(bool)
    return heat, mask


def _mean_and_variance(values: np.ndarray) -> tuple[float, float]:
    # Equal values are told apart first: rounding in the mean would leave a variance of 1e-34 to divide by.
    if values.min() == values.max():
        return float(values[0]), 0.0
    return float(values.mean()), float(values.var())


def cnr(heat_map: ArrayLike, region: ArrayLike) -> float:
    """Contrast-to-noise ratio, signed: (mean inside - mean outside) / sqrt(variance inside + variance outside).

    Population variances. 0 for a constant map, +-inf when inside and outside are both constant and differ,
    NaN when the region is empty or the whole image.
    """
    heat, mask = _check(heat_map, region)
    if not mask.any() or mask.all():
        return math.nan
    inside, inside_variance = _mean_and_variance(heat[mask])
    outside, outside_variance = _mean_and_variance(heat[~mask])
    difference, noise = inside - outside, math.sqrt(inside_variance + outside_variance)
    if noise == 0.0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / noise


def abs_cnr(heat_map: ArrayLike, region: ArrayLike) -> float:
    """|CNR|, which some papers report: it also counts a map that avoids the region as good, so prefer `cnr`."""
    return abs(cnr(heat_map, region))


def mass_in_region(heat_map: ArrayLike, region: ArrayLike) -> float:
    """Share in [0, 1] of the map's total that lies inside; a flat map gives the region's share of the area.

    NaN when the region is empty or the map is all 0. Raises InputError for negative values.
    """
    heat, mask = _check(heat_map, region)
    if heat.min() < 0.0:
        raise InputError(f"mass needs a map without negative values, found a minimum of {heat.min():g}")
    total = heat.sum()
    return float(heat[mask].sum() / total) if mask.any() and total > 0.0 else math.nan


def iou(heat_map: ArrayLike, region: ArrayLike, threshold: float = 0.5) -> float:
    """Intersection over union of {heat map > threshold} and the region, for a map in [0, 1]; NaN for no region."""
    heat, mask = _check(heat_map, region)
    if heat.min() < 0.0 or heat.max() > 1.0 + 1e-6:
        raise InputError(f"a threshold needs a map in [0, 1], found {heat.min():g} to {heat.max():g}")
    if not mask.any():
        return math.nan
    hot = heat > threshold
    return float((hot & mask).sum() / (hot | mask).sum())


def miou(heat_map: ArrayLike, region: ArrayLike, thresholds: Sequence[float] = MIOU_THRESHOLDS) -> float:
    """Mean IoU over the thresholds 0.1 to 0.5; several boxes count as their union. NaN for no region."""
    return float(np.mean([iou(heat_map, region, threshold) for threshold in thresholds]))


def pointing_game(heat_map: ArrayLike, region: ArrayLike) -> float:
    """1 when the hottest pixel lies inside, 0 when not (arXiv 1608.00507, without tolerance).

    Several equally hot pixels count by their share inside, so a flat map earns no more than the region's area.
    NaN for no region.
    """
    heat, mask = _check(heat_map, region)
    return float(mask[heat == heat.max()].mean()) if mask.any() else math.nan


def pixel_auroc(heat_map: ArrayLike, region: ArrayLike) -> float:
    """Probability that a pixel inside is hotter than one outside, ties counting half; 0.5 is chance.

    NaN when the region is empty or the whole image.
    """
    heat, mask = _check(heat_map, region)
    inside, outside = int(mask.sum()), int((~mask).sum())
    if inside == 0 or outside == 0:
        return math.nan
    rank_sum = float(rankdata(heat.ravel())[mask.ravel()].sum())
    return (rank_sum - inside * (inside + 1) / 2) / (inside * outside)
