"""`python -m train spectrum RECIPE`: the gains that bring what a model folder draws to real images' power spectrum.

The folder's pictures of training images' captions, by its default adapter, are held against the latents of those very
images: the gain of a latent channel and band of frequencies is what makes the geometric mean of the band's power over
pictures that over images, so that a few pictures full of hair do not decide for all, and the offset of a channel gives
its mean (see `medviz.generation.spectrum`).
What the few-step adapter draws alone is brought to what ships in many steps, of the same captions and noises: to real
images where that is, else to pictures as they were drawn. A few hundred images tell a common contrast to some percent
only, for they differ by as much among one another; so the few-step adapter, which draws what many steps draw of the
same noises nearly, may draw many more captions, and many steps are told apart from it on few: a control variate.
Neither reward nor judge has a part in it. Then pictures of validation captions are measured with the gains and without.
"""

import importlib.metadata
import json
import random
import shlex
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medviz import __version__
from medviz.domains import Domain, get_domain
from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.plan import FewSteps
from medviz.generation.sampling import encode_image
from medviz.generation.spectrum import BOUNDS, Spectrum, radius
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from medviz.models.library import LoadedDomain, ModelLibrary
from train import seeding
from train.assemble import assemble, read_parts
from train.config import StageConfig, parse
from train.datasets.latents import to_pixels
from train.datasets.split import open_split
from train.evaluate.choose import ValidationLook
from train.evaluate.generated import caption_request, generate, generate_latents
from train.evaluate.real import RealImages, real_images
from train.evaluate.report import FORMAT_VERSION

STAGE, SPECTRA_NAME = "spectrum", "spectra.json"
BANDS = 7
"""Of frequencies, as wide as one another on a logarithmic scale; those in which a small grid has none fall away."""
VERSIONED = ("torch", "diffusers", "numpy")


@dataclass
class SpectrumConfig(StageConfig):
    """Options of the spectrum stage."""

    steps: int = DEFAULT_STEPS
    """Denoising steps of the pictures in many steps."""
    assembly: str = ""
    """Assembly recipe of the model folder; its own spectrum, if it names one, is left out."""
    to_real: bool = True
    """Bring pictures in many steps to real images; else they stay as they were drawn."""
    pictures: int = 128
    """Training images, whose captions are drawn once each in either number of steps."""
    few_step_pictures: int = 0
    """Training images, those among them, whose captions the few-step adapter draws; 0: no more than `pictures`. More
    ask for `to_real`."""
    captions: int = 192
    """Validation images whose captions are drawn to measure (at most half of the split)."""
    batch: int = 16
    """Pictures drawn at a time."""
    bf16: bool = False
    """Draw in bf16: faster, where the processor has instructions for it."""
    report: str = ""
    """JSON file to write beside the one in `out`; empty: none."""


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


def spectrum_of(drawn: torch.Tensor, real: torch.Tensor) -> Spectrum:
    """The gains, none beyond BOUNDS, that give `drawn` (N, C, s, s) the geometric mean power of `real`, of one shape
    and the same captions, and the offsets that give it the mean."""
    frequencies, power = band_power(drawn)
    wanted = band_power(real)[1]
    gains = ((wanted.log() - power.log()).mean(dim=0) / 2).exp().clamp(*BOUNDS)
    offsets = (real - drawn).double().mean(dim=(0, 2, 3))
    rows = tuple(tuple(row) for row in gains.tolist())
    return Spectrum(tuple(frequencies.tolist()), rows, tuple(offsets.tolist()))


def joined(first: Spectrum, second: Spectrum) -> Spectrum:
    """What both do one after the other, of one shape; no gain beyond BOUNDS."""
    products = (np.array(first.gains) * np.array(second.gains)).clip(*BOUNDS)
    offsets = np.add(first.offsets, second.offsets)
    return Spectrum(first.frequencies, tuple(map(tuple, products.tolist())), tuple(offsets.tolist()))


