"""`python -m train evaluate RECIPE`: draw the pictures of a model folder, measure them, write JSON and contact sheets.

Three sets of prompts: the domain's fixed grid, each prompt from the same few seeds (alignment, diversity), captions
of real images that no generator was trained on, one picture each (fidelity, memorisation: there the mix of generated
and real images is the same), and captions of such images that show every class as often (what the judge recognises).
Every picture is drawn once and read by every metric.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medviz import __version__
from medviz.audit.memorisation import held_out_threshold, nearest_similarity
from medviz.domains import Domain, ParsedPrompt, get_domain
from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.spectrum import Spectra
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from medviz.models.library import LoadedDomain, ModelLibrary
from medviz.models.manifest import FileRecord, read_manifest
from medviz.rewards.attribute import attribute_reward, prompt_targets
from medviz.rewards.classifier import AttributeClassifier
from train.config import StageConfig, parse
from train.datasets.latents import to_pixels
from train.datasets.split import open_split
from train.evaluate.contact_sheet import contact_sheet, evenly_spaced, write_sheet
from train.evaluate.features import FeatureSpace, independent_space, judge_space
from train.evaluate.figures import Figure
from train.evaluate.generated import (
    Request,
    caption_request,
    few_steps_of,
    generate,
    grid_request,
    rests_on,
    told,
)
from train.evaluate.history import record
from train.evaluate.measure import (
    BASELINE,
    PromptSet,
    Readings,
    Role,
    alignment_figures,
    diversity_figure,
    fidelity_figures,
    memorisation_figures,
)
from train.evaluate.real import RealImages, real_images
from train.evaluate.recognition import class_records, confusions
from train.evaluate.report import FORMAT_VERSION

REAL = "real"
SHEET_SEEDS = 4
SHEET_TEXT = {"Synthetic": "yes", "Description": "Synthetic images", "Software": f"medviz {__version__}"}
VERSIONED = ("torch", "diffusers", "transformers", "peft", "numpy", "torchmetrics")

logger = logging.getLogger(__name__)


@dataclass
class EvaluateConfig(StageConfig):
    """Options of the evaluate stage. Pictures already drawn are found again, so a stopped run goes on by itself."""

    steps: int = DEFAULT_STEPS
    """Denoising steps of a picture."""
    guidance_scale: float = 0.0
    """0: the model folder's own; another scale keeps the folder's interval."""
    domain: str = "dermatology"
    models: str = "assets/models"
    """Folder that holds the domain's model folder."""
    eyes: str = ""
    """Another such folder, whose judge, reward and second feature space look on in place of the model's own: generators
    that have networks of their own are measured alike, against real images of the size that judge reads. Reports get an
    entry in the history alone."""
    adapters: tuple[str, ...] = ()
    """Adapters to compare with the baseline; none named: the default one."""
    split: str = "validation"
    """Real images to compare with: validation while choosing, test once to report."""
    grid_prompts: int = 0
    """Validation prompts of the domain, evenly spaced (0: all)."""
    seeds_per_prompt: int = 8
    """Pictures of each validation prompt and model, at least 2."""
    captions: int = 256
    """Real images whose captions are drawn once each by every model (at most half of the split is used)."""
    per_class: int = 16
    """Real images of each of the judge's heads, as far as the split has them, and pictures of their captions (0: no
    table of classes)."""
    training_images: int = 0
    """Training images that memorisation is checked against (0: all)."""
    apr_heads: tuple[str, ...] = ()
    """Heads of the paper's artefact prevalence rate: all of them right at once."""
    batch: int = 16
    """Pictures drawn at a time; part of what names the stored pictures."""
    bf16: bool = False
    """Draw in bf16 on a CPU as on a card: faster, where the CPU has instructions for it."""
    reports: str = "assets/reports"
    """Folder that also gets the JSON and the contact sheet (empty: only `out`)."""


