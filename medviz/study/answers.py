"""The answers as one table, a row each, with what was shown decoded from the protocol and readers under numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medviz.errors import StudyError
from medviz.study.protocol import SYNTHETIC_ARMS, Arm, Protocol
from medviz.study.store import Answer, Store

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = (
    "study",
    "domain",
    "reader",
    "specialty",
    "years",
    "simulated",
    "phase",
    "practice",
    "repeat",
    "position",
    "case",
    "stratum",
    "adapter",
    "arm",
    "left",
    "answer",
    "score",
    "response_ms",
    "zoom",
    "display",
    "answered_at",
)


def answer_table(protocol: Protocol, store: Store) -> "pd.DataFrame":
    """Every answer of a study with the columns COLUMNS, by reader and position.

    reader: R1, R2, ... in the order of consent; codes and their hashes are left out. arm: "baseline", "aligned" or
    "real"; empty in the preference phase, where `left` names the image on the left. score: the rating 1 to 5, the
    confidence 1 (definitely real) to 6 (definitely synthetic), or 1 where the aligned image was preferred, 0 where the
    baseline was, 0.5 for neither.
    """
    import pandas as pd

    numbers = {reader.id: reader for reader in store.readers()}
    cases = {case.key: case for case in (*protocol.cases, *protocol.practice)}
    rows = []
    for answer in store.answers():
        reader, case, arms = numbers[answer.reader], cases.get(answer.case_key), answer.arms.split(",")
        rows.append(
            (
                protocol.title,
                protocol.domain,
                f"R{reader.number}",
                reader.specialty,
                reader.years,
                reader.simulated,
                answer.phase,
                answer.practice,
                answer.is_repeat,
                answer.position,
                answer.case_key,
                case.stratum if case else "real",
                case.adapter if case else "",
                arms[0] if len(arms) == 1 else "",
                arms[0] if len(arms) == 2 else "",
                answer.value,
                _score(answer, arms),
                answer.response_ms,
                answer.zoom,
                answer.display,
                answer.answered_at,
            )
        )
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _score(answer: Answer, arms: list[str]) -> float:
    if answer.phase != "preference":
        return float(answer.value)
    if answer.value == "tie":
        return 0.5
    if answer.value not in ("left", "right"):
        raise StudyError(f"the stored answer {answer.value!r} is none of left, tie and right")
    return float(arms[("left", "right").index(answer.value)] == "aligned")


@dataclass(frozen=True, eq=False)
class Scores:
    """Complete scores: readers, and values (len(readers), cases). Readers with a gap are left out."""

    readers: tuple[str, ...]
    values: NDArray[np.float64]


def first_answers(table: "pd.DataFrame", phase: str) -> "pd.DataFrame":
    """The answers of one phase without practice and repeats."""
    return table[(table["phase"] == phase) & ~table["practice"] & ~table["repeat"]]


def complete_scores(table: "pd.DataFrame", cases: Sequence[str]) -> Scores:
    """Scores of the readers who answered every one of `cases`. table: one answer a reader and case."""
    wide = table.pivot(index="reader", columns="case", values="score").reindex(columns=list(cases)).dropna()
    return Scores(tuple(map(str, wide.index)), wide.to_numpy(dtype=np.float64))


def scores_by_arm(protocol: Protocol, table: "pd.DataFrame") -> tuple[tuple[str, ...], dict[str, NDArray[np.float64]]]:
    """Readers who answered every image, and their scores of each arm, (readers, images), in the protocol's order."""
    keys: dict[Arm, list[str]] = {arm: [case.key for case in protocol.cases] for arm in SYNTHETIC_ARMS}
    keys["real"] = [image.key for image in protocol.real]
    arms = {arm: complete_scores(table[table["arm"] == arm], cases) for arm, cases in keys.items() if cases}
    readers = tuple(reader for reader in arms["aligned"].readers if all(reader in arm.readers for arm in arms.values()))
    return readers, {name: arm.values[[arm.readers.index(reader) for reader in readers]] for name, arm in arms.items()}


def all_scores(table: "pd.DataFrame") -> NDArray[np.float64]:
    """Scores (readers, items) with NaN in the gaps; an item is a case with an arm."""
    wide = table.assign(item=table["case"] + "/" + table["arm"]).pivot(index="reader", columns="item", values="score")
    return wide.to_numpy(dtype=np.float64)


def repeated_answers(table: "pd.DataFrame", phase: str) -> "pd.DataFrame":
    """One row an item that a reader answered twice: reader, case, arm, score_first, score_repeat."""
    shown = table[(table["phase"] == phase) & ~table["practice"]]
    keys = ["reader", "case", "arm"]
    return shown[~shown["repeat"]].merge(shown[shown["repeat"]], on=keys, suffixes=("_first", "_repeat"))
