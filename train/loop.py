"""The one training loop: resume, progress with time left, metrics, checkpoints, export.

A stage supplies a :class:`Learner`; the loop knows nothing of what is learnt.
"""

import errno
import json
import logging
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from tqdm import tqdm

from medviz.errors import InputError, ModelError
from train import checkpoint, processes
from train.config import StageConfig, check_resumable, options
from train.tracking import Tracker

logger = logging.getLogger(__name__)
METRICS_LOG = "metrics.jsonl"
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


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
    goes on). Of several processes each updates its learner; the main one alone writes, and the others return None.

    Raises ModelError when `resume` finds no sound checkpoint, when a fresh run would overwrite one, when a figure or a
    number of the learner's state is not finite (no checkpoint is made of that), and when the disk takes no more.
    Raises InputError when `resume` is asked for with options that change the run.
    """
    if config.device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True  # every step has the shapes of the first
        torch.set_float32_matmul_precision("high")
    out, main = Path(config.out), processes.is_main()
    out.mkdir(parents=True, exist_ok=True)
    start, trained_s = 0, 0.0
    figures = Figures(config)
    if config.resume:
        start, state = _resumed(config)
        trained_s = state.pop("trained_s")
        figures.load_state(state.pop("figures", {}))
        learner.load_state(state)
    elif checkpoint.steps(out):
        raise ModelError(f"{out} already holds a checkpoint: pass --resume to go on, or choose another --out")
    if main:
        _forget_after(out / METRICS_LOG, start)
    began = saved = time.monotonic()
    page = Tracker(config) if tracker is None else tracker

    def elapsed() -> float:
        return trained_s + time.monotonic() - began

    with page, tqdm(total=config.steps, initial=start, unit="step", dynamic_ncols=True, disable=not main) as bar:
        for step in range(start, config.steps):
            figures.add(step + 1, learner.update(step))
            bar.update()
            if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
                means = figures.means()
                if main:
                    _append(out / METRICS_LOG, {**means, "step": step + 1, "trained_s": round(elapsed(), 1)})
                page.figures(step + 1, means)
                bar.set_postfix({k: f"{v:.4g}" for k, v in means.items()}, refresh=False)
            # Clocks differ: the main one decides for all. None gets a step ahead of another, so that no checkpoint
            # goes while it is still being read.
            over = processes.from_main(config.max_minutes > 0 and time.monotonic() - began > 60 * config.max_minutes)
            due = over or step + 1 == config.steps or time.monotonic() - saved > config.checkpoint_every_s
            if main and due:
                figures.check()
                state = learner.state()
                _check_finite(state, config, step + 1)
                state |= {"trained_s": elapsed(), "figures": figures.state()}
                checkpoint.save(out, step + 1, state, options(config))
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
    with _told_of_the_disk(out):
        metrics = {
            **learner.export(out / "model"),
            "steps": config.steps,
            "seed": config.seed,
            "trained_s": round(elapsed(), 1),
        }
        unknown = [name for name, value in _leaves(metrics) if isinstance(value, float) and not math.isfinite(value)]
        if unknown:
            raise _not_finite(config, config.steps, f"{', '.join(unknown)} of the final figures is not finite")
        _replace(out / "metrics.json", json.dumps(metrics, indent=1, allow_nan=False) + "\n")
    return metrics


class Figures:
    """What the updates since the last line of the log returned.

    Raises ModelError at the first figure that is not finite: on a CPU at its own step; on a card, where each look would
    wait for the step, when the figures are logged or a checkpoint is due, and names the step it was of.
    """

    def __init__(self, config: StageConfig) -> None:
        self.config, self._at_once = config, not config.device.startswith("cuda")
        self._values: dict[str, list[float | torch.Tensor]] = defaultdict(list)
        self._unchecked: list[tuple[int, Mapping[str, float | torch.Tensor]]] = []

    def add(self, step: int, figures: Mapping[str, float | torch.Tensor]) -> None:
        """Take in the figures of the update after which `step` steps are done."""
        for name, figure in figures.items():
            self._values[name].append(figure)
        self._unchecked.append((step, figures))
        if self._at_once:
            self.check()

    def check(self) -> None:
        """Raises ModelError, naming figure and step, when one that was added is not finite."""
        for step, figures in self._unchecked:
            for name, figure in figures.items():
                if not math.isfinite(float(figure)):
                    raise _not_finite(self.config, step, f"{name} is {float(figure)}")
        self._unchecked.clear()

    def means(self) -> dict[str, float]:
        """The mean of each figure, which are then forgotten. Raises as `check`."""
        self.check()
        means = {name: sum(map(float, values)) / len(values) for name, values in self._values.items()}
        self._values.clear()
        return means

    def state(self) -> dict[str, list[float]]:
        """What `load_state` takes back."""
        return {name: [float(value) for value in values] for name, values in self._values.items()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Take back what `state` gave."""
        for name, values in state.items():
            self._values[name].extend(values)


