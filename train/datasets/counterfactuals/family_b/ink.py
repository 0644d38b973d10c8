"""Pen marks of family "b": Bezier strokes widened by a distance transform, dry in streaks, darker at the border."""

from collections.abc import Callable

import cv2
import numpy as np

from train.datasets.counterfactuals.family_b.splines import FINE, bezier, lines, splatted
from train.datasets.counterfactuals.pasting import paste_ink
from train.datasets.counterfactuals.placement import region
from train.datasets.counterfactuals.templates import Templates

SAMPLES = 120
LIGHT_THROUGH = {
    "gentian violet": (0.36, 0.2, 0.62),
    "purple": (0.45, 0.24, 0.55),
    "navy": (0.2, 0.26, 0.5),
    "royal blue": (0.22, 0.36, 0.72),
    "sepia black": (0.24, 0.2, 0.18),
    "teal": (0.24, 0.48, 0.5),
}
"""Share of red, green and blue that one coat lets through."""
SHARES = (0.4, 0.24, 0.12, 0.1, 0.11, 0.03)


def _unit(angles: np.ndarray | float) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _scribble(at: np.ndarray, k: float, rng: np.random.Generator) -> np.ndarray:
    """One long stroke to and fro: control points (N, 4, 2) that join smoothly."""
    count, extent = int(rng.integers(14, 56)), rng.uniform(7, 21) * k
    main, ends = rng.uniform(0, np.pi), np.arange(count + 1)
    swing = np.where(ends % 2, 1, -1) * rng.uniform(0.3, 1.0, count + 1)
    drift = np.linspace(-0.7, 0.7, count + 1) + rng.normal(0, 0.25, count + 1)
    knots = at + extent * (swing[:, None] * _unit(main) + drift[:, None] * _unit(main + np.pi / 2))
    reach = rng.normal(0, rng.uniform(0.05, 0.25) * extent, (count + 1, 2))
    return np.stack([knots[:-1], knots[:-1] + reach[:-1], knots[1:] - reach[1:], knots[1:]], axis=1)


