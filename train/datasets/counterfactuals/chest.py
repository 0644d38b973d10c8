"""What both families of composed chest findings share: which films take one, where it goes, and what the records say.

The patient's right is on the image's left, and no film is ever mirrored.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import cv2
import numpy as np

from medviz.domains.base import items
from medviz.domains.chest_findings import NO_FINDING
from medviz.domains.lung_places import LEVELS, LOCATIONS, SIDES, box_locations
from medviz.errors import InputError
from train.datasets.counterfactuals.base import Counterfactual
from train.datasets.counterfactuals.lungs import Film, film, lung_labels, plausible
from train.datasets.split import Split, boxes

ZONES = tuple(f"{side} {level} zone" for level in LEVELS for side in SIDES)
WHOLE = tuple(f"{side} lung" for side in SIDES)
PLACES: dict[str, tuple[str, ...]] = {
    "opacity": LOCATIONS,
    "pleural_effusion": WHOLE,
    "cardiomegaly": (),
    "nodule": ZONES,
    "cavity": tuple(zone for zone in ZONES if "lower" not in zone),
    "consolidation": ZONES,
}
"""Attribute -> the places it may be asked for at; none for a finding that has no side."""
LABELS = {"opacity": "lung opacity", "pleural_effusion": "effusion"}
"""Attribute -> its label in `findings` and `boxes`, where that is not its own name."""
WORDS = {
    "pleural_effusion": "pleural effusion",
    "nodule": "nodule",
    "cavity": "cavity",
    "consolidation": "consolidation",
}
"""Attributes that captions word by the record's `finding_places`, not by its boxes."""
ANATOMY = ("right lung", "left lung")
PLAIN = 10.0
"""Change in grey levels from which on a mask is 1."""
LEAST_CHANGE = 10.0
"""Grey levels by which at least LEAST_AREA of the film must change."""
LEAST_AREA = 0.0006
"""Share of the film: a disc of 7 px at 256 px."""
RATIOS, LEAST_RISE = (0.34, 0.66), 0.06
"""Cardiothoracic ratios between which borders are believed, and by how much a drawn cardiomegaly raises the ratio."""
TRIES = 4


@dataclass(frozen=True)
class Drawn:
    """grey: float32 (S, S), the film with the finding. extent: float32 (S, S), how much of it lies where, 0 to 1."""

    grey: np.ndarray
    extent: np.ndarray


Drawer = Callable[[Film, str, np.random.Generator], Drawn | None]
"""(film, place, rng) -> the film with the finding there; None where it does not fit."""


class ChestFamily(ABC):
    """A `Family` of composed findings on films without finding.

    half: of the train split's patients (`Split.halves`) that films and donors come from; other splits are used whole.
    """

    name: str
    half: int
    attributes: tuple[str, ...] = tuple(PLACES)

    def __init__(self) -> None:
        self._lungs: dict[int, tuple[Split, np.ndarray]] = {}

    @abstractmethod
    def drawers(self) -> Mapping[str, Drawer]:
        """Attribute -> what draws it."""

    def eligible(self, split: Split, attribute: str) -> np.ndarray:
        """See `Family.eligible`: films without finding whose lungs are known, of this family's patients."""
        self._check(attribute)
        clear = np.array([_is_clear(record) for record in split.records], bool)
        if split.name == "train":
            clear &= split.halves == self.half
        lungs = self.lungs(split)
        return np.array([index for index in np.nonzero(clear)[0] if plausible(lungs[index])], np.int64)

    def add(
        self,
        split: Split,
        index: int,
        attribute: str,
        rng: np.random.Generator,
        size_px: int = 256,
        place: str | None = None,
    ) -> Counterfactual | None:
        """See `Family.add`. A place is drawn from PLACES[attribute] where none is given."""
        self._check(attribute, place)
        record = split.records[index]
        if not _is_clear(record):
            return None
        found = film(split.image(index, size_px), self.lungs(split)[index])
        if found is None:
            return None
        for _ in range(TRIES):
            where = place if place is not None else _any_place(attribute, rng)
            drawn = self.drawers()[attribute](found, where, rng)
            pair = None if drawn is None else _paired(found, drawn)
            if pair is None:
                continue
            without, image, mask, box = pair
            if attribute not in ("pleural_effusion", "cardiomegaly") and box_locations(box) != (where,):
                continue
            return Counterfactual(
                without, image, mask, dict(record), _described(record, attribute, where, box), attribute, where
            )
        return None

    def lungs(self, split: Split) -> np.ndarray:
        """`lung_labels` of a split, read once."""
        # The split is kept with its lungs, so that its id is its own.
        if id(split) not in self._lungs:
            self._lungs[id(split)] = (split, lung_labels(split))
        return self._lungs[id(split)][1]

    def _check(self, attribute: str, place: str | None = None) -> None:
        if attribute not in self.attributes:
            raise InputError(f"family {self.name!r} draws no {attribute!r}; it draws {', '.join(self.attributes)}")
        if place is not None and place not in PLACES[attribute]:
            allowed = ", ".join(PLACES[attribute]) or "no place"
            raise InputError(f"{attribute} cannot be drawn at {place!r}; allowed: {allowed}")