def read_metrics(log: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl, in order; none where there is no such file.

    A kill or a full disk can tear a line, merge two or leave NULs. What is no JSON object with a step is left out, with
    a warning that names the lines.
    """
    if not log.is_file():
        return []
    records, damaged = [], {}
    for number, line in enumerate(log.read_bytes().splitlines(), start=1):
        for text in re.split(rb'(?<=.)(?=\{")', line):  # a record is flat: where another begins, two were merged
            try:
                record = json.loads(text)
            except ValueError:  # of the encoding as well
                record = None
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
            else:
                damaged[number] = text
    if damaged:
        logger.warning("%s: left out what is no record, in line %s", log, ", ".join(map(str, damaged)))
    return records


def _resumed(config: StageConfig) -> tuple[int, dict[str, Any]]:
    """The step and state that the run goes on from. Raises as `fit`."""
    place = checkpoint.newest(Path(config.out))
    check_resumable(config, checkpoint.recipe(place))
    start, state = checkpoint.read(place)
    if config.steps < start:
        raise InputError(f"steps is {config.steps}, and {place} is after {start}: allowed are {start} or more")
    return start, state


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which the run goes on from: it takes and logs them again."""
    if log.is_file():
        kept = [json.dumps(line) + "\n" for line in read_metrics(log) if line["step"] <= step]
        with _told_of_the_disk(log):
            _replace(log, "".join(kept))


def _append(log: Path, line: Mapping[str, Any]) -> None:
    # On the disk before the checkpoint of its step is: a resumed run does not make the line again.
    with _told_of_the_disk(log), log.open("a") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())


def _replace(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all."""
    writing = path.with_name(f".{path.name}.writing")
    with writing.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(writing, path)


@contextmanager
def _told_of_the_disk(place: Path) -> Iterator[None]:
    """Raises ModelError in place of what a full or broken disk raises."""
    try:
        yield
    except checkpoint.WRITE_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in _DISK_ERRORS:
            raise
        raise ModelError(f"{place} cannot be written: {error}. Make room, then go on with --resume") from error


def _check_finite(state: Mapping[str, Any], config: StageConfig, step: int) -> None:
    """Raises ModelError that names the first tensor of a learner's state which is not finite."""
    for name, value in _leaves(state):
        if isinstance(value, torch.Tensor) and not bool(value.isfinite().all()):
            raise _not_finite(config, step, f"{name} of the learner's state is not finite")


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """What lies below the nested mappings and lists of `value`, with the names that lead there."""
    inside: Iterable[tuple[Any, Any]]
    if isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    else:
        yield name, value
        return
    for key, inner in inside:
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def _not_finite(config: StageConfig, step: int, what: str) -> ModelError:
    stage = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(config).__name__.removesuffix("Config")).lower()
    kept = ", ".join(f"checkpoint-{each:08d}" for each in checkpoint.steps(Path(config.out))) or "none"
    return ModelError(
        f"{stage} run {config.out} ended at step {step} of {config.steps}: {what}. No checkpoint was made of it; those "
        f"from before: {kept}. Look at the images and lower the learning rate, in a fresh --out"
    )
