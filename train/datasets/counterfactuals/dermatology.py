"""Artefacts added to dermoscopic images: which images may take one, the exact mask, the records of both pictures.

How an artefact is drawn is the families' own: `family_a` and `family_b` bring one painter an attribute.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from medviz.domains.dermatology import SURE_ABSENT
from medviz.domains.image_places import IMAGE_PLACES
from medviz.errors import InputError
from medviz.evidence.places import place_of
from train.datasets.counterfactuals.base import Counterfactual
from train.datasets.counterfactuals.templates import Painter, read_templates
from train.datasets.split import Split
from train.datasets.visible import SIDE_PX, UNSEEN, hair_length

ATTRIBUTES = ("ruler", "gel_bubble", "hair", "ink")
LABELLED_BY_HAND = ("manual", "rl4med")
ATTEMPTS = 4
"""How often an addition is drawn until it is plain and lies at the place that was asked for."""
PLAIN_LEVELS = 16
"""Difference in grey levels that counts as a change of a pixel."""
LEAST_CHANGED = {"ruler": 110, "gel_bubble": 70, "hair": 180, "ink": 80}
"""Pixels of 256 x 256 that must change by PLAIN_LEVELS, or the addition is drawn again."""
MOST_CHANGED = 0.45
"""Share of the picture that an addition may change by PLAIN_LEVELS."""


def mask_of(without: np.ndarray, image: np.ndarray) -> np.ndarray:
    """float32 (S, S) in [0, 1]: above 0 wherever two uint8 pictures differ, 1 where they differ plainly."""
    difference = _difference(without, image).astype(np.float32)
    changed = difference[difference >= PLAIN_LEVELS]
    plain = np.clip(0.5 * np.percentile(changed, 90), PLAIN_LEVELS, 48) if changed.size else PLAIN_LEVELS
    return np.minimum(difference / np.float32(plain), np.float32(1))


def _difference(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Largest difference of a channel, uint8 (S, S)."""
    red, green, blue = cv2.split(cv2.absdiff(one, other))
    return cv2.max(cv2.max(red, green), blue)


class ArtefactFamily:
    """A `Family` of artefacts on skin; see `train.datasets.counterfactuals.base`.

    painters: attribute -> how it is drawn. thirds: of the templates (`templates.third_of`). half: of the lesions of the
    training split (`Split.halves`); every image of another split may be used. root: the images' folder.
    """

    attributes: tuple[str, ...] = ATTRIBUTES

    def __init__(
        self,
        name: str,
        painters: Mapping[str, Painter],
        thirds: tuple[int, ...],
        half: int,
        root: str | Path | None = None,
    ) -> None:
        self.name, self.half = name, half
        self.templates = read_templates(thirds, root)
        self._painters = painters

    def add(
        self,
        split: Split,
        index: int,
        attribute: str,
        rng: np.random.Generator,
        size_px: int = 256,
        place: str | None = None,
    ) -> Counterfactual | None:
        """See `Family.add`. The half of the lesions is left to `eligible`."""
        self._check(attribute, place)
        record = split.records[index]
        image = split.image(index, size_px)
        if not _known_absent(record, attribute) and not _looks_clear(split, index, record, attribute):
            return None
        return self.added_to(image, record, attribute, rng, place)

    def added_to(
        self,
        image: np.ndarray,
        record: Mapping[str, Any],
        attribute: str,
        rng: np.random.Generator,
        place: str | None = None,
    ) -> Counterfactual | None:
        """As `add`, for any uint8 RGB (S, S, 3) and its record, whatever the record says of the attribute."""
        self._check(attribute, place)
        skin = image.astype(np.float32)
        scale = (image.shape[0] / SIDE_PX) ** 2
        for _ in range(ATTEMPTS):
            painted = self._painters[attribute](skin, place or "", rng, self.templates)
            changed = np.clip(np.rint(painted), 0, 255).astype(np.uint8)
            count = np.count_nonzero(_difference(image, changed) >= PLAIN_LEVELS)
            if not LEAST_CHANGED[attribute] * scale <= count <= MOST_CHANGED * image.shape[0] ** 2:
                continue
            mask = mask_of(image, changed)
            found = place_of(mask)
            if place and found != place:
                continue
            column, places = f"artefact_{attribute}", record.get("artefact_place") or {}
            return Counterfactual(
                without=image,
                image=changed,
                mask=mask,
                without_record={**record, column: 0.0},
                record={**record, column: 1.0, "artefact_place": {**places, attribute: found}},
                attribute=attribute,
                place=found,
            )
        return None

    def eligible(self, split: Split, attribute: str) -> np.ndarray:
        """See `Family.eligible`: images without the artefact, and in the training split of this family's lesions alone.

        A label by hand decides; where there is none, the picture must show no thin dark lines.
        """
        self._check(attribute, None)
        allowed = split.halves == self.half if split.name == "train" else np.ones(len(split), bool)
        found = [
            index
            for index, record in enumerate(split.records)
            if allowed[index] and (_known_absent(record, attribute) or _looks_clear(split, index, record, attribute))
        ]
        return np.array(found, np.int64)

    def _check(self, attribute: str, place: str | None) -> None:
        if attribute not in self._painters:
            raise InputError(f"family {self.name!r} draws no {attribute!r}; it draws {', '.join(self._painters)}")
        if place and place not in IMAGE_PLACES:
            raise InputError(f"no place {place!r} on an image; places are {', '.join(IMAGE_PLACES)}")


def _known_absent(record: Mapping[str, Any], attribute: str) -> bool:
    return record.get("artefact_source") in LABELLED_BY_HAND and record.get(f"artefact_{attribute}") == 0


def _looks_clear(split: Split, index: int, record: Mapping[str, Any], attribute: str) -> bool:
    """Whether an image without a label by hand shows nothing like the attribute.

    A guess that the artefact is there counts against it. The filter finds hair and the lines of a ruler.
    """
    label = record.get(f"artefact_{attribute}")
    if label is not None and (label > SURE_ABSENT or record.get("artefact_source") in LABELLED_BY_HAND):
        return False
    return hair_length(split.image(index, SIDE_PX)) <= UNSEEN