def run(config: SpectrumConfig, command: str = "") -> dict[str, Any]:
    """Measure and write the gains; returns the report that was written. Raises InputError without an assembly recipe,
    for a number out of range, and where there is nothing to measure."""
    for name in ("pictures", "captions"):
        if getattr(config, name) < 2:
            raise InputError(f"{name} must be at least 2, found {getattr(config, name)}")
    if not config.assembly:
        raise InputError("name the assembly recipe of the model folder whose spectrum is to be measured")
    parts = read_parts(config.assembly)
    if not (config.to_real or parts.few_step_adapter):
        raise InputError(
            f"{config.assembly} has no few-step adapter, whose pictures could be brought to others (to_real)"
        )
    if config.few_step_pictures and not (config.to_real and parts.few_step_adapter):
        raise InputError("few_step_pictures needs real images to be brought to (to_real) and a few-step adapter")
    if config.few_step_pictures and config.few_step_pictures < config.pictures:
        least = config.pictures
        raise InputError(f"few_step_pictures must be 0 or at least {least}, found {config.few_step_pictures}")
    with tempfile.TemporaryDirectory() as aside:
        runs = {stage: run for stage, run in parts.runs.items() if stage != STAGE}
        assemble(replace(parts, spectrum="", runs=runs), Path(aside) / parts.domain)
        dtype = torch.bfloat16 if config.bf16 else None
        loaded = ModelLibrary(Path(aside), config.device, dtype).load(parts.domain)
        return _measured(config, command, loaded)


@dataclass(frozen=True)
class _Way:
    """One way of drawing: its name among the spectra, steps, how the few-step adapter has part in it, in words."""

    name: str
    steps: int
    few_steps: FewSteps | None
    label: str


