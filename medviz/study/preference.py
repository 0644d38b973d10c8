"""Analysis of the preference phase: does the aligned image match the prompt better than the baseline's?"""

import math
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medviz.study import mrmc
from medviz.study.agreement import inter_reader_kappa, krippendorff_alpha
from medviz.study.answers import all_scores, complete_scores, first_answers
from medviz.study.mixed import fit_mean
from medviz.study.protocol import Protocol
from medviz.study.repeats import intra_reader
from medviz.study.resampling import percentile_interval

if TYPE_CHECKING:
    import pandas as pd

CATEGORIES = (0.0, 0.5, 1.0)  # baseline, no difference, aligned
BASELINE = "baseline"
_REGULARISATION = 0.01  # of Bradley-Terry strengths, so that an unbeaten model has a finite one


def analyse_preference(protocol: Protocol, table: "pd.DataFrame") -> dict[str, Any]:
    """Score 1 for the aligned image, 0.5 for no difference, 0 for the baseline, with readers and cases crossed."""
    first = first_answers(table, "preference")
    keys = [case.key for case in protocol.cases]
    scores, model = complete_scores(first, keys), fit_mean(first)
    decided = first[first["score"] != 0.5]
    on_left = int((decided["answer"] == "left").sum())
    return {
        "mixed_model": None if model is None else {**asdict(model), "p_value": model.estimate.p_value(0.5)},
        "obuchowski_rockette": asdict(mrmc.mean(scores.values).estimate()) if scores.readers else None,
        "answers": _counts(first),
        "per_reader": {str(reader): _reader(rows) for reader, rows in first.groupby("reader")},
        "per_stratum": {str(name): _group(rows) for name, rows in first.groupby("stratum")},
        "per_adapter": {str(name): _group(rows) for name, rows in first.groupby("adapter")},
        "bradley_terry": bradley_terry(first, protocol.seed),
        "left_chosen": {
            "answers": len(decided),
            "left": on_left,
            "p_value": float(stats.binomtest(on_left, len(decided)).pvalue) if len(decided) else None,
        },
        "intra_reader": intra_reader(table, "preference", CATEGORIES, protocol.seed),
        "inter_reader": {
            "krippendorff_alpha": asdict(krippendorff_alpha(all_scores(first), protocol.seed)),
            "fleiss_kappa": asdict(inter_reader_kappa(scores.values, protocol.seed))
            if len(scores.readers) > 1
            else None,
        },
    }


def bradley_terry(first: "pd.DataFrame", seed: int) -> dict[str, Any]:
    """Strength of each adapter in log odds of being chosen over the baseline, with a bootstrap over cases (choix).

    An answer of no difference counts as half a win for either. Readers are taken as they are.
    """
    import choix

    models = [BASELINE, *sorted(set(first["adapter"]) - {BASELINE})]
    by_case = [
        [pair for row in rows.itertuples() for pair in _wins(models.index(row.adapter), row.score)]
        for _, rows in first.groupby("case")
    ]

    def log_odds(model: int, cases: NDArray[np.intp]) -> float:
        wins = [pair for case in cases for pair in by_case[case]]
        strength = choix.ilsr_pairwise(len(models), wins, alpha=_REGULARISATION)
        return float(strength[model] - strength[0])

    found = {}
    for model, name in enumerate(models[1:], 1):
        value, low, high = percentile_interval(partial(log_odds, model), len(by_case), seed)
        found[name] = {"log_odds": value, "low": low, "high": high, "cases": len(by_case)}
    return found


def _wins(model: int, score: float) -> list[tuple[int, int]]:
    """Pairs (winner, loser) of one answer, two in all."""
    aligned = round(2 * score)
    return [(model, 0)] * aligned + [(0, model)] * (2 - aligned)


def _counts(rows: "pd.DataFrame") -> dict[str, int]:
    score = rows["score"]
    return {
        "aligned": int((score == 1).sum()),
        "no_difference": int((score == 0.5).sum()),
        "baseline": int((score == 0).sum()),
    }


def _reader(rows: "pd.DataFrame") -> dict[str, Any]:
    """One reader: cases random. sign_test: two-sided p over the cases that the reader decided."""
    counts = _counts(rows)
    decided = counts["aligned"] + counts["baseline"]
    return {
        **_group(rows),
        "answers": counts,
        "sign_test": float(stats.binomtest(counts["aligned"], decided).pvalue) if decided else None,
    }


def _group(rows: "pd.DataFrame") -> dict[str, Any]:
    """Mean score of complete readers with its interval; no interval for a single case or where none is complete."""
    scores = complete_scores(rows, sorted(rows["case"].unique()))
    if scores.readers and scores.values.shape[1] > 1:
        return asdict(mrmc.mean(scores.values).estimate())
    readers, cases = rows["reader"].nunique(), rows["case"].nunique()
    return asdict(mrmc.Estimate(float(rows["score"].mean()), math.nan, math.nan, math.nan, math.nan, readers, cases))
