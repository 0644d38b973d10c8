"""Rulers of family "a": scale bars, rows of ticks and printed strips, drawn upright and then turned."""

from dataclasses import dataclass

import cv2
import numpy as np

from train.datasets.counterfactuals.family_a.canvas import FINE, SHIFT, blend, fixed
from train.datasets.counterfactuals.pasting import paste_ruler
from train.datasets.counterfactuals.placement import pose
from train.datasets.counterfactuals.templates import Templates


@dataclass(frozen=True)
class _Strip:
    """A ruler lying upright, drawn at FINE times the resolution. marks, body: uint8 (h, w); body None where clear."""

    marks: np.ndarray
    body: np.ndarray | None


def _rectangle(canvas: np.ndarray, left: float, top: float, right: float, bottom: float, level: int = 255) -> None:
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    cv2.fillConvexPoly(canvas, fixed(corners), level, cv2.LINE_AA, SHIFT)


def _ticks(
    canvas: np.ndarray, start: float, spacing: float, count: int, base: float, lengths: np.ndarray, widths: np.ndarray
) -> None:
    """`count` ticks from `base` upwards (to smaller y), one every `spacing`."""
    for position, length, width in zip(start + spacing * np.arange(count), lengths, widths, strict=True):
        _rectangle(canvas, position - width / 2, base - length, position + width / 2, base)


def _text(canvas: np.ndarray, text: str, left: float, bottom: float, height: float, weight: int) -> None:
    cv2.putText(
        canvas,
        text,
        (round(left * FINE), round(bottom * FINE)),
        cv2.FONT_HERSHEY_SIMPLEX,
        height * FINE / 21.0,
        255,
        weight,
        cv2.LINE_AA,
    )


def _scale_bar(rng: np.random.Generator, k: float) -> _Strip:
    """A straight bar with ticks on one side and its unit at one end, as dermatoscopes print it."""
    length, height = rng.uniform(105, 190) * k, 44 * k
    margin, base = 14 * k, 24 * k
    marks = np.zeros((round(height * FINE), round((length + 2 * margin) * FINE)), np.uint8)
    bar, tick = rng.uniform(0.8, 2.0) * k, rng.uniform(0.7, 1.5) * k
    divisions = int(rng.choice((8, 10, 10, 10, 12, 15, 20)))
    fine = int(rng.choice((1, 1, 2, 5))) if divisions <= 12 else 1
    major, every = rng.uniform(6, 13) * k, int(rng.choice((1, 5, 10)))
    index = np.arange(divisions * fine + 1)
    lengths = np.where(index % fine == 0, major * rng.uniform(0.6, 1), major * rng.uniform(0.3, 0.55))
    lengths = np.where(index % (fine * every) == 0, major, lengths)
    if rng.random() < 0.9:
        _rectangle(marks, margin, base - bar / 2, margin + length, base + bar / 2)
    _ticks(marks, margin, length / (divisions * fine), len(index), base, lengths, np.full(len(index), tick))
    if rng.random() < 0.8:
        unit = str(rng.choice(("MM", "mm", "MM", "mm", "cm", "1 cm")))
        left = margin if rng.random() < 0.8 else margin + length - 14 * k
        _text(marks, unit, left, base + rng.uniform(9, 13) * k, rng.uniform(5.5, 7.5) * k, int(rng.integers(2, 4)))
    return _Strip(marks, None)


def _tick_row(rng: np.random.Generator, k: float) -> _Strip:
    """Short and long ticks in a row that runs through the image, with digits now and then."""
    length, base = 400 * k, 24 * k
    marks = np.zeros((round(44 * k * FINE), round(length * FINE)), np.uint8)
    spacing = rng.uniform(5.5, 24) * k
    count = int(length / spacing)
    every = int(rng.choice((5, 5, 10, 2)))
    short = rng.uniform(4, 9) * k
    long = short * rng.uniform(1.3, 2.2)
    is_long = (np.arange(count) + int(rng.integers(every))) % every == 0
    width = rng.uniform(0.7, 2.2) * k
    _ticks(marks, spacing / 2, spacing, count, base, np.where(is_long, long, short), np.full(count, width))
    if rng.random() < 0.35:
        first = int(rng.integers(0, 12))
        for number, at in enumerate(np.flatnonzero(is_long)):
            text = str(first + number)
            _text(marks, text, spacing * (at + 0.5) - 3 * k, base + 11 * k, rng.uniform(6, 8) * k, 2)
    if rng.random() < 0.15:
        _rectangle(marks, 0, base - 0.6 * k, length, base + 0.6 * k)
    return _Strip(marks, None)


