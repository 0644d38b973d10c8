"""`python -m train spectrum RECIPE`: gains by spatial frequency for pictures that the few-step adapter draws alone.

What is drawn in few steps is a little smoother than what many steps draw from the same noise. The folder's pictures of
training images' captions are drawn both ways by its default adapter. The gain of a latent channel and band of
frequencies makes the geometric mean of the band's power in few steps that in many, and the offset of a channel gives
its mean (see `medviz.generation.spectrum`). Neither reward nor judge has a part in it.
"""

import random
import tempfile
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medviz.domains import Domain, get_domain
from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.plan import FewSteps
from medviz.generation.spectrum import BOUNDS, Spectrum, radius
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from medviz.models.library import LoadedDomain, ModelLibrary
from train import seeding
from train.assemble import assemble, read_parts
from train.config import StageConfig, parse
from train.datasets.split import open_split
from train.evaluate.generated import caption_request, generate_latents
from train.experiments.pieces import write_json
from train.lineage import recipe_of

STAGE, SPECTRA_NAME = "spectrum", "spectra.json"
BANDS = 7
"""Of frequencies, as wide as one another on a logarithmic scale; those in which a small grid has none fall away."""


@dataclass
class SpectrumConfig(StageConfig):
    """Options of the spectrum stage."""

    steps: int = DEFAULT_STEPS
    """Denoising steps of the pictures in many steps."""
    assembly: str = ""
    """Assembly recipe of the model folder; its own spectrum, if it names one, is left out."""
    pictures: int = 128
    """Training images, whose captions are drawn once each in either number of steps."""
    batch: int = 16
    """Pictures drawn at a time."""
    bf16: bool = False
    """Draw in bf16: faster, where the processor has instructions for it."""


def band_edges(side: int) -> np.ndarray:
    """Edges (BANDS + 1,) of the bands of a latent grid of side x side cells, in cycles a cell, all but the mean."""
    return np.geomspace(0.9 / side, 0.5 * np.sqrt(2.0) + 1e-6, BANDS + 1)


def band_power(latents: torch.Tensor) -> tuple[np.ndarray, torch.Tensor]:
    """Mean power of latents (N, C, s, s) in each band, (N, C, K) float64, and the K bands' mean frequencies."""
    frequency = radius(*latents.shape[-2:])
    power = torch.fft.rfft2(latents.double().cpu(), norm="ortho").abs().square()
    edges = band_edges(latents.shape[-1])
    bands = [(low <= frequency) & (frequency < high) for low, high in pairwise(edges)]
    bands = [band for band in bands if bool(band.any())]
    frequencies = np.array([frequency[band].mean().item() for band in bands])
    return frequencies, torch.stack([power[..., band].mean(dim=-1) for band in bands], dim=-1)


def spectrum_of(drawn: torch.Tensor, wanted: torch.Tensor) -> Spectrum:
    """The gains, none beyond BOUNDS, that give `drawn` (N, C, s, s) the geometric mean power of `wanted`, of one shape
    and the same captions, and the offsets that give it the mean."""
    frequencies, power = band_power(drawn)
    gains = ((band_power(wanted)[1].log() - power.log()).mean(dim=0) / 2).exp().clamp(*BOUNDS)
    offsets = (wanted - drawn).double().mean(dim=(0, 2, 3))
    rows = tuple(tuple(row) for row in gains.tolist())
    return Spectrum(tuple(frequencies.tolist()), rows, tuple(offsets.tolist()))


def run(config: SpectrumConfig) -> dict[str, Any]:
    """Measure and write the gains; returns the metrics that were written. Raises InputError without an assembly recipe,
    for one without a few-step adapter, and for fewer than two pictures."""
    if config.pictures < 2:
        raise InputError(f"pictures must be at least 2, found {config.pictures}")
    if not config.assembly:
        raise InputError("name the assembly recipe of the model folder whose spectrum is to be measured")
    parts = read_parts(config.assembly)
    with tempfile.TemporaryDirectory() as aside:
        runs = {stage: run for stage, run in parts.runs.items() if stage != STAGE}
        assemble(replace(parts, spectrum="", runs=runs), Path(aside) / parts.domain)
        dtype = torch.bfloat16 if config.bf16 else None
        loaded = ModelLibrary(Path(aside), config.device, dtype).load(parts.domain)
        few_steps = loaded.manifest.few_steps
        if few_steps is None:
            raise InputError(f"{config.assembly} has no few-step adapter")
        captions = _training_captions(config, get_domain(parts.domain))
        in_few = _drawn(config, loaded, captions, few_steps)
        in_many = _drawn(config, loaded, captions, config.steps)
    spectrum = spectrum_of(in_few, in_many)
    gains = np.array(spectrum.gains)
    metrics = {
        "seed": config.seed,
        "recipe": recipe_of(config),
        "pictures": len(captions),
        "few_steps_lowest_gain": float(gains.min()),
        "few_steps_highest_gain": float(gains.max()),
    }
    write_json(Path(config.out) / SPECTRA_NAME, {"few_steps": spectrum.as_json()})
    write_json(Path(config.out) / "metrics.json", metrics)
    return metrics


def _training_captions(config: SpectrumConfig, domain: Domain) -> list[str]:
    """A caption of each of `pictures` training images, or of all where there are fewer."""
    split = open_split(domain.name, "train")
    rng = seeding.numpy_generator(config.seed, STAGE, "images")
    rows = rng.choice(len(split.records), min(config.pictures, len(split.records)), replace=False).tolist()
    words = [random.Random(seeding.key(config.seed, STAGE, "caption", i)) for i in range(len(rows))]
    return [domain.caption(split.records[row], each) for row, each in zip(rows, words, strict=True)]


def _drawn(config: SpectrumConfig, loaded: LoadedDomain, captions: list[str], steps: int) -> torch.Tensor:
    """Finished latents (N, C, h, w) of the captions by the folder's default adapter."""
    manifest = loaded.manifest
    guidance = Guidance.of_recipe(manifest.recipe, loaded.name, DEFAULT_GUIDANCE_SCALE)
    batches = generate_latents(
        loaded.pipeline,
        manifest.files,
        loaded.default_adapter,
        caption_request(captions, config.seed, steps, guidance),
        Path(config.out) / "pictures",
        batch=config.batch,
        label=f"training captions, {steps} steps",
        few_steps=FewSteps.of(manifest, steps, guidance.scale),
    )
    return torch.cat([latents() for latents in batches])


def main(arguments: list[str]) -> None:
    """`python -m train spectrum RECIPE [overrides]`."""
    run(parse(arguments, SpectrumConfig))
