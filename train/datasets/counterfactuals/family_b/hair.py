"""Hair of family "b": Bezier curves that follow a common flow, darker at the root than at the tip."""

import numpy as np

from train.datasets.counterfactuals.family_b.splines import bezier, lines
from train.datasets.counterfactuals.placement import region
from train.datasets.counterfactuals.templates import Templates

SAMPLES = 120
ROOTS = ((22, 16, 16), (40, 26, 20), (58, 36, 22), (80, 48, 28), (66, 62, 64))
LIGHT = (236, 226, 205)


def _curves(size: int, place: str, rng: np.random.Generator) -> np.ndarray:
    """Control points (N, 4, 2) in pixels."""
    k = size / 256
    count = int(rng.geometric(0.09)) + 2 if rng.random() < 0.85 else int(rng.integers(30, 60))
    count = min(count, 60)
    centre, reach = region(place, rng, 0.58)
    roots = (centre + rng.uniform(-reach, reach, (count, 2))) * size
    # A whorl or a straight flow: the direction is a smooth function of the place.
    flow, turn = rng.uniform(0, 2 * np.pi), rng.normal(0, 1.1, 2)
    angles = flow + ((roots / size - 0.5) * turn).sum(axis=1) + rng.normal(0, rng.uniform(0.08, 0.7), count)
    is_short = rng.random() < 0.12
    lengths = rng.lognormal(np.log(16 if is_short else 95), 0.25 if is_short else 0.5, count) * k
    lengths = np.minimum(lengths, 55 * k) if place else lengths
    ahead = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    aside = np.stack([-ahead[:, 1], ahead[:, 0]], axis=1)
    sway = rng.normal(0, rng.uniform(0.03, 0.25), (count, 2)) + rng.normal(0, 0.12)
    steps = np.array([0.0, 0.33, 0.66, 1.0])
    bends = np.stack([np.zeros(count), sway[:, 0], sway.sum(axis=1), 1.4 * sway[:, 1]], axis=1)
    path = steps[None, :, None] * ahead[:, None] + bends[..., None] * aside[:, None]
    return roots[:, None] + lengths[:, None, None] * (path - path[:, 1:2])


def paint_hair(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Hairs of one head, some thick and some fine, with the shadow they cast on the skin."""
    size = image.shape[0]
    k = size / 256
    control = _curves(size, place, rng)
    points = bezier(control, SAMPLES)
    steps = np.linalg.norm(np.diff(points, axis=1), axis=2)
    spacing = float(np.median(steps))
    travelled = np.linspace(0, 1, SAMPLES)
    taper = np.clip((1 - travelled) / 0.3, 0.15, 1) * np.clip(0.5 + travelled / 0.05, 0, 1)
    # Points of a longer hair lie further apart: their weight makes up for it.
    lengths = steps.mean(axis=1, keepdims=True)
    weights = taper * lengths / spacing * rng.uniform(0.45, 1.0, (len(points), 1))
    is_thick = rng.random(len(points)) < 0.65
    width = rng.uniform(0.8, 1.7) * k
    covered = np.zeros((size, size), np.float32)
    for chosen, factor in ((is_thick, 1.0), (~is_thick, 0.6)):
        if chosen.any():
            drawn = lines(points[chosen].reshape(-1, 2), weights[chosen].ravel(), size, width * factor, spacing)
            covered = 1 - (1 - covered) * (1 - drawn)
    root = np.array(LIGHT if rng.random() < 0.1 and image.mean() < 170 else ROOTS[int(rng.integers(len(ROOTS)))])
    # The tone drifts over the picture as the light does.
    slope = rng.normal(0, 18, 2)
    drift = np.linspace(-slope[0], slope[0], size)[:, None] + np.linspace(-slope[1], slope[1], size)
    tone = (root + rng.normal(0, 6) + drift[..., None] * np.array([1.0, 0.75, 0.6])).astype(np.float32)
    down, across = (int(s) for s in np.rint(rng.uniform(-2, 2, 2) * k))
    cast = np.roll(covered, (down, across), (0, 1)) * np.float32(rng.uniform(0.03, 0.2))
    skin = image * (1 - cast[..., None])
    opacity = covered[..., None] * np.float32(rng.uniform(0.8, 1.0))
    return skin * (1 - opacity) + tone * opacity