def _printed_strip(rng: np.random.Generator, k: float) -> _Strip:
    """A pale ruler with dark blocks or ticks along the side that faces the image, and digits on it."""
    length, depth = 440 * k, 44 * k
    marks = np.zeros((round(depth * FINE), round(length * FINE)), np.uint8)
    body = np.full_like(marks, 255)
    spacing = rng.uniform(5, 20) * k
    count = int(length / spacing)
    every = int(rng.choice((2, 5, 10)))
    is_long = (np.arange(count) + int(rng.integers(every))) % every == 0
    short = rng.uniform(4, 8) * k
    width = spacing * (rng.uniform(0.35, 0.5) if rng.random() < 0.5 else rng.uniform(0.12, 0.25))
    lengths = np.where(is_long, short * rng.uniform(1.0, 1.9), short)
    _ticks(marks, spacing / 2, spacing, count, 0.0, -lengths, np.full(count, width))
    if rng.random() < 0.5:
        for number, at in enumerate(np.flatnonzero(is_long)):
            bottom = short * 2.2 + 8 * k
            _text(marks, str(number + 1), spacing * (at + 0.5) - 3 * k, bottom, rng.uniform(6, 9) * k, 3)
    return _Strip(marks, body)


def _laid(strip: np.ndarray, size: int, centre: tuple[float, float], angle: float, anchor: float) -> np.ndarray:
    """Coverage float32 (S, S) of an upright strip turned about (its middle, `anchor` of its height)."""
    cosine, sine = np.cos(angle), np.sin(angle)
    matrix = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    pivot = np.array([strip.shape[1] / 2, strip.shape[0] * anchor])
    matrix[:, 2] = np.asarray(centre) * size * FINE - matrix[:, :2] @ pivot
    side = size * FINE
    fine = cv2.warpAffine(strip, matrix, (side, side), flags=cv2.INTER_LINEAR)
    return cv2.resize(fine, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _dark_colour(rng: np.random.Generator) -> np.ndarray:
    """Black, brown-black or grey of a printed mark."""
    level = rng.uniform(5, 60)
    return level + np.array([rng.uniform(0, 14), rng.uniform(-3, 5), rng.uniform(-8, 4)])


def paint_ruler(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """A ruler: a template, a scale bar, a row of ticks, or a printed strip."""
    size = image.shape[0]
    k = size / 256
    kind = rng.random()
    if kind < 0.33 and templates.get("ruler"):
        return paste_ruler(image, place, rng, templates)
    if kind < 0.7:
        strip, laid, anchor = _scale_bar(rng, k), pose(place, rng, (0.08, 0.24), tilt=1.6), 0.55
    elif kind < 0.85:
        strip, laid, anchor = _tick_row(rng, k), pose(place, rng, (0.02, 0.18)), 0.5
    else:
        # Only the strip's marked side reaches into the image.
        strip, anchor = _printed_strip(rng, k), 0.0
        laid = pose(place, rng, (0.03, 0.1), tilt=0.4, from_outside=True)
    marks = _laid(strip.marks, size, laid.centre, laid.angle, anchor)
    blur = rng.uniform(0, 0.75) * k
    painted = image
    if strip.body is not None:
        body = _laid(strip.body, size, laid.centre, laid.angle, anchor)
        shadow = cv2.GaussianBlur(body, (0, 0), 2.5 * k)
        painted = painted * (1 - 0.3 * (shadow * (1 - body))[..., None])
        pale = rng.uniform(195, 245) + np.array([rng.uniform(-4, 8), 0, rng.uniform(-8, 8)])
        painted = blend(painted, body * rng.uniform(0.7, 1.0), pale)
    if blur > 0.2:
        marks = cv2.GaussianBlur(marks, (0, 0), blur)
    opacity = rng.uniform(0.5, 1.0) if rng.random() < 0.75 else rng.uniform(0.3, 0.5)
    return blend(painted, marks * opacity, _dark_colour(rng))
