"""Family "a" of artefacts on skin: polygons and polylines drawn at a higher resolution, two thirds of the templates.

Lengths are in pixels of a 256 px image and grow with the image.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np

from train.datasets.counterfactuals.dermatology import Painter, Templates
from train.datasets.counterfactuals.templates import pasted

FINE = 3
"""Drawing resolution over the image's."""
SHIFT = 4
"""Fractional bits of the coordinates given to OpenCV."""


def _coverage(size: int, draw: Callable[[np.ndarray], None], blur_px: float = 0.0) -> np.ndarray:
    """float32 (S, S) in [0, 1] of what `draw` paints on a uint8 canvas of FINE times the side."""
    canvas = np.zeros((size * FINE, size * FINE), np.uint8)
    draw(canvas)
    covered = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    return cv2.GaussianBlur(covered, (0, 0), blur_px) if blur_px > 0.2 else covered


def _fixed(points: np.ndarray) -> np.ndarray:
    """Image coordinates as OpenCV's fixed-point coordinates of the canvas, int32 (N, 1, 2)."""
    return np.rint(points * (FINE << SHIFT)).astype(np.int32).reshape(-1, 1, 2)


def _blend(image: np.ndarray, coverage: np.ndarray, colour: np.ndarray) -> np.ndarray:
    return image + coverage[..., None] * (colour.astype(np.float32) - image)