def _measured(config: SpectrumConfig, command: str, loaded: LoadedDomain) -> dict[str, Any]:
    domain, manifest, out = get_domain(loaded.name), loaded.manifest, Path(config.out)
    guidance = Guidance.of_recipe(manifest.recipe, domain.name, DEFAULT_GUIDANCE_SCALE)
    ways = [
        _Way(name, steps, FewSteps.of(manifest, steps, guidance.scale), f"{steps} steps")
        for name, steps in (("steps", config.steps), ("few_steps", manifest.few_steps))
        if steps
    ]
    found, training_images = _found(config, loaded, ways, guidance)
    split = open_split(domain.name, "validation")
    validation = real_images(split, domain, config.captions, _size_px(loaded), config.seed)
    figures, arms = _look(config, loaded, ways, found, guidance, validation)
    wanted_of = "real images" if config.to_real else f"pictures in {config.steps} steps"
    report = {
        "format_version": FORMAT_VERSION,
        "kind": STAGE,
        "title": f"{domain.label}: pictures brought to {wanted_of} in their power spectrum, and as they were drawn",
        "domain": domain.name,
        "command": command,
        "default_adapter": None,
        "rows": "arms",
        "arms": arms,
        "intervals": "brackets hold 95 % intervals over captions, Δ is the change against the first row, caption by "
        "caption; all rows are of the default adapter",
        "settings": {
            "split": "validation",
            "captions": len(validation.captions),
            "real_references": len(validation.reference),
            "training_images": training_images,
            "drawn_in_many_steps": min(config.pictures, training_images),
            "matched_to": wanted_of,
            "seed": config.seed,
            "guidance_scale": str(guidance),
        },
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "figures": figures,
    }
    metrics: dict[str, Any] = {"seed": config.seed, "to_real": config.to_real, "pictures": training_images}
    for name, spectrum in found.items():
        gains = np.array(spectrum.gains)
        metrics |= {f"{name}_lowest_gain": float(gains.min()), f"{name}_highest_gain": float(gains.max())}
    for path, each in (
        (out / SPECTRA_NAME, {name: spectrum.as_json() for name, spectrum in found.items()}),
        (out / "metrics.json", metrics),
        (out / "report.json", report),
        *([(Path(config.report), report)] if config.report else []),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(each, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return report


def _found(
    config: SpectrumConfig, loaded: LoadedDomain, ways: Sequence[_Way], guidance: Guidance
) -> tuple[dict[str, Spectrum], int]:
    """The spectra by their names, and of how many training images they are."""
    captions, images = _training_captions(config, get_domain(loaded.name), _size_px(loaded))

    def drawn(way: _Way, count: int) -> torch.Tensor:
        request = caption_request(captions[:count], config.seed, way.steps, guidance)
        label = f"training captions, {way.label}"
        batches = generate_latents(**_asked(config, loaded, way), request=request, label=label)
        return torch.cat([latents() for latents in batches])

    many, *few = ways
    in_many = drawn(many, config.pictures)
    if not config.to_real:
        return {few[0].name: spectrum_of(drawn(few[0], config.pictures), in_many)}, len(in_many)
    parts = [images[start : start + config.batch] for start in range(0, len(images), config.batch)]
    real = torch.cat([encode_image(loaded.pipeline, to_pixels(part, loaded.device)) for part in parts])
    if not few:
        return {many.name: spectrum_of(in_many, real)}, len(real)
    in_few = drawn(few[0], len(real))
    found = {few[0].name: spectrum_of(in_few, real)}
    found[many.name] = joined(spectrum_of(in_many, in_few[: len(in_many)]), found[few[0].name])
    return found, len(real)


def _size_px(loaded: LoadedDomain) -> int:
    """Side of the folder's pictures in px."""
    return int(loaded.pipeline.unet.config.sample_size) * int(loaded.pipeline.vae_scale_factor)


def _training_captions(config: SpectrumConfig, domain: Domain, size_px: int) -> tuple[list[str], np.ndarray]:
    """A caption of each of the training images, and the images uint8 (N, H, W, 3)."""
    split, count = open_split(domain.name, "train"), max(config.pictures, config.few_step_pictures)
    rng = seeding.numpy_generator(config.seed, STAGE, "images")
    rows = rng.choice(len(split.records), min(count, len(split.records)), replace=False).tolist()
    words = [random.Random(seeding.key(config.seed, STAGE, "caption", i)) for i in range(len(rows))]
    captions = [domain.caption(split.records[row], each) for row, each in zip(rows, words, strict=True)]
    return captions, split.images(size_px, rows)


def _asked(config: SpectrumConfig, loaded: LoadedDomain, way: _Way) -> dict[str, Any]:
    """What `generate` and `generate_latents` take alike, but for the request."""
    return {
        "pipeline": loaded.pipeline,
        "files": loaded.manifest.files,
        "adapter": loaded.default_adapter,
        "folder": Path(config.out) / "pictures",
        "batch": config.batch,
        "few_steps": way.few_steps,
    }


def _look(
    config: SpectrumConfig,
    loaded: LoadedDomain,
    ways: Sequence[_Way],
    spectra: Mapping[str, Spectrum],
    guidance: Guidance,
    real: RealImages,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Figures of validation captions' pictures, each way's with its gains and without, and the arms they compare."""
    judge, features = str(loaded.folder / "judge"), str(loaded.folder)
    look = ValidationLook(judge, features, config.device, real, get_domain(loaded.name))
    seen, arms = {}, []
    for way in ways:
        request = caption_request(real.captions, config.seed, way.steps, guidance)
        matched = [("matched", ", matched", spectra[way.name])] if way.name in spectra else []
        for ending, words, spectrum in (*matched, ("as_drawn", ", as drawn", None)):
            label = f"validation captions, {way.label}{words}"
            images = generate(**_asked(config, loaded, way), request=request, label=label, spectrum=spectrum)
            name = f"{way.name}_{ending}"
            seen[name] = look.seen(images)
            arms.append({"name": name, "label": way.label + words})
    photographs = look.seen(real.prompted)
    return [figure.as_json() for figure in look.figures(seen, photographs, "Drawn in")], arms


def main(arguments: list[str]) -> None:
    """`python -m train spectrum RECIPE [overrides]`."""
    run(parse(arguments, SpectrumConfig), f"python -m train spectrum {shlex.join(arguments)}")
