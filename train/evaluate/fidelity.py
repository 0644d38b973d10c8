"""How far generated images lie from real ones, in the space of a feature network given by the caller.

Kernel distance: Binkowski et al. 2018, "Demystifying MMD GANs", the unbiased MMD^2 with k(x, y) = (x.y / D + 1)^3.
Unlike the Frechet distance it has no bias that grows as images get fewer, which at a few hundred images decides which
model looks better. Left out on purpose: ImageNet's Inception features, which are far from dermoscopy and radiography
and would have to be downloaded.
"""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from train.evaluate.statistics import Estimate, half_sample_interval

HALF_SAMPLES = 200


def kernel_distance(
    generated: np.ndarray, reference: np.ndarray, *, seed: int = 0, half_samples: int = HALF_SAMPLES
) -> Estimate:
    """Unbiased polynomial MMD^2 between two sets of features (N, D) and (M, D), with its half-sample interval.

    Both sets are divided by one number, the root mean square of the reference's features, so that the kernel's
    constant means the same in every feature space. The value may be slightly negative where the sets are alike.
    Raises ValueError when a set has fewer than 4 images or the widths differ.
    """
    value, halves = distance_and_halves(generated, reference, seed=seed, half_samples=half_samples)
    return half_sample_interval(value, halves, n=len(generated))


def kernel_distance_change(
    aligned: np.ndarray,
    baseline: np.ndarray,
    reference: np.ndarray,
    *,
    seed: int = 0,
    half_samples: int = HALF_SAMPLES,
) -> Estimate:
    """kernel_distance(aligned) - kernel_distance(baseline), row i of both from one prompt and seed.

    Both are read on the same halves of pairs and of the reference, so that what they share cancels.
    """
    if len(aligned) != len(baseline):
        raise ValueError(f"pairs need equal numbers of images, found {len(aligned)} and {len(baseline)}")
    after, after_halves = distance_and_halves(aligned, reference, seed=seed, half_samples=half_samples)
    before, before_halves = distance_and_halves(baseline, reference, seed=seed, half_samples=half_samples)
    return half_sample_interval(after - before, after_halves - before_halves, n=len(aligned))


def frechet_distance(generated: np.ndarray, reference: np.ndarray) -> float:
    """Frechet distance (FID's formula) between features (N, D) and (M, D), for those who compare with older papers.

    It is biased upwards at a few hundred images: read it only beside the real-against-real value of equal N, never
    against a published one. Raises ValueError when a set has fewer than 2 images or the widths differ.
    """
    _check(generated, reference, at_least=2)
    metric = FrechetInceptionDistance(feature=_AsGiven(generated.shape[1]))
    metric.update(torch.from_numpy(reference.astype(np.float32)), real=True)
    metric.update(torch.from_numpy(generated.astype(np.float32)), real=False)
    return float(metric.compute())


class _AsGiven(torch.nn.Module):
    """Hands features through where torchmetrics expects a network that turns images into features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def distance_and_halves(
    generated: np.ndarray, reference: np.ndarray, *, seed: int = 0, half_samples: int = HALF_SAMPLES
) -> tuple[float, np.ndarray]:
    """The value of :func:`kernel_distance` and its values (half_samples,) on random halves of both sets.

    Which halves depends on the seed and the sizes alone: sets drawn from the same prompts are read on the same halves.
    """
    _check(generated, reference, at_least=4)
    scale = float(np.sqrt(np.mean(np.square(reference, dtype=np.float64))))
    if scale == 0.0:
        raise ValueError("the reference's features are all zero: the feature network sees nothing")
    x = generated.astype(np.float64) / scale
    y = reference.astype(np.float64) / scale
    width = x.shape[1]
    k_xx, k_yy, k_xy = (_kernel(a, b, width) for a, b in ((x, x), (y, y), (x, y)))
    rng = np.random.default_rng(seed)
    halves = np.empty(half_samples)
    for index in range(half_samples):
        i = rng.permutation(len(x))[: len(x) // 2]
        j = rng.permutation(len(y))[: len(y) // 2]
        halves[index] = _mmd(k_xx[np.ix_(i, i)], k_yy[np.ix_(j, j)], k_xy[np.ix_(i, j)])
    return _mmd(k_xx, k_yy, k_xy), halves


def _kernel(x: np.ndarray, y: np.ndarray, width: int) -> np.ndarray:
    return (x @ y.T / width + 1.0) ** 3


def _mmd(k_xx: np.ndarray, k_yy: np.ndarray, k_xy: np.ndarray) -> float:
    n, m = k_xy.shape
    within_x = (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
    within_y = (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
    return float(within_x + within_y - 2.0 * k_xy.mean())


def _check(generated: np.ndarray, reference: np.ndarray, at_least: int) -> None:
    for name, features in (("generated", generated), ("reference", reference)):
        if features.ndim != 2 or len(features) < at_least:
            raise ValueError(f"{name} features need shape (N >= {at_least}, D), found {features.shape}")
    if generated.shape[1] != reference.shape[1]:
        raise ValueError(f"feature widths differ: {generated.shape[1]} and {reference.shape[1]}")
