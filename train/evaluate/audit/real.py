"""Trials on real images: AUC within one source and view, on thumbnails, and answers in another light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from tqdm import tqdm

from train import calibration, seeding
from train.datasets.counterfactuals import Counterfactual, relit
from train.datasets.evidence.labels import Labelled
from train.datasets.split import Split
from train.evaluate.audit.instruments import BATCH, Instrument, Row, gate
from train.evaluate.statistics import Estimate, share_interval

THUMBNAIL_PX = 4


@dataclass(frozen=True)
class Readings:
    """What an instrument says of images: scores (N, K) of each as it is, of its thumbnail and of it in another light.

    rows: index of the image in its split -> row. means: (N, 3) mean colour of each.
    """

    rows: Mapping[int, int]
    plain: np.ndarray
    thumbnail: np.ndarray
    relit: np.ndarray
    means: np.ndarray

    def of(self, known: Labelled) -> Readings:
        """Those of the images of `known`, in its order."""
        chosen = [self.rows[int(index)] for index in known.indices]
        return Readings(
            {int(index): row for row, index in enumerate(known.indices)},
            self.plain[chosen],
            self.thumbnail[chosen],
            self.relit[chosen],
            self.means[chosen],
        )


def read(instrument: Instrument, split: Split, indices: Sequence[int], size_px: int, seed: int) -> Readings:
    """What the instrument says of the images at `indices`."""
    plain, small, lit, means = [], [], [], []
    for start in tqdm(range(0, len(indices), BATCH), desc=f"{instrument.name}, {split.name}", unit="batch"):
        images = split.images(size_px, indices[start : start + BATCH])
        plain.append(instrument.score(images))
        small.append(instrument.score(np.stack([thumbnail(image) for image in images])))
        numbered = zip(images, indices[start : start + BATCH], strict=True)
        lit.append(instrument.score(np.stack([relight(image, seed, index) for image, index in numbered])))
        means.append(images.reshape(len(images), -1, 3).mean(axis=1))
    none = np.zeros((0, len(instrument.heads)))
    return Readings(
        rows={index: row for row, index in enumerate(indices)},
        plain=np.concatenate([none, *plain]),
        thumbnail=np.concatenate([none, *small]),
        relit=np.concatenate([none, *lit]),
        means=np.concatenate([np.zeros((0, 3)), *means]),
    )


def real_rows(
    instrument: Instrument, head: str, found: Readings, known: Labelled, least: int, seed: int, attribute: str = ""
) -> list[Row]:
    """AUC within each source and view, and over all of them; the same on thumbnails; answers in another light.

    found: what is said of the images of `known`, in its order. attribute: what the gates are of; empty: there are none.
    """
    column, threshold = instrument.heads.index(head), instrument.thresholds[head]
    rows: list[Row] = []
    for trial, scores in (("auc", found.plain), ("auc_thumbnail", found.thumbnail)):
        rows += auc_rows(instrument.name, head, trial, scores[:, column], known, least, seed, attribute)
    turned = (found.plain[:, column] >= threshold) != (found.relit[:, column] >= threshold)
    bound = gate("recolour", attribute)
    return [*rows, Row(instrument.name, head, "recolour", "all sources", share_interval(turned), bound)]


def auc_rows(
    name: str, head: str, trial: str, scores: np.ndarray, known: Labelled, least: int, seed: int, attribute: str
) -> list[Row]:
    """A row a source and view that has enough images, and one over these, weighted by their pairs of images."""
    strata, rows, kept = np.array(known.strata), [], np.zeros(len(known.truth), bool)
    for stratum in sorted(set(known.strata)):
        mine = strata == stratum
        if min(known.truth[mine].sum(), (~known.truth[mine]).sum()) < least:
            continue
        kept |= mine
        rows.append(_auc_row(name, head, trial, stratum, scores, known, mine, seed, None))
    if len(rows) > 0:
        within, _ = calibration.auroc_within_sources(scores[kept], known.truth[kept], strata[kept].tolist(), least)
        ends = within_interval(scores[kept], known.truth[kept], strata[kept], known.groups_of(kept), seed)
        estimate = Estimate(float("nan") if within is None else within, *ends, int(kept.sum()))
        counts = {"positives": int(known.truth[kept].sum())}
        rows.append(Row(name, head, trial, "within sources", estimate, gate(trial, attribute), counts))
    return rows


def _auc_row(
    name: str, head: str, trial: str, stratum: str, scores: np.ndarray, known: Labelled, mine: np.ndarray, seed: int,
    bound: tuple[str, float] | None,
) -> Row:  # fmt: skip
    value = calibration.auroc(scores[mine], known.truth[mine])
    ends = calibration.auroc_interval(scores[mine], known.truth[mine], known.groups_of(mine), seed)
    low, high = (None, None) if ends is None else ends
    estimate = Estimate(float("nan") if value is None else value, low, high, int(mine.sum()))
    return Row(name, head, trial, stratum, estimate, bound, {"positives": int(known.truth[mine].sum())})


def within_interval(
    scores: np.ndarray, truth: np.ndarray, strata: np.ndarray, groups: Sequence[str], seed: int
) -> tuple[float | None, float | None]:
    """95 % percentile bootstrap interval of the AUC within sources, drawn by lesion or patient."""
    names, group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = seeding.numpy_generator(seed, "audit", "bootstrap")
    resamples = calibration.RESAMPLES
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, group].astype(float)
    areas, weights = [], []
    for stratum in np.unique(strata):
        mine = strata == stratum
        areas.append(calibration.weighted_auroc(scores[mine], truth[mine], times[:, mine]))
        weights.append(float(truth[mine].sum()) * float((~truth[mine]).sum()))
    stacked, shares = np.stack(areas), np.array(weights)[:, None]
    there = np.isfinite(stacked)
    total = (there * shares).sum(axis=0)
    mean = np.where(there, stacked * shares, 0.0).sum(axis=0)[total > 0] / total[total > 0]
    if len(mean) == 0:
        return None, None
    low, high = np.quantile(mean, [0.025, 0.975])
    return float(low), float(high)


def recoloured_row(
    instrument: Instrument, head: str, attribute: str, split_rows: Sequence[tuple[Split, Labelled, Readings]],
    size_px: int,
) -> Row:  # fmt: skip
    """Answers on images that were given the mean colour of the images with the other answer."""
    column, threshold = instrument.heads.index(head), instrument.thresholds[head]
    turned = [np.zeros(0, bool)]
    for split, known, found in split_rows:
        targets = other_means(found.means, known)
        for start in range(0, len(known.indices), BATCH):
            chosen = range(start, min(start + BATCH, len(known.indices)))
            images = split.images(size_px, known.indices[chosen].tolist())
            lit = [
                to_other_colour(image, found.means[row], targets[row])
                for image, row in zip(images, chosen, strict=True)
            ]
            said = instrument.score(np.stack(lit))[:, column] >= threshold
            turned.append(said != (found.plain[chosen][:, column] >= threshold))
    bound = gate("recolour_to_other", attribute)
    return Row(instrument.name, head, "recolour_to_other", "all sources", share_interval(np.concatenate(turned)), bound)


def other_means(means: np.ndarray, known: Labelled) -> np.ndarray:
    """Mean colour (N, 3) of the images of each image's source with the other answer; its own where there is none."""
    strata, found = np.array(known.strata), means.copy()
    for row, (stratum, truth) in enumerate(zip(known.strata, known.truth, strict=True)):
        others = (strata == stratum) & (known.truth != truth)
        if others.any():
            found[row] = means[others].mean(axis=0)
    return found


def to_other_colour(image: np.ndarray, mean: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The image, of mean colour `mean`, brought to the mean colour `target` by a gain of each channel."""
    return np.clip(np.rint(image * (target / np.maximum(mean, 1.0))), 0, 255).astype(np.uint8)


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 (S, S, 3) of which 4x4 mean colours are left, enlarged smoothly."""
    small = cv2.resize(image, (THUMBNAIL_PX, THUMBNAIL_PX), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, image.shape[1::-1], interpolation=cv2.INTER_LINEAR)


def relight(image: np.ndarray, seed: int, number: int) -> np.ndarray:
    """The image under another light, by `train.datasets.counterfactuals.relit`; number: of the image, for the draw."""
    alone = Counterfactual(image, image, np.zeros(image.shape[:2], np.float32), {}, {}, "", "")
    return relit(alone, seeding.numpy_generator(seed, "audit", "relit", number)).image
