"""95 % intervals over two crossed sources of chance: the runs (training seeds) and the units that all runs share.

Every run is measured on the same units (prompts, captions, lesions). A resample draws runs with replacement and,
independently, units with replacement, and computes the figure on the product: the pigeonhole bootstrap (Owen 2007,
Annals of Applied Statistics 1). The interval is that of another training run, shown other prompts of the same kind.
With few runs its share for the runs is too narrow, by the factor sqrt((S - 1) / S) in the spread: 18 % at 3
seeds, 11 % at 5. A difference between two models is computed within each resample, on the same runs and units, so that
what they share cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from train import seeding
from train.evaluate.statistics import CONFIDENCE, RESAMPLES, Estimate, half_sample_interval

Statistic = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(times each run counts (R, S), times each unit counts (R, U)) -> the figure of each of R resamples (R,)."""


def crossed_interval(
    statistic: Statistic, runs: int, units: int, *, n: int | None = None, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """`statistic` of all runs and units, with its percentile interval; n: the number to report, else `units`.

    Resamples on which the figure cannot be computed are left out. There is no interval where nothing varies: one run
    and one unit.
    """
    n = units if n is None else n
    if runs == 0 or units == 0:
        return Estimate(float("nan"), None, None, 0)
    value = float(statistic(np.ones((1, runs)), np.ones((1, units)))[0])
    if not np.isfinite(value) or (runs == 1 and units == 1):
        return Estimate(value, None, None, n)
    found = statistic(_times(seed, "runs", runs, resamples), _times(seed, "units", units, resamples))
    found = found[np.isfinite(found)]
    if found.size < 2:
        return Estimate(value, None, None, n)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(found, [tail, 1.0 - tail])
    return Estimate(value, float(low), float(high), n)


def crossed_mean(values: np.ndarray, *, seed: int = 0) -> Estimate:
    """Mean of `values` (S, U): over the runs and the units that all runs have, i.e. without NaN."""
    kept = values[:, np.isfinite(values).all(axis=0)]
    return crossed_interval(_mean(kept), *kept.shape, seed=seed)


def crossed_ratio(above: np.ndarray, below: np.ndarray, *, seed: int = 0) -> Estimate:
    """mean(above) / mean(below) of above (S, U) and below (U,), units left out where either has NaN."""
    kept = np.isfinite(above).all(axis=0) & np.isfinite(below)
    over, under = _mean(above[:, kept]), _mean(below[None, kept])

    def ratio(times_run: np.ndarray, times_unit: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return over(times_run, times_unit) / under(np.ones((len(times_unit), 1)), times_unit)

    return crossed_interval(ratio, len(above), int(kept.sum()), seed=seed)


def calibration_error(excess: np.ndarray, counts: np.ndarray) -> Statistic:
    """Expected calibration error of pooled answers, from sums that add up over units.

    excess (S, U, B): of each bin of probability, answers that are yes less their summed probability; counts (S, U): all
    answers. The error is the sum over bins of |excess| over answers, the size-weighted gap between said and so.
    """

    def error(times_run: np.ndarray, times_unit: np.ndarray) -> np.ndarray:
        gap = np.abs(np.einsum("rs,sub,ru->rb", times_run, excess, times_unit, optimize=True)).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            return gap / np.einsum("rs,su,ru->r", times_run, counts, times_unit, optimize=True)

    return error


def difference(one: Statistic, other: Statistic) -> Statistic:
    """one - other on the same runs and units."""
    return lambda times_run, times_unit: one(times_run, times_unit) - other(times_run, times_unit)


def single_run(statistic: Statistic) -> Statistic:
    """A figure of one run (a baseline) where it stands beside figures of several: it has no runs to draw."""
    return lambda times_run, times_unit: statistic(np.ones((len(times_unit), 1)), times_unit)


def kernel_interval(values: np.ndarray, halves: np.ndarray, n: int, *, seed: int = 0) -> Estimate:
    """Mean kernel distance over runs: values (S,), halves (S, H) on the same half-samples in every run.

    Each half-sample goes with runs drawn with replacement, so that the spread holds both; see `half_sample_interval`.
    """
    times = _times(seed, "runs", len(values), halves.shape[1])
    return half_sample_interval(float(values.mean()), (times * halves.T).sum(axis=1) / len(values), n)


def _mean(values: np.ndarray) -> Statistic:
    def mean(times_run: np.ndarray, times_unit: np.ndarray) -> np.ndarray:
        total = np.einsum("rs,su,ru->r", times_run, values, times_unit, optimize=True)
        return total / (times_run.sum(axis=1) * times_unit.sum(axis=1))

    return mean


@lru_cache(maxsize=8)
def _times(seed: int, drawn: str, count: int, resamples: int) -> np.ndarray:
    """How often each of `count` things is drawn in each resample, (resamples, count): the same for every figure."""
    rng = seeding.numpy_generator(seed, "crossed", drawn, count)
    return rng.multinomial(count, np.full(count, 1.0 / count), size=resamples).astype(np.float64)
