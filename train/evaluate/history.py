"""Every model that was evaluated, beside its successors: so that a worse one never replaces a better one unnoticed.

`assets/reports/history-DOMAIN.json` gets an entry of the figures that decide with every evaluation that writes reports.
Entries compare where they were measured alike: by the same judge and feature networks, on one split, from as many
captions and steps, from one seed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medviz.errors import InputError

ALIKE = ("split", "captions", "real_references", "steps", "seed")
"""Settings of a report that must be equal for its figures to compare."""
DECIDING = ("judge_accuracy_captions", "kernel_distance", "memorisation_share", "coverage", "diversity")
"""Names, or beginnings of names that a feature space ends, of the figures that are kept."""


def entry(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the history keeps of a report: what was measured, how, and the deciding figures of baseline and default."""
    figures = [f for f in report["figures"] if f["prompts"] != "classes" and f["name"].startswith(DECIDING)]
    default = report["default_adapter"]
    return {
        "models": report["models"]["sha256"],
        "eyes": report["models"]["eyes"],
        "preset": report["preset"],
        "settings": {name: report["settings"][name] for name in ALIKE},
        "guidance": report["settings"]["guidance_scale"],
        "default_adapter": default,
        "figures": {
            f["name"]: {
                "label": f["label"],
                "higher_is_better": f["higher_is_better"],
                "baseline": f["baseline"],
                "aligned": f["adapters"].get(default, {}).get("value"),
            }
            for f in figures
        },
    }


def read(path: Path) -> list[dict[str, Any]]:
    """The entries in `path`, oldest first; none where there is no file. Raises InputError for what is no history."""
    if not path.is_file():
        return []
    try:
        return json.loads(path.read_text(encoding="utf-8"))["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no history of evaluations: {error}") from error


def alike(entries: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Those of `entries` that were measured as `new` was."""
    return [old for old in entries if old["settings"] == new["settings"] and old["eyes"] == new["eyes"]]


def added(entries: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """`entries` with `new` last; an older measurement of the same models in the same way gives way to it."""
    same = ("models", "settings", "default_adapter", "guidance", "eyes")
    return [*(old for old in entries if any(old[key] != new[key] for key in same)), new]


def worse(entries: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> list[str]:
    """A sentence for each figure in which `new` is worse than the best entry measured alike.

    Worse is where the 95 % intervals lie apart, for the default adapter's figures (the baseline's without one).
    """
    found = []
    others = [old for old in alike(entries, new) if old["models"] != new["models"]]
    for name, mine in new["figures"].items():
        sign = 1.0 if mine["higher_is_better"] else -1.0
        shown = [(old, _shown(old["figures"][name])) for old in others if name in old["figures"]]
        rivals = [(old, theirs) for old, theirs in shown if theirs]
        ours = _shown(mine)
        if not ours or not rivals:
            continue
        best, theirs = max(rivals, key=lambda pair: sign * pair[1]["value"])
        ends = ("high", "low") if sign > 0 else ("low", "high")
        ours_at_best, theirs_at_worst = ours[ends[0]], theirs[ends[1]]
        if None not in (ours_at_best, theirs_at_worst) and sign * ours_at_best < sign * theirs_at_worst:
            found.append(
                f"{mine['label']} is {ours['value']:.3g}, worse than {theirs['value']:.3g} of models "
                f"{best['models'][:12]}: intervals lie apart"
            )
    return found


def record(path: Path, report: Mapping[str, Any]) -> list[str]:
    """Add `report` to the history in `path`; returns what :func:`worse` finds against what was there."""
    entries, new = read(path), entry(report)
    text = json.dumps({"entries": added(entries, new)}, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing-{path.name}")
    writing.write_text(text, encoding="utf-8")
    os.replace(writing, path)
    return worse(entries, new)


def _shown(figure: Mapping[str, Any]) -> Mapping[str, Any]:
    """The default adapter's estimate, or the baseline's; empty where it was not computed."""
    estimate = figure["aligned"] or figure["baseline"]
    return estimate if estimate and estimate["value"] is not None else {}
