"""Equivalence by two one-sided tests (Schuirmann 1987, Journal of Pharmacokinetics and Biopharmaceutics 15, 657)."""

import math
from dataclasses import dataclass

from scipy import stats

from medviz.study.mrmc import Estimate


@dataclass(frozen=True)
class Equivalence:
    """Whether a value lies within `margin` of `null`. p: the larger of the two one-sided tests'.

    equivalent: p < alpha, the same as the interval of level 1 - 2 alpha lying within the margin. p is NaN, and
    equivalent False, where the standard error is not known.
    """

    value: float
    null: float
    margin: float
    low: float
    high: float
    p: float
    equivalent: bool


def two_one_sided_tests(estimate: Estimate, null: float, margin: float, alpha: float = 0.05) -> Equivalence:
    """Test an estimate, readers and cases random, for equivalence with `null`."""
    error, df = estimate.standard_error, estimate.df
    if not error > 0:
        return Equivalence(estimate.value, null, margin, math.nan, math.nan, math.nan, False)
    distance = estimate.value - null
    p = max(float(stats.t.sf((distance + margin) / error, df)), float(stats.t.cdf((distance - margin) / error, df)))
    half = float(stats.t.ppf(1 - alpha, df)) * error
    return Equivalence(estimate.value, null, margin, estimate.value - half, estimate.value + half, p, p < alpha)
