"""Where on the image an artefact is laid, for a place in words or at random."""

from dataclasses import dataclass

import numpy as np

from medviz.domains.image_places import CORNERS, EDGES


@dataclass(frozen=True)
class Pose:
    """Of a straight thing. centre: (x, y) in sides of the image; angle: radians, 0 upright at the lower edge."""

    centre: tuple[float, float]
    angle: float


def pose(
    place: str, rng: np.random.Generator, depth: tuple[float, float], tilt: float = 1.0, from_outside: bool = False
) -> Pose:
    """A pose at an edge or a corner, upright for someone who looks from that edge, or across the image.

    depth: range of the distance from the edge, in sides. tilt: factor on the random tilt. from_outside: of a strip that
    reaches in from an edge: its foot is always outside, and it never lies across.
    """
    if not place:
        places, shares = (*EDGES, "corner", "across"), (0.17, 0.4, 0.1, 0.1, 0.11, 0.12)
        place = str(rng.choice(EDGES if from_outside else places, p=None if from_outside else shares))
    if place == "corner":
        place = str(rng.choice(CORNERS))
    along, into = rng.normal(0, 0.12), rng.uniform(*depth)
    lean = np.deg2rad(rng.normal(0, 3) if rng.random() < 0.6 else rng.normal(0, 12)) * tilt
    if place == "lower edge":
        return Pose((0.5 + along, 1 - into), lean)
    if place == "upper edge":
        return Pose((0.5 + along, into), lean + (np.pi if from_outside or rng.random() < 0.7 else 0))
    if place == "left edge":
        return Pose((into, 0.5 + along), lean + np.pi / 2)
    if place == "right edge":
        return Pose((1 - into, 0.5 + along), lean - np.pi / 2)
    if place.endswith("corner"):
        right, lower = "right" in place, "lower" in place
        into = rng.uniform(0.1, 0.26)
        at = (1 - into if right else into, 1 - into if lower else into)
        angle = np.deg2rad(rng.uniform(30, 55)) * (-1 if right == lower else 1)
        return Pose(at, angle if lower else angle + np.pi)
    centre = rng.uniform(0.38, 0.62, 2) if place == "centre" else rng.uniform(0.25, 0.75, 2)
    return Pose((float(centre[0]), float(centre[1])), rng.uniform(-np.pi, np.pi))


def region(place: str, rng: np.random.Generator, reach: float) -> tuple[np.ndarray, np.ndarray]:
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


def bubble_discs(place: str, rng: np.random.Generator, size: int) -> list[tuple[float, float, float]]:
    """(x, y, radius) in pixels of bubbles that do not overlap: one, a few, or many small ones."""
    k = size / 256
    kind = rng.random()
    count = 1 if kind < 0.3 else int(rng.integers(2, 7)) if kind < 0.75 else int(rng.integers(7, 22))
    largest = rng.uniform(7, 28) if count == 1 else rng.uniform(5, 16) if count < 7 else rng.uniform(4, 8.5)
    centre, reach = region(place, rng, 0.42)
    if not place and count > 1:
        centre, reach = rng.uniform(0.15, 0.85, 2), np.full(2, rng.choice((0.1, 0.2, 0.4)))
    discs: list[tuple[float, float, float]] = []
    for _ in range(count):
        radius = largest * (rng.uniform(0.3, 1.0) ** 1.3 if discs else 1.0) * k
        x, y = (centre + rng.uniform(-reach, reach)) * size
        if all(np.hypot(x - a, y - b) >= radius + r for a, b, r in discs):
            discs.append((float(x), float(y), float(radius)))
    return discs