def _scribbles(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> np.ndarray:
    if alone or rng.random() < 0.5:
        return _scribble(at, k, rng)
    count = int(rng.integers(2, 7))
    turns = rng.uniform(0, 2 * np.pi) + np.arange(count) * 2 * np.pi / count + rng.normal(0, 0.25, count)
    return np.concatenate(
        [_scribble(256 * k * (0.5 + rng.uniform(0.28, 0.45) * _unit(turn)), k, rng) for turn in turns]
    )


def _rounded(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> np.ndarray:
    """A circle around the lesion in four strokes, one of which may be left out; at a place a part of it alone."""
    quarter = 0.5523
    start, radius = rng.uniform(0, 2 * np.pi), rng.uniform(64, 122) * k
    turns = start + np.arange(4) * np.pi / 2
    first, last = _unit(turns), _unit(turns + np.pi / 2)
    control = np.stack([first, first + quarter * last, last + quarter * first, last], axis=1)
    control = control * radius * np.array([1.0, rng.uniform(0.8, 1.15)]) + rng.normal(0, 0.025 * radius, (4, 4, 2))
    kept = control[: int(rng.integers(1, 3))] if alone or rng.random() < 0.5 else control[: int(rng.integers(3, 5))]
    if len(kept) > 2:
        return kept + 256 * k * (0.5 + rng.normal(0, 0.03, 2))
    return kept * (0.45 if alone else 0.8) - (kept * (0.45 if alone else 0.8)).mean(axis=(0, 1)) + at


def _crosses(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> np.ndarray:
    """A cross or a corner mark, or four of them around the lesion."""
    ends = [at]
    if not alone and rng.random() < 0.6:
        ends = list(256 * k * (0.5 + rng.uniform(0.3, 0.42) * _unit(rng.uniform(0, 6) + np.arange(4) * np.pi / 2)))
    arm, main, is_corner = rng.uniform(5, 13) * k, rng.uniform(0, np.pi), rng.random() < 0.4
    control = []
    for end in ends:
        for turn in (main, main + np.pi / 2 + rng.normal(0, 0.15)):
            low = 0.0 if is_corner else -1.0
            steps = np.linspace(low, 1, 4)[:, None]
            control.append(end + arm * steps * _unit(turn) + rng.normal(0, 0.8 * k, (4, 2)))
    return np.stack(control)


def _dashes(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> np.ndarray:
    """Short strokes along a bent line."""
    path = bezier((at + rng.normal(0, 26 * k, (4, 2)))[None], int(rng.integers(5, 14)))[0]
    main, length = rng.uniform(0, np.pi), rng.uniform(4, 14) * k
    turns = main + rng.normal(0, 0.25, len(path))
    steps = np.linspace(-0.5, 0.5, 4)[None, :, None]
    return path[:, None] + length * steps * _unit(turns)[:, None] + rng.normal(0, 0.9 * k, (len(path), 4, 2))


def _sweeps(at: np.ndarray, k: float, rng: np.random.Generator, alone: bool) -> np.ndarray:
    """One to three bent strokes beside each other."""
    main, length = rng.uniform(0, 2 * np.pi), rng.uniform(26, 85) * k
    count = int(rng.integers(1, 4))
    aside = (np.arange(count) - (count - 1) / 2) * rng.uniform(6, 13) * k
    steps = np.linspace(-0.5, 0.5, 4)[None, :, None]
    middle = at + aside[:, None] * _unit(main + np.pi / 2)
    return middle[:, None] + length * steps * _unit(main) + rng.normal(0, 4 * k, (count, 4, 2))


SHAPES: tuple[tuple[Callable[[np.ndarray, float, np.random.Generator, bool], np.ndarray], float, float], ...] = (
    (_scribbles, 0.42, 0.0),
    (_rounded, 0.2, 4.6),
    (_crosses, 0.12, 1.8),
    (_dashes, 0.11, 1.5),
    (_sweeps, 0.15, 4.0),
)
"""(middle in pixels, pixels of a 256 px image, rng, whether all must lie there) -> control points; share;
largest half width of a broad pen in pixels of a 256 px image, 0 for a fine pen."""


def _broad(points: np.ndarray, size: int, widest: float, rng: np.random.Generator) -> np.ndarray:
    """Amount of ink float32 (S, S) of a felt pen: flat inside, more at the border, streaks along the main direction."""
    k = size / 256
    on_line = splatted(points, np.ones(len(points)), size) > 0
    distance = cv2.distanceTransform((~on_line).astype(np.uint8), cv2.DIST_L2, 5) / FINE
    pressure = cv2.resize(
        rng.uniform(0.6, 1.2, (9, 9)).astype(np.float32), distance.shape, interpolation=cv2.INTER_CUBIC
    )
    half = rng.uniform(0.9, widest) * k * pressure
    body = np.clip((half - distance) / (0.8 * k) + 0.5, 0, 1)
    border = np.exp(-(((half - distance) / (0.9 * k)) ** 2)) * rng.uniform(0.0, 0.5)
    spread = points - points.mean(axis=0)
    direction = np.rad2deg(np.arctan2(*np.linalg.eigh(spread.T @ spread)[1][::-1, 1]))
    side = distance.shape[0]
    streaks = cv2.resize(rng.random((side // 4, side // 12), np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), -float(direction), 1.45)
    streaks = cv2.warpAffine(streaks, turn, (side, side), borderMode=cv2.BORDER_REFLECT_101)
    speckle = cv2.resize(rng.random((side // 2, side // 2), np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    dry = rng.uniform(0.36, 0.56)
    held = np.clip((0.45 * streaks + 0.55 * speckle - dry) / 0.3 + 0.5, 0, 1)
    coated = (body + border * body) * (0.05 + 0.95 * held)
    return cv2.resize(cv2.GaussianBlur(coated, (0, 0), 0.9 * k), (size, size), interpolation=cv2.INTER_AREA)


def _ridges(image: np.ndarray, k: float) -> np.ndarray:
    """How far each pixel stands out of its surroundings in brightness, float32 (S, S), about -1 to 1."""
    luminance = image @ np.array([0.3, 0.59, 0.11], np.float32)
    return np.clip((luminance - cv2.blur(luminance, (round(7 * k) | 1,) * 2)) / 14, -1, 1)


def paint_ink(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Pen marks: templates, or coats of an ink that each let a share of the light through."""
    size = image.shape[0]
    k = size / 256
    if templates.get("ink") and rng.random() < 0.3:
        return paste_ink(image, place, rng, templates)
    centre, reach = region(place, rng, 0.42)
    if not place:
        centre, reach = 0.5 + rng.uniform(0.2, 0.46) * _unit(rng.uniform(0, 2 * np.pi)), np.full(2, 0.06)
    at = (centre + rng.uniform(-reach, reach) * 0.5) * size
    shape, _, widest = SHAPES[int(rng.choice(len(SHAPES), p=[share for _, share, _ in SHAPES]))]
    strokes = bezier(shape(at, k, rng, bool(place)), SAMPLES)
    if widest:
        amount = _broad(strokes.reshape(-1, 2), size, widest, rng)
    else:
        spacing = float(np.linalg.norm(np.diff(strokes, axis=1), axis=2).mean())
        pressure = rng.uniform(0.35, 1.0, (len(strokes), 1)) * (0.7 + 0.3 * np.sin(np.linspace(0, np.pi, SAMPLES)))
        amount = 1.3 * lines(strokes.reshape(-1, 2), pressure.ravel(), size, rng.uniform(0.9, 2.0) * k, spacing)
        grain = cv2.resize(rng.random((size // 2, size // 2), np.float32), (size, size), interpolation=cv2.INTER_LINEAR)
        amount = amount * (0.2 + 1.3 * grain)
    coats = amount * (1 - rng.uniform(0.2, 0.8) * _ridges(image, k)) * rng.uniform(0.6, 1.25)
    through = np.log(np.array(LIGHT_THROUGH[str(rng.choice(list(LIGHT_THROUGH), p=SHARES))]))
    through = through * rng.uniform(0.88, 1.12, 3)
    return image * np.exp(coats[..., None] * through).astype(np.float32)
