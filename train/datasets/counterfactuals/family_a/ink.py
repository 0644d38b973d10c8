"""Pen marks of family "a": polylines whose ink absorbs light and gathers in the furrows of the skin."""

from collections.abc import Callable

import cv2
import numpy as np

from train.datasets.counterfactuals.family_a.canvas import FINE, SHIFT, coverage, fixed, noise
from train.datasets.counterfactuals.pasting import paste_ink
from train.datasets.counterfactuals.placement import region
from train.datasets.counterfactuals.templates import Templates

INKS = {
    "violet": (0.85, 1.45, 0.35),
    "blue violet": (1.1, 1.3, 0.3),
    "blue": (1.5, 1.05, 0.35),
    "black": (1.5, 1.5, 1.35),
    "grey": (0.75, 0.8, 0.7),
    "green": (1.4, 0.55, 0.95),
}
"""Optical density of red, green and blue where the ink is plain."""
INK_SHARES = (0.42, 0.25, 0.1, 0.12, 0.09, 0.02)

Stroke = tuple[np.ndarray, float]
"""Points (N, 2) in pixels and the width of the pen in pixels of a 256 px image."""


def _direction(angle: float) -> np.ndarray:
    return np.array([np.cos(angle), np.sin(angle)])


def _blot(at: np.ndarray, k: float, rng: np.random.Generator) -> list[Stroke]:
    """Many short strokes over each other."""
    extent, main = rng.uniform(7, 24) * k, rng.uniform(0, np.pi)
    squeeze = np.array([1.0, rng.uniform(0.4, 1.0)])
    strokes = []
    for _ in range(int(rng.integers(14, 60))):
        turn = main + rng.normal(0, 0.55) + (np.pi / 2) * (rng.random() < 0.3)
        half = extent * rng.uniform(0.2, 0.9) * _direction(turn)
        middle = at + np.clip(rng.normal(0, 0.38, 2), -1, 1) * extent * squeeze
        bow = rng.normal(0, extent * 0.12, 2)
        strokes.append((np.stack([middle - half, middle + bow, middle + half]), rng.uniform(0.6, 1.9)))
    return strokes


