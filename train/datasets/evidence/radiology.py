"""Findings and structures on chest X-rays: counterfactual pairs, and real films by their boxes, labels and outlines.

Sides are the patient's; no film is mirrored.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

from medviz.domains.base import items
from medviz.domains.chest_findings import NO_FINDING
from medviz.domains.lung_places import LEVELS, MID_ENDS, SIDES, UPPER_ENDS
from medviz.errors import InputError
from train.datasets.counterfactuals import Counterfactual, Family
from train.datasets.counterfactuals.lungs import LABELS as LUNG_LABELS
from train.datasets.counterfactuals.lungs import lung_labels
from train.datasets.evidence.examples import SOMEWHERE, UNKNOWN, Example, drawn, unknown
from train.datasets.split import Split, boxes, images_root

FINDINGS = ("opacity", "pleural_effusion", "nodule")
STRUCTURES = ("heart", "right_lung", "left_lung")
ATTRIBUTES = (*FINDINGS, *STRUCTURES)
DOMAIN, NLM_JSRT = "radiology", "radiology-nlm-jsrt"
DRAWN = {"opacity": "opacity", "pleural_effusion": "pleural_effusion", "nodule": "nodule", "consolidation": "opacity"}
"""What a family draws -> the attribute it is an example of."""
READERS_BOX, OPACITIES = "lung opacity", frozenset({"pneumonia", "infiltration", "consolidation", "tuberculosis"})
BOXED_WEIGHT, LABEL_WEIGHT = 1.0, 0.3
SHARES = {"opacity": 0.5, "pleural_effusion": 0.12, "nodule": 0.13, "heart": 0.25}
"""Attribute -> share of the real films that are drawn for it, half of them without it."""


def is_clear(record: Mapping[str, Any]) -> bool:
    """Whether a film was read as without finding, and no reader drew a box."""
    return items(record.get("findings")) == [NO_FINDING] and not finding_boxes(record)


def finding_boxes(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The boxes of a film that mark no anatomy."""
    return [box for box in boxes(record) if not box["label"].endswith(" lung")]


def stratum(record: Mapping[str, Any]) -> str:
    """Source and view of a film: images are compared within one."""
    return f"{record.get('source')}, {record.get('view') or 'unknown view'}"


