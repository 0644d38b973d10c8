"""Hair of family "a": bent polylines that taper, with a soft shadow."""

import cv2
import numpy as np

from train.datasets.counterfactuals.family_a.canvas import FINE, SHIFT, blend, coverage, fixed
from train.datasets.counterfactuals.placement import region
from train.datasets.counterfactuals.templates import Templates


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
    centre, reach = region(place, rng, 0.55 if is_stubble else 0.6)
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
                cv2.polylines(canvas, [fixed(stretch)], False, int(level), thickness, cv2.LINE_AA, SHIFT)

    covered = coverage(size, draw, blur_px=rng.uniform(0.0, 0.6) * k)
    is_light = rng.random() < 0.1 and float(image.mean()) < 175
    tones = ((28, 20, 18), (48, 32, 24), (70, 46, 32), (96, 66, 46), (84, 80, 80))
    tone = np.array((228, 218, 200) if is_light else tones[int(rng.integers(len(tones)))], np.float32)
    tone = tone + rng.uniform(-10, 10)
    shift = rng.uniform(-2.5, 2.5, 2) * k
    shadow = cv2.GaussianBlur(covered, (0, 0), rng.uniform(1.2, 2.4) * k)
    shadow = cv2.warpAffine(shadow, np.array([[1, 0, shift[0]], [0, 1, shift[1]]]), (size, size))
    painted = image * (1 - rng.uniform(0.05, 0.3) * shadow[..., None])
    return blend(painted, np.minimum(covered * rng.uniform(0.75, 1.0), 1), tone)
