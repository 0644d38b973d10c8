"""Multi-reader multi-case intervals by the method of Obuchowski and Rockette, readers and cases both random.

Obuchowski and Rockette 1995, Communications in Statistics 24, 285; degrees of freedom of Hillis 2007, Statistics in
Medicine 26, 596. Covariances over cases by DeLong, DeLong and Clarke-Pearson 1988, Biometrics 44, 837; for a mean they
are the usual ones. Every figure of merit here is a mean over cases of what each case contributes, so AUC, accuracy,
preference and mean rating go through one function.
"""

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medviz.errors import InputError

Values = NDArray[np.float64]
LEVEL = 0.95
SHARE = (0.0, 1.0)


@dataclass(frozen=True)
class Estimate:
    """A mean over readers with its interval; NaN bounds where all answers agree and no spread can be seen.

    df: of Student's t; infinite for the normal distribution. readers, cases: how many it rests on.
    """

    value: float
    standard_error: float
    df: float
    low: float
    high: float
    readers: int
    cases: int

    def p_value(self, null: float) -> float:
        """Two-sided p of the value being `null`; NaN where the standard error is not known."""
        if not self.standard_error > 0:
            return math.nan
        return float(2 * stats.t.sf(abs(self.value - null) / self.standard_error, self.df))


@dataclass(frozen=True, eq=False)
class Figure:
    """A figure of merit of R readers. values (R,); parts: one (R, n) array for each independent sample of cases.

    The covariance of the values over cases is the sum of the parts' covariances over n. limits: what a value can be, at
    which intervals end. Figures of the same readers and cases can be subtracted.
    """

    values: Values
    parts: tuple[Values, ...]
    limits: tuple[float, float] = (-math.inf, math.inf)

    def __sub__(self, other: "Figure") -> "Figure":
        return Figure(self.values - other.values, tuple(a - b for a, b in zip(self.parts, other.parts, strict=True)))

    @property
    def covariance(self) -> Values:
        """(R, R): of the readers' values over cases, readers fixed. InputError for a sample of one case."""
        if min(part.shape[1] for part in self.parts) < 2:
            raise InputError("a covariance over cases needs at least two cases of each kind")
        return sum((np.atleast_2d(np.cov(part)) / part.shape[1] for part in self.parts), start=np.zeros(()))

    def of_reader(self, index: int) -> "Figure":
        """The figure of one reader alone."""
        return Figure(self.values[[index]], tuple(part[[index]] for part in self.parts), self.limits)

    def estimate(self, level: float = LEVEL) -> Estimate:
        """The mean over readers: readers and cases random, or the one reader fixed where there is only one."""
        found = random_readers(self.values, self.covariance, sum(part.shape[1] for part in self.parts), level)
        low, high = np.clip((found.low, found.high), *self.limits)
        return replace(found, low=float(low), high=float(high))


def auc(positive: Values, negative: Values) -> Figure:
    """Area under the ROC curve of each reader, ties counted half. positive (R, n1) and negative (R, n0): scores."""
    wins = (positive[:, :, None] > negative[:, None, :]) + 0.5 * (positive[:, :, None] == negative[:, None, :])
    return Figure(wins.mean(axis=(1, 2)), (wins.mean(axis=2), wins.mean(axis=1)), SHARE)


def mean(scores: Values, limits: tuple[float, float] = SHARE) -> Figure:
    """Mean of each reader's scores (R, n), all within `limits`."""
    return Figure(scores.mean(axis=1), (scores,), limits)


def mean_difference(first: Values, second: Values) -> Figure:
    """Mean of the first sample of cases (R, n1) less that of an independent one (R, n2)."""
    return Figure(first.mean(axis=1) - second.mean(axis=1), (first, -second))


def random_readers(values: Values, covariance: Values, cases: int, level: float = LEVEL) -> Estimate:
    """Interval of the mean of values (R,), given their covariance over cases (R, R).

    Single-treatment interval of Hillis 2007: variance [MS(R) + max(R Cov2, 0)] / R, with Cov2 the mean covariance
    between readers and df = [MS(R) + max(R Cov2, 0)]^2 / [MS(R)^2 / (R - 1)]. For the difference of two treatments,
    given as each reader's difference, it is the interval of their equation for two treatments. The variance component
    of readers is not let below zero: MS(R) is at least Var(error) - Cov2, its expectation where readers do not differ.
    With three readers a negative component is frequent and its interval too narrow. One reader: the normal interval
    over cases.
    """
    readers = len(values)
    if readers == 1:
        return _bounded(float(values[0]), math.sqrt(float(covariance[0, 0])), math.inf, 1, cases, level)
    own, total = np.trace(covariance) / readers, covariance.sum()
    between = (total - readers * own) / (readers * (readers - 1))
    error, df = _spread(np.asarray(values.var(ddof=1)), np.asarray(own), np.asarray(between), readers)
    return _bounded(float(values.mean()), float(error), float(df), readers, cases, level)


def crossed_means(scores: Values, level: float = LEVEL) -> tuple[Values, Values, Values]:
    """(mean, low, high) of many studies at once: scores (..., R, C) of R readers, at least two, and C cases.

    The same interval as `mean(scores).estimate()`. Bounds are NaN where no spread can be seen.
    """
    readers, cases = scores.shape[-2:]
    values = scores.mean(axis=-1)
    own = scores.var(axis=-1, ddof=1).mean(axis=-1) / cases
    total = scores.sum(axis=-2).var(axis=-1, ddof=1) / cases
    between = (total - readers * own) / (readers * (readers - 1))
    error, df = _spread(values.var(axis=-1, ddof=1), own, between, readers)
    value = values.mean(axis=-1)
    half = stats.t.ppf((1 + level) / 2, df) * np.where(error > 0, error, np.nan)
    return value, value - half, value + half


def _spread(reader_variance: Values, own: Values, between: Values, readers: int) -> tuple[Values, Values]:
    """(standard error, degrees of freedom) of means over readers, element by element.

    reader_variance: MS(R). own, between: mean variance of a reader's value over cases, and covariance of two readers'.
    """
    mean_square = np.maximum(reader_variance, own - between)
    variance = mean_square + np.maximum(readers * between, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        df = np.where(mean_square > 0, variance**2 / (mean_square**2 / (readers - 1)), np.inf)
    return np.sqrt(variance / readers), df


def _bounded(value: float, error: float, df: float, readers: int, cases: int, level: float) -> Estimate:
    half = float(stats.t.ppf((1 + level) / 2, df)) * error if error > 0 else math.nan
    return Estimate(value, error, df, value - half, value + half, readers, cases)
