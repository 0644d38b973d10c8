"""Real images of which it is known whether they show an attribute: what detectors are calibrated and audited on."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from train.datasets.evidence import radiology
from train.datasets.split import Split

READINGS = Path(__file__).parent / "crop_readings.json"


@dataclass(frozen=True)
class Labelled:
    """indices (N,) of a split's images; truth bool (N,); strata and groups (N,): source (and view), lesion or patient."""

    indices: np.ndarray
    truth: np.ndarray
    strata: list[str]
    groups: list[str]


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
    says: Callable[[Mapping[str, Any]], bool | None]
    if split.domain == "dermatology":
        says = _published(attribute) if published else _read(attribute)
        strata = [str(record.get("source")) for record in split.records]
    else:
        says = _boxed(attribute)
        strata = [radiology.stratum(record) for record in split.records]
    answers = [says(record) for record in split.records]
    known = [index for index, answer in enumerate(answers) if answer is not None]
    return Labelled(
        indices=np.array(known, np.int64),
        truth=np.array([answers[index] for index in known], bool),
        strata=[strata[index] for index in known],
        groups=[split.groups[index] for index in known] if known else [],
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
