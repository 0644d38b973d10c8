"""Where each named place of a chest X-ray lies: a mean anatomy as Gaussians, or one patient's own from lung masks.

A place is one Gaussian, or two where it is a pair, with mu the centre of its mean box and sigma a sixth of the box's
sides (arXiv 2506.10633, which takes one Gaussian for every location from averaged boxes). Coordinates are fractions of
the image, origin top left; sides are the patient's, so the patient's left lies at great x.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf

from medviz.domains.chest_places import BILATERAL, DIFFUSE, HEART, MEDIASTINUM, PLACES, mirrored_place
from medviz.domains.lung_places import LEVELS, SIDES
from medviz.errors import InputError, ModelError
from medviz.grounding.anatomy import lung_regions
from medviz.models.manifest import read_json

if TYPE_CHECKING:
    from medviz.grounding.anatomy import Mask

ATLAS_NAME = "atlas.json"
FORMAT_VERSION = 1
SIGMAS_A_SIDE = 6.0

# Fractions of a lung's height and width.
TIP = 0.2  # apex and base: the first and the last fifth
HILUM_ROWS, HILUM_WIDTH = (0.35, 0.60), 0.35
ANGLE_WIDTH, ANGLE_HEIGHT = 0.30, 0.20
HEART_BEGINS = 0.45  # of the height of the mediastinum between the lungs


@dataclass(frozen=True)
class Box:
    """x0, y0, x1, y1: fractions of the image, origin top left, ends exclusive."""

    x0: float
    y0: float
    x1: float
    y1: float


@dataclass(frozen=True)
class Gaussian:
    """exp(-(x - mu_x)^2 / (2 sigma_x^2) - (y - mu_y)^2 / (2 sigma_y^2)), peak 1; all in fractions of the image."""

    mu_x: float
    mu_y: float
    sigma_x: float
    sigma_y: float

    def __post_init__(self) -> None:
        numbers = (self.mu_x, self.mu_y, self.sigma_x, self.sigma_y)
        if not all(math.isfinite(value) for value in numbers) or min(self.sigma_x, self.sigma_y) <= 0:
            raise InputError(f"a Gaussian needs finite numbers and sigma > 0, found {numbers}")

    def heat(self, grid_hw: tuple[int, int]) -> NDArray[np.float32]:
        """Mean of the Gaussian over every cell of a grid: float32 (h, w) in [0, 1].

        The mean, not the value at the centre: a place smaller than a cell is still there on a coarse grid.
        """
        rows = _cell_means(self.mu_y, self.sigma_y, grid_hw[0])
        columns = _cell_means(self.mu_x, self.sigma_x, grid_hw[1])
        return np.outer(rows, columns).astype(np.float32)

    def jittered(self, rng: np.random.Generator, amount: float) -> Gaussian:
        """Moved by at most `amount` of the image's side, its sigma scaled by 1 +- `amount`, each uniformly."""
        shift_x, shift_y, scale_x, scale_y = rng.uniform(-amount, amount, 4)
        return Gaussian(
            self.mu_x + shift_x, self.mu_y + shift_y, self.sigma_x * (1 + scale_x), self.sigma_y * (1 + scale_y)
        )

    def widened(self, factor: float) -> Gaussian:
        """The Gaussian with its sigmas times `factor`, greater than 0."""
        return Gaussian(self.mu_x, self.mu_y, self.sigma_x * factor, self.sigma_y * factor)

    def mirrored(self) -> Gaussian:
        """The Gaussian in the image mirrored left to right."""
        return Gaussian(1.0 - self.mu_x, self.mu_y, self.sigma_x, self.sigma_y)

    def holds(self, x: float, y: float) -> bool:
        """Whether a point lies in the box that the Gaussian stands for."""
        reach = SIGMAS_A_SIDE / 2
        return abs(x - self.mu_x) <= reach * self.sigma_x and abs(y - self.mu_y) <= reach * self.sigma_y


def _cell_means(mu: float, sigma: float, cells: int) -> NDArray[np.float64]:
    edges = (np.arange(cells + 1) / cells - mu) / (sigma * math.sqrt(2.0))
    return sigma * math.sqrt(math.pi / 2.0) * np.diff(erf(edges)) * cells


