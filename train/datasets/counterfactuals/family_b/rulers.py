"""Rulers of family "b": every mark is a function of the pixel's position along and across the ruler."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from train.datasets.counterfactuals.pasting import paste_ruler
from train.datasets.counterfactuals.placement import Pose, pose
from train.datasets.counterfactuals.templates import Templates


@dataclass(frozen=True)
class _Grid:
    """Position of each pixel on a ruler, float32 (S, S) in pixels of a 256 px image: along it, and across it.

    `across` grows towards the side that the ruler is read from; 0 is its spine. sharpness: of a mark's border.
    """

    along: np.ndarray
    across: np.ndarray
    sharpness: float

    def span(self, at: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
        """Coverage in [0, 1] of low <= at <= high."""
        return np.clip((at - low) * self.sharpness + 0.5, 0, 1) * np.clip((high - at) * self.sharpness + 0.5, 0, 1)


def _grid(size: int, laid: Pose, rng: np.random.Generator) -> _Grid:
    k = size / 256
    at = np.arange(size, dtype=np.float32) / k
    x, y = at[None] - 256 * laid.centre[0], at[:, None] - 256 * laid.centre[1]
    cosine, sine = np.float32(np.cos(laid.angle)), np.float32(np.sin(laid.angle))
    along, across = cosine * x + sine * y, cosine * y - sine * x
    # A film on skin is a little bent and seen a little from the side.
    across = across + np.float32(rng.normal(0, 0.00016)) * along * along
    along = along * (1 + np.float32(rng.normal(0, 0.00025)) * along)
    return _Grid(along, across, float(k * rng.uniform(0.65, 1.0)))


def _ticks(grid: _Grid, period: float, width: float, heights: tuple[float, float, float], low: float) -> np.ndarray:
    """Ticks from `low` towards smaller `across`; every fifth and tenth has the second and third height."""
    number = np.rint(grid.along / period)
    offset = np.abs(grid.along - number * period)
    height = np.where(number % 10 == 0, heights[2], np.where(number % 5 == 0, heights[1], heights[0]))
    return np.clip((width / 2 - offset) * grid.sharpness + 0.5, 0, 1) * grid.span(grid.across, low - height, low)


SEGMENTS = {
    # Strokes of a character in a box of 1 x 1: x and y of both ends.
    "m": ((0, 0, 0, 1), (0.5, 0.15, 0.5, 1), (1, 0.15, 1, 1), (0, 0.08, 1, 0.08)),
    "c": ((0, 0, 0, 1), (0, 0, 1, 0), (0, 1, 1, 1)),
    "1": ((0.6, 0, 0.6, 1), (0.25, 0.2, 0.6, 0)),
    "5": ((0, 0, 1, 0), (0, 0, 0, 0.5), (0, 0.5, 1, 0.5), (1, 0.5, 1, 1), (0, 1, 1, 1)),
    "0": ((0, 0, 1, 0), (0, 0, 0, 1), (1, 0, 1, 1), (0, 1, 1, 1)),
    "2": ((0, 0, 1, 0), (1, 0, 1, 0.5), (0, 0.5, 1, 0.5), (0, 0.5, 0, 1), (0, 1, 1, 1)),
}


def _written(grid: _Grid, text: str, left: float, top: float, height: float, weight: float) -> np.ndarray:
    """Coverage of a text of straight strokes."""
    total = np.zeros_like(grid.along)
    wide = 0.75 * height
    rows, columns = np.nonzero(
        (np.abs(grid.across - top - height / 2) < height) & (grid.along > left - 3) & (grid.along < left + 200)
    )
    if len(rows) == 0:
        return total
    x, y = grid.along[rows, columns], grid.across[rows, columns]
    ink = np.zeros_like(x)
    for place, character in enumerate(text):
        start = left + place * 1.35 * wide
        for x0, y0, x1, y1 in SEGMENTS[character]:
            ax, ay, bx, by = start + x0 * wide, top + y0 * height, start + x1 * wide, top + y1 * height
            length = (bx - ax) ** 2 + (by - ay) ** 2
            t = np.clip(((x - ax) * (bx - ax) + (y - ay) * (by - ay)) / length, 0, 1)
            distance = np.hypot(x - ax - t * (bx - ax), y - ay - t * (by - ay))
            ink = np.maximum(ink, np.clip((weight / 2 - distance) * grid.sharpness + 0.5, 0, 1))
    total[rows, columns] = ink
    return total


def _bar(grid: _Grid, rng: np.random.Generator) -> np.ndarray:
    """A scale bar with a spine and ends, ticks on one side or on both."""
    half, period = rng.uniform(50, 98), rng.uniform(5.5, 16)
    half = round(half / period) * period
    width = rng.uniform(0.7, 1.5)
    long = rng.uniform(6, 13)
    heights = (long * rng.uniform(0.45, 0.9), long * rng.uniform(0.8, 1), long)
    within = grid.span(grid.along, -half - width / 2, half + width / 2)
    marks = _ticks(grid, period, width, heights, 0.0) * within
    spine = rng.uniform(0.8, 1.9)
    marks = np.maximum(marks, grid.span(grid.across, -spine / 2, spine / 2) * within)
    if rng.random() < 0.2:
        lower = tuple(-0.7 * height for height in heights)
        number = np.rint(grid.along / period)
        offset = np.abs(grid.along - number * period)
        mirrored = np.clip((width / 2 - offset) * grid.sharpness + 0.5, 0, 1) * grid.span(grid.across, 0, -lower[0])
        marks = np.maximum(marks, mirrored * within)
    if rng.random() < 0.8:
        text = str(rng.choice(("mm", "mm", "cm", "10mm", "1cm", "5mm")))
        left = -half if rng.random() < 0.7 else half - 16
        marks = np.maximum(marks, _written(grid, text, left, rng.uniform(3, 6), rng.uniform(4.5, 7), 1.1))
    return marks


def _row(grid: _Grid, rng: np.random.Generator) -> np.ndarray:
    """A row of ticks through the whole image, with numbers at some of them."""
    period = rng.uniform(5, 22)
    short = rng.uniform(4.5, 9)
    heights = (short, short * rng.uniform(1.2, 1.7), short * rng.uniform(1.6, 2.3))
    marks = _ticks(grid, period, rng.uniform(0.7, 2.0), heights, 0.0)
    if rng.random() < 0.4:
        for number, text in zip((-10, -5, 0, 5, 10), ("5", "10", "15", "20", "25"), strict=True):
            marks = np.maximum(marks, _written(grid, text, number * period - 3, 3.5, rng.uniform(5, 7), 1.1))
    return marks


def _chequers(grid: _Grid, rng: np.random.Generator) -> np.ndarray:
    """Dark and clear boxes in turn, in one row or in two that alternate, between two lines."""
    period, depth = rng.uniform(12, 34), rng.uniform(4, 8)
    wave = grid.along / period
    first = np.clip((0.25 - np.abs(wave - np.rint(wave))) * period * grid.sharpness + 0.5, 0, 1)
    marks = first * grid.span(grid.across, 0, depth)
    if rng.random() < 0.5:
        marks = np.maximum(marks, (1 - first) * grid.span(grid.across, depth, 2 * depth))
    for line in (-0.4, depth if rng.random() < 0.5 else 2 * depth):
        marks = np.maximum(marks, grid.span(grid.across, line, line + 0.9))
    return marks


DRAWN: tuple[tuple[Callable[[_Grid, np.random.Generator], np.ndarray], float, tuple[float, float]], ...] = (
    (_bar, 0.55, (0.08, 0.24)),
    (_row, 0.25, (0.02, 0.18)),
    (_chequers, 0.2, (0.05, 0.12)),
)
"""What is drawn, its share, and its distance from the edge in sides of the image."""


def paint_ruler(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """A ruler: a template, or marks that let little light through, on clear film or on a pale strip."""
    if templates.get("ruler") and rng.random() < 0.3:
        return paste_ruler(image, place, rng, templates)
    draw, _, depth = DRAWN[int(rng.choice(len(DRAWN), p=[share for _, share, _ in DRAWN]))]
    on_paper = draw is not _bar and rng.random() < (0.75 if draw is _chequers else 0.3)
    laid = pose(place, rng, depth, tilt=1.4 if draw is _bar else 0.6, from_outside=on_paper)
    grid = _grid(image.shape[0], laid, rng)
    painted = image
    if on_paper:
        strip = grid.span(grid.across, -rng.uniform(10, 20), 80.0)[..., None] * rng.uniform(0.5, 0.95)
        paper = rng.uniform(200, 248) * np.array([1.0, rng.uniform(0.97, 1.0), rng.uniform(0.93, 1.0)])
        painted = painted * (1 - strip) + paper * strip
    marks = draw(grid, rng)
    through = rng.uniform(0.08, 0.5) * np.array([1.0, rng.uniform(0.85, 1.0), rng.uniform(0.8, 1.05)])
    return painted * (1 - marks[..., None] * (1 - through)).astype(np.float32)
