"""Templates laid onto skin: `skin + strength * change`, scaled, turned and mirrored."""

import cv2
import numpy as np

from train.datasets.counterfactuals.placement import pose, region
from train.datasets.counterfactuals.templates import Template, Templates

SCALES = (0.4, 0.7)
"""From the 600 x 450 originals to a 256 px image."""
BUBBLE_SCALES = (0.4, 0.85)
STRENGTHS = (0.6, 1.1)
FAINT_LEVELS, SEEN_LEVELS = 60, (45, 110)
"""The ink of a ruler fainter than the first, in grey levels, is brought to a level between the others."""


def pasted(
    image: np.ndarray, change: np.ndarray, centre: tuple[float, float], angle: float, scale: float, strength: float
) -> np.ndarray:
    """float32 RGB (S, S, 3): `image` with `change` turned by `angle` (radians) and scaled, its middle at `centre`."""
    # Area averaging first: a bilinear warp alone would drop ticks that are narrower than a pixel.
    small = cv2.resize(change, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else change
    rest = 1.0 if scale < 1 else scale
    cosine, sine = np.cos(angle) * rest, np.sin(angle) * rest
    matrix = np.array([[cosine, -sine, 0.0], [sine, cosine, 0.0]])
    middle = np.array([small.shape[1] - 1, small.shape[0] - 1]) / 2
    matrix[:, 2] = np.asarray(centre) - matrix[:, :2] @ middle
    laid = cv2.warpAffine(small, matrix, image.shape[1::-1], flags=cv2.INTER_LINEAR)
    return image + strength * laid


def paste_ruler(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """A ruler template at an edge, in a corner or across the image; long rows may be continued by themselves."""
    size = image.shape[0]
    chosen = _drawn(templates["ruler"], rng)
    change = chosen.change[:, ::-1] if rng.random() < 0.5 else chosen.change
    if rng.random() < 0.25:
        change = change[::-1]
    if rng.random() < 0.3 and change.shape[1] > 600:
        change = np.hstack([change, change])
    laid = pose(place, rng, (0.05, 0.2))
    centre = (laid.centre[0] * size, laid.centre[1] * size)
    scale, strength = rng.uniform(*SCALES) * size / 256, rng.uniform(*STRENGTHS)
    depth = float(np.percentile(-change.min(axis=2), 99.5))
    if depth < FAINT_LEVELS:
        strength *= max(1.0, rng.uniform(*SEEN_LEVELS) / max(depth, 20.0))
    return pasted(image, change, centre, laid.angle, scale, strength)


def paste_ink(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """An ink template; one that frames a lesion is laid around the middle, others mostly near the border."""
    size = image.shape[0]
    change = _drawn(templates["ink"], rng).change
    if rng.random() < 0.5:
        change = change[:, ::-1]
    centre, reach = region(place, rng, 0.4)
    if max(change.shape[:2]) > 250:
        at = 0.5 + rng.normal(0, 0.06, 2) + (0.8 * (centre - 0.5) if place else 0.0)
    else:
        at = centre + rng.uniform(-reach, reach)
        if not place and rng.random() < 0.6:
            at = 0.5 + (at - 0.5) / max(1e-3, float(np.abs(at - 0.5).max())) * rng.uniform(0.25, 0.45)
    scale = rng.uniform(*SCALES) * size / 256
    return pasted(
        image, change, (at[0] * size, at[1] * size), rng.uniform(0, 2 * np.pi), scale, rng.uniform(*STRENGTHS)
    )


def paste_bubbles(
    image: np.ndarray, discs: list[tuple[float, float, float]], rng: np.random.Generator, templates: Templates
) -> np.ndarray:
    """Bubble templates of one source image at `discs` (x, y, radius in pixels), each about as large as its disc."""
    source = _drawn(templates["gel_bubble"], rng).image_id
    bank = [template for template in templates["gel_bubble"] if template.image_id == source]
    least, most = (scale * image.shape[0] / 256 for scale in BUBBLE_SCALES)
    for x, y, radius in discs:
        fitting = [2.4 * radius / max(template.change.shape[:2]) for template in bank]
        sized = [template for template, scale in zip(bank, fitting, strict=True) if least <= scale <= most]
        change = _drawn(sized or bank, rng).change
        scale = float(np.clip(2.4 * radius / max(change.shape[:2]), least, most))
        change = change[:, ::-1] if rng.random() < 0.5 else change
        image = pasted(image, change, (x, y), rng.uniform(0, 2 * np.pi), scale, rng.uniform(0.8, 1.15))
    return image


def _drawn(templates: list[Template], rng: np.random.Generator) -> Template:
    return templates[int(rng.integers(len(templates)))]