def _blots(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> list[Stroke]:
    """One blot, or several around the lesion."""
    if alone or rng.random() < 0.45:
        return _blot(at, k, rng)
    count, first = int(rng.integers(2, 7)), rng.uniform(0, 2 * np.pi)
    turns = first + 2 * np.pi * np.arange(count) / count + rng.normal(0, 0.2, count)
    ends = [256 * k * (0.5 + rng.uniform(0.28, 0.46) * _direction(turn)) for turn in turns]
    return [stroke for end in ends for stroke in _blot(end, k, rng)]


def _along(points: np.ndarray, k: float, rng: np.random.Generator) -> list[Stroke]:
    """A curve of 40 points drawn with a broad pen in overlapping pieces, or with many strokes of a fine pen."""
    width = rng.uniform(3, 10)
    if rng.random() < 0.5:
        starts = range(0, 39, 3)
        return [(points[i : i + 5] + rng.normal(0, 0.5 * k, 2), width * rng.uniform(0.75, 1.2)) for i in starts]
    strokes = []
    for _ in range(int(rng.integers(40, 110))):
        first = int(rng.integers(0, 36))
        piece = points[first : first + int(rng.integers(3, 6))]
        strokes.append((piece + rng.normal(0, width * 0.42 * k, 2), rng.uniform(0.5, 1.8)))
    return strokes


def _curve(radius: float, sweep: float, rng: np.random.Generator) -> np.ndarray:
    """40 points of an uneven arc about the origin."""
    start = rng.uniform(0, 2 * np.pi)
    turns = start + np.linspace(0, sweep, 40)
    uneven = 1 + 0.06 * np.sin(2 * turns + start) + 0.035 * np.sin(3 * turns + 2 * start) + rng.normal(0, 0.004, 40)
    return radius * uneven[:, None] * np.stack([np.cos(turns), np.sin(turns) * rng.uniform(0.8, 1.1)], axis=1)


def _ring(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> list[Stroke]:
    """A ring around the lesion, not quite closed; where a place is asked for, an arc there."""
    if alone:
        return _arc(at, k, rng, alone)
    middle = 256 * k * (0.5 + rng.normal(0, 0.03, 2))
    return _along(middle + _curve(rng.uniform(70, 128) * k, rng.uniform(1.5, 2.0) * np.pi, rng), k, rng)


def _arc(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> list[Stroke]:
    points = _curve(rng.uniform(30, 108) * k, rng.uniform(0.35, 1.1), rng)
    return _along(points - points.mean(axis=0) + at, k, rng)


def _hatching(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> list[Stroke]:
    """One zigzag stroke along a bent line."""
    main, length = rng.uniform(0, 2 * np.pi), rng.uniform(35, 110) * k
    count = int(length / k / rng.uniform(1.1, 2.6))
    travel = np.linspace(-0.5, 0.5, count)
    swing = rng.uniform(3, 8) * k * np.where(np.arange(count) % 2, 1, -1) * rng.uniform(0.5, 1.1, count)
    bow = rng.uniform(-0.8, 0.8) * length * travel**2
    points = length * travel[:, None] * _direction(main) + (swing + bow)[:, None] * _direction(main + np.pi / 2)
    return [(at + points + rng.normal(0, k, (count, 2)), rng.uniform(0.7, 1.7))]


def _lines(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> list[Stroke]:
    """One to three lines, or an arrow."""
    main, length, width = rng.uniform(0, 2 * np.pi), rng.uniform(25, 90) * k, rng.uniform(2, 6)
    is_arrow = rng.random() < 0.3
    strokes: list[Stroke] = []
    for _ in range(1 if is_arrow else int(rng.integers(1, 4))):
        wobble = rng.normal(0, 1.8 * k, (7, 2)).cumsum(axis=0) * (0.3 if is_arrow else 1)
        shift = rng.normal(0, 0 if is_arrow else 7 * k, 2)
        strokes.append((at + shift + np.linspace(-0.5, 0.5, 7)[:, None] * length * _direction(main) + wobble, width))
    if is_arrow:
        tip = strokes[0][0][-1]
        for side in (-1, 1):
            barb = 0.35 * length * _direction(main + np.pi + side * rng.uniform(0.4, 0.8))
            strokes.append((np.stack([tip, tip + barb]), width))
    return strokes


def _dots(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> list[Stroke]:
    """Speckles in a cloud, or a few thick dots around the lesion."""
    if rng.random() < 0.5:
        spots, largest = at + rng.normal(0, 14 * k, (int(rng.integers(6, 30)), 2)), 3.0
    elif alone:
        spots, largest = at + rng.normal(0, 8 * k, (3, 2)), 9.0
    else:
        around = 0.36 * np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
        spots, largest = (0.5 + around) * 256 * k + rng.normal(0, 9 * k, (4, 2)), 9.0
    return [(np.stack([spot, spot + rng.normal(0, 1.5 * k, 2)]), rng.uniform(0.3, 1.0) * largest) for spot in spots]


SHAPES: tuple[tuple[Callable[[np.ndarray, float, np.random.Generator, bool], list[Stroke]], float], ...] = (
    (_blots, 0.36),
    (_ring, 0.12),
    (_arc, 0.14),
    (_hatching, 0.14),
    (_lines, 0.14),
    (_dots, 0.1),
)
"""(middle in pixels, pixels of a 256 px image, rng, whether all must lie there) -> strokes; and their shares."""


def _strokes(size: int, place: str, rng: np.random.Generator) -> list[Stroke]:
    centre, reach = region(place, rng, 0.42)
    if not place:
        centre, reach = 0.5 + rng.uniform(0.22, 0.48) * _direction(rng.uniform(0, 2 * np.pi)), np.full(2, 0.08)
    at = (centre + rng.uniform(-reach, reach) * 0.5) * size
    shape = SHAPES[int(rng.choice(len(SHAPES), p=[share for _, share in SHAPES]))][0]
    return shape(at, size / 256, rng, bool(place))


def paint_ink(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Pen marks: templates, or strokes of an ink that absorbs light."""
    size = image.shape[0]
    k = size / 256
    if templates.get("ink") and rng.random() < 0.3:
        return paste_ink(image, place, rng, templates)
    strokes = _strokes(size, place, rng)
    levels = rng.integers(120, 256, len(strokes))

    def draw(canvas: np.ndarray) -> None:
        for (points, width), level in zip(strokes, levels, strict=True):
            thickness = max(1, round(width * k * FINE))
            cv2.polylines(canvas, [fixed(points)], False, int(level), thickness, cv2.LINE_AA, SHIFT)

    amount = coverage(size, draw, blur_px=rng.uniform(0.3, 0.8) * k)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    furrows = (cv2.GaussianBlur(grey, (0, 0), 2.5 * k) - cv2.GaussianBlur(grey, (0, 0), 0.6 * k)) / 12
    # A broad pen skips the ridges; a fine one hardly does.
    is_broad = max(width for _, width in strokes) > 2.5
    dryness = rng.uniform(0.4, 0.95) if is_broad else rng.uniform(0.1, 0.5)
    grain = 0.75 * noise(size, size // 2, rng) + 0.6 * noise(size, size // 6, rng) + np.clip(furrows, -1.5, 1.5)
    held = np.clip(1 - dryness + dryness * (0.35 + 0.9 * grain), 0.02, 1.6)
    ink = np.array(INKS[str(rng.choice(list(INKS), p=INK_SHARES))], np.float32)
    ink = ink * rng.uniform(0.85, 1.15, 3).astype(np.float32) * rng.uniform(0.7, 1.5)
    bleed = rng.uniform(0, 0.1) * cv2.GaussianBlur(amount, (0, 0), 3 * k)
    density = (amount * held + bleed).astype(np.float32)
    return image * np.exp(-density[..., None] * ink)
