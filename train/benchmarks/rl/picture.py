"""The benchmark in two panels: reward against reward queries, and against UNet forwards."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medviz.errors import InputError

LABELS = {"trl": "TRL DDPO", "ddpo": "our DDPO", "forward": "our forward-process method", "draft": "our DRaFT-1"}
COLOURS = {"trl": "#8c6d46", "ddpo": "#3b6fb6", "forward": "#b6433b", "draft": "#3f8f5b"}
AXES = {"queries": "reward queries (images)", "unet_rows": "UNet forwards (latents, guidance counts twice)"}


def draw(methods: Mapping[str, Any], path: Path) -> None:
    """Write the picture of `methods` (method -> its figures with their `curve`); bands are 95 % intervals over seeds.

    Raises InputError where matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("the picture needs matplotlib: install the extra `bench`, or pass --picture ''") from error
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (cost, label) in zip(figure.subplots(1, 2, sharey=True), AXES.items(), strict=True):
        for name, found in methods.items():
            across = [point[cost] for point in found["curve"]]
            reward = [point["reward"] for point in found["curve"]]
            axes.plot(across, [r["value"] for r in reward], color=COLOURS[name], label=LABELS[name])
            if all(r["low"] is not None for r in reward):
                low, high = ([r[end] for r in reward] for end in ("low", "high"))
                axes.fill_between(across, low, high, color=COLOURS[name], alpha=0.2, linewidth=0)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mean reward of held-out noise")
    figure.axes[0].legend(loc="best", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
