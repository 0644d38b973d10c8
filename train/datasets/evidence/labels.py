"""Real images of which it is known whether they show an attribute: what detectors are calibrated and audited on."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from medviz.domains import get_domain
from train.datasets.evidence import radiology
from train.datasets.split import Split

READINGS = Path(__file__).parent / "crop_readings.json"


@dataclass(frozen=True)
class Labelled:
    """indices (N,) of images; truth bool (N,); strata (N,): source and view; groups (N,): lesion or patient."""

    indices: np.ndarray
    truth: np.ndarray
    strata: list[str]
    groups: list[str]

    def only(self, chosen: np.ndarray) -> "Labelled":
        """The images at `chosen`, bool (N,)."""
        rows = np.flatnonzero(chosen)
        strata, groups = ([names[row] for row in rows] for names in (self.strata, self.groups))
        return Labelled(self.indices[rows], self.truth[rows], strata, groups)

    def groups_of(self, chosen: np.ndarray) -> list[str]:
        """The groups of the images at `chosen`, bool (N,)."""
        return [self.groups[row] for row in np.flatnonzero(chosen)]

    @classmethod
    def joined(cls, parts: Sequence["Labelled"]) -> "Labelled":
        """The images of several splits, one after the other."""
        return cls(
            np.concatenate([part.indices for part in parts]),
            np.concatenate([part.truth for part in parts]),
            [name for part in parts for name in part.strata],
            [name for part in parts for name in part.groups],
        )


@cache
def crop_readings() -> Mapping[str, Mapping[str, int]]:
    """Image id -> artefact -> 1 or 0: what one reader saw in the 256 px crop, without any network's answer.

    Published labels describe the full frame, whose edges these crops lack. What the reader was unsure of is left out.
    """
    return json.loads(READINGS.read_text(encoding="utf-8"))


def labelled(split: Split, attribute: str, *, published: bool = False) -> Labelled:
    """The images of a split that are known to show an attribute, or known not to.

    Dermatology: the crop readings of images labelled by hand, or with `published` the labels themselves. Radiology:
    films on which readers boxed the finding (an effusion: labelled it) against films without finding.
    """
    if split.domain == "dermatology":
        return _known(split, _published(attribute) if published else _read(attribute))
    return _known(split, _boxed(attribute))


def labelled_head(split: Split, head: str) -> Labelled:
    """The images of a split whose records know the answer of a classifier's head (`Domain.labels`)."""
    domain = get_domain("dermatology" if split.domain == "dermatology" else radiology.DOMAIN)

    def says(record: Mapping[str, Any]) -> bool | None:
        label = domain.labels(record).get(head)
        return None if label is None else label >= 0.5

    return _known(split, says)


def _known(split: Split, says: Callable[[Mapping[str, Any]], bool | None]) -> Labelled:
    is_skin, groups = split.domain == "dermatology", split.groups
    answers = [says(record) for record in split.records]
    known = [index for index, answer in enumerate(answers) if answer is not None]
    records = [split.records[index] for index in known]
    return Labelled(
        indices=np.array(known, np.int64),
        truth=np.array([answers[index] for index in known], bool),
        strata=[str(record.get("source")) if is_skin else radiology.stratum(record) for record in records],
        groups=[groups[index] for index in known],
    )


def _read(attribute: str) -> Callable[[Mapping[str, Any]], bool | None]:
    def says(record: Mapping[str, Any]) -> bool | None:
        seen = crop_readings().get(str(record["image_id"]), {}).get(attribute)
        return None if seen is None else bool(seen)

    return says


def _published(attribute: str) -> Callable[[Mapping[str, Any]], bool | None]:
    def says(record: Mapping[str, Any]) -> bool | None:
        label = record.get(f"artefact_{attribute}") if record.get("artefact_source") == "manual" else None
        return None if label is None else label >= 0.5

    return says


def _boxed(attribute: str) -> Callable[[Mapping[str, Any]], bool | None]:
    def says(record: Mapping[str, Any]) -> bool | None:
        if attribute == "opacity" and not radiology.is_clear(record):
            marked = {box["label"] for box in radiology.finding_boxes(record)}
            return True if radiology.READERS_BOX in marked else None
        return radiology.shows(record, attribute)

    return says
