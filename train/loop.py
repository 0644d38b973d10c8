"""The one training loop: resume, progress with time left, metrics, checkpoints, export.

A stage supplies a :class:`Learner`; the loop knows nothing of what is learnt.
"""

import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from medviz.errors import ModelError
from train import checkpoint, processes
from train.config import StageConfig
from train.tracking import Tracker

logger = logging.getLogger(__name__)


class Learner(Protocol):
    """What a stage gives to :func:`fit`."""

    def state(self) -> dict[str, Any]:
        """Everything a resumed run needs beside the step number: nested dicts and lists of tensors and JSON values."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""

    def update(self, step: int) -> Mapping[str, float | torch.Tensor]:
        """One optimiser step, random by `train.seeding` with this step's number alone. Returns figures to log; those
        still on a graphics card are read when they are logged, so that no step waits for the last one's."""

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the finished model and return the final metrics."""


def fit(learner: Learner, config: StageConfig, tracker: Tracker | None = None) -> dict[str, Any] | None:
    """Run `learner` for `config.steps` updates and export it.

    tracker: where it was opened already, so that the learner may show pictures on it.

    Returns the final metrics, or None when `max_minutes` ended the run early (its checkpoint is written, `--resume`
    goes on). Raises ModelError when `resume` finds no sound checkpoint, or when a fresh run would overwrite one.
    Of several processes each updates its learner; the main one alone writes, and the others return None.
    """
    if config.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True  # every step has the shapes of the first
        torch.set_float32_matmul_precision("high")
    out, main = Path(config.out), processes.is_main()
    out.mkdir(parents=True, exist_ok=True)
    start, trained_s = 0, 0.0
    if config.resume:
        start, state = checkpoint.load(out)
        trained_s = state.pop("trained_s")
        learner.load_state(state)
        if main:
            _forget_after(out / "metrics.jsonl", start)
    elif checkpoint.steps(out):
        raise ModelError(f"{out} already holds a checkpoint: pass --resume to go on, or choose another --out")
    began = saved = time.monotonic()
    sums: dict[str, list[float | torch.Tensor]] = defaultdict(list)
    page = Tracker(config) if tracker is None else tracker

    def elapsed() -> float:
        return trained_s + time.monotonic() - began

    with (
        page,
        (out / "metrics.jsonl" if main else Path(os.devnull)).open("a") as log,
        tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=not main) as bar,
    ):
        for step in range(start, config.steps):
            for name, figure in learner.update(step).items():
                sums[name].append(figure)
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                means = {name: sum(map(float, figures)) / len(figures) for name, figures in sums.items()}
                sums.clear()
                log.write(json.dumps({**means, "step": step + 1, "trained_s": round(elapsed(), 1)}) + "\n")
                log.flush()
                page.figures(step + 1, means)
                bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()}, refresh=False)
            # Clocks differ: the main one decides for all. None gets a step ahead of another, so that no checkpoint
            # goes while it is still being read.
            over = processes.from_main(config.max_minutes > 0 and time.monotonic() - began > 60 * config.max_minutes)
            due = over or step + 1 == config.steps or time.monotonic() - saved > config.checkpoint_every_s
            if main and due:
                checkpoint.save(out, step + 1, {**learner.state(), "trained_s": elapsed()})
                saved = time.monotonic()
            if over and step + 1 < config.steps:
                logger.warning(
                    "stopped at step %d of %d after %.1f minutes; --resume goes on",
                    step + 1,
                    config.steps,
                    config.max_minutes,
                )
                return None
    if not main:
        return None
    return _exported(learner, config, config.steps, elapsed())


def export_newest(learner: Learner, config: StageConfig) -> dict[str, Any] | None:
    """Export what the newest checkpoint in `config.out` holds; returns its metrics, None beside the main process.

    The run may be going on meanwhile: its checkpoints are only read. Raises ModelError as `checkpoint.load`.
    """
    step, state = checkpoint.load(Path(config.out))
    learner.load_state(state)
    return _exported(learner, config, step, state["trained_s"]) if processes.is_main() else None


def _exported(learner: Learner, config: StageConfig, steps: int, trained_s: float) -> dict[str, Any]:
    out = Path(config.out)
    metrics = {
        **learner.export(out / "model"),
        "steps": steps,
        "seed": config.seed,
        "trained_s": round(trained_s, 1),
    }
    writing = out / ".metrics.json.writing"
    writing.write_text(json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    os.replace(writing, out / "metrics.json")
    return metrics


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that the checkpoint of `step` does not hold: a resumed run makes and logs them again."""
    if log.is_file():
        kept = [line for line in log.read_text().splitlines(keepends=True) if json.loads(line)["step"] <= step]
        log.write_text("".join(kept))
