"""Chest findings, family "b": mixtures of Gaussians, gradient noise, and the heart drawn as an arc.

A density absorbs: what light is left of a pixel is multiplied by exp(-density), so that ribs and vessels over it fade
by themselves. No residual of a film is used, and none of family "a"'s drawing code.
"""

from collections.abc import Mapping
from functools import cached_property

import cv2
import numpy as np

from train.datasets.counterfactuals.chest import LEAST_RISE, RATIOS, ChestFamily, Drawer, Drawn
from train.datasets.counterfactuals.lungs import Film

WHITE = 255.0


class ChestFindingsB(ChestFamily):
    """See the module."""

    name, half = "b", 1

    def drawers(self) -> Mapping[str, Drawer]:
        """See `ChestFamily.drawers`."""
        return self._drawers

    @cached_property
    def _drawers(self) -> dict[str, Drawer]:
        return {
            "opacity": _opacity,
            "pleural_effusion": _effusion,
            "cardiomegaly": _cardiomegaly,
            "nodule": _nodule,
            "cavity": _cavity,
            "consolidation": _consolidation,
        }


def gradient_noise(size_px: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    """Perlin's gradient noise (1985) of two octaves, float32 (S, S), about -1 to 1."""
    half = size_px // 2
    coarse = _perlin(half, cells, rng) + 0.5 * _perlin(half, 2 * cells, rng)
    return cv2.resize(coarse, (size_px, size_px), interpolation=cv2.INTER_LINEAR)


def _perlin(size_px: int, cells: int, rng: np.random.Generator) -> np.ndarray:
    angles = rng.uniform(0, 2 * np.pi, (cells + 1, cells + 1))
    slopes = np.stack([np.cos(angles), np.sin(angles)]).astype(np.float32)
    at = np.linspace(0, cells, size_px, endpoint=False, dtype=np.float32)
    cell = at.astype(int)
    part = at - cell
    fade = part**3 * (part * (part * 6 - 15) + 10)
    total = np.zeros((size_px, size_px), np.float32)
    for down in (0, 1):
        for across in (0, 1):
            slope = slopes[:, cell[:, None] + down, cell[None, :] + across]
            value = slope[0] * (part[None, :] - across) + slope[1] * (part[:, None] - down)
            weight_down = fade if down else 1 - fade
            weight_across = fade if across else 1 - fade
            total += weight_down[:, None] * weight_across[None, :] * value
    return total * 1.4


def _ceiling(found: Film) -> np.ndarray:
    """The brightest a finding gets at each height, float32 (S, 1): soft tissue there, between the lungs or beside."""
    rows = np.percentile(found.low[:, :: max(1, found.size_px // 64)], 88, axis=1).astype(np.float32)
    return np.minimum(cv2.GaussianBlur(rows[:, None], (0, 0), 6.0), found.tissue + 6)


def _absorbed(found: Film, density: np.ndarray) -> Drawn:
    """A density float32 (S, S) of optical depth laid into the film; it brings no pixel past soft tissue by much."""
    density = np.where(density < 0.015, 0.0, density).astype(np.float32)
    room = np.maximum(_ceiling(found) - found.grey, 0.12 * (WHITE - found.grey))
    absorbed = (1 - np.exp(-density)) * room
    return Drawn(found.grey + absorbed, density)


def _depth_of(found: Film, place: np.ndarray, levels: float) -> float:
    """The optical depth that brightens the darker half of `place`, bool (S, S), by `levels`; at most 2.5."""
    dark = float(np.percentile(found.grey[place], 40))
    rows = np.nonzero(place.any(axis=1))[0]
    room = max(float(_ceiling(found)[rows].mean()) - dark, 0.12 * (WHITE - dark), 1.0)
    return float(-np.log(max(1 - levels / room, 0.08)))


def _window(found: Film, side: str, sigma_px: float) -> np.ndarray:
    """The lung with a soft rim that lies inside it, float32 (S, S) in [0, 1]."""
    mask = found.outline[side].astype(np.float32)
    soft = cv2.blur(mask, (2 * round(sigma_px) + 1,) * 2)
    return np.clip(2 * soft - 0.75, 0, 1)


def _normal(found: Film, centre: np.ndarray, deviations: np.ndarray, turn: float) -> np.ndarray:
    """A Gaussian of peak 1 at centre (row, column), turned by `turn`, float32 (S, S)."""
    line = np.arange(found.size_px, dtype=np.float32)
    down, across = line[:, None] - np.float32(centre[0]), line[None, :] - np.float32(centre[1])
    cosine, sine = np.float32(np.cos(turn)), np.float32(np.sin(turn))
    first = (cosine * down + sine * across) / np.float32(deviations[0])
    second = (cosine * across - sine * down) / np.float32(deviations[1])
    return np.exp(-0.5 * (first * first + second * second))


def _point(zone: np.ndarray, rng: np.random.Generator, margin_px: float = 0.0) -> np.ndarray | None:
    """(row, column) in a zone, bool (S, S), drawn more often where it is wide; None in an empty one."""
    inside = cv2.distanceTransform(np.pad(zone, 1).astype(np.uint8), cv2.DIST_L1, 3)[1:-1, 1:-1]
    rows, columns = np.nonzero(inside > max(margin_px, 3.0))
    if len(rows) < 12:
        return None
    weights = inside[rows, columns]
    chosen = int(rng.choice(len(rows), p=weights / weights.sum()))
    return np.array([rows[chosen], columns[chosen]], float)


def _opacity(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """Three to eight Gaussians around one point, broken up by gradient noise."""
    zone, side, size = found.zone(place), place.split()[0], found.size_px
    whole = place.endswith("lung")
    rows, columns = np.nonzero(zone)
    if len(rows) < 60:
        return None
    centre = np.array([rows.mean(), columns.mean()]) if whole else _point(zone, rng)
    if centre is None:
        return None
    spread = rng.uniform(6, 19) * size / 256
    stretch = np.array([2.4, 1.1]) if whole else np.array([1.0, 0.85])
    if whole:
        spread = 20 * size / 256
    density = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(5, 10) if whole else rng.integers(3, 9))):
        middle = centre + rng.normal(0, 0.7, 2) * spread * stretch
        deviations = spread * rng.uniform(0.45, 0.95, 2) * (1.3 if whole else 1.0)
        density += rng.uniform(0.5, 1.0) * _normal(found, middle, deviations, rng.uniform(0, np.pi))
    density = density / density.max()
    broken = gradient_noise(size, int(rng.integers(14, 26)), rng)
    density *= np.clip(1 + rng.uniform(0.25, 0.7) * broken, 0.1, 1.8)
    density = cv2.GaussianBlur(density, (0, 0), 1.2) * _window(found, side, 3)
    return _absorbed(found, density * _depth_of(found, zone, rng.uniform(34, 72)))


def _effusion(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """Fluid below a parabola that climbs the chest wall, with a film of fluid along the wall above it."""
    side, size = place.split()[0], found.size_px
    mask = found.outline[side]
    rows, columns = np.nonzero(mask)
    top, bottom, first, last = rows.min(), rows.max(), columns.min(), columns.max()
    height, width = bottom - top, last - first
    line = np.arange(size, dtype=np.float32)
    # 0 at the chest wall, 1 at the spine.
    inward = (line - first) / width if side == "right" else (last - line) / width
    lowest = bottom - rng.uniform(0.06, 0.34) * height
    climb = rng.uniform(0.1, 0.2) * height
    at_bottom = rng.uniform(0.55, 0.8)
    surface = lowest - climb * np.clip((at_bottom - inward) / at_bottom, 0, 1.15) ** 2
    surface += 0.1 * climb * np.clip((inward - at_bottom) / (1 - at_bottom), 0, 1)
    depth_px = line[:, None] - surface[None, :]
    fluid = 1 / (1 + np.exp(np.clip(-depth_px / (rng.uniform(1.6, 3.2) * size / 256), -30, 30)))
    # The column of the chest that holds fluid: the lung's width at each height, kept to the bottom.
    widest = mask.copy()
    for row in range(int(lowest - climb), bottom + 1):
        widest[row] |= widest[row - 1]
    reach = min(bottom + round(9 * size / 256), size - 1)
    widest[bottom + 1 : reach] = widest[bottom]
    chest = cv2.blur(cv2.blur(widest.astype(np.float32), (5, 5)), (5, 5))
    chest *= np.clip((reach - line) / (12 * size / 256), 0, 1)[:, None]
    amount = (fluid * chest * np.clip(0.8 + depth_px / (0.5 * height), 0.7, 0.96)).astype(np.float32)
    amount[amount < 0.02] = 0.0
    belly = found.low[min(bottom + 3, size - 8) : min(bottom + 20, size)][:, first : last + 1]
    level = float(np.clip(np.median(belly), found.tissue - 18, found.tissue + 18))
    level_grid = level + 4 * gradient_noise(size, 6, rng)
    # Brightness between the film's and the fluid's as light through both; faint ribs stay.
    smooth = cv2.blur(found.grey, (9, 9))
    filled = smooth + amount * (level_grid - smooth) + (found.grey - smooth) * (1 - rng.uniform(0.5, 0.75) * amount)
    return Drawn(filled, amount)


def _cardiomegaly(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """A wider heart painted over the lungs: half an ellipse on each side, of the old heart's brightness."""
    size = found.size_px
    old, wanted = found.heart, rng.uniform(0.56, 0.65)
    if old is None or not RATIOS[0] <= old.ratio <= wanted - LEAST_RISE:
        return None
    top, bottom, middle, height = old.top, old.bottom, old.middle, old.bottom - old.top
    line = np.arange(size, dtype=np.float32)
    rows = np.arange(top, bottom + 1)
    right_heart, right_wall = (np.interp(line, rows, edge) for edge in (old.right, old.right_wall))
    left_heart, left_wall = (np.interp(line, rows, edge) for edge in (old.left, old.left_wall))
    more = (wanted - old.ratio) * old.chest_px
    share = rng.uniform(0.6, 0.8)
    reaches = {"right": old.right_reach + (1 - share) * more, "left": old.left_reach + share * more}
    centre = top + rng.uniform(0.68, 0.76) * height
    # Above its centre the ellipse ends at the hilum; below, it is cut off by the diaphragm.
    up, down = rng.uniform(0.42, 0.5) * height, rng.uniform(0.42, 0.55) * height
    span = (line - centre) / np.where(line < centre, up, down)
    bulge = np.sqrt(np.clip(1 - span**2, 0, 1))
    new_left = np.maximum(left_heart, middle + reaches["left"] * bulge)
    new_right = np.minimum(right_heart, middle - reaches["right"] * bulge)
    new_left = np.minimum(new_left, left_wall - 0.02 * size)
    new_right = np.maximum(new_right, right_wall + 0.02 * size)
    new_left, new_right = (
        cv2.GaussianBlur(edge.astype(np.float32)[None], (0, 0), 4.0)[0] for edge in (new_left, new_right)
    )
    soft = rng.uniform(1.0, 2.0) * size / 256
    columns = line[None, :]
    inside = np.clip(0.5 + (columns - new_right[:, None]) / (2 * soft), 0, 1)
    inside = inside * np.clip(0.5 + (new_left[:, None] - columns) / (2 * soft), 0, 1)
    rows_in = np.clip((line - top - 0.2 * height) / (0.12 * height), 0, 1) * np.clip((bottom + 6 - line) / 10, 0, 1)
    heart = cv2.GaussianBlur((inside * rows_in[:, None]).astype(np.float32), (0, 0), 1.0)
    # Each row of the old heart, away from the spine, gives the brightness of the new one.
    within = (columns > right_heart[:, None] + 3) & (columns < left_heart[:, None] - 3)
    weights = within.astype(np.float32) * (np.abs(columns - middle) > 0.04 * size)
    smooth = cv2.GaussianBlur(found.grey, (0, 0), 3)
    level = (smooth * weights).sum(axis=1) / np.maximum(weights.sum(axis=1), 1)
    level = np.where(weights.sum(axis=1) >= 3, level, found.tissue)
    level = cv2.GaussianBlur(level.astype(np.float32)[:, None], (0, 0), 6.0)
    # Thinner towards its border, as a ball is.
    reach = np.maximum(np.where(columns < middle, middle - new_right[:, None], new_left[:, None] - middle), 1)
    thick = np.sqrt(np.clip(1.08 - (np.abs(columns - middle) / reach) ** 2, 0, 1))
    # Where the film is as bright already, as in the old heart, nothing is painted.
    lift = np.clip(level * (0.86 + 0.14 * thick) - smooth, 0, None)
    lift = cv2.GaussianBlur(lift.astype(np.float32), (0, 0), 1.0)
    lift *= np.clip((np.abs(columns - middle) - 0.03 * size) / (0.03 * size), 0, 1)
    amount = heart * 0.97
    amount[amount < 0.02] = 0.0
    # The old border would show as a line inside the new heart, so its detail goes.
    near = np.maximum(
        *(np.exp(-(((columns - edge[:, None]) / (0.025 * size)) ** 2)) for edge in (left_heart, right_heart))
    )
    lost = amount * np.maximum(0.45 * np.clip(lift / 25, 0, 1), 0.9 * near)
    painted = found.grey + amount * lift - lost * (found.grey - smooth)
    return Drawn(painted, heart * ((line >= top + 0.4 * height) & (line <= bottom))[:, None])


def _nodule(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """A round density of even depth that rolls off at its rim, 8 to 25 px across at 256 px."""
    radius = rng.uniform(4, 12.5) * found.size_px / 256
    lung = found.outline[place.split()[0]]
    deep = cv2.erode(lung.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=int(radius) + 1).astype(bool)
    spot = _point(found.zone(place) & deep, rng)
    if spot is None:
        return None
    line = np.arange(found.size_px, dtype=np.float32)
    down, across = line[:, None] - np.float32(spot[0]), line[None, :] - np.float32(spot[1])
    # Lobes: the radius as a short Fourier series of the angle.
    angle = np.arctan2(down, across)
    radii = np.full_like(angle, radius)
    for order in (2, 3, 4):
        radii += radius * rng.normal(0, 0.035) * np.cos(order * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    sharp = rng.uniform(2.2, 4.5)
    disc = np.exp(-np.log(2) * (np.hypot(down, across) / radii) ** (2 * sharp / 1.5))
    disc[np.hypot(down, across) > 2 * radius] = 0.0
    near = np.hypot(down, across) < radius
    return _absorbed(found, disc * _depth_of(found, near, rng.uniform(30, 58)))


def _cavity(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """Two outlines that do not share their centre, the space between them filled, in a cloud of Gaussians."""
    size = found.size_px
    radius = rng.uniform(9, 18) * size / 256
    lung = found.outline[place.split()[0]]
    deep = cv2.erode(lung.astype(np.uint8), np.ones((3, 3), np.uint8), iterations=int(0.8 * radius)).astype(bool)
    spot = _point(found.zone(place) & deep, rng)
    if spot is None:
        return None
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)

    def outline(centre: np.ndarray, mean_px: float) -> np.ndarray:
        radii = np.full_like(angles, mean_px)
        for order in (2, 3, 5):
            radii += mean_px * rng.normal(0, 0.05) * np.cos(order * angles + rng.uniform(0, 2 * np.pi))
        points = np.stack([centre[1] + radii * np.cos(angles), centre[0] + radii * np.sin(angles)], 1)
        return np.rint(points * 16).astype(np.int32)

    hollow = rng.uniform(0.5, 0.68)
    shift = rng.uniform(-0.15, 0.15, 2) * radius
    wall = np.zeros((size, size), np.float32)
    cv2.fillPoly(wall, [outline(spot, radius)], 1.0, cv2.LINE_8, shift=4)
    cv2.fillPoly(wall, [outline(spot + shift, hollow * radius)], float(rng.uniform(0.0, 0.18)), cv2.LINE_8, shift=4)
    wall = cv2.GaussianBlur(wall, (0, 0), rng.uniform(1.3, 2.3) * size / 256)
    cloud = sum(
        _normal(found, spot + rng.normal(0, 1.0, 2) * radius, radius * rng.uniform(0.5, 1.0, 2), rng.uniform(0, np.pi))
        for _ in range(3)
    )
    cloud = cloud * (1 - np.clip(1.3 * _normal(found, spot + shift, np.array([hollow, hollow]) * radius, 0.0), 0, 1))
    density = wall + rng.uniform(0.05, 0.25) * cloud
    near = np.zeros_like(lung)
    near[int(spot[0]) - 3 : int(spot[0]) + 4, int(spot[1]) - 3 : int(spot[1]) + 4] = True
    return _absorbed(found, density * _window(found, place.split()[0], 2) * _depth_of(found, near, rng.uniform(28, 52)))


def _consolidation(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """A lobe's worth of the lung filled by a level set of gradient noise, with dark tubes left in it."""
    zone, side, size = found.zone(place), place.split()[0], found.size_px
    rows, columns = np.nonzero(zone)
    if len(rows) < 200:
        return None
    centre = np.array([rows.mean(), columns.mean()]) + rng.uniform(-0.1, 0.1, 2) * [np.ptp(rows), np.ptp(columns)]
    deviations = np.array([np.ptp(rows) * rng.uniform(0.28, 0.42), np.ptp(columns) * rng.uniform(0.3, 0.45)])
    body = _normal(found, centre, deviations, rng.uniform(-0.3, 0.3)) + 0.22 * gradient_noise(size, 7, rng)
    filled = np.clip((body - 0.3) / rng.uniform(0.4, 0.7), 0, 1)
    tubes = np.abs(gradient_noise(size, 11, rng))
    filled *= 1 - rng.uniform(0.15, 0.4) * np.clip(1 - tubes / 0.09, 0, 1)
    density = cv2.GaussianBlur(filled.astype(np.float32), (0, 0), 1.6 * size / 256) * _window(found, side, 3)
    return _absorbed(found, density * _depth_of(found, zone, rng.uniform(42, 75)))
