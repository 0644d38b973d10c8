"""Figures and pictures of a run on the page of a tracker, beside metrics.jsonl, which is always written."""

from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS
from PIL import Image

from medviz.audit.provenance import label
from medviz.errors import InputError
from train import processes
from train.config import StageConfig

TRACKERS = ("tensorboard", "trackio")


class Tracker:
    """Shows a run on the page of the recipe's tracker; without one, and in all processes but the main one, nothing.

    TensorBoard writes to `out`/tensorboard; Trackio to its own folder on this machine, as a project named as `out` is.
    """

    def __init__(self, config: StageConfig) -> None:
        """Raises InputError for a tracker that is not known or not installed."""
        name = config.tracker
        if name not in ("", *TRACKERS):
            raise InputError(f"no tracker {name!r}; allowed are {', '.join(TRACKERS)}, or empty for none")
        if name and find_spec(name) is None:
            raise InputError(
                f"the tracker {name} is not installed: pip install --editable '.[{name}]', or leave the option empty"
            )
        self.name, self.out = name if processes.is_main() else "", Path(config.out)
        self._page: Any = None

    def __bool__(self) -> bool:
        """Whether anybody sees what is shown."""
        return bool(self.name)

    def figures(self, step: int, figures: dict[str, float]) -> None:
        """Show `figures` as those after `step` steps."""
        if self:
            self._open(step).log(figures, step=step)

    def images(self, step: int, name: str, images: torch.Tensor, columns: int) -> None:
        """Show images (N, 3, H, W) in [-1, 1], N a multiple of `columns`, as one sheet called `name`."""
        if self.name == "tensorboard":
            self._open(step).log_images({name: sheet(images, columns)[None]}, step=step, dataformats="NHWC")
        elif self.name == "trackio":
            import trackio

            self._open(step).log({name: trackio.Image(sheet(images, columns))}, step=step)

    def _open(self, step: int) -> Any:
        if self._page is None:
            PartialState()  # accelerate's trackers write to its log, which needs one
            run, place = self.out.name, {}
            if self.name == "tensorboard":
                # What a killed run showed after its last checkpoint is shown again: the old goes from the page.
                run, place = self.name, {"logging_dir": str(self.out), "purge_step": step}
            self._page = LOGGER_TYPE_TO_CLASS[self.name](run, **place)
            self._page.start()
        return self._page

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._page is not None:
            self._page.finish()


def sheet(images: torch.Tensor, columns: int) -> np.ndarray:
    """Images (N, 3, H, W) in [-1, 1] as one labelled picture uint8 (rows, width, 3), `columns` of them in a row."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1)
    rows = pixels.unflatten(0, (-1, columns)).transpose(1, 2)
    return np.asarray(label(Image.fromarray(rows.flatten(0, 1).flatten(1, 2).numpy())))
