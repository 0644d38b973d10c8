"""How long a pair takes a model that is loaded: as the app draws and measures it, and drawn in the same passes beside
one picture after the other."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from medviz.errors import InputError
from medviz.generation.sampling import sample
from medviz.models.adapters import using_adapter
from medviz.models.library import ModelLibrary
from medviz.results import Request
from medviz.workbench import Models, compare, load_models
from train.evaluate.statistics import student_interval, student_ratio


@dataclass
class PairBenchmark:
    """Options of the pair benchmark."""

    domains: tuple[str, ...] = ("dermatology", "radiology")
    models: str = "assets/models"
    """Folder that holds the domains' model folders."""
    steps: tuple[int, ...] = (4,)
    """Numbers of steps, each at the domain's own guidance scale."""
    repeats: int = 8
    """Pairs of each number of steps, over the domain's example prompts in turn; one more before them is not counted."""
    threads: int = 2
    device: str = "cpu"
    out: str = ""
    """JSON file to write; empty: standard output alone."""


def measure(config: PairBenchmark) -> dict[str, Any]:
    """By domain and number of steps: seconds of a pair (mean, Student's interval over prompts), the slowest of them,
    and the ratio of drawing one picture after the other to drawing both in the same passes.

    Raises InputError for fewer than two repeats.
    """
    if config.repeats < 2:
        raise InputError(f"repeats is {config.repeats}; at least 2 are needed for an interval")
    torch.set_num_threads(config.threads)
    library = ModelLibrary(Path(config.models), config.device)
    instructions = torch.backends.cpu.get_cpu_capability()
    found: dict[str, Any] = {"threads": config.threads, "device": config.device, "instructions": instructions}
    for name in config.domains:
        models = load_models(library, name)
        found[name] = {str(steps): _of_steps(models, steps, config.repeats) for steps in config.steps}
    return found


def _of_steps(models: Models, steps: int, repeats: int) -> dict[str, Any]:
    prompts = [example.prompt for example in models.domain.examples]
    adapter, name = models.loaded.default_adapter, models.domain.name
    whole, together, apart = np.zeros(repeats), np.zeros(repeats), np.zeros(repeats)
    for turn in range(-1, repeats):  # the first, number -1, is not counted
        request = Request(name, prompts[turn % len(prompts)], turn + 1, steps, models.guidance.scale, adapter)
        seconds = (
            _seconds(partial(compare, models, request, None, lambda: None)),
            _seconds(partial(_draw, models, request, [(None, adapter)])),
            _seconds(partial(_draw, models, request, [(None,), (adapter,)])),
        )
        if turn >= 0:
            whole[turn], together[turn], apart[turn] = seconds
    return {
        "pair_s": student_interval(whole).as_json(),
        "slowest_pair_s": float(whole.max()),
        "apart_over_together": student_ratio(apart, together).as_json(),
    }


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _draw(models: Models, request: Request, drawings: Sequence[Sequence[str | None]]) -> list[torch.Tensor]:
    """Latents of each drawing's adapters, without what the app measures on them."""
    pipeline = models.loaded.pipeline
    with using_adapter(pipeline.unet, None):
        return [
            sample(
                pipeline,
                [request.prompt],
                [request.seed],
                steps=request.steps,
                guidance_scale=models.guidance,
                few_steps=models.few_steps(request),
                adapters=adapters,
            )
            for adapters in drawings
        ]


def main(arguments: list[str]) -> None:
    """`python -m train bench pair [options]`."""
    config = tyro.cli(PairBenchmark, args=arguments, prog="python -m train bench pair")
    text = json.dumps(measure(config), indent=1) + "\n"
    if config.out:
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
        Path(config.out).write_text(text)
    sys.stdout.write(text)
