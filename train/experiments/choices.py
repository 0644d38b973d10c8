"""`python -m train choices RECIPE`: ways of training a generator side by side, each at the same compute, and the first
of them at more and less.

Every choice is the shared diffusion recipe with overrides of its own, trained in a folder that repeats it
(`python -m train diffusion OUT/CHOICE/recipe.yaml`), for as many steps as the first one's compute allows. All draw the
captions of the same validation images from the same noises. Choices that differ in their seed alone say how far apart
two runs lie that differ in nothing. A run that was stopped goes on; what is finished is found.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTextConfig

from medviz import __version__
from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.models.manifest import NAME_PATTERN
from train import diffusion
from train.config import GuidedConfig, parse, read_recipe
from train.datasets.split import open_split
from train.diffusion import DiffusionConfig, new_unet
from train.evaluate.choose import ValidationLook
from train.evaluate.figures import Figure
from train.evaluate.generated import Request, caption_request, file_records, generate
from train.evaluate.real import RealImages, real_images
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.experiments.compute import PASSES, PETA, cost, pass_flops
from train.experiments.pieces import run_stage, write_json
from train.rl.trainer import open_pipeline

SPLIT = "validation"

logger = logging.getLogger(__name__)


@dataclass
class ChoicesConfig(GuidedConfig):
    """Options of the experiment. Guidance is of the pictures that are measured. It goes on by itself: run the same
    command again."""

    steps: int = 20
    """Denoising steps of a measured picture."""
    diffusion: str = ""
    """The diffusion recipe that all share."""
    shared: str = ""
    """Overrides of it for all, as on the stage's command line; its --steps give the first choice's compute to all."""
    choices: dict[str, str] = field(default_factory=dict)
    """Choice -> its own overrides. The first is what the others are held against."""
    compute: dict[str, float] = field(default_factory=dict)
    """Choice -> how many times the first one's compute it gets; one that is not named gets as much."""
    judge: str = ""
    features: str = ""
    """Folder that holds features/, the second feature space."""
    captions: int = 192
    """Validation images whose captions are drawn once by each (at most half of the split is used), at least 4."""
    batch: int = 16
    """Pictures drawn at a time."""
    reports: str = "assets/reports"
    """Folder that also gets the JSON (empty: only `out`)."""


@dataclass(frozen=True)
class Choice:
    """One way of training. overrides: as they were written. flops: of a UNet pass of one image. compute: how many times
    the first one's it gets."""

    overrides: str
    recipe: DiffusionConfig
    flops: int
    compute: float = 1.0


def unet_flops(config: DiffusionConfig) -> int:
    """Floating point operations of one UNet pass of one image; a step of training costs three times as many an image.

    Raises InputError for an autoencoder or contrastive run that is missing.
    """
    for folder in (config.autoencoder, f"{config.contrastive}/text_encoder"):
        if not Path(folder).is_dir():
            raise InputError(f"no folder {folder}: train that stage first")
    latent = AutoencoderTiny.load_config(config.autoencoder)
    channels, size = latent["latent_channels"], config.size_px // 2 ** (len(latent["encoder_block_out_channels"]) - 1)
    text = CLIPTextConfig.from_pretrained(f"{config.contrastive}/text_encoder")
    unet = new_unet(config, channels, size, text.hidden_size)
    return pass_flops(unet, text.max_position_embeddings)


def plan(config: ChoicesConfig) -> dict[str, Choice]:
    """Choice -> its recipe, whose steps cost what the first one's do, or its share of that.

    Raises InputError for fewer than two choices, names that no folder can have, choices that read another domain or say
    how many steps they take, and a share of the compute that is not above 0, the first one's own or no choice's.
    """
    if len(config.choices) < 2:
        raise InputError("name at least two choices and their overrides; the first may have none")
    for option, low in (("captions", 4), ("batch", 1), ("steps", 1)):
        if getattr(config, option) < low:
            raise InputError(f"{option} must be at least {low}, found {getattr(config, option)}")
    others = list(config.choices)[1:]
    for name, times in config.compute.items():
        if name not in others or not 0 < times < math.inf:
            raise InputError(f"compute gives {name!r} {times}; allowed are numbers above 0 for {', '.join(others)}")
    plans: dict[str, Choice] = {}
    for name, overrides in config.choices.items():
        if not NAME_PATTERN.fullmatch(name):
            raise InputError(f"{name!r} cannot be a choice's name; allowed: {NAME_PATTERN.pattern}")
        flags = [*shlex.split(config.shared), *shlex.split(overrides)]
        recipe = read_recipe(config.diffusion, DiffusionConfig, flags)
        latents = recipe.latents or str(Path(config.out).parent / "latents")  # the other stages'
        recipe = replace(recipe, out=f"{config.out}/{name}", latents=latents, device=config.device)
        recipe = replace(recipe, resume=False, max_minutes=0.0)
        first = next(iter(plans.values())).recipe if plans else recipe
        if recipe.domain != first.domain or recipe.steps != first.steps:
            raise InputError(f"{name}: all choices share domain and steps; the steps follow from the compute")
        plans[name] = Choice(overrides, recipe, unet_flops(recipe), config.compute.get(name, 1.0))
    first_of_all = next(iter(plans.values()))
    budget = first_of_all.flops * first_of_all.recipe.batch * first_of_all.recipe.steps

    def steps(one: Choice) -> int:
        return max(1, round(one.compute * budget / one.flops / one.recipe.batch))

    return {name: replace(one, recipe=replace(one.recipe, steps=steps(one))) for name, one in plans.items()}


