"""What capturing cross-attention costs: the same picture drawn with and without it, in turn, in one process."""

from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.generation.sampling import sample
from medviz.grounding.capture import capture
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from medviz.models.library import ModelLibrary
from train.benchmarks.timing import timed, write


@dataclass
class AttentionBenchmark:
    """Options of the attention benchmark."""

    domains: tuple[str, ...] = ("dermatology", "radiology")
    models: str = "assets/models"
    """Folder that holds the domains' model folders."""
    repeats: int = 5
    """Pictures drawn with and as many without, in turn; the first of either is not counted."""
    steps: int = DEFAULT_STEPS
    guidance_scale: float = DEFAULT_GUIDANCE_SCALE
    device: str = "cpu"
    out: str = ""
    """JSON file to write; empty: standard output alone."""


def measure(config: AttentionBenchmark) -> dict[str, Any]:
    """Medians a domain: seconds without and with capture, their ratio, and whether the latents are bit-identical.

    Raises InputError for fewer than one repeat.
    """
    if config.repeats < 1:
        raise InputError(f"repeats is {config.repeats}; at least 1 is needed")
    library, found = ModelLibrary(Path(config.models), config.device), {}
    for name in config.domains:
        pipeline = library.load(name).pipeline
        prompt = get_domain(name).examples[0].prompt
        options: dict[str, Any] = {"steps": config.steps, "guidance_scale": config.guidance_scale}

        def plain() -> torch.Tensor:
            return sample(pipeline, [prompt], [1], **options)  # noqa: B023 - called before the next domain

        def captured() -> torch.Tensor:
            with capture(pipeline.unet) as maps:  # noqa: B023
                return sample(pipeline, [prompt], [1], maps=maps, **options)  # noqa: B023

        timed(plain), timed(captured)
        seconds: dict[str, list[float]] = {"plain": [], "captured": []}
        identical = True
        for _ in range(config.repeats):
            without_s, first = timed(plain)
            with_s, second = timed(captured)
            seconds["plain"].append(without_s)
            seconds["captured"].append(with_s)
            identical &= torch.equal(first, second)
        medians = {kind: median(values) for kind, values in seconds.items()}
        found[name] = {
            **{f"{kind}_median_s": value for kind, value in medians.items()},
            "ratio": medians["captured"] / medians["plain"],
            "bit_identical": identical,
            "repeats": config.repeats,
            "steps": config.steps,
            "guidance_scale": config.guidance_scale,
            "threads": torch.get_num_threads(),
        }
    return found


def main(arguments: list[str]) -> None:
    """`python -m train bench attention [options]`."""
    config = tyro.cli(AttentionBenchmark, args=arguments, prog="python -m train bench attention")
    write(measure(config), config.out)