def run(config: EvaluateConfig, command: str = "") -> dict[str, Any]:
    """Evaluate one domain's models and return the report that was written.

    Raises InputError for an option out of range, ModelError for model files that are missing or damaged.
    """
    _check(config)
    domain = get_domain(config.domain)
    dtype = torch.bfloat16 if config.bf16 else None
    loaded = ModelLibrary(Path(config.models), config.device, dtype).load(config.domain)
    adapters = _chosen_adapters(config, loaded)
    watching = Path(config.eyes) / config.domain if config.eyes else loaded.folder
    judge = AttributeClassifier.load(watching / "judge", config.device)
    reward = AttributeClassifier.load(watching / "rewards" / "attribute", config.device)
    drawn_px = int(loaded.pipeline.unet.config.sample_size) * int(loaded.pipeline.vae_scale_factor)
    size_px = judge.size_px if config.eyes else drawn_px
    split = open_split(config.domain, config.split)
    real = real_images(split, domain, config.captions, size_px, config.seed)
    prompts = domain.validation_prompts()
    prompts = tuple(prompts[i] for i in evenly_spaced(len(prompts), config.grid_prompts or len(prompts)))
    guidance = Guidance.of_recipe(loaded.manifest.recipe, config.domain, DEFAULT_GUIDANCE_SCALE)
    guidance = guidance.with_scale(config.guidance_scale or guidance.scale)
    requests: dict[PromptSet, Request] = {
        "grid": grid_request(prompts, config.seeds_per_prompt, config.steps, guidance),
        "captions": caption_request(real.captions, config.seed, config.steps, guidance),
    }
    photographs: dict[PromptSet, dict[str, np.ndarray]] = {"grid": {}, "captions": {REAL: real.prompted}}
    if config.per_class:
        indices, captions = class_records(domain, split.records, judge.heads, config.per_class, config.seed)
        requests["classes"] = caption_request(captions, config.seed, config.steps, guidance)
        photographs["classes"] = {REAL: split.images(size_px, indices)}
    grid = requests["grid"]
    pictures = {kind: _draw(config, loaded, adapters, request, kind) for kind, request in requests.items()}
    labels = {head.name: head.label for head in domain.heads}
    figures: list[Figure] = []
    confused: list[dict[str, Any]] = []
    classifiers: dict[Role, AttributeClassifier] = {"judge": judge, "reward": reward}
    for role, classifier in classifiers.items():
        for kind, request in requests.items():
            once = {prompt: domain.parse(prompt) for prompt in dict.fromkeys(request.prompts)}
            parsed = [once[prompt] for prompt in request.prompts]
            shown = pictures[kind] | photographs[kind]
            read = {name: readings(classifier, images, parsed, config.device) for name, images in shown.items()}
            figures += alignment_figures(
                role,
                kind,
                classifier.heads,
                labels,
                classifier.thresholds,
                [prompt.targets for prompt in parsed],
                {name: read[name] for name in pictures[kind]},
                real=read.get(REAL),
                subset=config.apr_heads,
            )
            if role == "judge" and kind == "classes":
                probabilities = {name: r.probabilities for name, r in read.items()}
                confused = confusions(domain, classifier.heads, classifier.thresholds, parsed, probabilities)
    for space in (independent_space(watching, config.device), judge_space(judge)):
        independent = space.name != "judge"
        figures += _in_space(config, space, grid, pictures, real, size_px, independent=independent)
    sheet = None if config.eyes else _write_sheets(config, domain, loaded, adapters, guidance, judge.heads)
    report = _report(config, command, loaded, adapters, real, grid, figures, sheet) | {"confusions": confused}
    _write_report(config, report)
    return report


def _check(config: EvaluateConfig) -> None:
    for name, low in (
        ("seeds_per_prompt", 2),
        ("captions", 4),
        ("batch", 1),
        ("steps", 1),
        ("grid_prompts", 0),
        ("per_class", 0),
    ):
        if getattr(config, name) < low:
            raise InputError(f"{name} must be at least {low}, found {getattr(config, name)}")


def _chosen_adapters(config: EvaluateConfig, loaded: LoadedDomain) -> tuple[str, ...]:
    named = config.adapters or ("",)
    found = [loaded.resolve_adapter(name) for name in named]
    return tuple(dict.fromkeys(name for name in found if name is not None))


