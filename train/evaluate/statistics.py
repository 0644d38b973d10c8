"""Point estimates with 95 % intervals: every figure of an evaluation passes through here.

Images that one prompt and one seed gave to two models are a pair, so a difference between models is resampled by pair
and never as two independent samples: the seed's share of the variance cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest, bootstrap, ttest_1samp

CONFIDENCE = 0.95
RESAMPLES = 2000


@dataclass(frozen=True)
class Estimate:
    """A figure, the ends of its 95 % interval and the number of independent units it rests on.

    `low` and `high` are None where no interval exists (one unit, or a figure that is a bound by definition).
    """

    value: float
    low: float | None
    high: float | None
    n: int

    @property
    def standard_error(self) -> float:
        """A quarter of the interval's width, which is near enough; 0.0 where there is no interval."""
        return 0.0 if self.low is None or self.high is None else (self.high - self.low) / 4

    def as_json(self) -> dict[str, float | int | None]:
        """Plain values for a JSON file; a figure that is not finite becomes None, which reads "not computed"."""
        return {
            "value": _finite(self.value),
            "low": _finite(self.low),
            "high": _finite(self.high),
            "n": self.n,
        }


def mean_interval(
    values: np.ndarray, *, kinds: np.ndarray | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Mean of `values` (N,), units left out where NaN, with a percentile bootstrap interval over the units.

    kinds (N,) bool: units of two kinds, whose means count the same however many each has, as in a balanced accuracy.
    They are resampled apart, so that no resample has more of one kind than there are. Where only one kind is left, its
    mean is the mean.
    """
    if kinds is None:
        return _bootstrapped((_kept(values),), _mean, seed=seed, resamples=resamples)
    parts = [_kept(values[kinds]), _kept(values[~kinds])]
    if not all(part.size for part in parts):
        return mean_interval(values, seed=seed, resamples=resamples)
    found = _bootstrapped(tuple(parts), _mean_of_means, paired=False, seed=seed, resamples=resamples)
    return replace(found, n=sum(part.size for part in parts))


def paired_difference(
    aligned: np.ndarray,
    baseline: np.ndarray,
    *,
    kinds: np.ndarray | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean of aligned - baseline over the pairs (N,) in which both were computed; kinds: as for `mean_interval`.

    Raises ValueError if the two arrays do not have the same shape.
    """
    if aligned.shape != baseline.shape:
        raise ValueError(f"paired values need one shape, found {aligned.shape} and {baseline.shape}")
    difference = aligned.astype(np.float64) - baseline.astype(np.float64)
    return mean_interval(difference, kinds=kinds, seed=seed, resamples=resamples)


def paired_ratio(aligned: np.ndarray, baseline: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """mean(aligned) / mean(baseline) over the pairs (N,) in which both were computed, resampled by pair.

    Raises ValueError if the two arrays do not have the same shape.
    """
    if aligned.shape != baseline.shape:
        raise ValueError(f"paired values need one shape, found {aligned.shape} and {baseline.shape}")
    both = np.isfinite(aligned) & np.isfinite(baseline)
    above, below = aligned[both].astype(np.float64), baseline[both].astype(np.float64)
    if below.size == 0 or below.mean() == 0.0:
        return Estimate(float("nan"), None, None, int(below.size))
    return _bootstrapped((above, below), _ratio_of_means, seed=seed, resamples=resamples)


def share_interval(hits: np.ndarray) -> Estimate:
    """Share of True in `hits` (N,), with Wilson's interval, which has a width where all answers are alike."""
    n = int(hits.size)
    if n == 0:
        return Estimate(float("nan"), None, None, 0)
    interval = binomtest(int(hits.sum()), n).proportion_ci(CONFIDENCE, method="wilson")
    return Estimate(float(hits.mean()), float(interval.low), float(interval.high), n)


def median_interval(values: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Median of `values` (N,), units left out where NaN, with a percentile bootstrap interval over the units."""
    return _bootstrapped((_kept(values),), _median, seed=seed, resamples=resamples)


def student_interval(values: np.ndarray) -> Estimate:
    """Mean of `values` (N,), units left out where NaN, with Student's t interval over the units.

    For a handful of units, such as training seeds: of five, a percentile bootstrap's interval is a third too narrow.
    """
    kept = _kept(values)
    if kept.size < 2 or np.ptp(kept) == 0.0:
        return mean_interval(kept)
    interval = ttest_1samp(kept, 0.0).confidence_interval(CONFIDENCE)
    return Estimate(float(kept.mean()), float(interval.low), float(interval.high), int(kept.size))


def student_ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Geometric mean of above / below over the pairs (N,) in which both are positive and finite, with Student's t
    interval of its logarithm."""
    ratios = np.full(np.shape(above), np.nan)
    both = np.isfinite(above) & np.isfinite(below) & (above > 0) & (below > 0)
    ratios[both] = np.log(above[both] / below[both])
    found = student_interval(ratios)
    ends = [None if end is None else float(np.exp(end)) for end in (found.low, found.high)]
    return Estimate(float(np.exp(found.value)), ends[0], ends[1], found.n)


def half_sample_interval(value: float, half_values: np.ndarray, n: int, *, confidence: float = CONFIDENCE) -> Estimate:
    """Interval of a statistic of two samples from its values on random halves of both samples.

    Half-samples without replacement are the delete-d jackknife at d = n/2, whose scale factor sqrt((n - d) / d) is 1:
    the spread of the halves around the whole sample is the spread of the whole sample around the truth (Shao and Wu
    1989). Unlike a bootstrap it never repeats an image, which would bias a kernel distance. It is conservative where
    the two distributions are equal.
    """
    if half_values.size < 2:
        return Estimate(value, None, None, n)
    spread = half_values - value
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(spread, [tail, 1.0 - tail])
    return Estimate(value, float(value - high), float(value - low), n)


def _kept(values: np.ndarray) -> np.ndarray:
    flat = np.asarray(values, dtype=np.float64).ravel()
    return flat[np.isfinite(flat)]


def _mean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(values, axis=axis)


def _median(values: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.median(values, axis=axis)


def _mean_of_means(first: np.ndarray, second: np.ndarray, axis: int = -1) -> np.ndarray:
    return (np.mean(first, axis=axis) + np.mean(second, axis=axis)) / 2


def _ratio_of_means(above: np.ndarray, below: np.ndarray, axis: int = -1) -> np.ndarray:
    return np.mean(above, axis=axis) / np.mean(below, axis=axis)


def _bootstrapped(
    samples: tuple[np.ndarray, ...],
    statistic: Callable[..., np.ndarray],
    *,
    seed: int,
    resamples: int,
    paired: bool = True,
) -> Estimate:
    n = int(samples[0].size)
    if n == 0:
        return Estimate(float("nan"), None, None, 0)
    value = float(statistic(*samples))
    if min(sample.size for sample in samples) == 1:
        return Estimate(value, None, None, n)
    if all(np.ptp(sample) == 0.0 for sample in samples):
        return Estimate(value, value, value, n)
    interval = bootstrap(
        samples,
        statistic,
        paired=paired and len(samples) > 1,
        n_resamples=resamples,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=200,
    ).confidence_interval
    return Estimate(value, float(interval.low), float(interval.high), n)


def _finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)
