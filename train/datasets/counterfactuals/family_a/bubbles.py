"""Gel bubbles of family "a": discs with a dark rim, a bright arc, and a weak lens over the skin."""

import cv2
import numpy as np

from train.datasets.counterfactuals.pasting import paste_bubbles
from train.datasets.counterfactuals.placement import bubble_discs
from train.datasets.counterfactuals.templates import Templates


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
    discs = bubble_discs(place, rng, image.shape[0])
    if templates.get("gel_bubble") and rng.random() < 0.5:
        return paste_bubbles(image, discs, rng, templates)
    painted = image.copy()
    look = rng.random(9)
    for x, y, radius in discs:
        own = np.clip(look + rng.normal(0, 0.12, 9), 0, 1)
        # One light for all, and one kind.
        own[5], own[8] = (look[5] + rng.normal(0, 0.03)) % 1, look[8]
        _bubble(painted, x, y, radius, own)
    return painted