def _draw(
    config: EvaluateConfig, loaded: LoadedDomain, adapters: tuple[str, ...], request: Request, kind: str
) -> dict[str, np.ndarray]:
    """The request's pictures by every variant, uint8 (N, H, W, 3), drawn as the app draws them."""
    few_steps = few_steps_of(loaded.manifest, request.steps, request.guidance_scale)
    return {
        adapter or BASELINE: generate(
            loaded.pipeline,
            _files(loaded),
            adapter,
            request,
            Path(config.out) / "pictures",
            batch=config.batch,
            label=f"{kind}, {adapter or BASELINE}",
            few_steps=few_steps,
            spectrum=Spectra.of_manifest(loaded.manifest).of(few_steps),
        )
        for adapter in (None, *adapters)
    }


def _files(loaded: LoadedDomain) -> dict[str, FileRecord]:
    hub = loaded.manifest.hub
    return {**({} if hub is None else hub.files), **loaded.manifest.files}


def readings(
    classifier: AttributeClassifier, images: np.ndarray, parsed: Sequence[ParsedPrompt], device: str
) -> Readings:
    """What `classifier` says of images uint8 (N, H, W, 3), each beside what its prompt asks for."""
    targets, mask = prompt_targets(parsed, classifier.heads)
    probabilities, margins = [], []
    with torch.inference_mode():
        for start in range(0, len(images), 64):
            rows = slice(start, start + 64)
            logits = classifier.logits(to_pixels(images[rows]).to(device)).cpu()
            probabilities.append(torch.sigmoid(logits.double()))
            margins.append(attribute_reward(logits, targets[rows], mask[rows], thresholds=classifier.thresholds))
    return Readings(torch.cat(probabilities).numpy(), torch.cat(margins).double().numpy())


def _in_space(
    config: EvaluateConfig,
    space: FeatureSpace,
    grid: Request,
    pictures: Mapping[PromptSet, Mapping[str, np.ndarray]],
    real: RealImages,
    size_px: int,
    *,
    independent: bool,
) -> list[Figure]:
    """Fidelity and diversity in one feature space, and memorisation in the independent one."""

    def embed(images: np.ndarray) -> np.ndarray:
        return space.embed(images, device=config.device)

    of_grid = {name: embed(images) for name, images in pictures["grid"].items()}
    of_captions = {name: embed(images) for name, images in pictures["captions"].items()}
    reference, prompted = embed(real.reference), embed(real.prompted)
    figures = fidelity_figures(space.name, space.description, reference, prompted, of_captions)
    figures.append(diversity_figure(space.name, space.description, grid.prompts, of_grid, headline=independent))
    if independent:
        training = training_features(config.domain, space, size_px, config.training_images, config.device)
        everything = {name: np.concatenate([of_grid[name], of_captions[name]]) for name in of_grid}
        figures += memorisation_figures(
            space.name,
            space.description,
            held_out_threshold(nearest_similarity(reference, training)),
            nearest_similarity(prompted, training).similarity,
            {name: nearest_similarity(features, training).similarity for name, features in everything.items()},
        )
    return figures


def training_features(domain: str, space: FeatureSpace, size_px: int, count: int, device: str) -> np.ndarray:
    """Features (M, D) of `count` training images (0: all), read in small groups: they are never all in memory."""
    split = open_split(domain, "train")
    chosen = evenly_spaced(len(split), count or len(split))
    starts = tqdm(range(0, len(chosen), 64), desc=f"training images, {space.name}", unit="batch")
    return np.concatenate(
        [space.embed(split.images(size_px, chosen[start : start + 64]), device=device) for start in starts]
    )


