"""The rows of a report: one figure for real images, the baseline and each aligned model, with what changed.

Every kind of evaluation writes this one form, so that one renderer makes every table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from train.evaluate.statistics import Estimate

Group = Literal[
    "alignment",
    "calibration",
    "fidelity",
    "diversity",
    "memorisation",
    "grounding",
    "quality",
    "classification",
    "cost",
]
Change = Literal["difference", "ratio"]


@dataclass(frozen=True)
class Figure:
    """One figure of an evaluation.

    name: a key that is unique in its report. label: how a reader sees it. role: "judge" (held out), "reward" (trained
    on) or None. prompts: "grid" (the fixed prompts, several seeds each), "captions" (one image a real caption) or
    "classes" (the same, of records that show every class as often).
    space: name of the feature space, None where there is none. real: the figure of real images, the floor or ceiling.
    aligned, change: adapter -> figure; a change is aligned minus baseline, or aligned over baseline for a ratio.
    headline: stands in the README's first table. counts: how many images a figure's parts rest on. table: heading of a
    table of its own kind that it stands in; empty where a report with several arms has one table a group.
    """

    name: str
    label: str
    group: Group
    baseline: Estimate | None
    aligned: Mapping[str, Estimate | None]
    change: Mapping[str, Estimate | None]
    higher_is_better: bool | None
    role: Literal["judge", "reward"] | None = None
    prompts: Literal["grid", "captions", "classes"] | None = None
    space: str | None = None
    real: Estimate | None = None
    change_kind: Change = "difference"
    headline: bool = False
    note: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    table: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values; an estimate that is missing is null, which a table shows as "not computed"."""
        return {
            "name": self.name,
            "label": self.label,
            "group": self.group,
            "table": self.table,
            "role": self.role,
            "prompts": self.prompts,
            "feature_space": self.space,
            "higher_is_better": self.higher_is_better,
            "headline": self.headline,
            "note": self.note,
            "counts": dict(self.counts),
            "real": _json(self.real),
            "baseline": _json(self.baseline),
            "change_kind": self.change_kind,
            "adapters": {
                name: {"value": _json(self.aligned[name]), "change": _json(self.change.get(name))}
                for name in self.aligned
            },
        }


def _json(estimate: Estimate | None) -> dict[str, float | int | None] | None:
    return None if estimate is None else estimate.as_json()