@dataclass(frozen=True)
class Atlas:
    """places: name -> its Gaussians. fitted_on: name -> number of images; details: where they came from."""

    places: Mapping[str, tuple[Gaussian, ...]]
    fitted_on: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def heat(
        self,
        names: Sequence[str],
        grid_hw: tuple[int, int],
        *,
        jitter: float = 0.0,
        rng: np.random.Generator | None = None,
        spread: float = 1.0,
    ) -> NDArray[np.float32]:
        """G of arXiv 2506.10633 for one or several places: the greatest of their Gaussians, float32 (h, w) in [0, 1].

        jitter: see `Gaussian.jittered`; it needs `rng`. spread: see `Gaussian.widened`. Raises InputError for no place,
        or one the atlas lacks.
        """
        if not names:
            raise InputError("an atlas needs at least one place to look up, found none")
        if jitter < 0 or (jitter > 0 and rng is None):
            raise InputError(f"jitter must be at least 0 and needs a generator when it is not 0, found {jitter}")
        chosen = [gaussian.widened(spread) for name in names for gaussian in self.gaussians(name)]
        if rng is not None and jitter > 0:
            chosen = [gaussian.jittered(rng, jitter) for gaussian in chosen]
        return np.max([gaussian.heat(grid_hw) for gaussian in chosen], axis=0)

    def gaussians(self, name: str) -> tuple[Gaussian, ...]:
        """The Gaussians of one place. Raises InputError naming the places there are."""
        if name not in self.places:
            raise InputError(f"the atlas has no place {name!r}; it has {', '.join(self.places) or 'none'}")
        return self.places[name]

    def mirrored(self) -> Atlas:
        """The atlas of a mirrored image: what was the right lung's place is now called the left lung's."""
        turned = {
            mirrored_place(name): tuple(gaussian.mirrored() for gaussian in reversed(gaussians))
            for name, gaussians in self.places.items()
        }
        counts = {mirrored_place(name): count for name, count in self.fitted_on.items()}
        return Atlas({name: turned[name] for name in PLACES if name in turned}, counts, self.details)

    def write(self, path: Path) -> None:
        """Write the atlas as JSON; the same atlas gives the same file."""
        content = {
            "format_version": FORMAT_VERSION,
            "unit": "fractions of the image, origin top left; sides are the patient's",
            "places": {name: [asdict(gaussian) for gaussian in found] for name, found in self.places.items()},
            "fitted_on": dict(self.fitted_on),
            "details": dict(self.details),
        }
        path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Atlas:
        """Read what `write` wrote. Raises ModelError, naming the file, when it is missing, damaged or another's."""
        content = read_json(path)
        if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
            raise ModelError(f"{path} is no atlas of the format version {FORMAT_VERSION}")
        try:
            places = {
                str(name): tuple(Gaussian(**{key: float(value) for key, value in each.items()}) for each in found)
                for name, found in content["places"].items()
            }
            counts = {str(name): int(count) for name, count in content["fitted_on"].items()}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{path} is damaged: {error}") from error
        unknown = sorted(set(places) - set(PLACES))
        if unknown or not all(places.values()):
            raise ModelError(f"{path} is damaged: unknown places {unknown}, or a place without a Gaussian")
        return cls(places, counts, content.get("details", {}))

    @classmethod
    def of_boxes(
        cls, found: Iterable[Mapping[str, tuple[Box, ...]]], details: Mapping[str, Any] | None = None
    ) -> Atlas:
        """The atlas of the boxes found in one image or in many: mu the mean centre, sigma a sixth of the mean side.

        found: for each image, place -> its boxes, as `place_boxes` gives them. A place that no image has is missing.
        """
        corners: dict[str, list[list[tuple[float, float, float, float]]]] = {}
        for boxes in found:
            for name, several in boxes.items():
                corners.setdefault(name, []).append([(box.x0, box.y0, box.x1, box.y1) for box in several])
        places = {}
        for name in (name for name in PLACES if name in corners):
            means = np.mean(corners[name], axis=0)
            places[name] = tuple(
                Gaussian(
                    float(x0 + x1) / 2,
                    float(y0 + y1) / 2,
                    float(x1 - x0) / SIGMAS_A_SIDE,
                    float(y1 - y0) / SIGMAS_A_SIDE,
                )
                for x0, y0, x1, y1 in means
            )
        return cls(places, {name: len(corners[name]) for name in places}, details or {})


