"""`python -m train choose RECIPE`: what each guidance scale and each share of an adapter's change is worth.

Alignment does part of guidance's work: too much of either pushes pictures beyond what real ones look like, so the two
are chosen together, for the model that ships, on captions of validation images. The assembly recipe takes what is
chosen here (`guidance_scale`, `adapter_strengths`); test images have no say in it.
"""

import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medviz.domains import Domain, get_domain
from medviz.errors import InputError
from medviz.generation.guidance import RECIPE_OPTIONS
from medviz.generation.plan import FewSteps
from medviz.models.adapters import ADAPTER_CONFIG_NAME, load_lora
from medviz.models.manifest import read_json
from medviz.rewards.classifier import AttributeClassifier
from train.assemble import weaken
from train.config import GuidedConfig, parse
from train.datasets.split import open_split
from train.evaluate.alignment import Agreement, agreement
from train.evaluate.features import independent_space, judge_space
from train.evaluate.fidelity import kernel_distance, kernel_distance_change
from train.evaluate.generated import caption_request, file_records, generate
from train.evaluate.measure import BASELINE
from train.evaluate.real import RealImages, real_images
from train.evaluate.stage import readings
from train.evaluate.statistics import Estimate, mean_interval, paired_difference
from train.rl.trainer import open_pipeline

SETTINGS = ("guidance_scale", "semantic_scale", "few_step_finish", "strength")
TOLD = ("steps", "seed", *RECIPE_OPTIONS, "pipeline", "adapter", "few_step_adapter")
FEW_STEPS = "few_steps"
"""What the adapter that finishes pictures is called while they are drawn."""


@dataclass
class ChooseConfig(GuidedConfig):
    """Options of the choose stage; `guidance_scale` is left to `guidance_scales`, as `semantic_scale` may be."""

    steps: int = 20
    """Denoising steps of a picture."""
    pipeline: str = ""
    """Folder of the generator."""
    autoencoder: str = ""
    """Folder of the autoencoder that decodes; empty: the pipeline's own."""
    adapter: str = ""
    """Folder of the LoRA adapter."""
    judge: str = ""
    features: str = ""
    """Folder that holds features/, the second feature space."""
    guidance_scales: tuple[float, ...] = (1.5, 2.0, 3.0)
    strengths: tuple[float, ...] = (0.5, 1.0)
    """Shares of the adapter's change, above 0 and at most 1; none of it, the baseline, is always measured."""
    semantic_scales: tuple[float, ...] = ()
    """Scales of guidance along `semantic_heads`, 0 for none, each measured; empty: `semantic_scale` alone."""
    few_step_adapter: str = ""
    """Folder of an adapter that draws in few steps, for `few_step_finishes`."""
    few_step_finishes: tuple[int, ...] = ()
    """How many of its last steps finish what the generator began, 0 for none, all of them for pictures that it draws
    alone, along no word, each measured; empty: none do."""
    captions: int = 192
    """Validation images whose captions are drawn once each (at most half of the split)."""
    batch: int = 16
    """Pictures drawn at a time."""
    bf16: bool = False
    """Draw in bf16: faster, where the processor has instructions for it."""
    report: str = ""
    """JSON file to write beside the one in `out`; empty: none."""


def choose(config: ChooseConfig) -> dict[str, Any]:
    """Draw and measure every combination; returns the report that was written.

    A row's changes are since the row without the adapter at its own setting; those that end in _since_first are since
    the first setting's row of its own strength, of the same captions and noises.

    Raises InputError for a strength out of range, ModelError for a pipeline that is missing.
    """
    domain, place = get_domain(config.domain), Path(config.out)
    pipeline = open_pipeline(config.pipeline, config.device, config.autoencoder)
    size_px = int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)
    real = real_images(open_split(config.domain, "validation"), domain, config.captions, size_px, config.seed)
    names = {0.0: None} | {strength: f"share{round(1000 * strength)}" for strength in sorted(config.strengths)}
    files = file_records(Path(config.pipeline))
    if config.autoencoder:
        files |= file_records(Path(config.autoencoder), "vae/")
    with tempfile.TemporaryDirectory() as aside:
        for strength, name in names.items():
            if name is not None:
                folder = Path(aside) / name
                shutil.copytree(config.adapter, folder)
                weaken(folder, strength)
                files |= file_records(folder, f"adapters/{name}/")
                load_lora(pipeline.unet, folder, name)
    finishes = finishing(config)
    if any(finishes.values()):
        files |= file_records(Path(config.few_step_adapter), f"adapters/{FEW_STEPS}/")
        load_lora(pipeline.unet, Path(config.few_step_adapter), FEW_STEPS)
    if config.bf16:
        pipeline.to(torch.bfloat16)
    look = ValidationLook(config.judge, config.features, config.device, real, domain)

    def row(chosen: tuple[float | None, ...], images: np.ndarray, figures: dict[str, Estimate]) -> dict[str, Any]:
        figures = figures | look.of_heads(images, config.semantic_heads)
        measured = {name: estimate.as_json() for name, estimate in figures.items()}
        return dict(zip(SETTINGS, chosen, strict=True)) | measured

    rows: list[dict[str, Any]] = []
    first: dict[float, Seen] = {}
    settings = list(product(config.guidance_scales, config.semantic_scales or (config.semantic_scale,), finishes))
    for scale, semantic, last in tqdm(settings, unit="setting"):
        heads = config.semantic_heads if semantic else ()
        chosen = replace(config, guidance_scale=scale, semantic_scale=semantic, semantic_heads=heads)
        request = caption_request(real.captions, config.seed, config.steps, chosen.guidance)
        drawn = {
            strength: generate(
                pipeline,
                files,
                name,
                request,
                place / "pictures",
                batch=config.batch,
                label=name or BASELINE,
                few_steps=finishes[last],
            )
            for strength, name in names.items()
        }
        seen = {strength: look.seen(images) for strength, images in drawn.items()}
        first = first or seen
        for strength, images in drawn.items():
            since_first = look.changes(seen[strength], first[strength], "_since_first")
            figures = look.compared(seen[strength], seen[0.0]) | since_first
            rows.append(row((scale, semantic, last, strength), images, figures))
    photographs = look.seen(real.prompted)
    report = {
        "kind": "choice",
        "domain": config.domain,
        "split": "validation",
        "settings": {name: value for name, value in asdict(config).items() if name in TOLD},
        "captions": len(real.captions),
        "reference": len(real.reference),
        "real": row((None,) * len(SETTINGS), real.prompted, look.compared(photographs, photographs)),
        "rows": rows,
    }
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    place.mkdir(parents=True, exist_ok=True)
    for path in (place / "choice.json", *([Path(config.report)] if config.report else [])):
        path.write_text(text)
    return report


