"""How well diseases are told apart on real test images, overall and a subgroup, with intervals over seeds and lesions.

Balanced accuracy is the mean recall of the diagnoses, AUROC the mean over diagnoses of one against all others. A
diagnosis counts in a subgroup that has enough of its images; a resample that draws none of them leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from train.calibration import weighted_auroc
from train.evaluate.figures import Figure
from train.evaluate.statistics import Estimate
from train.experiments import crossed
from train.experiments.subgroups import NO_ARTEFACT, Described

AUROC_RESAMPLES = 1000

Answers = Mapping[str, np.ndarray]
"""Arm -> logits (S, N, K): S seeds, N test images, K diagnoses. The others are held against the first arm."""


@dataclass(frozen=True)
class Subgroup:
    """rows int: which of the test images belong to it."""

    name: str
    label: str
    rows: np.ndarray


def subgroups(test: Described, rarest: np.ndarray, rare_below: int, labels: Mapping[str, str]) -> list[Subgroup]:
    """All test images; those with a rare cell and those without; each artefact, age band and site.

    rarest (N,): of `rarest_cell` by the training images; labels: how a reader sees a head.
    """
    found = [
        Subgroup("all", "all test images", np.arange(len(test))),
        Subgroup("rare", "under-represented subgroups", np.flatnonzero(rarest < rare_below)),
        Subgroup("common", "all other images", np.flatnonzero(rarest >= rare_below)),
    ]
    parts = sorted({part for parts in test.parts for part in parts}, key=lambda p: (p[0], p[1] == NO_ARTEFACT, p[1]))
    for axis, part in parts:
        rows = np.flatnonzero([(axis, part) in each for each in test.parts])
        shown = labels.get(part, part).lower()
        # "artefact: hair", but "none of the artefacts" needs no such word.
        named = shown if part == NO_ARTEFACT else f"{axis}: {shown}"
        found.append(Subgroup(f"{axis}_{part}".replace(" ", "_").replace("/", "_"), named, rows))
    return found


def balanced_accuracy(
    hits: np.ndarray, labels: np.ndarray, units: np.ndarray, classes: Sequence[int]
) -> crossed.Statistic:
    """Mean recall of `classes`, averaged over runs.

    hits (S, N) 1.0 where an answer is right; labels, units int (N,): diagnosis and lesion (from 0) of each image.
    """
    count = int(units.max()) + 1 if len(units) else 0
    asked = np.zeros((len(classes), count))
    right = np.zeros((len(classes), len(hits), count))
    for index, disease in enumerate(classes):
        mine = labels == disease
        np.add.at(asked[index], units[mine], 1.0)
        for run in range(len(hits)):
            np.add.at(right[index, run], units[mine], hits[run, mine])

    def statistic(times_run: np.ndarray, times_unit: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            recalls = np.stack(
                [times_unit @ r.T / (times_unit @ a)[:, None] for r, a in zip(right, asked, strict=True)]
            )
        return _over_runs(_mean_of_classes(recalls), times_run)

    return statistic


def mean_auroc(scores: np.ndarray, labels: np.ndarray, units: np.ndarray, classes: Sequence[int]) -> crossed.Statistic:
    """Mean over `classes` of the AUROC of one against all others, averaged over runs.

    scores (S, N, K) of the images; labels, units: see `balanced_accuracy`.
    """

    def statistic(times_run: np.ndarray, times_unit: np.ndarray) -> np.ndarray:
        times = times_unit[:, units]
        areas = np.stack(
            [
                np.stack([weighted_auroc(run[:, disease], labels == disease, times) for run in scores], axis=1)
                for disease in classes
            ]
        )
        return _over_runs(_mean_of_classes(areas), times_run)

    return statistic


def classified_figures(
    answers: Answers, test: Described, groups: Sequence[Subgroup], least: int, labels: Mapping[str, str]
) -> list[Figure]:
    """Balanced accuracy and AUROC of each subgroup, then the recall of each diagnosis, alone and in each subgroup.

    least: images of a diagnosis that a subgroup must have for it to count there.
    """
    figures = [
        _figure(kind, group, answers, test, least) for kind in ("balanced_accuracy", "auroc") for group in groups
    ]
    for group in groups:
        for index, disease in enumerate(test.diseases):
            rows = group.rows[test.labels[group.rows] == index]
            if len(rows) >= least:
                where = "" if group.name == "all" else f", {group.label}"
                named = Subgroup(f"{disease}_{group.name}", f"{labels.get(disease, disease).lower()}{where}", rows)
                figures.append(_figure("recall", named, answers, test, 1, headline=group.name == "all"))
    return figures


LABELS = {"balanced_accuracy": "Balanced accuracy", "auroc": "AUROC", "recall": "Recall of"}


def _figure(
    kind: str, group: Subgroup, answers: Answers, test: Described, least: int, *, headline: bool | None = None
) -> Figure:
    rows, seeds = group.rows, len(next(iter(answers.values())))
    labels = test.labels[rows]
    classes = [c for c in range(len(test.diseases)) if (labels == c).sum() >= least]
    lesions, units = np.unique(np.array([test.groups[i] for i in rows], dtype=str), return_inverse=True)
    enough = len(classes) >= (1 if kind == "recall" else 2)

    def statistic(logits: np.ndarray) -> crossed.Statistic:
        if kind == "auroc":
            return mean_auroc(log_softmax(logits[:, rows], axis=2), labels, units, classes)
        return balanced_accuracy((logits[:, rows].argmax(axis=2) == labels).astype(float), labels, units, classes)

    def estimate(made: crossed.Statistic) -> Estimate:
        resamples = {"resamples": AUROC_RESAMPLES} if kind == "auroc" else {}
        return crossed.crossed_interval(made, seeds, len(lesions), **resamples)

    if headline is None:
        headline = enough and (kind != "auroc" or group.name in ("all", "rare", "common"))
    first, *others = answers
    made = {arm: statistic(logits) for arm, logits in answers.items()} if enough else {}
    return Figure(
        name=f"{kind}_{group.name}",
        label=f"{LABELS[kind]}{' ' if kind == 'recall' else ', '}{group.label}",
        group="classification",
        baseline=estimate(made[first]) if enough else None,
        aligned={arm: estimate(made[arm]) if enough else None for arm in others},
        change={arm: estimate(crossed.difference(made[arm], made[first])) if enough else None for arm in others},
        higher_is_better=True,
        headline=headline,
        note="" if enough else f"fewer than two diagnoses have {least} images",
        counts={"seeds": seeds, "images": len(rows), "lesions": len(lesions), "diagnoses": len(classes)},
    )


def _mean_of_classes(values: np.ndarray) -> np.ndarray:
    """(R, S) means over the first axis of (C, R, S), without NaN; NaN where all are."""
    there = np.isfinite(values)
    total, count = np.where(there, values, 0.0).sum(axis=0), there.sum(axis=0)
    return np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)


def _over_runs(values: np.ndarray, times_run: np.ndarray) -> np.ndarray:
    """(R,) means of values (R, S) in which run s counts times_run (R, S) times."""
    return (values * times_run).sum(axis=1) / times_run.sum(axis=1)
