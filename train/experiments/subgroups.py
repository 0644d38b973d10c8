"""Subgroups of dermatology records, which of them are under-represented, and prompts made from their records.

A cell is a diagnosis together with an artefact, a body site or an age band, or the diagnosis alone. A record is
under-represented when one of its cells has fewer than a given number of training images.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medviz.domains import Domain
from medviz.domains.base import number
from medviz.errors import InputError
from train import seeding

DISEASES = "diagnosis"
"""Group of heads of which an image shows one."""
AGE_BANDS = {"under 40": (0, 40), "40 to 59": (40, 60), "60 and over": (60, 200)}
"""Years, from the first up to below the second."""
NO_ARTEFACT = "none of the artefacts"
WORDINGS = 24
"""Captions of a record from which the one that states most is taken: few of them name site and age."""
LEAST_CELL = 10
"""Cells with fewer images are drawn as if they had so many: a single image is not drawn hundreds of times."""

Parts = tuple[tuple[str, str], ...]
"""(axis, part) of a record, e.g. ("site", "back"); an axis that is unknown of it is not there."""


@dataclass(frozen=True)
class Described:
    """N labelled records. labels int (N,): which of `diseases` each shows; parts: N; groups: N lesions."""

    diseases: tuple[str, ...]
    labels: np.ndarray
    parts: tuple[Parts, ...]
    groups: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, rows: np.ndarray) -> Described:
        """The records `rows` (int)."""
        return Described(
            self.diseases,
            self.labels[rows],
            tuple(self.parts[i] for i in rows),
            tuple(self.groups[i] for i in rows),
        )


def diseases_of(domain: Domain) -> tuple[str, ...]:
    """Names of the heads that say which disease an image shows. Raises InputError for a domain without such."""
    found = tuple(head.name for head in domain.heads if head.group == DISEASES)
    if len(found) < 2:
        raise InputError(f"{domain.name} has no diagnoses that exclude each other: nothing to classify")
    return found


def described(
    domain: Domain, records: Sequence[Mapping[str, Any]], groups: Sequence[str], artefacts: Sequence[str]
) -> tuple[Described, np.ndarray]:
    """The records whose one diagnosis is known, and which of all they are, int (N,)."""
    diseases, labels, parts, rows = diseases_of(domain), [], [], []
    for row, record in enumerate(records):
        known = domain.labels(record)
        shown = [index for index, head in enumerate(diseases) if known.get(head, 0.0) >= 0.5]
        if len(shown) == 1:
            labels.append(shown[0])
            parts.append(_parts(record, known, artefacts))
            rows.append(row)
    found = Described(diseases, np.array(labels, np.int64), tuple(parts), tuple(groups[row] for row in rows))
    return found, np.array(rows, np.int64)


def _parts(record: Mapping[str, Any], known: Mapping[str, float], artefacts: Sequence[str]) -> Parts:
    present = [head for head in artefacts if known.get(head, 0.0) >= 0.5]
    found = [("artefact", head) for head in present]
    if not present and all(head in known for head in artefacts):
        found.append(("artefact", NO_ARTEFACT))
    if record.get("site"):
        found.append(("site", str(record["site"])))
    age = number(record.get("age"))
    found += [("age", band) for band, (low, high) in AGE_BANDS.items() if age is not None and low <= age < high]
    return tuple(found)


def cell_counts(training: Described) -> Counter[tuple[int, tuple[str, str] | None]]:
    """Training images of each cell: (diagnosis, part), and (diagnosis, None) for the diagnosis alone."""
    counts: Counter[tuple[int, tuple[str, str] | None]] = Counter()
    for label, parts in zip(training.labels.tolist(), training.parts, strict=True):
        counts.update((label, part) for part in (None, *parts))
    return counts


def rarest_cell(images: Described, counts: Mapping[tuple[int, tuple[str, str] | None], int]) -> np.ndarray:
    """(N,) training images of the rarest cell that each image belongs to."""
    return np.array(
        [
            min(counts.get((label, part), 0) for part in (None, *parts))
            for label, parts in zip(images.labels.tolist(), images.parts, strict=True)
        ],
        np.int64,
    )


def drawn_again(training: Described, rare_below: int, count: int, seed: int) -> np.ndarray:
    """Which under-represented records the extra pictures stand for, int (count,), with repetition.

    A record is drawn in proportion to one over the images of its rarest cell. Raises InputError where every cell has
    `rare_below` images or more.
    """
    rarest = rarest_cell(training, cell_counts(training))
    weights = np.where(rarest < rare_below, 1.0 / np.maximum(rarest, LEAST_CELL), 0.0)
    if not weights.any():
        raise InputError(f"rare_below is {rare_below}; every cell of the training images has as many or more")
    return seeding.numpy_generator(seed, "augmentation", "records").choice(
        len(training), size=count, p=weights / weights.sum()
    )


def prompt_of(domain: Domain, record: Mapping[str, Any], disease: str, seed: int, which: int) -> str:
    """A caption of `record` that names its `disease`; of several wordings the one that states most of the record.

    which: number of the extra picture, so that a record drawn twice is worded anew. Raises InputError where no wording
    names the disease.
    """
    best, most = "", -1
    for wording in range(WORDINGS):
        caption = domain.caption(record, random.Random(seeding.key(seed, "augmentation", "words", which, wording)))
        parsed = domain.parse(caption)
        stated = sum(len(values) for values in parsed.values.values())
        if parsed.targets.get(disease) == 1.0 and stated > most:
            best, most = caption, stated
    if most < 0:
        raise InputError(f"none of {WORDINGS} captions of a record with {disease} names it")
    return best