def finishing(config: ChooseConfig) -> dict[int, FewSteps | None]:
    """What draws the end of a picture, by how many steps of the few-step adapter that is.

    Raises InputError for steps that it has not, or without one.
    """
    if not any(config.few_step_finishes):
        return {0: None}
    if not config.few_step_adapter:
        raise InputError("few_step_finishes needs a few_step_adapter")
    timesteps = tuple(read_json(Path(config.few_step_adapter) / ADAPTER_CONFIG_NAME)["timesteps"])
    for last in config.few_step_finishes:
        if not 0 <= last <= len(timesteps):
            raise InputError(f"few_step_finishes must be from 0 to {len(timesteps)}, found {last}")
    return {last: _few_steps(timesteps, last, config.steps) for last in config.few_step_finishes}


def _few_steps(timesteps: tuple[int, ...], last: int, steps: int) -> FewSteps | None:
    if not last:
        return None
    return FewSteps(FEW_STEPS, timesteps[-last:], lead=steps if last < len(timesteps) else None)


@dataclass(frozen=True)
class Seen:
    """Pictures of captions as the judge and the feature spaces see them: `accuracy` (N,) as `ValidationLook.accuracy`,
    `features` space -> (N, D)."""

    accuracy: np.ndarray
    features: Mapping[str, np.ndarray]


class ValidationLook:
    """Accuracy by the judge and kernel distance in both feature spaces, of pictures drawn for captions of validation
    images.

    judge: folder of the held-out classifier; features: folder that holds features/, the independent space.
    """

    def __init__(self, judge: str, features: str, device: str, real: RealImages, domain: Domain) -> None:
        self.device, self.judge = device, AttributeClassifier.load(judge, device)
        self.parsed = [domain.parse(caption) for caption in real.captions]
        self.spaces = (independent_space(Path(features), device), judge_space(self.judge))
        self.reference = {space.name: space.embed(real.reference, device=device) for space in self.spaces}

    def agreement(self, images: np.ndarray) -> Agreement:
        """What the judge sees of what each caption asks for."""
        read = readings(self.judge, images, self.parsed, self.device)
        targets = [prompt.targets for prompt in self.parsed]
        return agreement(read.probabilities, targets, self.judge.heads, self.judge.thresholds)

    def accuracy(self, images: np.ndarray) -> np.ndarray:
        """Share of what each caption asks for that the judge sees (N,), NaN where it asks for nothing it knows."""
        return self.agreement(images).mean

    def of_heads(self, images: np.ndarray, heads: Sequence[str]) -> dict[str, Estimate]:
        """Share of the captions that ask for each of `heads`, and of those that ask for its absence, which get it.

        Keys: sensitivity_HEAD, specificity_HEAD.
        """
        found = {}
        for head in heads:
            wanted = np.array([prompt.targets.get(head, np.nan) for prompt in self.parsed])
            matches = self.agreement(images).of_head(head)
            for name, rows in (("sensitivity", wanted >= 0.5), ("specificity", wanted < 0.5)):
                found[f"{name}_{head}"] = mean_interval(np.where(rows, matches, np.nan))
        return found

    def seen(self, images: np.ndarray) -> Seen:
        """What judge and feature spaces see of pictures uint8 (N, S, S, 3), row i of caption i."""
        features = {space.name: space.embed(images, device=self.device) for space in self.spaces}
        return Seen(self.accuracy(images), features)

    def compared(self, now: Seen, before: Seen) -> dict[str, Estimate]:
        """Accuracy and kernel distances of `now`, and their changes since `before`, of the same captions and noises.

        Keys: accuracy, accuracy_change, kernel_distance_SPACE, kernel_distance_change_SPACE.
        """
        found = {
            "accuracy": mean_interval(now.accuracy),
            "accuracy_change": paired_difference(now.accuracy, before.accuracy),
        }
        for name, reference in self.reference.items():
            mine, theirs = now.features[name], before.features[name]
            found[f"kernel_distance_{name}"] = kernel_distance(mine, reference)
            found[f"kernel_distance_change_{name}"] = kernel_distance_change(mine, theirs, reference)
        return found

    def changes(self, now: Seen, before: Seen, ending: str) -> dict[str, Estimate]:
        """The changes of `compared` alone, their keys with `ending`."""
        found = self.compared(now, before)
        return {f"{name}{ending}": change for name, change in found.items() if "change" in name}


def main(arguments: list[str]) -> None:
    """`python -m train choose RECIPE [overrides]`."""
    config = parse(arguments, ChooseConfig)
    if not config.adapter or not config.guidance_scales or not config.strengths:
        raise InputError("choose needs an adapter and at least one guidance scale and strength")
    choose(config)
