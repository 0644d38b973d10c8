"""The analysis of a whole study, as one JSON object in which what could not be computed is null."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from medviz import __version__
from medviz.errors import MedvizError, StudyError
from medviz.study.answers import answer_table
from medviz.study.protocol import Protocol
from medviz.study.schedule import schedule
from medviz.study.store import Store

if TYPE_CHECKING:
    import pandas as pd

PACKAGES = ("choix", "krippendorff", "numpy", "pandas", "pingouin", "scipy", "statsmodels")


def analyse(protocol: Protocol, store: Store) -> dict[str, Any]:
    """Analyse every phase of a study. Raises StudyError while there are no answers, MedvizError without the libraries.

    Readers who have not finished a phase count in the mixed model, and not in what needs complete readers; `readers`
    says how far each of them is. Practice is left out, and so are repeats but for the agreement within readers.
    """
    try:
        from medviz.study.detection import analyse_detection
        from medviz.study.preference import analyse_preference
        from medviz.study.rating import analyse_rating

        table = answer_table(protocol, store)
        if not (~table["practice"]).any():
            raise StudyError(f"{store.path} holds no answers besides practice; there is nothing to analyse")
        analyses = {"rating": analyse_rating, "detection": analyse_detection, "preference": analyse_preference}
        answered = set(table.loc[~table["practice"], "phase"])
        phases: dict[str, Any] = {
            task.phase: analyses[task.phase](protocol, table) if task.phase in answered else None
            for task in protocol.tasks
        }
        result: dict[str, Any] = {
            "medviz": __version__,
            "packages": _versions(),
            "study": describe(protocol),
            "readers": _readers(protocol, store, table),
            "simulated": bool(table["simulated"].any()),
            **phases,
        }
    except ModuleNotFoundError as error:
        raise MedvizError(f"the analysis needs {error.name}; install it with `pip install 'medviz[study]'`") from error
    return finite(result)


def describe(protocol: Protocol) -> dict[str, Any]:
    """What a report says of the protocol."""
    strata: dict[str, int] = {}
    for case in protocol.cases:
        strata[case.stratum] = strata.get(case.stratum, 0) + 1
    return {
        "title": protocol.title,
        "domain": protocol.domain,
        "protocol_sha256": protocol.sha256,
        "phases": [task.phase for task in protocol.tasks],
        "cases": len(protocol.cases),
        "real_images": len(protocol.real),
        "practice_cases": len(protocol.practice),
        "strata": strata,
        "adapters": sorted({case.adapter for case in protocol.cases}),
        "models": dict(protocol.models),
        "size_px": protocol.size_px,
        "repeat_share": protocol.repeat_share,
        "rating_margin": protocol.rating_margin,
        "auc_margin": protocol.auc_margin,
        "seed": protocol.seed,
    }


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite, as JSON needs it."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return value


def _readers(protocol: Protocol, store: Store, table: "pd.DataFrame") -> dict[str, Any]:
    described = {}
    for reader in store.readers():
        rows = table[table["reader"] == f"R{reader.number}"]
        described[f"R{reader.number}"] = {
            "specialty": reader.specialty,
            "years": reader.years,
            "simulated": reader.simulated,
            "answered": len(rows),
            "items": len(schedule(protocol, reader.id)),
            "median_response_s": float(rows["response_ms"].median() / 1000) if len(rows) else None,
            "share_zoomed": float((rows["zoom"] > 1).mean()) if len(rows) else None,
        }
    return described


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in PACKAGES}
