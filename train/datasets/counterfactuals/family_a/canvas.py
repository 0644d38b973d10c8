"""Drawing at a higher resolution with OpenCV's polygons and polylines. Coordinates are in pixels of the image."""

from collections.abc import Callable

import cv2
import numpy as np

FINE = 3
"""Drawing resolution over the image's."""
SHIFT = 4
"""Fractional bits of the coordinates given to OpenCV."""


def coverage(size: int, draw: Callable[[np.ndarray], None], blur_px: float = 0.0) -> np.ndarray:
    """float32 (S, S) in [0, 1] of what `draw` paints on a uint8 canvas of FINE times the side."""
    canvas = np.zeros((size * FINE, size * FINE), np.uint8)
    draw(canvas)
    covered = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return cv2.GaussianBlur(covered, (0, 0), blur_px) if blur_px > 0.2 else covered


def fixed(points: np.ndarray) -> np.ndarray:
    """Image coordinates as OpenCV's fixed-point coordinates of the canvas, int32 (N, 1, 2)."""
    return np.rint(points * (FINE << SHIFT)).astype(np.int32).reshape(-1, 1, 2)


def blend(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """`image` float32 RGB (S, S, 3) covered by `colour` RGB, both in grey levels."""
    return image + coverage[..., None] * (colour.astype(np.float32) - image)


def noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit variance at the cells, float32 (S, S)."""
    return cv2.resize(rng.standard_normal((cells, cells), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)
