"""The report of one or more studies: one HTML file that needs nothing besides itself."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medviz.study.answers import answer_table, first_answers, scores_by_arm
from medviz.study.checklist import claim_checklist
from medviz.study.plots import forest, rating_shares, roc
from medviz.study.protocol import SYNTHETIC_ARMS, Protocol
from medviz.study.store import Store

NOT_COMPUTED = "not computed"
_TEMPLATE = Path(__file__).with_name("report.html.jinja")


@dataclass(frozen=True)
class Plot:
    """A figure of the page: data URI of an SVG and its text alternative."""

    uri: str
    alt: str


def report_page(studies: Sequence[tuple[Protocol, Store, Mapping[str, Any]]]) -> str:
    """HTML of the analyses (see `medviz.study.statistics.analyse`), one section a study. Text is escaped."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"interval": interval, "number": number, "p": p_value}
    template = environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        sections=[
            {"result": result, "plots": _plots(protocol, store, result), "checklist": claim_checklist(result)}
            for protocol, store, result in studies
        ]
    )


def interval(estimate: Mapping[str, Any] | None, digits: int = 2) -> str:
    """ "0.63 [0.52, 0.74]"."""
    if estimate is None or estimate.get("value") is None:
        return NOT_COMPUTED
    if estimate["low"] is None:
        return f"{estimate['value']:.{digits}f} [interval {NOT_COMPUTED}]"
    return f"{estimate['value']:.{digits}f} [{estimate['low']:.{digits}f}, {estimate['high']:.{digits}f}]"


def number(value: float | None, digits: int = 2) -> str:
    """A number, or that it was not computed."""
    return NOT_COMPUTED if value is None else f"{value:.{digits}f}"


def p_value(value: float | None) -> str:
    """ "0.034", "< 0.001"."""
    if value is None:
        return NOT_COMPUTED
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _plots(protocol: Protocol, store: Store, result: Mapping[str, Any]) -> dict[str, Plot]:
    plots = {}
    if preference := result.get("preference"):
        model = preference["mixed_model"]
        rows = [("All readers", model["estimate"] if model else preference["obuchowski_rockette"])]
        plots["preference"] = _plot(
            forest([*rows, *preference["per_reader"].items()], 0.5, "Preference for the aligned image"),
            "Preference score of all readers and of each reader with 95 % intervals; 0.5 is no preference.",
        )
        plots["strata"] = _plot(
            forest([*rows, *preference["per_stratum"].items()], 0.5, "Preference for the aligned image"),
            "Preference score of each stratum of prompts with 95 % intervals.",
        )
    if (result.get("detection") or {}).get("readers"):
        _, scores = scores_by_arm(protocol, first_answers(answer_table(protocol, store), "detection"))
        plots["roc"] = _plot(
            roc({arm: (scores[arm], scores["real"]) for arm in SYNTHETIC_ARMS}),
            "ROC curves of telling synthetic from real images, averaged over readers.",
        )
    if (result.get("rating") or {}).get("readers"):
        plots["ratings"] = _plot(
            rating_shares(result["rating"]["shares"]), "Share of each quality rating for every kind of image."
        )
    return plots


def _plot(svg: str, alt: str) -> Plot:
    return Plot("data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode(), alt)
