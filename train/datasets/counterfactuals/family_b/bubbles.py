"""Gel bubbles of family "b": spherical caps with refraction, Fresnel reflection and highlights of lamps in a ring."""

import cv2
import numpy as np

from train.datasets.counterfactuals.pasting import paste_bubbles
from train.datasets.counterfactuals.placement import bubble_discs
from train.datasets.counterfactuals.templates import Templates

LAMP = np.array([252.0, 250.0, 255.0], np.float32)


def _cap(x: np.ndarray, y: np.ndarray, height: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Surface normals of a cap over the unit disc; height in (0, 1], 1 being half a sphere."""
    scaled = height * np.minimum(np.hypot(x, y), 0.999)
    up = np.sqrt(1 - scaled**2)
    return height * x, height * y, up


def _bubble(image: np.ndarray, disc: tuple[float, float, float], look: dict[str, float]) -> None:
    """One bubble, drawn into `image` in place."""
    size = image.shape[0]
    x, y, radius = disc
    reach = int(radius * 1.25 + 4)
    left, top = max(0, int(x) - reach), max(0, int(y) - reach)
    right, bottom = min(size, int(x) + reach), min(size, int(y) + reach)
    if right - left < 2 or bottom - top < 2:
        return
    patch = image[top:bottom, left:right]
    across = np.arange(left, right, dtype=np.float32)[None] - np.float32(x)
    down = np.arange(top, bottom, dtype=np.float32)[:, None] - np.float32(y)
    cosine, sine = np.cos(look["turn"]), np.sin(look["turn"])
    u = (cosine * across + sine * down) / (radius * look["stretch"])
    v = (cosine * down - sine * across) / (radius / look["stretch"])
    u = u * (1 + look["dent"] * v)
    r = np.hypot(u, v)
    soft = radius * 0.9
    inside = np.clip((1 - r) * soft + 0.5, 0, 1)
    nx, ny, nz = _cap(u, v, look["height"])
    # Refraction (small angles): light from below is shifted along the normal.
    shift = look["refraction"] * radius * r**3
    map_x = (across + x - shift * nx).astype(np.float32)
    map_y = (down + y - shift * ny).astype(np.float32)
    seen = cv2.remap(image, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    # Total reflection at the steep border lets no light up from the skin; outside lies the meniscus' glint.
    steep = np.clip((r - look["border"]) / max(1 - look["border"], 0.8 / radius), 0, 1)
    lit = np.cos(np.arctan2(v, u) - look["light"])
    shade = 1 - look["shade"] * steep**2 * (0.75 - 0.25 * lit)
    # Lamps in a ring are mirrored where the surface leans by half of their angle.
    lean = np.sqrt(nx**2 + ny**2)
    ring = np.exp(-(((lean - look["lamp_lean"]) / max(0.06, 0.5 / radius)) ** 2))
    lamps = np.clip(lit, 0, 1) ** look["lamp_focus"] + look["far_lamp"] * np.clip(-lit, 0, 1) ** (
        2 * look["lamp_focus"]
    )
    fresnel = 0.25 * np.clip(1 - nz, 0, 1) ** 2
    mirror = np.clip(look["gloss"] * ring * lamps + fresnel * look["gloss"] * np.clip(lit, 0, 1), 0, 1) * inside
    glint = np.exp(-(((r - 1.06) * radius / 0.9) ** 2)) * look["meniscus"] * np.clip(-0.3 + lit, 0, 1)
    drawn = seen * (shade * inside + 1 - inside)[..., None]
    drawn = patch * (1 - inside[..., None]) + drawn * inside[..., None]
    bright = np.clip(mirror + glint, 0, 1)[..., None]
    image[top:bottom, left:right] = drawn + bright * (LAMP - drawn)


def paint_gel_bubble(image: np.ndarray, place: str, rng: np.random.Generator, templates: Templates) -> np.ndarray:
    """Gel bubbles: templates or spherical caps under one light."""
    discs = bubble_discs(place, rng, image.shape[0])
    if templates.get("gel_bubble") and rng.random() < 0.45:
        return paste_bubbles(image, discs, rng, templates)
    painted = image.copy()
    light, height, border = rng.uniform(0, 2 * np.pi), rng.uniform(0.75, 1.0), rng.uniform(0.72, 0.9)
    shade, gloss, far = rng.uniform(0.35, 0.85), rng.uniform(0.6, 1.1), rng.uniform(0.2, 0.9)
    lamp_lean, focus, uneven = rng.uniform(0.5, 0.75), rng.uniform(2, 14), rng.uniform(0, 0.12)
    for disc in discs:
        look = {
            "turn": rng.uniform(0, np.pi),
            "stretch": 1 + abs(rng.normal(0, uneven)),
            "dent": rng.normal(0, uneven),
            "height": height,
            "refraction": rng.uniform(0.1, 0.5),
            "border": border,
            "light": light + rng.normal(0, 0.1),
            "shade": shade * rng.uniform(0.85, 1.1),
            "lamp_lean": lamp_lean * height,
            "lamp_focus": focus,
            "far_lamp": far,
            "gloss": gloss,
            "meniscus": rng.uniform(0, 0.5),
        }
        _bubble(painted, disc, look)
    return painted