def _is_clear(record: Mapping[str, Any]) -> bool:
    findings = {box["label"] for box in boxes(record)} - set(ANATOMY)
    return items(record.get("findings")) == [NO_FINDING] and not findings


def _any_place(attribute: str, rng: np.random.Generator) -> str:
    places = PLACES[attribute]
    if not places:
        return ""
    # A whole lung is rarer than a zone.
    weights = np.array([0.3 if place in WHOLE and len(places) > 2 else 1.0 for place in places])
    return str(places[int(rng.choice(len(places), p=weights / weights.sum()))])


def _paired(found: Film, drawn: Drawn) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, float]] | None:
    """(without, image, mask, box in fractions) of what was drawn; None where the picture hardly changes."""
    change = np.clip(drawn.grey, 0, 255) - found.grey
    if (np.abs(change) >= LEAST_CHANGE).mean() < LEAST_AREA:
        return None
    image = np.rint(found.grey + change).astype(np.uint8)
    without = found.grey.astype(np.uint8)
    changed = image != without
    soft = np.clip(cv2.GaussianBlur(np.abs(change), (0, 0), 1.0) / PLAIN, 0.0, 1.0)
    mask = np.where(changed, np.maximum(soft, 0.02), 0.0).astype(np.float32)
    extent = drawn.extent >= 0.35 * float(drawn.extent.max())
    rows, columns = np.nonzero(extent.any(axis=1))[0], np.nonzero(extent.any(axis=0))[0]
    size = found.size_px
    box = {
        "x": round(float(columns[0]) / size, 4),
        "y": round(float(rows[0]) / size, 4),
        "w": round(float(columns[-1] + 1 - columns[0]) / size, 4),
        "h": round(float(rows[-1] + 1 - rows[0]) / size, 4),
    }
    return np.repeat(without[..., None], 3, 2), np.repeat(image[..., None], 3, 2), mask, box


def _described(record: Mapping[str, Any], attribute: str, place: str, box: Mapping[str, float]) -> dict[str, Any]:
    """The record of a film without finding, with the finding, its box and its place added."""
    label = LABELS.get(attribute, attribute)
    described = dict(record)
    described["findings"] = json.dumps([label])
    described["boxes"] = json.dumps([*boxes(record), {"label": label, **box}])
    if attribute in WORDS:
        described["finding_places"] = json.dumps({WORDS[attribute]: [place]})
    return described


@cache
def grid(size_px: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a square film, float32 (S, 1) and (1, S)."""
    line = np.arange(size_px, dtype=np.float32)
    return line[:, None], line[None, :]


def smooth_step(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 at `low`, 1 at `high`, smooth between; `low` may be the larger."""
    t = np.clip((x - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)
