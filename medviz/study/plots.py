"""Figures of the report, drawn by matplotlib as SVG: estimates with intervals, ROC curves, distributions of ratings."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"baseline": "#b35900", "aligned": "#00639c", "real": "#5a5a5a"}
_GREY = "#8a8a8a"


def forest(rows: Sequence[tuple[str, Mapping[str, Any] | None]], null: float, label: str) -> str:
    """Estimates with their intervals, one a line, the first, of the whole study, in colour. null: a vertical line."""
    shown = [(name, estimate) for name, estimate in rows if estimate is not None]
    figure, axes = _axes(6.4, 0.9 + 0.32 * len(shown))
    for place, (_, estimate) in enumerate(shown):
        colour = COLOURS["aligned"] if place == 0 else _GREY
        if estimate["low"] is not None:
            axes.plot([estimate["low"], estimate["high"]], [place, place], color=colour, linewidth=2)
        axes.plot(estimate["value"], place, "o", color=colour)
    axes.axvline(null, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(shown)), [name for name, _ in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel(label)
    return _svg(figure)


def roc(curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> str:
    """ROC curves averaged over readers at each threshold. curves: arm -> positive (R, n1), negative (R, n0) scores."""
    figure, axes = _axes(4.4, 4.2)
    for arm, (positive, negative) in curves.items():
        cuts = np.arange(7, 0, -1)[:, None, None]
        false, true = ((scores >= cuts).mean(axis=2).mean(axis=1) for scores in (negative, positive))
        axes.plot(false, true, "o-", color=COLOURS[arm], label=arm)
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle="--")
    axes.set_xlabel("Real images called synthetic")
    axes.set_ylabel("Synthetic images called synthetic")
    axes.set_aspect("equal")
    axes.legend(frameon=False)
    return _svg(figure)


def rating_shares(shares: Mapping[str, Mapping[str, float]]) -> str:
    """Share of each rating, a group of bars for every arm."""
    figure, axes = _axes(6.4, 2.8)
    width = 0.8 / len(shares)
    for number, (arm, values) in enumerate(shares.items()):
        places = np.arange(len(values)) + (number - (len(shares) - 1) / 2) * width
        axes.bar(places, list(values.values()), width, color=COLOURS[arm], label=arm)
    axes.set_xticks(range(5), ["1 unacceptable", "2", "3", "4", "5 excellent"])
    axes.set_ylabel("Share of ratings")
    axes.legend(frameon=False)
    return _svg(figure)


def _axes(width_in: float, height_in: float) -> tuple["Figure", Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _svg(figure: "Figure") -> str:
    import matplotlib

    content = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "medviz", "svg.fonttype": "path"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None})
    return content.getvalue()
