"""Analysis of the detection phase: do readers tell synthetic images from real ones?"""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from medviz.study import mrmc
from medviz.study.agreement import inter_reader_kappa, krippendorff_alpha
from medviz.study.answers import all_scores, first_answers, scores_by_arm
from medviz.study.equivalence import two_one_sided_tests
from medviz.study.protocol import SYNTHETIC_ARMS, Protocol
from medviz.study.repeats import intra_reader

if TYPE_CHECKING:
    import pandas as pd

CATEGORIES = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
SAYS_SYNTHETIC = 3.5  # a confidence above it says synthetic


def analyse_detection(protocol: Protocol, table: "pd.DataFrame") -> dict[str, Any]:
    """AUC, accuracy, sensitivity and specificity, synthetic being positive, with readers and cases random.

    auc of 0.5 is chance; balanced_accuracy is the mean of sensitivity and specificity. auc_difference: aligned less
    baseline; below 0 the aligned images are harder to tell from real ones.
    """
    first = first_answers(table, "detection")
    readers, scores = scores_by_arm(protocol, first)
    if not readers:
        return {"readers": 0}
    said = {name: (values > SAYS_SYNTHETIC).astype(float) for name, values in scores.items()}
    areas = {arm: mrmc.auc(scores[arm], scores["real"]) for arm in SYNTHETIC_ARMS}
    accuracies = {arm: mrmc.auc(said[arm], said["real"]) for arm in SYNTHETIC_ARMS}
    difference = (areas["aligned"] - areas["baseline"]).estimate()
    return {
        "readers": len(readers),
        "specificity": asdict(mrmc.mean(1 - said["real"]).estimate()),
        "arms": {
            arm: {
                "auc": asdict(areas[arm].estimate()),
                "auc_against_chance": areas[arm].estimate().p_value(0.5),
                "auc_equivalent_to_chance": asdict(
                    two_one_sided_tests(areas[arm].estimate(), 0.5, protocol.auc_margin)
                ),
                "balanced_accuracy": asdict(accuracies[arm].estimate()),
                "sensitivity": asdict(mrmc.mean(said[arm]).estimate()),
            }
            for arm in SYNTHETIC_ARMS
        },
        "auc_difference": {**asdict(difference), "p_value": difference.p_value(0.0)},
        "per_reader": {
            reader: {
                arm: {
                    "auc": asdict(areas[arm].of_reader(number).estimate()),
                    "balanced_accuracy": asdict(accuracies[arm].of_reader(number).estimate()),
                    "sensitivity": float(said[arm][number].mean()),
                    "specificity": float(1 - said["real"][number].mean()),
                }
                for arm in SYNTHETIC_ARMS
            }
            for number, reader in enumerate(readers)
        },
        "intra_reader": intra_reader(table, "detection", CATEGORIES, protocol.seed),
        "inter_reader": {
            "krippendorff_alpha": asdict(krippendorff_alpha(all_scores(first), protocol.seed)),
            "fleiss_kappa_real_or_synthetic": asdict(
                inter_reader_kappa(np.hstack([said[name] for name in (*SYNTHETIC_ARMS, "real")]), protocol.seed)
            )
            if len(readers) > 1
            else None,
        },
    }
