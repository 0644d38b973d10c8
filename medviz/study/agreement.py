"""Agreement within and between readers: kappa, Krippendorff's alpha and the intraclass correlation, with bootstrap."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from medviz.study.resampling import percentile_interval

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """A coefficient and its 95 % percentile interval over resampled items; NaN where it is not defined."""

    value: float
    low: float
    high: float
    items: int
    readers: int


def intra_reader_kappa(
    first: Scores, second: Scores, categories: Sequence[float], readers: int, seed: int
) -> Agreement:
    """Cohen's kappa, quadratic weights, of answers (n,) with the same readers' answers to the same items shown again.

    categories: all that could be answered, in order. readers: how many the answers come from.
    """
    from statsmodels.stats.inter_rater import cohens_kappa

    codes = np.searchsorted(np.asarray(categories), np.stack([first, second]))

    def kappa(items: NDArray[np.intp]) -> float:
        table = np.zeros((len(categories), len(categories)))
        np.add.at(table, tuple(codes[:, items]), 1)
        return float(cohens_kappa(table, wt="quadratic", return_results=False))

    return Agreement(*percentile_interval(kappa, len(first), seed), len(first), readers)


def inter_reader_kappa(scores: Scores, seed: int) -> Agreement:
    """Fleiss' kappa of complete scores (readers, items), categories without order."""
    from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

    counts = aggregate_raters(scores.T)[0]
    items, readers = counts.shape[0], len(scores)
    return Agreement(
        *percentile_interval(lambda chosen: float(fleiss_kappa(counts[chosen])), items, seed), items, readers
    )


def krippendorff_alpha(
    scores: Scores, seed: int, level: Literal["nominal", "ordinal", "interval"] = "ordinal"
) -> Agreement:
    """Krippendorff's alpha of scores (readers, items); NaN marks an item that a reader has not answered."""
    import krippendorff

    def alpha(items: NDArray[np.intp]) -> float:
        chosen = scores[:, items]
        if len(np.unique(chosen[np.isfinite(chosen)])) < 2 or not (np.isfinite(chosen).sum(axis=0) > 1).any():
            return math.nan
        return float(krippendorff.alpha(reliability_data=chosen, level_of_measurement=level))

    return Agreement(*percentile_interval(alpha, scores.shape[1], seed), scores.shape[1], len(scores))


def intraclass_correlation(scores: Scores) -> Agreement:
    """ICC(A,1), two-way random effects, absolute agreement, single rater, of complete scores (readers, items).

    The interval is the analytic one of McGraw and Wong 1996.
    """
    import pandas as pd
    import pingouin

    readers, items = scores.shape
    long = pd.DataFrame(
        {
            "item": np.tile(np.arange(items), readers),
            "reader": np.repeat(np.arange(readers), items),
            "score": scores.ravel(),
        }
    )
    with np.errstate(divide="ignore", invalid="ignore"):
        rows = pingouin.intraclass_corr(long, targets="item", raters="reader", ratings="score").set_index("Type")
    row = rows.loc["ICC(A,1)"]
    low, high = row["CI95"]
    return Agreement(float(row["ICC"]), float(low), float(high), items, readers)
