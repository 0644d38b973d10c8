"""Figures and calibration of one yes-or-no head on validation images.

Temperature and threshold are fitted on the same images that the figures come from. So that no figure flatters itself,
accuracy, balanced accuracy and calibration error are cross-fitted: each image is judged with a temperature and a
threshold fitted without its lesion's or patient's group. AUROC needs neither.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from torchmetrics.functional.classification import binary_accuracy, binary_auroc, binary_calibration_error

from train import seeding

FOLDS = 5
RESAMPLES = 1000
CALIBRATION_BINS = 15


def fit_platt(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """(temperature, bias) so that sigmoid((logit + bias) / temperature) is as likely as can be (Platt 1999).

    logits, targets in [0, 1]: (N,). A weak pull towards (1, 0) keeps separable heads finite.
    """
    logits, targets = logits.astype(np.float64), targets.astype(np.float64)

    def cost(parameters: np.ndarray) -> float:
        scaled = (logits + parameters[1]) * np.exp(-parameters[0])
        likelihood = np.mean(np.logaddexp(0.0, scaled) - targets * scaled)
        return float(likelihood + 1e-3 * parameters[0] ** 2 + 1e-5 * parameters[1] ** 2)

    bounds = [(np.log(0.2), np.log(10.0)), (-20.0, 20.0)]
    found = minimize(cost, np.zeros(2), method="L-BFGS-B", bounds=bounds)
    return float(np.exp(found.x[0])), float(found.x[1])


def fit_temperature(logits: np.ndarray, targets: np.ndarray) -> float:
    """The temperature alone, with the bias held at 0; see `fit_platt`."""
    logits, targets = logits.astype(np.float64), targets.astype(np.float64)

    def cost(parameters: np.ndarray) -> float:
        scaled = logits * np.exp(-parameters[0])
        return float(np.mean(np.logaddexp(0.0, scaled) - targets * scaled) + 1e-3 * parameters[0] ** 2)

    found = minimize(cost, np.zeros(1), method="L-BFGS-B", bounds=[(np.log(0.2), np.log(10.0))])
    return float(np.exp(found.x[0]))


def best_threshold(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """The probability from which on to say yes so that balanced accuracy is highest; 0.5 where a class is missing.

    probabilities (N,) in [0, 1], truth bool (N,). Of equally good thresholds the one nearest to 0.5, and always half
    way between two images' probabilities.
    """
    positives, negatives = int(truth.sum()), int((~truth).sum())
    if positives == 0 or negatives == 0:
        return 0.5
    order = np.argsort(probabilities, kind="stable")
    values, hits = probabilities[order], truth[order]
    # Cutting before position i refuses the i images below it.
    refused_right = np.concatenate([[0], np.cumsum(~hits)]) / negatives
    accepted_right = 1 - np.concatenate([[0], np.cumsum(hits)]) / positives
    balanced = (refused_right + accepted_right) / 2
    cuts = np.concatenate([[values[0] / 2], (values[1:] + values[:-1]) / 2, [(values[-1] + 1) / 2]])
    balanced[1:-1][values[1:] == values[:-1]] = -1.0
    best = np.flatnonzero(balanced >= balanced.max() - 1e-12)
    chosen = cuts[best[np.argmin(np.abs(cuts[best] - 0.5))]]
    return float(np.clip(chosen, 1e-4, 1 - 1e-4))


def auroc(scores: np.ndarray, truth: np.ndarray) -> float | None:
    """Area under the ROC curve, None where a class is missing. scores (N,), truth bool (N,)."""
    if truth.all() or not truth.any():
        return None
    # Ranks say the same and cannot be mistaken for probabilities outside [0, 1].
    ranks = np.unique(scores, return_inverse=True)[1] / max(1, len(scores))
    # torchmetrics computes in float32; what lies beyond its precision would make 1.0 read 0.99999994.
    return round(float(binary_auroc(torch.from_numpy(ranks), torch.from_numpy(truth.astype(np.int64)))), 6)


def auroc_interval(
    scores: np.ndarray, truth: np.ndarray, groups: Sequence[str], seed: int, resamples: int = RESAMPLES
) -> tuple[float, float] | None:
    """95 % percentile bootstrap interval of the AUROC, drawn by group (lesion, patient); None without both classes."""
    if truth.all() or not truth.any():
        return None
    names, group = np.unique(np.asarray(groups, dtype=str), return_inverse=True)
    rng = seeding.numpy_generator(seed, "auroc-bootstrap")
    times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)[:, group].astype(float)
    areas = weighted_auroc(scores, truth, times)
    low, high = np.quantile(areas[np.isfinite(areas)], [0.025, 0.975])
    return float(low), float(high)


def weighted_auroc(scores: np.ndarray, truth: np.ndarray, times: np.ndarray) -> np.ndarray:
    """AUROC of R resamples at once (R,), NaN where one has no positive or no negative image.

    scores (N,), truth bool (N,), times float (R, N): how often each image counts. The area is the share of pairs in
    which the positive image scores higher, ties counting half.
    """
    order = np.argsort(scores, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], np.diff(scores[order]) > 0]))
    times, hits = times[:, order], truth[order]
    positives = np.add.reduceat(times * hits, starts, axis=1)
    negatives = np.add.reduceat(times * ~hits, starts, axis=1)
    below = np.cumsum(negatives, axis=1) - negatives / 2
    pairs = positives.sum(axis=1) * negatives.sum(axis=1)
    won = (positives * below).sum(axis=1)
    return np.divide(won, pairs, out=np.full(len(times), np.nan), where=pairs > 0)


def auroc_within_sources(
    scores: np.ndarray, truth: np.ndarray, sources: Sequence[str], least: int
) -> tuple[float | None, dict[str, float]]:
    """AUROC among images of one source: mean over sources, weighted by their positive-negative pairs, and each one's.

    A head that only tells sources apart is at 0.5 here whatever its AUROC over all images. Sources with fewer than
    `least` positives or negatives are left out; None where none is left.
    """
    found: dict[str, float] = {}
    pairs: list[int] = []
    names = np.asarray(sources, dtype=str)
    for source in np.unique(names):
        mine = names == source
        positives = int(truth[mine].sum())
        if min(positives, int(mine.sum()) - positives) >= least:
            found[str(source)] = float(auroc(scores[mine], truth[mine]) or 0.0)
            pairs.append(positives * (int(mine.sum()) - positives))
    return (float(np.average(list(found.values()), weights=pairs)) if found else None), found


def head_figures(logits: np.ndarray, targets: np.ndarray, groups: Sequence[str], seed: int) -> dict[str, Any]:
    """AUROC with its interval, and cross-fitted accuracy, balanced accuracy and calibration error of one head.

    logits (N,) after the head's bias was calibrated; targets (N,) in [0, 1]; groups (N,). Soft targets count as yes
    from 0.5 on. Figures that cannot be computed are None.
    """
    truth = targets >= 0.5
    folds = np.array([hashlib.blake2b(g.encode(), digest_size=1).digest()[0] % FOLDS for g in groups])
    probabilities, answers = np.zeros(len(logits)), np.zeros(len(logits), bool)
    for fold in np.unique(folds):
        mine, others = folds == fold, folds != fold
        if not others.any():
            others = mine
        temperature = fit_temperature(logits[others], targets[others])
        threshold = best_threshold(expit(logits[others] / temperature), truth[others])
        probabilities[mine] = expit(logits[mine] / temperature)
        answers[mine] = probabilities[mine] >= threshold
    area, interval = auroc(logits, truth), auroc_interval(logits, truth, groups, seed)
    said, right = torch.from_numpy(answers), torch.from_numpy(truth)
    halves = [float((answers[side] == truth[side]).mean()) for side in (truth, ~truth) if side.any()]
    error = binary_calibration_error(torch.from_numpy(probabilities), right.long(), n_bins=CALIBRATION_BINS)
    return {
        "auroc": area,
        "ci": None if interval is None else list(interval),
        "accuracy": float(binary_accuracy(said.long(), right.long())),
        "balanced_accuracy": float(np.mean(halves)) if len(halves) == 2 else None,
        "ece": float(error),
        "n": len(truth),
        "positives": int(truth.sum()),
    }
