"""Findings of a chest X-ray with the places they lie in, from readers' boxes and from notes; and the mean anatomy."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medviz.domains import get_domain
from medviz.domains.chest_places import FINE_PARTS, HEART, MEDIASTINUM, places_in, wordings_of
from medviz.domains.lung_places import SIDES, box_locations, merged
from medviz.domains.radiology import PUBLISHED, UNPLACED
from medviz.errors import InputError
from medviz.grounding.anatomy import Mask
from medviz.grounding.atlas import Atlas, Box, place_boxes
from train.datasets.split import Split, boxes
from train.segmenter import split_lungs

DOMAIN = "radiology"
HEART_FINDING = "cardiomegaly"
# What a note's sentence is taken to place, the most visible first; a cause is named for the patient, not for a place.
NOTED = ("lung opacity", "atelectasis", "pleural effusion", "pneumonia")
# Sentences about something else than this X-ray.
_ELSEWHERE = re.compile(
    r"\b(ct|hrct|cta|tomogra\w*|ultraso\w*|echo\w*|mri|pet|histor\w*|previous\w*|prior|months? after)\b", re.IGNORECASE
)
_SENTENCE_END = re.compile(r"(?<=[.;!?])\s+|\n+")


@dataclass(frozen=True)
class PlacedFinding:
    """index: the image's row in its split. finding: its word. wordings: how prompts may word where it lies.

    source: "box" or "note".
    """

    index: int
    finding: str
    wordings: tuple[str, ...]
    source: str


def placed_findings(split: Split, atlas: Atlas, *, notes: bool = True) -> list[PlacedFinding]:
    """Every finding of a split whose place is known, each once an image, place and source; images without are left out.

    A box lies in the zone of its centre; where the centre lies in a finer place too (a base, a hilum, as the atlas has
    them), that may be said instead. notes: also the sentences of notes that name one place and one finding.
    """
    found: list[PlacedFinding] = []
    for index, record in enumerate(split.records):
        found += dict.fromkeys(_of_boxes(index, boxes(record), atlas))
        if notes:
            found += dict.fromkeys(_of_note(index, str(record.get("report") or "")))
    return found


def placed_boxes(found: list[dict], atlas: Atlas | None) -> Iterator[tuple[dict, str, tuple[str, ...]]]:
    """Each box of an image that marks a finding, with the finding's word and how prompts may word where it lies.

    Without an atlas no place is worded finer than a zone.
    """
    for box in found:
        for finding in PUBLISHED.get(str(box["label"]).lower(), ()):
            if finding == HEART_FINDING:
                yield box, finding, wordings_of((HEART,))
            elif finding not in UNPLACED:
                yield box, finding, _box_wordings(box, atlas)


def _of_boxes(index: int, found: list[dict], atlas: Atlas) -> Iterator[PlacedFinding]:
    for _, finding, wordings in placed_boxes(found, atlas):
        yield PlacedFinding(index, finding, wordings, "box")


def _box_wordings(box: dict, atlas: Atlas | None) -> tuple[str, ...]:
    places = merged(box_locations(box))
    if set(places) == {f"{side} lung" for side in SIDES}:
        return wordings_of(("bilateral",))
    wordings = wordings_of(places)
    if atlas and len(places) == 1 and not places[0].endswith("lung"):
        x, y = box["x"] + box["w"] / 2, box["y"] + box["h"] / 2
        for place in (f"{places[0].split()[0]} {part}" for part in FINE_PARTS):
            if place in atlas.places and any(gaussian.holds(x, y) for gaussian in atlas.places[place]):
                wordings += wordings_of((place,))
    return wordings


def _of_note(index: int, note: str) -> Iterator[PlacedFinding]:
    domain = get_domain(DOMAIN)
    for sentence in imaging_sentences(note):
        findings = domain.parse(sentence).values.get("findings", ())
        finding = next(finding for finding in NOTED if finding in findings)
        for place in _noted_places(sentence):
            yield PlacedFinding(index, finding, wordings_of((place,)), "note")


def imaging_sentences(note: str) -> list[str]:
    """The sentences of a note that say of this X-ray what lies where: one of NOTED and a place, neither denied.

    History, earlier images and other modalities are left out. Never raises on text.
    """
    domain, kept = get_domain(DOMAIN), []
    for sentence in filter(None, map(str.strip, _SENTENCE_END.split(note))):
        if _ELSEWHERE.search(sentence) or not _noted_places(sentence):
            continue
        if set(NOTED) & set(domain.parse(sentence).values.get("findings", ())):
            kept.append(sentence)
    return kept


def _noted_places(sentence: str) -> list[str]:
    """Places in the lungs; the heart of a note is a border that an opacity hides, not where it lies."""
    return [place for place in places_in(sentence, careful=True) if place not in (HEART, MEDIASTINUM)]


def fit_atlas(split: Split, size_px: int = 128) -> Atlas:
    """The mean anatomy of a training split, from its lung masks and, where an image has none, its boxes of both lungs.

    size_px: side of the grid on which masks are read. Raises InputError for a split that is not for training, or
    when no image has lungs marked.
    """
    if split.name != "train":
        raise InputError(f"an atlas is fitted on the train split alone, found {split.name!r}")
    found, counts = [], {"masks": 0, "boxes": 0}
    for index, record in enumerate(split.records):
        mask = split.mask(index, "lung_mask", size_px) if record.get("lung_mask") else None
        outlined = mask is not None and bool(mask.any())
        lungs = _outlined_lungs(mask) if mask is not None and outlined else _boxed_lungs(boxes(record), size_px)
        places = place_boxes(*lungs, outlined=outlined) if lungs else {}
        if places:
            found.append(places)
            counts["masks" if outlined else "boxes"] += 1
    return atlas_of(found, {"split": split.name, "images": counts})


def atlas_of(found: list[dict[str, tuple[Box, ...]]], details: dict | None = None) -> Atlas:
    """`Atlas.of_boxes`; InputError when no image has lungs."""
    if not found:
        raise InputError("no image has lungs marked by a mask or by boxes of both lungs, so no atlas can be fitted")
    return Atlas.of_boxes(found, details)


def _outlined_lungs(mask: Mask) -> tuple[Mask, Mask]:
    labels = split_lungs(mask)
    return labels == 1, labels == 2


def _boxed_lungs(found: list[dict], size_px: int) -> tuple[Mask, Mask] | None:
    sides = {box["label"]: box for box in found if box["label"] in ("right lung", "left lung")}
    if len(sides) < 2:
        return None
    lungs = []
    for label in ("right lung", "left lung"):
        box, mask = sides[label], np.zeros((size_px, size_px), bool)
        left, right = (round(edge * size_px) for edge in (box["x"], box["x"] + box["w"]))
        top, bottom = (round(edge * size_px) for edge in (box["y"], box["y"] + box["h"]))
        mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
        lungs.append(mask)
    return lungs[0], lungs[1]
