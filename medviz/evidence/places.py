"""The place of a mask in words."""

import numpy as np

from medviz.domains.image_places import CENTRE, CORNERS, EDGES

EDGE_BAND = 1 / 3
"""Depth of the band along an edge, in sides of the image."""
MOST = 0.75
"""Share of the mask that must lie at a place for the place to be named."""


def place_of(mask: np.ndarray) -> str:
    """The edge, corner or centre of the image where most of the mask lies, "" where no single place holds it.

    mask: (H, W) in [0, 1]; what is below half of the strongest value is left out. The centre is the middle half of the
    height and the width. Raises ValueError where the mask is not two-dimensional.
    """
    if mask.ndim != 2:
        raise ValueError(f"a mask has two dimensions, found shape {mask.shape}")
    weights = np.where(mask >= mask.max(initial=0.0) / 2, mask, 0.0)
    total = float(weights.sum())
    if total <= 0:
        return ""
    rows, columns = weights.sum(axis=1) / total, weights.sum(axis=0) / total
    upper, lower = _ends(rows)
    left, right = _ends(columns)
    vertical = "upper" if upper >= MOST else "lower" if lower >= MOST else ""
    sideways = "left" if left >= MOST else "right" if right >= MOST else ""
    if vertical and sideways:
        return CORNERS[CORNERS.index(f"{vertical} {sideways} corner")]
    if vertical or sideways:
        return EDGES[EDGES.index(f"{vertical or sideways} edge")]
    height, width = mask.shape
    middle = weights[height // 4 : height - height // 4, width // 4 : width - width // 4]
    return CENTRE if float(middle.sum()) / total >= MOST else ""


def _ends(shares: np.ndarray) -> tuple[float, float]:
    """Shares of the mask in the first and the last band of one axis."""
    depth = round(len(shares) * EDGE_BAND)
    return float(shares[:depth].sum()), float(shares[-depth:].sum())