def _noise(size: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit variance at the cells, float32 (S, S)."""
    return cv2.resize(rng.standard_normal((cells, cells), np.float32), (size, size), interpolation=cv2.INTER_CUBIC)


@dataclass(frozen=True)
class _Pose:
    """Of a straight thing. centre: (x, y) in sides of the image; angle: radians, 0 upright at the lower edge."""

    centre: tuple[float, float]
    angle: float


def _pose(place: str, rng: np.random.Generator, depth: tuple[float, float], tilt: float = 1.0) -> _Pose:
    """A pose at an edge or a corner, upright for someone who looks from that edge, or across the image.

    depth: range of the distance from the edge, in sides. tilt: factor on the random tilt.
    """
    if not place:
        places = ("lower edge", "upper edge", "left edge", "right edge", "corner", "across")
        place = str(rng.choice(places, p=(0.4, 0.17, 0.1, 0.1, 0.11, 0.12)))
    if place == "corner":
        place = str(rng.choice(("upper left corner", "upper right corner", "lower left corner", "lower right corner")))
    along, into = rng.normal(0, 0.12), rng.uniform(*depth)
    lean = np.deg2rad(rng.normal(0, 3) if rng.random() < 0.6 else rng.normal(0, 12)) * tilt
    if place == "lower edge":
        return _Pose((0.5 + along, 1 - into), lean)
    if place == "upper edge":
        return _Pose((0.5 + along, into), lean + (np.pi if rng.random() < 0.7 else 0))
    if place == "left edge":
        return _Pose((into, 0.5 + along), lean + np.pi / 2)
    if place == "right edge":
        return _Pose((1 - into, 0.5 + along), lean - np.pi / 2)
    if place.endswith("corner"):
        right, lower = "right" in place, "lower" in place
        into = rng.uniform(0.1, 0.26)
        at = (1 - into if right else into, 1 - into if lower else into)
        angle = np.deg2rad(rng.uniform(30, 55)) * (-1 if right == lower else 1)
        return _Pose(at, angle if lower else angle + np.pi)
    centre = rng.uniform(0.38, 0.62, 2) if place == "centre" else rng.uniform(0.25, 0.75, 2)
    return _Pose((float(centre[0]), float(centre[1])), rng.uniform(-np.pi, np.pi))


@dataclass(frozen=True)
class _Strip:
    """A ruler lying upright, drawn at FINE times the resolution. marks, body: uint8 (h, w); body None where clear."""

    marks: np.ndarray
    body: np.ndarray | None


def _rectangle(canvas: np.ndarray, left: float, top: float, right: float, bottom: float, level: int = 255) -> None:
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)])
    cv2.fillConvexPoly(canvas, _fixed(corners), level, cv2.LINE_AA, SHIFT)


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


def _template_ruler(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    size = image.shape[0]
    chosen = templates["ruler"][int(rng.integers(len(templates["ruler"])))]
    change = chosen.change[:, ::-1] if rng.random() < 0.5 else chosen.change
    if rng.random() < 0.25:
        change = change[::-1]
    scale = rng.uniform(0.4, 0.7) * size / 256
    # A row that is shorter than the image and has no ends is continued by itself.
    if rng.random() < 0.3 and change.shape[1] > 600:
        change = np.hstack([change, change])
    pose = _pose(place, rng, (0.05, 0.2))
    centre = (pose.centre[0] * size, pose.centre[1] * size)
    strength = rng.uniform(0.6, 1.1)
    # Faint rows are hardly seen at this resolution: their ink is brought to a visible level.
    depth = float(np.percentile(-change.min(axis=2), 99.5))
    strength *= max(1.0, rng.uniform(45, 110) / max(depth, 20.0)) if depth < 60 else 1.0
    return pasted(image, change, centre, pose.angle, scale, strength)


def paint_ruler(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """A ruler: a template, a scale bar, a row of ticks, or a printed strip."""
    size = image.shape[0]
    k = size / 256
    kind = rng.random()
    if kind < 0.33 and templates.get("ruler"):
        return _template_ruler(image, place, rng, templates)
    if kind < 0.7:
        strip, pose, anchor = _scale_bar(rng, k), _pose(place, rng, (0.08, 0.24), tilt=1.6), 0.55
    elif kind < 0.85:
        strip, pose, anchor = _tick_row(rng, k), _pose(place, rng, (0.02, 0.18)), 0.5
    else:
        # Only the strip's marked side reaches into the image.
        strip, anchor = _printed_strip(rng, k), 0.0
        edge = place or str(rng.choice(("lower edge", "upper edge", "left edge", "right edge", "corner")))
        pose = _pose(edge, rng, (0.03, 0.1), tilt=0.4)
        if edge == "upper edge" and abs(np.cos(pose.angle) - 1) < 1:
            pose = _Pose(pose.centre, pose.angle + np.pi)
    marks = _laid(strip.marks, size, pose.centre, pose.angle, anchor)
    blur = rng.uniform(0, 0.75) * k
    painted = image
    if strip.body is not None:
        body = _laid(strip.body, size, pose.centre, pose.angle, anchor)
        shadow = cv2.GaussianBlur(body, (0, 0), 2.5 * k)
        painted = painted * (1 - 0.3 * (shadow * (1 - body))[..., None])
        pale = rng.uniform(195, 245) + np.array([rng.uniform(-4, 8), 0, rng.uniform(-8, 8)])
        painted = _blend(painted, body * rng.uniform(0.7, 1.0), pale)
    if blur > 0.2:
        marks = cv2.GaussianBlur(marks, (0, 0), blur)
    opacity = rng.uniform(0.5, 1.0) if rng.random() < 0.75 else rng.uniform(0.3, 0.5)
    return _blend(painted, marks * opacity, _dark_colour(rng))


def _hair_paths(size: int, place: str, rng: np.random.Generator) -> list[tuple[np.ndarray, float]]:
    """Points (N, 2) in pixels and the width of each hair."""
    k = size / 256
    dense = rng.random()
    count = int(rng.integers(3, 9) if dense < 0.45 else rng.integers(9, 26) if dense < 0.9 else rng.integers(26, 55))
    is_stubble = rng.random() < 0.12
    main = rng.uniform(0, 2 * np.pi)
    spread = rng.uniform(0.12, 0.9) if rng.random() < 0.8 else np.pi
    width = rng.uniform(0.75, 1.9) * k
    curl = rng.uniform(0.0, 0.005) if rng.random() < 0.75 else rng.uniform(0.005, 0.014)
    step = 4.0 * k
    centre, reach = _region(place, rng, 0.55 if is_stubble else 0.6)
    paths = []
    for _ in range(count):
        length = rng.uniform(9, 28) * k if is_stubble else rng.uniform(50, 230) * k * (0.45 if place else 1)
        points = max(4, int(length / step))
        bend = curl * rng.normal(0, 1) * step / k + rng.normal(0, 0.012, points).cumsum() * 0.35
        heading = main + rng.normal(0, spread) + np.cumsum(bend)
        moves = np.stack([np.cos(heading), np.sin(heading)], axis=1).cumsum(axis=0) * step
        start = (centre + rng.uniform(-reach, reach, 2)) * size
        paths.append((start + moves - moves[len(moves) // 2], width * rng.uniform(0.6, 1.25)))
    return paths


def _region(place: str, rng: np.random.Generator, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Centre and half extent (x, y) in sides of the image of where things are strewn for a place."""
    centre, extent = np.array([0.5, 0.5]), np.array([reach, reach])
    if place == "centre":
        return centre, np.array([0.18, 0.18])
    for word, axis, at in (("left", 0, 0.12), ("right", 0, 0.88), ("upper", 1, 0.12), ("lower", 1, 0.88)):
        if word in place:
            centre[axis], extent[axis] = at, 0.11
    if place.endswith("edge"):
        free = 1 if centre[0] != 0.5 else 0
        extent[free] = rng.uniform(0.15, 0.45)
    return centre, extent


def paint_hair(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Hairs: bent tapering lines with a soft shadow; dark, brown, ginger, grey or light."""
    size = image.shape[0]
    k = size / 256
    paths = _hair_paths(size, place, rng)
    levels = rng.integers(150, 256, len(paths))

    def draw(canvas: np.ndarray) -> None:
        for (points, width), level in zip(paths, levels, strict=True):
            third = max(2, len(points) // 4)
            for stretch, factor in (
                (points[: len(points) - third + 1], 1.0),
                (points[-third - 1 : -third // 2], 0.72),
                (points[-third // 2 - 1 :], 0.42),
            ):
                thickness = max(1, round(width * factor * FINE))
                cv2.polylines(canvas, [_fixed(stretch)], False, int(level), thickness, cv2.LINE_AA, SHIFT)

    coverage = _coverage(size, draw, blur_px=rng.uniform(0.0, 0.6) * k)
    is_light = rng.random() < 0.1 and float(image.mean()) < 175
    tones = ((28, 20, 18), (48, 32, 24), (70, 46, 32), (96, 66, 46), (84, 80, 80))
    tone = np.array((228, 218, 200) if is_light else tones[int(rng.integers(len(tones)))], np.float32)
    tone = tone + rng.uniform(-10, 10)
    shift = rng.uniform(-2.5, 2.5, 2) * k
    shadow = cv2.GaussianBlur(coverage, (0, 0), rng.uniform(1.2, 2.4) * k)
    shadow = cv2.warpAffine(shadow, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), (size, size))
    painted = image * (1 - rng.uniform(0.05, 0.3) * shadow[..., None])
    return _blend(painted, np.minimum(coverage * rng.uniform(0.75, 1.0), 1), tone)


def _bubble(image: np.ndarray, x: float, y: float, radius: float, look: np.ndarray) -> None:
    """One bubble drawn into `image` in place. look: 9 random figures in [0, 1] that a cluster shares."""
    size = image.shape[0]
    reach = int(np.ceil(radius * 1.35 + 3))
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    right, bottom = min(size, int(x) + reach + 1), min(size, int(y) + reach + 1)
    if right - left < 2 or bottom - top < 2:
        return
    dx = np.arange(left, right, dtype=np.float32)[None] - x
    dy = np.arange(top, bottom, dtype=np.float32)[:, None] - y
    angle = np.arctan2(dy, dx)
    # Some are flat and glassy: irregular, with a bright rim and hardly a dark one.
    glassy = look[8] < 0.25
    squeeze, lean = 1 + (0.5 if glassy else 0.22) * look[0] ** (1 if glassy else 3), look[1] * np.pi
    distance = np.sqrt(dx * dx + dy * dy)
    distance = distance * (1 + (squeeze - 1) * np.cos(angle - lean) ** 2)
    distance = distance * (1 + (0.1 if glassy else 0.03) * look[2] * np.sin(3 * angle + 6 * look[3])) / radius
    pixel = 1 / radius
    inside = np.clip((1 - distance) / pixel + 0.5, 0, 1)
    # The gel's surface is a weak lens: the skin in it is seen shrunk towards the middle.
    bend = (0.1 + 0.3 * look[4]) * np.clip(1 - distance, 0, 1)
    map_x, map_y = (dx * (1 + bend) + x).astype(np.float32), (dy * (1 + bend) + y).astype(np.float32)
    seen = cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    light = look[5] * 2 * np.pi
    rim_width = max(0.06 + 0.05 * look[6], 0.75 * pixel)
    rim = np.exp(-(((distance - 1 + rim_width * 0.6) / rim_width) ** 2))
    side = 0.6 + 0.4 * np.cos(angle - light + 2.4)
    dark = (0.12 if glassy else 0.3 + 0.4 * look[7]) * rim * side
    glow = np.exp(-(((distance - 1 - 0.9 * rim_width) / (0.8 * rim_width)) ** 2)) * (0.5 + 0.5 * np.cos(angle - light))
    glow = glow * (0.7 if glassy else 0.2)
    arc_at = 0.7 + 0.12 * look[3]
    arc_width = max(0.07, 0.6 * pixel)
    band = np.exp(-(((distance - arc_at) / arc_width) ** 2))
    facing = np.exp(-((_turn(angle - light) / (0.35 + 0.4 * look[2])) ** 2))
    behind = np.exp(-((_turn(angle - light - np.pi - 0.4) / 0.4) ** 2))
    shine = band * (facing + 0.55 * look[6] * behind) * inside
    painted = image[top:bottom, left:right] * (1 - inside[..., None]) + seen * inside[..., None]
    painted *= 1 - dark[..., None]
    white = np.array([250, 247, 250], np.float32)
    bright = np.clip(glow + (0.6 + 0.4 * look[7]) * shine + 0.06 * inside * (1 - distance), 0, 1)
    image[top:bottom, left:right] = painted + bright[..., None] * (white - painted)


def _turn(angle: np.ndarray) -> np.ndarray:
    """Angles in [-pi, pi)."""
    return (angle + np.pi) % (2 * np.pi) - np.pi


def paint_gel_bubble(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Gel bubbles: templates or refracting discs, singly, in clusters, or strewn."""
    size = image.shape[0]
    k = size / 256
    painted = image.copy()
    kind = rng.random()
    count = 1 if kind < 0.3 else int(rng.integers(2, 7)) if kind < 0.75 else int(rng.integers(7, 22))
    largest = rng.uniform(7, 28) if count == 1 else rng.uniform(5, 16) if count < 7 else rng.uniform(4, 8.5)
    centre, reach = _region(place, rng, 0.42)
    if not place and count > 1:
        centre, reach = rng.uniform(0.15, 0.85, 2), np.full(2, rng.choice((0.1, 0.2, 0.4)))
    from_template = bool(templates.get("gel_bubble")) and rng.random() < 0.5
    look = rng.random(9)
    bank = templates.get("gel_bubble", [])
    bank = [t for t in bank if t.image_id == bank[int(rng.integers(len(bank)))].image_id] if from_template else bank
    taken: list[tuple[float, float, float]] = []
    for _ in range(count):
        radius = largest * (1.0 if not taken else rng.uniform(0.3, 1.0) ** 1.3) * k
        x, y = (centre + rng.uniform(-reach, reach)) * size
        if any(np.hypot(x - a, y - b) < radius + r for a, b, r in taken):
            continue
        taken.append((x, y, radius))
        if from_template:
            chosen = bank[int(rng.integers(len(bank)))].change
            change = chosen[:, ::-1] if rng.random() < 0.5 else chosen
            scale, strength = rng.uniform(0.45, 0.8) * k, rng.uniform(0.8, 1.15)
            painted = pasted(painted, change, (x, y), rng.uniform(0, 2 * np.pi), scale, strength)
        else:
            own = np.clip(look + rng.normal(0, 0.12, 9), 0, 1)
            own[8] = look[8]
            own[5] = (look[5] + rng.normal(0, 0.03)) % 1
            _bubble(painted, x, y, radius, own)
    return painted


INKS = {
    # Optical density of red, green and blue where the ink is plain.
    "violet": (0.85, 1.45, 0.35),
    "blue violet": (1.1, 1.3, 0.3),
    "blue": (1.5, 1.05, 0.35),
    "black": (1.5, 1.5, 1.35),
    "grey": (0.75, 0.8, 0.7),
    "green": (1.4, 0.55, 0.95),
}


def _strokes(size: int, place: str, rng: np.random.Generator) -> tuple[list[np.ndarray], np.ndarray]:
    """Polylines (N, 2) in pixels and their widths: blots, a ring, arcs, zigzag bands, lines, an arrow or dots."""
    k = size / 256
    kinds = ("blots", "ring", "arc", "zigzag", "lines", "arrow", "dots")
    kind = str(rng.choice(kinds, p=(0.34, 0.1, 0.14, 0.14, 0.12, 0.06, 0.1)))
    if kind == "ring" and place:
        kind = "blots"
    centre, reach = _region(place, rng, 0.42)
    if not place and kind != "ring":
        turn = rng.uniform(0, 2 * np.pi)
        centre, reach = 0.5 + rng.uniform(0.22, 0.48) * np.array([np.cos(turn), np.sin(turn)]), np.full(2, 0.08)
    middle = (centre + rng.uniform(-reach, reach) * 0.5) * size
    paths: list[np.ndarray] = []
    widths: list[float] = []

    def line(points: np.ndarray, width: float) -> None:
        paths.append(points)
        widths.append(width * k)

    if kind == "blots":
        around = 1 if place or rng.random() < 0.45 else int(rng.integers(2, 7))
        first = rng.uniform(0, 2 * np.pi)
        for number in range(around):
            at = middle
            if around > 1:
                turn = first + 2 * np.pi * number / around + rng.normal(0, 0.2)
                at = size * (0.5 + rng.uniform(0.28, 0.46) * np.array([np.cos(turn), np.sin(turn)]))
            extent, main = rng.uniform(7, 24) * k, rng.uniform(0, np.pi)
            squeeze = rng.uniform(0.4, 1.0)
            for _ in range(int(rng.integers(14, 60))):
                turn = main + rng.normal(0, 0.55) + (np.pi / 2) * (rng.random() < 0.3)
                half = extent * rng.uniform(0.2, 0.9) * np.array([np.cos(turn), np.sin(turn)])
                off = np.clip(rng.normal(0, 0.38, 2), -1, 1) * extent * np.array([1.0, squeeze])
                mid = at + off
                bow = rng.normal(0, extent * 0.12, 2)
                line(np.stack([mid - half, mid + bow, mid + half]), rng.uniform(0.6, 1.9))
    elif kind in ("ring", "arc"):
        radius = rng.uniform(0.27, 0.5) * size if kind == "ring" else rng.uniform(0.12, 0.42) * size
        sweep = rng.uniform(1.5, 2.0) * np.pi if kind == "ring" else rng.uniform(0.35, 1.1)
        start = rng.uniform(0, 2 * np.pi)
        turns = start + np.linspace(0, sweep, 40)
        hub = size * (0.5 + rng.normal(0, 0.03, 2)) if kind == "ring" else middle
        uneven = 1 + 0.06 * np.sin(2 * turns + start) + 0.035 * np.sin(3 * turns + 2 * start)
        points = hub + radius * (uneven + rng.normal(0, 0.004, 40))[:, None] * np.stack(
            [np.cos(turns), np.sin(turns) * rng.uniform(0.8, 1.1)], axis=1
        )
        if kind == "arc":
            points = points - points.mean(axis=0) + middle
        width = rng.uniform(3, 10)
        if rng.random() < 0.5:
            # A broad pen: pieces of uneven width that overlap.
            for first in range(0, 39, 3):
                line(points[first : first + 5] + rng.normal(0, 0.5 * k, 2), width * rng.uniform(0.75, 1.2))
        else:
            # Many strokes of a fine pen along the curve.
            for _ in range(int(rng.integers(40, 110))):
                first = int(rng.integers(0, 36))
                piece = points[first : first + int(rng.integers(3, 6))]
                line(piece + rng.normal(0, width * 0.42 * k, 2), rng.uniform(0.5, 1.8))
    elif kind == "zigzag":
        main, length = rng.uniform(0, 2 * np.pi), rng.uniform(35, 110) * k
        axis = np.array([np.cos(main), np.sin(main)])
        across = np.array([-axis[1], axis[0]])
        count = int(length / k / rng.uniform(1.1, 2.6))
        travel = np.linspace(-0.5, 0.5, count) * length
        swing = rng.uniform(3, 8) * k * np.where(np.arange(count) % 2, 1, -1) * rng.uniform(0.5, 1.1, count)
        bow = rng.uniform(-0.2, 0.2) * length * (np.linspace(-1, 1, count) ** 2)
        points = middle + travel[:, None] * axis + (swing + bow)[:, None] * across + rng.normal(0, 1.0 * k, (count, 2))
        line(points, rng.uniform(0.7, 1.7))
    elif kind in ("lines", "arrow"):
        main, length = rng.uniform(0, 2 * np.pi), rng.uniform(25, 90) * k
        axis = np.array([np.cos(main), np.sin(main)])
        width = rng.uniform(2, 6)
        for _ in range(int(rng.integers(1, 4)) if kind == "lines" else 1):
            shift = rng.normal(0, 7 * k, 2) if kind == "lines" else np.zeros(2)
            wobble = rng.normal(0, 1.8 * k, (7, 2)).cumsum(axis=0)
            line(middle + shift + np.linspace(-0.5, 0.5, 7)[:, None] * length * axis + wobble, width)
        if kind == "arrow":
            tip = middle + 0.5 * length * axis
            for side in (-1, 1):
                turn = main + np.pi + side * rng.uniform(0.4, 0.8)
                line(np.stack([tip, tip + 0.35 * length * np.array([np.cos(turn), np.sin(turn)])]), width)
    else:
        spots = (middle + rng.normal(0, 14 * k, (int(rng.integers(6, 30)), 2))) if rng.random() < 0.5 else None
        if spots is None:
            spots = (0.5 + np.array([(0.36, 0), (0, 0.36), (-0.36, 0), (0, -0.36)])) * size
            spots = spots + rng.normal(0, 9 * k, spots.shape) if not place else middle + rng.normal(0, 8 * k, (3, 2))
        largest = 3.0 if len(spots) > 4 else 9.0
        for spot in spots:
            line(np.stack([spot, spot + rng.normal(0, 1.5 * k, 2)]), rng.uniform(0.3, 1.0) * largest)
    return paths, np.array(widths)


def _template_ink(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    size = image.shape[0]
    bank = templates["ink"]
    chosen = bank[int(rng.integers(len(bank)))].change
    if rng.random() < 0.5:
        chosen = chosen[:, ::-1]
    largest = max(chosen.shape[:2])
    centre, reach = _region(place, rng, 0.4)
    if largest > 250:
        # A frame of marks around the lesion stays around it, or one of its marks is moved to the place.
        at = np.array([0.5, 0.5]) + rng.normal(0, 0.06, 2)
        at = at if not place else at + (centre - 0.5) * 0.8
    else:
        at = centre + rng.uniform(-reach, reach)
        if not place and rng.random() < 0.6:
            at = 0.5 + (at - 0.5) / max(1e-3, np.abs(at - 0.5).max()) * rng.uniform(0.25, 0.45)
    angle = rng.uniform(0, 2 * np.pi)
    scale = rng.uniform(0.4, 0.7) * size / 256
    return pasted(image, chosen, (at[0] * size, at[1] * size), angle, scale, rng.uniform(0.6, 1.1))


def paint_ink(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Pen marks: templates, or strokes whose ink absorbs light and gathers in the furrows of the skin."""
    size = image.shape[0]
    k = size / 256
    if templates.get("ink") and rng.random() < 0.3:
        return _template_ink(image, place, rng, templates)
    paths, widths = _strokes(size, place, rng)
    levels = rng.integers(120, 256, len(paths))

    def draw(canvas: np.ndarray) -> None:
        for points, width, level in zip(paths, widths, levels, strict=True):
            thickness = max(1, round(width * FINE))
            cv2.polylines(canvas, [_fixed(points)], False, int(level), thickness, cv2.LINE_AA, SHIFT)

    amount = _coverage(size, draw, blur_px=rng.uniform(0.3, 0.8) * k)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    furrows = (cv2.GaussianBlur(grey, (0, 0), 2.5 * k) - cv2.GaussianBlur(grey, (0, 0), 0.6 * k)) / 12
    dryness = rng.uniform(0.4, 0.95) if widths.max() > 2.5 * k else rng.uniform(0.1, 0.5)
    grain = 0.75 * _noise(size, size // 2, rng) + 0.6 * _noise(size, size // 6, rng) + np.clip(furrows, -1.5, 1.5)
    held = np.clip(1 - dryness + dryness * (0.35 + 0.9 * grain), 0.02, 1.6)
    names = tuple(INKS)
    ink = np.array(INKS[str(rng.choice(names, p=(0.42, 0.25, 0.1, 0.12, 0.09, 0.02)))], np.float32)
    ink = ink * rng.uniform(0.85, 1.15, 3).astype(np.float32) * rng.uniform(0.7, 1.5)
    bleed = rng.uniform(0, 0.1) * cv2.GaussianBlur(amount, (0, 0), 3 * k)
    density = (amount * held + bleed).astype(np.float32)
    return image * np.exp(-density[..., None] * ink)


PAINTERS: dict[str, Painter] = {
    "ruler": paint_ruler,
    "gel_bubble": paint_gel_bubble,
    "hair": paint_hair,
    "ink": paint_ink,
}
