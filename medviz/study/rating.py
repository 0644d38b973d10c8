"""Analysis of the rating phase: quality by arm, and whether arms are equivalent within the protocol's margin."""

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from medviz.study import mrmc
from medviz.study.agreement import intraclass_correlation, krippendorff_alpha
from medviz.study.answers import all_scores, first_answers, scores_by_arm
from medviz.study.equivalence import two_one_sided_tests
from medviz.study.protocol import SYNTHETIC_ARMS, Protocol
from medviz.study.repeats import intra_reader

if TYPE_CHECKING:
    import pandas as pd

CATEGORIES = (1.0, 2.0, 3.0, 4.0, 5.0)


def analyse_rating(protocol: Protocol, table: "pd.DataFrame") -> dict[str, Any]:
    """Mean ratings and their differences with readers and cases random.

    Baseline and aligned images of one case are paired; real images are another sample of cases.
    """
    first = first_answers(table, "rating")
    readers, scores = scores_by_arm(protocol, first)
    if not readers:
        return {"readers": 0}
    arms = list(scores)
    differences = {"aligned_less_baseline": _mean(scores["aligned"]) - _mean(scores["baseline"])}
    if "real" in arms:
        differences |= {f"{arm}_less_real": mrmc.mean_difference(scores[arm], scores["real"]) for arm in SYNTHETIC_ARMS}
    return {
        "readers": len(readers),
        "arms": {arm: asdict(_mean(scores[arm]).estimate()) for arm in arms},
        "shares": {
            arm: {str(int(value)): float((scores[arm] == value).mean()) for value in CATEGORIES} for arm in arms
        },
        "differences": {name: _difference(figure, protocol.rating_margin) for name, figure in differences.items()},
        "per_reader": {
            reader: {
                "means": {arm: float(scores[arm][number].mean()) for arm in arms},
                "aligned_less_baseline": asdict(differences["aligned_less_baseline"].of_reader(number).estimate()),
                "equivalence_p": {
                    arm: _reader_equivalence(
                        scores["aligned"][number], scores[arm][number], arm == "baseline", protocol.rating_margin
                    )
                    for arm in arms
                    if arm != "aligned"
                },
            }
            for number, reader in enumerate(readers)
        },
        "intra_reader": intra_reader(table, "rating", CATEGORIES, protocol.seed),
        "inter_reader": {
            "krippendorff_alpha": asdict(krippendorff_alpha(all_scores(first), protocol.seed)),
            "intraclass_correlation": asdict(intraclass_correlation(np.hstack([scores[arm] for arm in arms])))
            if len(readers) > 1
            else None,
        },
    }


def _mean(scores: np.ndarray) -> mrmc.Figure:
    return mrmc.mean(scores, (CATEGORIES[0], CATEGORIES[-1]))


def _difference(figure: mrmc.Figure, margin: float) -> dict[str, Any]:
    estimate = figure.estimate()
    return {
        **asdict(estimate),
        "p_value": estimate.p_value(0.0),
        "equivalence": asdict(two_one_sided_tests(estimate, 0.0, margin)),
    }


def _reader_equivalence(aligned: np.ndarray, other: np.ndarray, paired: bool, margin: float) -> float:
    """p of one reader's two one-sided t tests (pingouin), paired with the baseline and unpaired with real images.

    NaN for a reader whose answers have no spread.
    """
    import pingouin

    spread = np.ptp(aligned - other) if paired else np.ptp(aligned) + np.ptp(other)
    if not spread:
        return math.nan
    return float(pingouin.tost(aligned, other, bound=margin, paired=paired)["pval"].iloc[0])