def read_structures(split: str, size_px: int, root: str | Path | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Image id -> structure ("heart", "right_lung", "left_lung") -> mask bool (S, S), of films outlined by hand.

    Empty where the folder has no structures. Raises InputError for a mask that cannot be decoded.
    """
    path = images_root(root) / NLM_JSRT / f"structures-{split}.parquet"
    if not path.is_file():
        return {}
    found: dict[str, dict[str, np.ndarray]] = {}
    for row in pq.read_table(path).to_pylist():
        mask = cv2.imdecode(np.frombuffer(row["mask"]["bytes"], np.uint8), cv2.IMREAD_GRAYSCALE)
        if mask is None:
            raise InputError(f"the {row['structure']} of {row['image_id']} in {path} cannot be decoded")
        scaled = cv2.resize(mask, (size_px, size_px), interpolation=cv2.INTER_AREA) >= 128
        found.setdefault(row["image_id"], {})[row["structure"].replace(" ", "_")] = scaled
    return found


class ChestExamples:
    """See `train.datasets.evidence.examples.Examples`.

    half: of the patients, as the family's own. structures: of `read_structures`.
    """

    attributes: tuple[str, ...] = ATTRIBUTES
    findings: tuple[bool, ...] = tuple(name in FINDINGS for name in ATTRIBUTES)

    def __init__(
        self,
        split: Split,
        family: Family,
        half: int,
        structures: Mapping[str, Mapping[str, np.ndarray]],
        size_px: int,
        distractors: float,
    ) -> None:
        self.split, self.family, self.structures = split, family, structures
        self.size_px, self.distractors = size_px, distractors
        self.lungs = lung_labels(split)
        self.eligible = _by_source(split, {name: family.eligible(split, name) for name in DRAWN})
        self.strata: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in SHARES}
        rows: dict[tuple[str, str, bool], list[int]] = {}
        for index in np.flatnonzero(split.halves == half).tolist():
            record = split.records[index]
            if record["image_id"] in structures:
                rows.setdefault(("heart", "", True), []).append(index)
            for name in FINDINGS:
                if (present := shows(record, name)) is not None:
                    rows.setdefault((name, stratum(record), present), []).append(index)
        for (name, where, present), found in rows.items():
            others = rows.get((name, where, not present), found if name == "heart" else [])
            if present and others:
                self.strata[name].append((np.array(found), np.array(others)))

    def pair(self, rng: np.random.Generator) -> list[Example]:
        """See `Examples.pair`; films of a source are drawn in proportion to the root of their number."""
        sizes = np.sqrt([len(eligible["opacity"]) for eligible in self.eligible])
        eligible = self.eligible[int(rng.choice(len(sizes), p=sizes / sizes.sum()))]
        chosen, other, index = drawn(
            self.family, self.split, eligible, tuple(DRAWN), rng, self.size_px, self.distractors
        )
        targets, weights = self._anatomy(index)
        targets[: len(FINDINGS)] = 0
        if other is not None:
            _add(targets, other)
        there = targets.copy()
        _add(there, chosen)
        return [Example(chosen.without, targets, weights), Example(chosen.image, there, weights)]

    def real(self, rng: np.random.Generator) -> Example:
        """See `Examples.real`: as often with a finding as without it, among films of one source and view."""
        possible = [name for name in SHARES if self.strata[name]]
        weights = np.array([SHARES[name] for name in possible])
        strata = self.strata[possible[int(rng.choice(len(possible), p=weights / weights.sum()))]]
        sizes = np.sqrt([min(len(rows), len(others)) for rows, others in strata])
        rows, others = strata[int(rng.choice(len(strata), p=sizes / sizes.sum()))]
        index = int(rng.choice(rows if rng.random() < 0.5 else others))
        return Example(self.split.image(index, self.size_px), *self._known(index))

    def _anatomy(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        targets, weights = unknown(ATTRIBUTES, self.size_px)
        outlined = self.structures.get(self.split.records[index]["image_id"], {})
        lungs = np.asarray(self.lungs[index])
        for name in STRUCTURES:
            column = ATTRIBUTES.index(name)
            if name in outlined:
                targets[column] = outlined[name]
            elif name != "heart" and lungs.any():
                mine = (lungs == LUNG_LABELS[name.split("_")[0]]).astype(np.float32)
                targets[column] = cv2.resize(mine, (self.size_px, self.size_px), interpolation=cv2.INTER_LINEAR)
        return targets, weights

    def _known(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        targets, weights = self._anatomy(index)
        record = self.split.records[index]
        if is_clear(record):
            targets[: len(FINDINGS)] = 0
            return targets, weights
        opacity, effusion, nodule = (ATTRIBUTES.index(name) for name in FINDINGS)
        if shows(record, "opacity"):
            targets[opacity], weights[opacity] = opacity_target(record, np.asarray(self.lungs[index]), self.size_px)
        if shows(record, "pleural_effusion"):
            top = round(0.4 * self.size_px)
            targets[effusion, :top], targets[effusion, top:] = UNKNOWN, SOMEWHERE
            weights[effusion] = LABEL_WEIGHT
        if shows(record, "nodule"):
            targets[nodule] = discs(finding_boxes(record), self.size_px)
        return targets, weights


def _add(targets: np.ndarray, added: Counterfactual) -> None:
    column = ATTRIBUTES.index(DRAWN[added.attribute])
    targets[column] = np.maximum(targets[column], added.mask)


def _by_source(split: Split, eligible: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The eligible images of each attribute, a mapping for each source that has some for all."""
    sources = np.array([str(record.get("source")) for record in split.records])
    parts = [
        {name: rows[sources[rows] == source] for name, rows in eligible.items()} for source in sorted(set(sources))
    ]
    return [part for part in parts if all(len(rows) for rows in part.values())]


def opacity_target(record: Mapping[str, Any], lungs: np.ndarray, size_px: int) -> tuple[np.ndarray, float]:
    """Target float32 (S, S) of a film with an opacity, and how much its SOMEWHERE counts.

    Readers outlined every opacity of a film they boxed; other boxes mark one finding; a report names zones; else the
    opacity lies somewhere in the lungs. lungs: uint8 labels, as `lung_labels` gives them.
    """
    marked = [box for box in finding_boxes(record) if box["label"] == READERS_BOX]
    if marked:
        return np.where(_inside(marked, size_px), SOMEWHERE, 0.0).astype(np.float32), BOXED_WEIGHT
    marked = [box for box in finding_boxes(record) if box["label"] in ("pneumonia", "infiltrate")]
    if marked:
        return np.where(_inside(marked, size_px), SOMEWHERE, UNKNOWN).astype(np.float32), BOXED_WEIGHT
    places = json.loads(record.get("finding_places") or "{}").get("lung opacity")
    if places:
        return np.where(_places(places, size_px), SOMEWHERE, UNKNOWN).astype(np.float32), BOXED_WEIGHT
    if not lungs.any():
        return np.full((size_px, size_px), SOMEWHERE, np.float32), LABEL_WEIGHT
    wide = cv2.dilate((lungs > 0).astype(np.uint8), np.ones((9, 9), np.uint8))
    wide = cv2.resize(wide, (size_px, size_px), interpolation=cv2.INTER_NEAREST)
    return np.where(wide > 0, SOMEWHERE, UNKNOWN).astype(np.float32), LABEL_WEIGHT


def discs(marked: Sequence[Mapping[str, Any]], size_px: int) -> np.ndarray:
    """Ellipses inscribed in boxes {x, y, w, h} in fractions, float32 (S, S) in [0, 1]."""
    canvas = np.zeros((size_px, size_px), np.float32)
    for box in marked:
        centre = ((box["x"] + box["w"] / 2) * size_px, (box["y"] + box["h"] / 2) * size_px)
        axes = (box["w"] * size_px, box["h"] * size_px)
        cv2.ellipse(canvas, (centre, axes, 0.0), 1.0, cv2.FILLED)
    return canvas


def _inside(marked: Sequence[Mapping[str, Any]], size_px: int) -> np.ndarray:
    inside = np.zeros((size_px, size_px), bool)
    for box in marked:
        left, top = round(box["x"] * size_px), round(box["y"] * size_px)
        inside[top : round((box["y"] + box["h"]) * size_px), left : round((box["x"] + box["w"]) * size_px)] = True
    return inside


def _places(places: Sequence[str], size_px: int) -> np.ndarray:
    """The named lungs and zones as blocks of the image, bool (S, S): half of its width, heights by `lung_places`."""
    edges = np.round(np.array([0.0, UPPER_ENDS, MID_ENDS, 1.0]) * size_px).astype(int)
    inside = np.zeros((size_px, size_px), bool)
    for place in places:
        side, level = place.split()[:2]
        half = size_px // 2
        columns = slice(0, half) if side == SIDES[0] else slice(half, size_px)
        rows = slice(0, size_px)
        if level in LEVELS:
            rows = slice(*edges[LEVELS.index(level) :][:2])
        inside[rows, columns] = True
    return inside


def shows(record: Mapping[str, Any], name: str) -> bool | None:
    """Whether a film shows a finding, by its boxes and labels; None where that is not known."""
    if is_clear(record):
        return False
    labels = set(items(record.get("findings")))
    marked = {box["label"] for box in finding_boxes(record)}
    if name == "opacity":
        return True if marked & {READERS_BOX, "pneumonia", "infiltrate"} or labels & OPACITIES else None
    if name == "pleural_effusion":
        return True if "effusion" in labels | marked else None
    return True if "nodule" in marked else None
