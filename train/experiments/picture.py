"""The picture of the methods experiment: the judge's gain against reward queries and against compute."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medviz.errors import InputError

AXES = {"queries": "reward queries (images)", "compute": "UNet forwards (latents), a backward pass counted as two"}
COLOURS = ("#3b6fb6", "#b6433b", "#3f8f5f", "#8c6d46", "#7a4fa3", "#4a4a4a", "#c98a1b", "#2b8c9e")
"""Of the methods in their order, begun again where they run out."""


def require_matplotlib() -> None:
    """Raises InputError where matplotlib is missing: before hours of training, and not after them."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError("the picture needs matplotlib: install the extra `bench`, or pass --no-picture") from error


def draw(curves: Mapping[str, Sequence[Mapping[str, Any]]], arms: Sequence[Mapping[str, str]], path: Path) -> None:
    """Write the picture of `curves` (method -> its looks, with queries, compute and judge_gain).

    Bands are 95 % intervals over training seeds. Raises InputError where matplotlib is missing.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels = {arm["name"]: arm["label"].replace("`", "") for arm in arms}
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        for index, (name, points) in enumerate(curves.items()):
            colour = COLOURS[index % len(COLOURS)]
            across = [point[cost] for point in points]
            gains = [point["judge_gain"] for point in points]
            axes.plot(across, [g["value"] for g in gains], color=colour, marker="o", markersize=3, label=labels[name])
            if all(g["low"] is not None for g in gains):
                low, high = ([g[end] for g in gains] for end in ("low", "high"))
                axes.fill_between(across, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.axhline(0.0, color="#999999", linewidth=0.8)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("judge's score, gain over the baseline")
    figure.axes[0].legend(loc="best", frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
