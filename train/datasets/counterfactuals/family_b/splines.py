"""Cubic Bezier curves drawn as splatted points with a Gaussian profile. Coordinates are in pixels of the image."""

import cv2
import numpy as np

FINE = 2
"""Resolution of the grid that points are splatted on, over the image's."""


def bezier(control: np.ndarray, samples: int) -> np.ndarray:
    """Points (N, samples, 2) of N cubic Bezier curves with control points (N, 4, 2)."""
    t = np.linspace(0, 1, samples)[:, None]
    basis = np.hstack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3])
    return np.einsum("sk,nkd->nsd", basis, control)


def splatted(points: np.ndarray, weights: np.ndarray, size: int) -> np.ndarray:
    """Sums of weights (M,) of points (M, 2) on a grid of FINE times the side, shared between the four nearest cells."""
    side = size * FINE
    at = points * FINE + (FINE - 1) / 2
    low = np.floor(at).astype(np.int64)
    part = at - low
    cells, shares = [], []
    for dx in (0, 1):
        for dy in (0, 1):
            x, y = low[:, 0] + dx, low[:, 1] + dy
            inside = (x >= 0) & (x < side) & (y >= 0) & (y < side)
            share = np.abs(1 - dx - part[:, 0]) * np.abs(1 - dy - part[:, 1]) * weights
            cells.append((y * side + x)[inside])
            shares.append(share[inside])
    total = np.bincount(np.concatenate(cells), np.concatenate(shares), side * side)
    return total.reshape(side, side).astype(np.float32)


def lines(points: np.ndarray, weights: np.ndarray, size: int, width: float, spacing: float) -> np.ndarray:
    """Coverage float32 (S, S) in [0, 1) of lines with a Gaussian profile; 1 - exp(-amount), so crossings are denser.

    points (M, 2) lie `spacing` pixels apart. weights (M,): 1 for a full line. width: at half of the height, in pixels.
    """
    sigma = max(width / 2.355, 0.3) * FINE
    amount = cv2.GaussianBlur(splatted(points, weights, size), (0, 0), sigma)
    # A line of unit weight has this height after the blur.
    height = 1 / (spacing * FINE * sigma * np.sqrt(2 * np.pi))
    covered = 1 - np.exp(np.float32(-2.2 / height) * amount)
    return cv2.resize(covered, (size, size), interpolation=cv2.INTER_AREA)
