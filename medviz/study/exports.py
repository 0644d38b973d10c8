"""Files of a study for other programs: answers by case as CSV, and input of iMRMC."""

import csv
import io
from typing import TYPE_CHECKING

import numpy as np

from medviz.errors import StudyError
from medviz.study.answers import first_answers, scores_by_arm
from medviz.study.protocol import SYNTHETIC_ARMS, Protocol

if TYPE_CHECKING:
    import pandas as pd

_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def answers_csv(table: "pd.DataFrame") -> str:
    """Every answer, a row each, with the columns of `medviz.study.answers`. A spreadsheet runs no cell as a formula."""
    safe = table.copy()
    for column in ("study", "specialty", "display", "stratum", "adapter"):
        safe[column] = [f"'{text}" if str(text).startswith(_FORMULA_STARTS) else text for text in safe[column]]
    return safe.to_csv(index=False, lineterminator="\n")


def imrmc_input(protocol: Protocol, table: "pd.DataFrame") -> str:
    """The detection phase as input of the iMRMC program: reader, case, modality and score, the truth first.

    Modality 1 is the baseline, 2 the aligned model. Synthetic images are the signal; each case stands for its pair.
    Real images are the cases without signal and have the same score in either modality. Readers who have not finished
    are left out. Raises StudyError where nobody has.
    """
    readers, scores = scores_by_arm(protocol, first_answers(table, "detection"))
    if not readers or "real" not in scores:
        raise StudyError("no reader has finished the real-or-synthetic phase; there is nothing to export for iMRMC")
    negatives, positives = len(protocol.real), len(protocol.cases)
    text = io.StringIO()
    text.write(f"{protocol.title}, protocol {protocol.sha256}\n")
    text.write("Modality 1: baseline; modality 2: aligned. Score: confidence that the image is synthetic, 1 to 6\n")
    text.write(f"Readers: {', '.join(f'{number} is {name}' for number, name in enumerate(readers, 1))}\n\n")
    text.write(f"NR: {len(readers)}\nN0: {negatives}\nN1: {positives}\nNM: {len(SYNTHETIC_ARMS)}\n\nBEGIN DATA:\n")
    rows = csv.writer(text, lineterminator="\n")
    cases = range(1, negatives + positives + 1)
    columns = [np.hstack([scores["real"], scores[arm]]) for arm in SYNTHETIC_ARMS]
    rows.writerows((-1, case, 0, int(case > negatives)) for case in cases)
    for reader in range(len(readers)):
        for case in cases:
            for modality, column in enumerate(columns, 1):
                rows.writerow((reader + 1, case, modality, int(column[reader, case - 1])))
    return text.getvalue()