def run(config: ChoicesConfig, command: str = "") -> dict[str, Any] | None:
    """Train and measure what is missing and write the report, which is returned; None where `max_minutes` was over
    before all was done (looked at between runs). See `plan` for what is refused."""
    began, plans = time.monotonic(), plan(config)
    first = next(iter(plans.values())).recipe
    domain = get_domain(first.domain)
    real = real_images(open_split(first.domain, SPLIT), domain, config.captions, first.size_px, config.seed)
    request = caption_request(real.captions, config.seed, config.steps, config.guidance)
    pictures: dict[str, np.ndarray] = {}
    for name, choice in plans.items():
        if 0 < config.max_minutes < (time.monotonic() - began) / 60:
            logger.warning("stopped before %s; the same command goes on", name)
            return None
        if run_stage(choice.recipe, diffusion.main):
            torch.compiler.reset()  # the next one's UNet is another
        pictures[name] = _drawn(config, name, request)
    found = report(config, command, plans, real, pictures)
    for folder in (Path(config.out), *([Path(config.reports)] if config.reports else [])):
        write_json(folder / f"choices-{first.domain}.json", found)
    return found


def _drawn(config: ChoicesConfig, name: str, request: Request) -> np.ndarray:
    folder = Path(config.out) / name / "model"
    pipeline = open_pipeline(str(folder), config.device)
    place = Path(config.out) / "pictures"
    return generate(pipeline, file_records(folder), None, request, place, batch=config.batch, label=name)


def report(
    config: ChoicesConfig,
    command: str,
    plans: Mapping[str, Choice],
    real: RealImages,
    pictures: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The JSON of the experiment; pictures: choice -> uint8 (N, S, S, 3), row i of caption i."""
    names = list(plans)
    first = plans[names[0]].recipe
    domain = get_domain(first.domain)
    look = ValidationLook(config.judge, config.features, config.device, real, domain)
    arms = {name: look.seen(images) for name, images in pictures.items()}
    figures = look.figures(arms, look.seen(real.prompted), "Choice")
    return {
        "format_version": FORMAT_VERSION,
        "kind": "choices",
        "title": f"{domain.label}: ways of training the generator, at one compute where a row names no other",
        "domain": first.domain,
        "command": command,
        "default_adapter": None,
        "rows": "arms",
        "arms": [{"name": name, "label": _label(name, choice)} for name, choice in plans.items()],
        "intervals": "brackets hold 95 % intervals over captions, of one run each; Δ is the change against the first "
        "row, caption by caption; rows that differ in their seed alone say what chance does",
        "settings": {
            "split": SPLIT,
            "recipe": config.diffusion,
            "shared": config.shared,
            "petaflops_of_the_first_run": round(_training_flops(plans[names[0]]) / PETA, 2),
            "captions": len(real.captions),
            "real_references": len(real.reference),
            "steps": config.steps,
            "guidance_scale": str(config.guidance),
        },
        "runs": {name: _spent(Path(choice.recipe.out), choice) for name, choice in plans.items()},
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "figures": [figure.as_json() for figure in [*figures, *_costs(plans)]],
    }


def _label(name: str, choice: Choice) -> str:
    notes = [f"`{choice.overrides}`"] if choice.overrides else []
    notes += [f"{choice.compute:g} times the compute"] if choice.compute != 1 else []
    words = name.replace("_", " ")
    return f"{words} ({', '.join(notes)})" if notes else words


def _training_flops(choice: Choice) -> int:
    return PASSES * choice.flops * choice.recipe.batch * choice.recipe.steps


def _costs(plans: Mapping[str, Choice]) -> list[Figure]:
    seen = {name: choice.recipe.steps * choice.recipe.batch for name, choice in plans.items()}
    return [cost("images_seen", "Images seen in training", seen, "Choice")]


def _spent(out: Path, choice: Choice) -> dict[str, Any]:
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    return {
        "overrides": choice.overrides,
        "steps": choice.recipe.steps,
        "unet_flops_an_image": choice.flops,
        "training_flops": _training_flops(choice),
        **{name: metrics[name] for name in ("trained_s", "unet_parameters", "validation_loss")},
    }


def main(arguments: list[str]) -> None:
    """`python -m train choices RECIPE [overrides]`."""
    config = parse(arguments, ChoicesConfig)
    run(config, command=f"python -m train choices {shlex.join(arguments)}")