def place_boxes(right: Mask, left: Mask, *, outlined: bool = True) -> dict[str, tuple[Box, ...]]:
    """The boxes of every place that follows from both lungs; a pair has two, all others one.

    right, left: bool (H, W), the patient's sides. outlined: whether the masks follow the lungs' outline; from lungs
    that are mere rectangles neither the costophrenic angles nor heart and mediastinum follow.
    Empty where a lung was not found or lies on the wrong side, as `anatomy.lung_regions` tells.
    """
    regions = lung_regions(right, left).regions
    if not all(f"{side}_lung" in regions for side in SIDES):
        return {}
    boxes: dict[str, tuple[Box, ...]] = {}
    for side in SIDES:
        lung = regions[f"{side}_lung"]
        boxes[f"{side} lung"] = (_box(lung),)
        for level in LEVELS:
            if regions[f"{side}_{level}_zone"].any():
                boxes[f"{side} {level} zone"] = (_box(regions[f"{side}_{level}_zone"]),)
        boxes[f"{side} apex"] = (_box(_rows(lung, 0.0, TIP)),)
        boxes[f"{side} base"] = (_box(_rows(lung, 1.0 - TIP, 1.0)),)
        boxes[f"{side} hilum"] = (_hilum(lung, inner_right=side == SIDES[0]),)
        if outlined:
            boxes[f"{side} costophrenic angle"] = (_angle(lung, inner_right=side == SIDES[0]),)
    if outlined and MEDIASTINUM in regions:
        boxes[MEDIASTINUM] = (_box(regions[MEDIASTINUM]),)
        boxes[HEART] = (_box(_rows(regions[MEDIASTINUM], HEART_BEGINS, 1.0)),)
    boxes[BILATERAL] = tuple(boxes[f"{side} lung"][0] for side in SIDES)
    boxes[DIFFUSE] = (_box(regions["right_lung"] | regions["left_lung"]),)
    return boxes


def _box(mask: Mask) -> Box:
    """The smallest box around a mask that is not empty."""
    rows, columns = np.nonzero(mask.any(axis=1))[0], np.nonzero(mask.any(axis=0))[0]
    height, width = mask.shape
    return Box(
        float(columns[0]) / width,
        float(rows[0]) / height,
        float(columns[-1] + 1) / width,
        float(rows[-1] + 1) / height,
    )


def _rows(mask: Mask, begin: float, end: float) -> Mask:
    """The part of a mask between two fractions of its own height; at least one row."""
    rows = np.nonzero(mask.any(axis=1))[0]
    first, height = int(rows[0]), int(rows[-1] - rows[0] + 1)
    top = min(first + round(begin * height), int(rows[-1]))
    bottom = max(first + round(end * height), top + 1)
    part = np.zeros_like(mask)
    part[top:bottom] = mask[top:bottom]
    return part if part.any() else mask


def _hilum(lung: Mask, inner_right: bool) -> Box:
    """The inner part of a lung's middle height; inner_right: the inner side is the image's right."""
    whole, middle = _box(lung), _box(_rows(lung, *HILUM_ROWS))
    width = HILUM_WIDTH * (whole.x1 - whole.x0)
    x0 = middle.x1 - width if inner_right else middle.x0
    return Box(x0, middle.y0, x0 + width, middle.y1)


def _angle(lung: Mask, inner_right: bool) -> Box:
    """A box around the lowest point of the outer half of a lung."""
    whole = _box(lung)
    height, width = lung.shape
    middle = round((whole.x0 + whole.x1) / 2 * width)
    outer = lung.copy()
    outer[:, slice(middle, None) if inner_right else slice(None, middle)] = False
    if not outer.any():
        outer = lung
    row = int(np.nonzero(outer.any(axis=1))[0][-1])
    x, y = (float(np.nonzero(outer[row])[0].mean()) + 0.5) / width, (row + 0.5) / height
    half_w, half_h = ANGLE_WIDTH * (whole.x1 - whole.x0) / 2, ANGLE_HEIGHT * (whole.y1 - whole.y0) / 2
    return Box(x - half_w, y - half_h, x + half_w, y + half_h)
