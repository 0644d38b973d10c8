"""What every side of the benchmark shares: the request, the reward, the look, and the instruments.

Nothing here imports a trainer, so that the peer's interpreter reads it, too.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from medviz.generation.sampling import decode, sample
from train import seeding

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "trl")
_STAGE = "bench-rl"
_FEATURE_GRID = 8  # images are compared as 8 x 8 colours


@dataclass(frozen=True)
class Work:
    """What one side is asked to do, in values that JSON holds.

    base: folder of the pipeline. prompts: all of them, every epoch draws prompts_per_epoch. sample_batch and batch:
    images a forward pass, in sampling and in training. learning: options of the method alone, by the names of
    `train.rl.recipe`.
    """

    method: str
    seed: int
    base: str
    prompts: tuple[str, ...]
    epochs: int
    prompts_per_epoch: int
    images_per_prompt: int
    sample_batch: int
    batch: int
    steps: int
    guidance_scale: float
    updates: int
    rank: int
    learning_rate: float
    evaluation_images: int
    threads: int
    learning: Mapping[str, float | str]

    @property
    def images(self) -> int:
        """Images, and so reward queries, an epoch."""
        return self.prompts_per_epoch * self.images_per_prompt

    def asked(self, epoch: int) -> list[str]:
        """The prompt of each image of `epoch`, the same for every method: those that `train.rl` draws."""
        chosen = seeding.batch_indices(len(self.prompts), self.prompts_per_epoch, epoch, self.seed, "rl-prompts")
        return [self.prompts[i] for i in np.repeat(chosen, self.images_per_prompt)]


def redness(images: torch.Tensor) -> torch.Tensor:
    """Mean red less the mean of green and blue, (B,) in [-1, 1], of images (B, 3, H, W) in [0, 1]."""
    red, green, blue = images.float().mean(dim=(2, 3)).unbind(1)
    return red - (green + blue) / 2


@dataclass(frozen=True)
class Look:
    """The mean reward of the fixed prompts and noises, and the mean distance between images of one prompt."""

    reward: float
    diversity: float


def look(pipeline: StableDiffusionPipeline, work: Work) -> Look:
    """Draw evaluation_images of every prompt by the folder's own solver, with whatever adapter is on.

    The noise depends on the seed of `work` alone, and no epoch trains on it.
    """
    prompts = [prompt for prompt in work.prompts for _ in range(work.evaluation_images)]
    seeds = [seeding.key(work.seed, _STAGE, "look", i) & 0xFFFFFFFF for i in range(len(prompts))]
    parts = []
    for start in range(0, len(prompts), work.sample_batch):
        rows = slice(start, start + work.sample_batch)
        latents = sample(pipeline, prompts[rows], seeds[rows], steps=work.steps, guidance_scale=work.guidance_scale)
        parts.append(decode(pipeline, latents) / 2 + 0.5)
    images = torch.cat(parts).cpu()
    features = torch.nn.functional.adaptive_avg_pool2d(images, _FEATURE_GRID).flatten(1)
    distances = [torch.pdist(mine).mean() for mine in features.split(work.evaluation_images)]
    return Look(redness(images).mean().item(), torch.stack(distances).mean().item())


class Meter:
    """Seconds, processor seconds and UNet rows of each phase; a phase inside another is not counted twice.

    A row is one latent through the UNet once: a guided step of B images is 2 B rows.
    """

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._phase, self._mark = "other", self._now()
        self._forget()
        unet.register_forward_hook(self._count)

    def _forget(self) -> None:
        self.wall_s: dict[str, float] = defaultdict(float)
        self.cpu_s: dict[str, float] = defaultdict(float)
        self.rows: dict[str, int] = defaultdict(int)
        self.rows_with_gradient: dict[str, int] = defaultdict(int)

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def _count(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...], __: Any) -> None:
        self.rows[self._phase] += len(arguments[0])
        if torch.is_grad_enabled():
            self.rows_with_gradient[self._phase] += len(arguments[0])

    def _switch(self, phase: str) -> str:
        now, before = self._now(), self._phase
        self.wall_s[before] += now[0] - self._mark[0]
        self.cpu_s[before] += now[1] - self._mark[1]
        self._mark, self._phase = now, phase
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """What runs inside is counted under `name`."""
        outer = self._switch(name)
        try:
            yield
        finally:
            self._switch(outer)

    def lap(self) -> dict[str, Any]:
        """What was counted of sampling and training since the last lap; looks and the rest are left out."""
        self._switch(self._phase)
        found: dict[str, Any] = {}
        for phase in ("sample", "train"):
            found[f"{phase}_s"], found[f"{phase}_cpu_s"] = self.wall_s[phase], self.cpu_s[phase]
            found[f"{phase}_rows"] = self.rows[phase]
        found["rows_with_gradient"] = self.rows_with_gradient["sample"] + self.rows_with_gradient["train"]
        self._forget()
        return found


def peak_bytes() -> int:
    """The most memory this program has held at once.

    From /proc where there is one: getrusage also counts what the parent held when it started this program.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def versions(libraries: Sequence[str] = LIBRARIES) -> dict[str, str | None]:
    """The installed version of each library in this interpreter, None where it is missing."""
    return {name: _version(name) for name in libraries}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Side:
    """A method ready to run: its pipeline, how an epoch is run (returning the mean reward of its images), and how the
    trained weights are switched on for a look."""

    pipeline: StableDiffusionPipeline
    meter: Meter
    epoch: Callable[[int], float]
    trained: Callable[[], Any]


def measured(side: Side, work: Work, ready_bytes: int) -> dict[str, Any]:
    """Run all epochs of `side` with a look before the first and after each; returns JSON values.

    looks has one entry more than epochs. ready_bytes: what the program had held before the method was set up.
    """
    looks = [vars(look(side.pipeline, work))]  # an adapter that has learnt nothing changes nothing
    side.meter.lap()
    epochs = []
    for epoch in range(work.epochs):
        reward = side.epoch(epoch)
        with side.meter.phase("look"), side.trained():
            looks.append(vars(look(side.pipeline, work)))
        epochs.append({**side.meter.lap(), "reward": reward})
    return {
        "method": work.method,
        "seed": work.seed,
        "looks": looks,
        "epochs": epochs,
        "ready_bytes": ready_bytes,
        "peak_bytes": peak_bytes(),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
