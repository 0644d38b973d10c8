"""What hidden repeats say of each reader's consistency."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from medviz.study.agreement import intra_reader_kappa
from medviz.study.answers import repeated_answers

if TYPE_CHECKING:
    import pandas as pd


def intra_reader(table: "pd.DataFrame", phase: str, categories: Sequence[float], seed: int) -> dict[str, Any]:
    """Kappa of the items shown twice: of all readers together, and of each reader, whose few items make it rough."""

    def kappa(rows: "pd.DataFrame") -> dict[str, Any]:
        first, second = rows["score_first"].to_numpy(), rows["score_repeat"].to_numpy()
        return asdict(intra_reader_kappa(first, second, categories, rows["reader"].nunique(), seed))

    pairs = repeated_answers(table, phase)
    return {
        "all_readers": kappa(pairs),
        "per_reader": {str(reader): kappa(rows) for reader, rows in pairs.groupby("reader")},
    }
