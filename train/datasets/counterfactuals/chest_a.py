"""Chest findings, family "a": residuals cut from boxed films, noise clouds, and the heart widened by a warp.

A density is added to the film's low-frequency layer and saturates at soft tissue; ribs and vessels lie over it with
less contrast.
"""

from collections.abc import Mapping
from functools import cached_property

import cv2
import numpy as np

from train.datasets.counterfactuals.chest import LEAST_RISE, RATIOS, ChestFamily, Drawer, Drawn, grid, smooth_step
from train.datasets.counterfactuals.lungs import Film, film
from train.datasets.split import Split, boxes, open_split

DONOR_LABELS = ("lung opacity", "pneumonia", "infiltrate")
DONOR_PX = 256
OCTAVES = ((5, 1.0), (10, 0.6), (21, 0.35), (43, 0.2))
"""Cells along a side of the noise grid, and their weight."""


class ChestFindingsA(ChestFamily):
    """See the module."""

    name, half = "a", 0

    def drawers(self) -> Mapping[str, Drawer]:
        """See `ChestFamily.drawers`."""
        return self._drawers

    @cached_property
    def _drawers(self) -> dict[str, Drawer]:
        return {
            "opacity": self._opacity,
            "pleural_effusion": _effusion,
            "cardiomegaly": _cardiomegaly,
            "nodule": _nodule,
            "cavity": _cavity,
            "consolidation": _consolidation,
        }

    @cached_property
    def residuals(self) -> list[np.ndarray]:
        """What an opacity adds inside its box, float32 (h, w) in [0, 1], of this family's training patients."""
        return donor_residuals(open_split("radiology", "train"), self)

    def _opacity(self, found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
        spot = _spot(found, place, rng)
        if spot is None:
            return None
        whole = place.endswith("lung")
        scale = found.size_px / 256
        radius = np.exp(rng.uniform(np.log(11), np.log(44))) * scale
        radii = (radius * rng.uniform(0.75, 1.1), radius * rng.uniform(0.85, 1.35))
        if whole:
            radii = (rng.uniform(35, 50) * scale, rng.uniform(70, 95) * scale)
        if self.residuals and rng.random() < 0.5:
            shape = self._transplanted(spot, radii, found.size_px, rng)
        else:
            shape = _cloud(spot, radii, found.size_px, rng)
        return _laid(found, shape * _lung(found, place), rng.uniform(30, 78), rng)

    def _transplanted(
        self, spot: tuple[float, float], radii: tuple[float, float], size_px: int, rng: np.random.Generator
    ) -> np.ndarray:
        residual = self.residuals[int(rng.integers(len(self.residuals)))]
        height, width = residual.shape
        turned = np.deg2rad(rng.uniform(-25, 25))
        across, down = 2 * radii[0] / width, 2 * radii[1] / height
        turn = np.array([[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]])
        linear = turn @ np.diag([across, down])
        shift = np.array([spot[1], spot[0]]) - linear @ np.array([width / 2, height / 2])
        moved = cv2.warpAffine(residual, np.column_stack([linear, shift]), (size_px, size_px), flags=cv2.INTER_LINEAR)
        return moved * (1 + 0.15 * noise(size_px, rng))


def donor_residuals(split: Split, family: ChestFamily) -> list[np.ndarray]:
    """The residuals of boxed opacities in a split: blurred film less the background beside the box, feathered."""
    found = []
    lungs = family.lungs(split)
    for index in np.nonzero(split.halves == family.half)[0]:
        marked = [box for box in boxes(split.records[index]) if box["label"] in DONOR_LABELS]
        donor = film(split.image(int(index), DONOR_PX), lungs[index]) if marked else None
        if donor is not None:
            found += [residual for box in marked if (residual := _residual(donor, box)) is not None]
    return found


def _residual(donor: Film, box: dict) -> np.ndarray | None:
    left, top = round(box["x"] * DONOR_PX), round(box["y"] * DONOR_PX)
    right, bottom = round((box["x"] + box["w"]) * DONOR_PX), round((box["y"] + box["h"]) * DONOR_PX)
    blurred = cv2.GaussianBlur(donor.grey, (0, 0), 3.5)[top:bottom, left:right]
    inside = np.maximum(*donor.lungs.values())[top:bottom, left:right]
    height, width = blurred.shape
    if min(height, width) < 16 or (inside > 0.5).mean() < 0.5:
        return None
    # Illumination: a plane through the darker half of the lung inside the box.
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    dark = (inside > 0.5) & (blurred <= np.median(blurred[inside > 0.5]))
    terms = np.stack([np.ones(dark.sum(), np.float32), rows[dark] / height - 0.5, columns[dark] / width - 0.5], 1)
    plane = np.linalg.lstsq(terms, blurred[dark], rcond=None)[0]
    level = np.percentile(blurred[dark], 20) + 0.5 * (
        plane[1] * (rows / height - 0.5) + plane[2] * (columns / width - 0.5)
    )
    radius = np.hypot((rows + 0.5) / height - 0.5, (columns + 0.5) / width - 0.5) * 2
    feather = smooth_step(radius, 1.02, 0.45) * np.clip(inside * 1.5, 0, 1)
    residual = np.clip(blurred - level, 0, None) * feather
    peak = float(np.percentile(residual, 97))
    if peak < 10:
        return None
    # A part is even density: vessels and ribs that remain would read as rings and stripes.
    return (0.6 * np.clip(residual / peak, 0, 1.2) + 0.4 * feather).astype(np.float32)


def noise(size_px: int, rng: np.random.Generator) -> np.ndarray:
    """Cloud noise of several scales, float32 (S, S), mean 0 and deviation 1."""
    half = size_px // 2
    total = np.zeros((half, half), np.float32)
    for cells, weight in OCTAVES:
        coarse = rng.standard_normal((cells, cells), np.float32)
        total += weight * cv2.resize(coarse, (half, half), interpolation=cv2.INTER_CUBIC)
    return cv2.resize((total - total.mean()) / total.std(), (size_px, size_px), interpolation=cv2.INTER_LINEAR)


def _spot(found: Film, place: str, rng: np.random.Generator) -> tuple[float, float] | None:
    """A pixel (row, column) of the place, off the lung's rim."""
    zone = found.zone(place)
    if place.endswith("lung"):
        rows, columns = np.nonzero(zone)
        return float(rows.mean()), float(columns.mean())
    depth = cv2.distanceTransform(zone.astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rows, columns = np.nonzero(depth > 0.4 * depth.max())
    if len(rows) < 20:
        return None
    chosen = int(rng.integers(len(rows)))
    return float(rows[chosen]), float(columns[chosen])


def _lung(found: Film, place: str) -> np.ndarray:
    return smooth_step(cv2.GaussianBlur(found.lungs[place.split()[0]], (0, 0), 1.5 * found.size_px / 256), 0.1, 0.95)


def _radius(
    spot: tuple[float, float], radii: tuple[float, float], size_px: int, rng: np.random.Generator, turn: float = 0.6
) -> np.ndarray:
    """Distance from the spot as a share of the ellipse's radii (across, down), float32 (S, S)."""
    rows, columns = grid(size_px)
    angle = rng.uniform(-turn, turn)
    down, across = rows - spot[0], columns - spot[1]
    along = np.cos(angle) * across + np.sin(angle) * down
    beside = -np.sin(angle) * across + np.cos(angle) * down
    return np.hypot(along / radii[0], beside / radii[1]).astype(np.float32)


def _cloud(spot: tuple[float, float], radii: tuple[float, float], size_px: int, rng: np.random.Generator) -> np.ndarray:
    """A patchy cloud with a ragged, soft border, float32 (S, S) in about [0, 1]."""
    outer, inner = noise(size_px, rng), noise(size_px, rng)
    border = _radius(spot, radii, size_px, rng) * (1 + rng.uniform(0.1, 0.3) * outer)
    patchy = rng.uniform(0.08, 0.28)
    return smooth_step(border, 1.15, rng.uniform(0.1, 0.5)) * np.clip(0.85 + patchy * inner, 0.1, 1.3)


def _laid(found: Film, density: np.ndarray, levels: float, rng: np.random.Generator) -> Drawn:
    """A density float32 (S, S) in about [0, 1] laid under ribs and vessels; `levels` is its peak in grey levels."""
    density = np.where(density < 0.02, 0.0, density).astype(np.float32)
    room = np.maximum(found.tissue + 12 - found.low, 0.3 * levels)
    rise = room * (1 - np.exp(-levels * density / room))
    kept = 1 - rng.uniform(0.25, 0.5) * np.clip(density, 0, 1)
    return Drawn(found.low + rise + (found.grey - found.low) * kept, rise)


def _filled(found: Film, amount: np.ndarray, level: float | np.ndarray, detail: float) -> Drawn:
    """The film brought towards a grey level by `amount` in [0, 1]; `detail` of ribs and vessels stays there."""
    amount = np.where(amount < 0.02, 0.0, amount).astype(np.float32)
    low = found.low + amount * np.maximum(level - found.low, 0)
    return Drawn(low + (found.grey - found.low) * (1 - (1 - detail) * amount), amount)


def _effusion(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """Fluid up to a meniscus that rises to the chest wall; the diaphragm and the costophrenic angle are hidden."""
    side = place.split()[0]
    size = found.size_px
    rows, inner, outer = found.borders[side]
    height, bottom = len(rows), rows[-1]
    depth = np.exp(rng.uniform(np.log(0.17), np.log(0.5)))
    at_wall = bottom - depth * height
    rise = height * rng.uniform(0.1, 0.2) * (0.6 + depth)
    base = rows > bottom - (depth + 0.2) * height
    wall, heart = float(np.median(outer[base])), float(np.median(inner[base]))
    row_grid, column_grid = grid(size)
    across = np.clip((column_grid - wall) / (heart - wall), 0, 1)
    surface = at_wall + rise * (1 - (1 - across) ** rng.uniform(1.8, 3.0))
    soft = rng.uniform(4, 9) * size / 256
    under = smooth_step(row_grid - surface, -soft, soft)
    # Under the lung's lowest point, so that fluid and abdomen are one and the diaphragm is lost between them.
    below = found.low[min(bottom + 4, size - 2) : min(bottom + 16, size)].mean(axis=0, keepdims=True)
    level = np.clip(cv2.GaussianBlur(below, (0, 0), 8 * size / 256), found.tissue - 22, found.tissue + 22)
    dense = np.clip(0.75 + 0.3 * (row_grid - surface) / (0.3 * height), 0.65, 0.97)
    amount = under * dense * _hemithorax(found, side, bottom)
    amount = np.where(amount < 0.02, 0.0, amount).astype(np.float32)
    kept = 1 - (1 - rng.uniform(0.3, 0.55)) * amount
    return Drawn(found.low + amount * (level - found.low) + (found.grey - found.low) * kept, amount)


def _hemithorax(found: Film, side: str, bottom: int) -> np.ndarray:
    """The lung with its recess along the chest wall and the dome below it, float32 (S, S) in [0, 1]."""
    size = found.size_px
    mask = found.outline[side].astype(np.uint8)
    reach = max(3, round(5 * size / 256))
    wide = cv2.dilate(mask, cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (reach, reach)))
    # Columns are filled below the lung: the dome of the diaphragm, which the fluid hides.
    filled = np.maximum.accumulate(wide, axis=0).astype(np.float32)
    fade = smooth_step(grid(size)[0], bottom + 12 * size / 256, bottom - 4 * size / 256)
    return cv2.GaussianBlur(filled, (0, 0), 2.0 * size / 256) * fade


def _cardiomegaly(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """The heart's borders moved out, mostly to the left, until the cardiothoracic ratio is 0.55 to 0.65."""
    size = found.size_px
    heart, wanted = found.heart, rng.uniform(0.56, 0.66)
    if heart is None or not RATIOS[0] <= heart.ratio <= wanted - LEAST_RISE:
        return None
    widen, share = (wanted - heart.ratio) * heart.chest_px, rng.uniform(0.62, 0.82)
    # The move grows from the hilum to the apex of the heart, and goes on a little under the diaphragm.
    at = (np.arange(size, dtype=np.float32) - heart.top) / (heart.bottom - heart.top)
    profile = smooth_step(at, 0.22, 0.7) * smooth_step(at, 1.3, 0.98)
    index = np.clip(np.arange(size), heart.top, heart.bottom) - heart.top
    columns = np.arange(size, dtype=np.float32)[None, :]
    shift, inside = np.zeros((size, size), np.float32), ((at >= 0.4) & (at <= 1.0))[:, None].repeat(size, 1)
    for sign, border, wall, moved in (
        (1.0, heart.left, heart.left_wall, widen * share),
        (-1.0, heart.right, heart.right_wall, widen * (1 - share)),
    ):
        edge, limit = (sign * (line[index][:, None] - heart.middle) for line in (border, wall))
        move = np.minimum(moved * profile[:, None], 0.7 * np.clip(limit - edge, 0, None))
        peak, start, out = edge + move, 0.02 * size, sign * (columns - heart.middle)
        medial = np.clip((out - start) / np.maximum(peak - start, 1), 0, 1)
        lateral = np.clip((limit - out) / np.maximum(limit - peak, 1), 0, 1)
        shift += sign * move * (0.5 - 0.5 * np.cos(np.pi * np.minimum(medial, lateral)))
        inside &= out <= peak
    rows_map = np.repeat(np.arange(size, dtype=np.float32)[:, None], size, 1)
    widened = cv2.remap(
        found.grey, (columns - shift).astype(np.float32), rows_map, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    return Drawn(widened, inside.astype(np.float32))


def _nodule(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """A ball, 8 to 25 px across at 256 px: the thickness of a sphere, slightly lobed."""
    radius = rng.uniform(4.5, 12.5) * found.size_px / 256
    spot = _inner_spot(found, place, radius, rng)
    if spot is None:
        return None
    lobed = 1 + rng.uniform(0.02, 0.09) * noise(found.size_px, rng)
    distance = _radius(spot, (radius, radius * rng.uniform(0.85, 1.1)), found.size_px, rng, turn=np.pi) * lobed
    ball = np.sqrt(np.clip(1 - distance**2, 0, 1))
    return _laid(found, cv2.GaussianBlur(ball, (0, 0), 1.0), rng.uniform(35, 75), rng)


def _inner_spot(found: Film, place: str, radius: float, rng: np.random.Generator) -> tuple[float, float] | None:
    """A pixel of the place so far inside the lung that a disc of the radius fits."""
    lung = found.outline[place.split()[0]].astype(np.uint8)
    depth = cv2.distanceTransform(lung, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    rows, columns = np.nonzero(found.zone(place) & (depth > radius + 1))
    if len(rows) == 0:
        return None
    chosen = int(rng.integers(len(rows)))
    return float(rows[chosen]), float(columns[chosen])


def _cavity(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """A ring of uneven thickness around a lucent centre, in a faint haze."""
    scale = found.size_px / 256
    radius = rng.uniform(9, 19) * scale
    spot = _inner_spot(found, place, 0.85 * radius, rng)
    if spot is None:
        return None
    size = found.size_px
    uneven = noise(size, rng)
    distance = _radius(spot, (radius, radius * rng.uniform(0.8, 1.15)), size, rng, turn=np.pi) * (1 + 0.07 * uneven)
    wall = rng.uniform(0.3, 0.5)
    outer = np.sqrt(np.clip(1 - distance**2, 0, 1))
    inner = np.sqrt(np.clip(1 - (distance / (1 - wall)) ** 2, 0, 1))
    ring = cv2.GaussianBlur((outer - rng.uniform(0.72, 0.95) * inner).astype(np.float32), (0, 0), 1.0 * scale)
    haze = smooth_step(distance * (1 + 0.15 * noise(size, rng)), 2.4, 0.9) * rng.uniform(0.05, 0.35)
    haze *= 1 - 0.8 * smooth_step(distance, 1 - wall + 0.1, 1 - wall - 0.25)
    return _laid(found, (ring / ring.max() + haze) * _lung(found, place), rng.uniform(45, 85), rng)


def _consolidation(found: Film, place: str, rng: np.random.Generator) -> Drawn | None:
    """A dense lobe: nearly as bright as soft tissue, often cut off by a fissure, with air in the bronchi."""
    zone = found.zone(place)
    rows, columns = np.nonzero(zone)
    if len(rows) < 200:
        return None
    size = found.size_px
    height, width = rows.max() - rows.min() + 1, columns.max() - columns.min() + 1
    spot = (rows.mean() + rng.uniform(-0.12, 0.12) * height, columns.mean() + rng.uniform(-0.15, 0.15) * width)
    radii = (width * rng.uniform(0.45, 0.7), height * rng.uniform(0.5, 0.72))
    border = _radius(spot, radii, size, rng) * (1 + 0.16 * noise(size, rng))
    shape = smooth_step(border, 1.15, rng.uniform(0.35, 0.7))
    row_grid, column_grid = grid(size)
    if rng.random() < 0.6:
        # The fissure is the lower border of an upper lobe and the upper border of the others.
        slope, upper = rng.uniform(-0.25, 0.25), "upper" in place
        fissure = spot[0] + (0.75 if upper else -0.75) * radii[1] * rng.uniform(0.7, 1.0)
        over = (row_grid - fissure - slope * (column_grid - spot[1])) * (-1 if upper else 1)
        soft = rng.uniform(2.5, 6) * size / 256
        shape = shape * smooth_step(over, -soft, soft)
    uneven = np.clip(0.9 + rng.uniform(0.04, 0.12) * noise(size, rng), 0.3, 1.05)
    air = 1 - rng.uniform(0.1, 0.3) * _bronchi(found, place, spot, rng)
    amount = np.clip(shape * uneven * air * rng.uniform(0.6, 0.88), 0, 1)
    # No brighter than what else is bright at this height, so that an upper lobe of a dark film stays one.
    level = min(found.tissue, float(np.percentile(found.low[rows.min() : rows.max() + 1], 85)))
    return _filled(found, amount * _lung(found, place), level + rng.uniform(-8, 6), rng.uniform(0.5, 0.75))


def _bronchi(found: Film, place: str, spot: tuple[float, float], rng: np.random.Generator) -> np.ndarray:
    """Branching air-filled tubes from the hilum into the lobe, float32 (S, S) in [0, 1]."""
    size = found.size_px
    rows, columns = np.nonzero(found.outline[place.split()[0]])
    inner = columns.max() if place.startswith("right") else columns.min()
    start = np.array([0.85 * inner + 0.15 * columns.mean(), rows.min() + 0.5 * (rows.max() - rows.min())])
    canvas = np.zeros((size, size), np.float32)
    for _ in range(int(rng.integers(3, 6))):
        end = np.array([spot[1], spot[0]]) + rng.normal(0, 0.07 * size, 2)
        bend = (start + end) / 2 + rng.normal(0, 0.03 * size, 2)
        along = np.linspace(0, 1, 12)[:, None]
        line = (1 - along) ** 2 * start + 2 * along * (1 - along) * bend + along**2 * end
        cv2.polylines(canvas, [np.rint(line * 16).astype(np.int32)], False, 1.0, 2, cv2.LINE_AA, shift=4)
    return cv2.GaussianBlur(canvas, (0, 0), 0.9 * size / 256)