def _write_sheets(
    config: EvaluateConfig,
    domain: Domain,
    loaded: LoadedDomain,
    adapters: tuple[str, ...],
    guidance: Guidance,
    heads: Sequence[str],
) -> str | None:
    """Write a contact sheet an adapter, and one of the default adapter with a row for each of `heads`.

    Returns the name of the first one; None without an adapter.
    """
    by_class = {domain.head_prompt(head): None for head in heads}
    sheets = [
        (adapter, "" if not number else f"-{adapter}", domain.sheet_prompts())
        for number, adapter in enumerate(adapters)
    ]
    sheets += [(adapter, "-classes", tuple(by_class)) for adapter in adapters[:1] if config.per_class]
    seeds = min(SHEET_SEEDS, config.seeds_per_prompt)
    names = []
    for adapter, suffix, prompts in sheets:
        request = grid_request(prompts, seeds, config.steps, guidance)
        pictures = _draw(config, loaded, (adapter,), request, f"sheet{suffix}")
        rows = {name: images.reshape(len(prompts), seeds, *images.shape[1:]) for name, images in pictures.items()}
        names.append(f"contact-sheet-{_stem(config)}{suffix}.png")
        sheet = contact_sheet(
            list(prompts),
            rows[BASELINE],
            rows[adapter],
            title=f"{domain.label}: synthetic images, no patient. Each column pair starts from one noise; "
            f"{config.steps} steps, guidance {told(loaded.manifest, config.steps, guidance)}. "
            "Prompts and seeds are not selected.",
            columns=[f"seed {seed}" for seed in range(seeds)],
            names=("baseline", f"aligned: {adapter}"),
        )
        for folder in _folders(config):
            write_sheet(folder / names[-1], sheet, SHEET_TEXT)
    return names[0] if names else None


def _report(
    config: EvaluateConfig,
    command: str,
    loaded: LoadedDomain,
    adapters: tuple[str, ...],
    real: RealImages,
    grid: Request,
    figures: list[Figure],
    sheet: str | None,
) -> dict[str, Any]:
    manifest = loaded.manifest
    eyes = read_manifest(Path(config.eyes) / config.domain).files if config.eyes else _files(loaded)
    few_steps = few_steps_of(manifest, grid.steps, grid.guidance_scale)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "evaluation",
        "title": f"{get_domain(config.domain).label}: baseline and aligned model"
        + ("" if config.steps == DEFAULT_STEPS else f", in {config.steps} steps"),
        "domain": config.domain,
        "preset": manifest.preset,
        "command": command,
        "default_adapter": adapters[0] if adapters else None,
        "settings": {
            "split": config.split,
            "steps": config.steps,
            "guidance_scale": told(loaded.manifest, grid.steps, grid.guidance_scale),
            "precision": str(loaded.dtype).removeprefix("torch."),
            "seed": config.seed,
            "grid": f"{len(grid) // config.seeds_per_prompt} prompts x {config.seeds_per_prompt} seeds",
            "captions": len(real.captions),
            "real_references": len(real.reference),
        },
        "prompts": list(dict.fromkeys(grid.prompts)),
        "seeds": sorted(set(grid.seeds)),
        "models": {
            "sha256": manifest.sha256,
            **rests_on(_files(loaded), eyes, {a or BASELINE: a for a in (None, *adapters)}, few_steps),
        },
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "contact_sheet": sheet,
        "figures": [figure.as_json() for figure in figures],
    }


def _stem(config: EvaluateConfig) -> str:
    """What the files of this evaluation are named by: the domain, and the steps where they are not the usual ones."""
    return config.domain + ("" if config.steps == DEFAULT_STEPS else f"-{config.steps}-steps")


def _folders(config: EvaluateConfig) -> list[Path]:
    return [Path(name) for name in (config.out, config.reports) if name]


def _write_report(config: EvaluateConfig, report: Mapping[str, Any]) -> None:
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    places = [Path(config.out) / "metrics.json"]
    if config.reports and not config.eyes:
        places.append(Path(config.reports) / f"evaluation-{_stem(config)}.json")
    for path in places:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing = path.with_name(f".writing-{path.name}")
        writing.write_text(text, encoding="utf-8")
        os.replace(writing, path)
        logger.info("wrote %s", path)
    if config.reports:
        for sentence in record(Path(config.reports) / f"history-{config.domain}.json", report):
            logger.warning("%s", sentence)


def main(arguments: list[str]) -> None:
    """`python -m train evaluate RECIPE [overrides]`."""
    if not arguments:
        raise InputError("name the recipe, e.g. train/recipes/evaluate.yaml")
    config = parse(arguments, EvaluateConfig)
    run(config, command=f"python -m train evaluate {shlex.join(arguments)}")
