"""Percentile intervals over resampled items (scipy.stats.bootstrap)."""

import math
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 1000
LEVEL = 0.95


def percentile_interval(
    statistic: Callable[[NDArray[np.intp]], float], items: int, seed: int
) -> tuple[float, float, float]:
    """(value, low, high) of a statistic of the indices of items; NaN where it is not defined.

    Resamples in which the statistic is not defined are left out.
    """

    def defined(chosen: NDArray[np.intp]) -> float:
        # Where every answer is the same, agreement by chance is complete and a coefficient is 0 / 0.
        with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            return statistic(chosen.astype(np.intp))

    everything = np.arange(items)
    value = defined(everything) if items else math.nan
    if items < 2 or math.isnan(value):
        return value, math.nan, math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # of its interval, which is not used
        drawn = stats.bootstrap(
            (everything,),
            defined,
            n_resamples=RESAMPLES,
            vectorized=False,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    kept = drawn[np.isfinite(drawn)]
    if not len(kept):
        return value, math.nan, math.nan
    low, high = np.quantile(kept, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return value, float(low), float(high)
