"""From heat maps to figures with 95 % intervals over patients and, where there are several, training seeds.

A phrase's scores are averaged within its patient and class, patients within the class, classes in the macro figure.
A resample draws patients, and independently training seeds, with replacement (`train.experiments.crossed`); a change or
a lead is computed within each resample, on the same patients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medviz.grounding.metrics import abs_cnr, cnr, mass_in_region, miou, pixel_auroc, pointing_game
from medviz.results import HeatMap
from train.datasets.grounded_phrases import PhraseSet
from train.evaluate.figures import Figure
from train.evaluate.statistics import Estimate
from train.experiments.crossed import Statistic, crossed_interval

MACRO = "macro"
LED = ("cnr", "miou")
"""Metrics whose lead over the image-free prior is a figure of its own, and which the README shows class by class."""


@dataclass(frozen=True)
class Metric:
    """label: of its column. score: (heat map, region) -> a number, NaN where it has no meaning."""

    label: str
    score: Callable[[HeatMap, np.ndarray], float]
    higher_is_better: bool | None = True


METRICS: Mapping[str, Metric] = {
    "cnr": Metric("CNR", cnr),
    # A map that avoids the region has it, too: neither high nor low is good.
    "abs_cnr": Metric("|CNR|", abs_cnr, None),
    "miou": Metric("mIoU", miou),
    "auroc": Metric("AUROC of pixels", pixel_auroc),
    "pointing": Metric("pointing game", pointing_game),
    "mass": Metric("mass in region", mass_in_region),
}


@dataclass(frozen=True)
class Arm:
    """A row of the tables. held: whether its change against the first arm means something."""

    name: str
    label: str
    held: bool = True


def score_maps(maps: Sequence[HeatMap | None], phrases: PhraseSet) -> np.ndarray:
    """Scores (P, M) of the phrases' maps by METRICS; NaN for a map that is missing and a figure without meaning."""
    rows = [
        [math.nan] * len(METRICS) if heat is None else [metric.score(heat, each.region) for metric in METRICS.values()]
        for heat, each in zip(maps, phrases.phrases, strict=True)
    ]
    scores = np.array(rows, np.float64)
    return np.where(np.isfinite(scores), scores, np.nan)


def patient_means(scores: np.ndarray, phrases: PhraseSet) -> np.ndarray:
    """Scores (P, M) as (U, C, M): mean over each patient's phrases of each class, NaN where a patient has none.

    A patient whose class holds a score that is NaN has none either, so that all figures rest on whole patients.
    """
    patients = {group: row for row, group in enumerate(dict.fromkeys(phrases.groups))}
    columns = {each.name: column for column, each in enumerate(phrases.classes)}
    cells: dict[tuple[int, int], list[int]] = {}
    for row, each in enumerate(phrases.phrases):
        cells.setdefault((patients[phrases.groups[each.image]], columns[each.kind]), []).append(row)
    means = np.full((len(patients), len(columns), scores.shape[1]), np.nan)
    for (patient, column), rows in cells.items():
        means[patient, column] = scores[rows].mean(axis=0)
    return means


def class_mean(values: np.ndarray) -> Statistic:
    """Mean over classes of the mean over seeds and patients of values (S, U, C), NaN where a patient lacks the class.

    A class that no patient of a resample has leaves the resample out.
    """
    there = np.isfinite(values).all(axis=0).astype(np.float64)
    known = np.where(there[None] > 0, values, 0.0)

    def mean(times_run: np.ndarray, times_unit: np.ndarray) -> np.ndarray:
        sums = np.tensordot(times_unit, known, axes=([1], [1]))
        totals = np.einsum("rs,rsc->rc", times_run, sums)
        with np.errstate(divide="ignore", invalid="ignore"):
            return (totals / (times_run.sum(axis=1)[:, None] * (times_unit @ there))).mean(axis=1)

    return mean


def interval(values: np.ndarray) -> Estimate:
    """`class_mean` of values (S, U, C) with its interval; n counts the patients that have a class."""
    patients = np.isfinite(values).all(axis=0).any(axis=1)
    kept = values[:, patients]
    return crossed_interval(class_mean(kept), kept.shape[0], kept.shape[1])


def figures(
    phrases: PhraseSet,
    arms: Sequence[Arm],
    values: Mapping[str, np.ndarray],
    priors: Sequence[str],
    macro: Sequence[str],
) -> list[Figure]:
    """Every metric of one set, macro first, then class by class.

    values: arm -> (S, U, C, M) as `patient_means` gives each seed. priors: the arms that see no image, the better
    of which all others must lead. macro: the classes that the macro figure is the mean of.
    """
    names = [each.name for each in phrases.classes]
    groups = {MACRO: [names.index(name) for name in macro], **{name: [i] for i, name in enumerate(names)}}
    labels = {each.name: each.label for each in phrases.classes}
    found = []
    for group, columns in groups.items():
        for number, (key, metric) in enumerate(METRICS.items()):
            mine = {name: each[:, :, columns, number] for name, each in values.items()}
            whole = group == MACRO
            found.append(
                _figure(
                    name=f"{phrases.name}_{group}_{key}",
                    label=metric.label if whole else labels[group],
                    table=phrases.label if whole else f"{phrases.label}: {metric.label} by class",
                    headline=whole or key in LED,
                    higher_is_better=metric.higher_is_better,
                    arms=arms,
                    values=mine,
                    counts={"phrases": sum(each.kind in {names[i] for i in columns} for each in phrases.phrases)},
                )
            )
            if key in LED:
                found.append(_lead(found[-1], arms, mine, priors, headline=whole))
    return sorted(found, key=lambda figure: not figure.headline)


def _figure(
    *,
    name: str,
    label: str,
    table: str,
    headline: bool,
    higher_is_better: bool | None,
    arms: Sequence[Arm],
    values: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
) -> Figure:
    first, others = arms[0], arms[1:]
    changes = {arm.name: interval(values[arm.name] - values[first.name]) for arm in others if arm.held}
    return Figure(
        name=name,
        label=label,
        group="grounding",
        table=table,
        baseline=interval(values[first.name]),
        aligned={arm.name: interval(values[arm.name]) for arm in others},
        change={arm: change for arm, change in changes.items() if np.isfinite(change.value)},
        higher_is_better=higher_is_better,
        headline=headline,
        counts=counts,
    )


def _lead(
    of: Figure, arms: Sequence[Arm], values: Mapping[str, np.ndarray], priors: Sequence[str], *, headline: bool
) -> Figure:
    """A figure less that of the prior which has most of it, on the same patients."""
    earned = {name: interval(values[name]).value for name in priors}
    best = max(priors, key=lambda name: earned[name] if math.isfinite(earned[name]) else -math.inf)
    leads = {arm.name: interval(values[arm.name] - values[best]) for arm in arms}
    return Figure(
        name=f"{of.name}_lead",
        label=f"{of.label} less the better prior's",
        group="grounding",
        table=of.table,
        baseline=leads[arms[0].name],
        aligned={arm.name: leads[arm.name] for arm in arms[1:]},
        change={},
        higher_is_better=True,
        headline=headline,
        note=f"the better prior is {best}",
        counts=of.counts,
    )
