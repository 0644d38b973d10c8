"""Artefacts on skin: counterfactual pairs, and real images by their labels."""

import numpy as np

from train.datasets.counterfactuals import Family
from train.datasets.evidence.examples import SOMEWHERE, Example, drawn, unknown
from train.datasets.split import Split

ATTRIBUTES = ("hair", "ruler", "gel_bubble", "ink")
SOURCES = {"manual": 0.6, "rl4med": 0.4}
"""Where labels come from -> share of the real images; others are not used."""
TRUST = {"manual": 1.0, "rl4med": 0.4}
"""Of a label that an artefact is there, which the crop often does not bear out."""
SOMEWHERE_WEIGHTS = {"hair": 1.0, "ruler": 1.0, "gel_bubble": 0.0, "ink": 1.0}
"""Labels describe the full frame, and these are centre crops: half of the labelled bubbles cannot be seen in them, and
most of these images hold a ruler that would be learnt in their place."""


class ArtefactExamples:
    """See `train.datasets.evidence.examples.Examples`. half: of the lesions, as the family's own."""

    attributes: tuple[str, ...] = ATTRIBUTES
    findings: tuple[bool, ...] = (True,) * len(ATTRIBUTES)

    def __init__(self, split: Split, family: Family, half: int, size_px: int, distractors: float) -> None:
        self.split, self.family, self.size_px, self.distractors = split, family, size_px, distractors
        self.eligible = {name: family.eligible(split, name) for name in ATTRIBUTES}
        self.known_absent = {name: set(rows.tolist()) for name, rows in self.eligible.items()}
        mine = split.halves == half
        self.rows: dict[tuple[str, str, bool], np.ndarray] = {}
        for source in SOURCES:
            for name in ATTRIBUTES:
                for present in (False, True):
                    rows = [i for i in np.flatnonzero(mine) if _says(split.records[i], source, name, present)]
                    self.rows[source, name, present] = np.array(rows, np.int64)

    def pair(self, rng: np.random.Generator) -> list[Example]:
        """See `Examples.pair`."""
        chosen, other, index = drawn(
            self.family, self.split, self.eligible, ATTRIBUTES, rng, self.size_px, self.distractors
        )
        targets, weights = unknown(ATTRIBUTES, self.size_px)
        for column, name in enumerate(ATTRIBUTES):
            if index in self.known_absent[name]:
                targets[column] = 0
        if other is not None:
            targets[ATTRIBUTES.index(other.attribute)] = other.mask
        column = ATTRIBUTES.index(chosen.attribute)
        targets[column] = 0
        there = targets.copy()
        there[column] = chosen.mask
        return [Example(chosen.without, targets, weights), Example(chosen.image, there, weights)]

    def real(self, rng: np.random.Generator) -> Example:
        """See `Examples.real`: as often with an attribute as without it, among labels from one source."""
        name = ATTRIBUTES[int(rng.integers(len(ATTRIBUTES)))]
        source = str(rng.choice(list(SOURCES), p=list(SOURCES.values())))
        rows = self.rows[source, name, bool(rng.random() < 0.5)]
        if len(rows) == 0:
            rows = self.rows["manual", name, bool(rng.random() < 0.5)]
        index = int(rng.choice(rows))
        return Example(self.split.image(index, self.size_px), *self._known(index))

    def _known(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        targets, weights = unknown(ATTRIBUTES, self.size_px)
        record = self.split.records[index]
        if record.get("artefact_source") not in SOURCES:
            return targets, weights
        for column, name in enumerate(ATTRIBUTES):
            label = record.get(f"artefact_{name}")
            if label is not None and label < 0.5:
                targets[column] = 0
            elif label is not None:
                targets[column] = SOMEWHERE
                weights[column] = SOMEWHERE_WEIGHTS[name] * TRUST[record["artefact_source"]]
        return targets, weights


def _says(record: dict, source: str, name: str, present: bool) -> bool:
    label = record.get(f"artefact_{name}")
    return record.get("artefact_source") == source and label is not None and (label >= 0.5) == present
