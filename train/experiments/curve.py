"""`python -m train curve RECIPE`: how near to real images generators come that were trained for longer and longer.

Model folders, of the repository's history for one, draw the same captions of validation images from the same noises at
one guidance, and one judge and feature space look at all of them. Where a distance still stands clear of zero, a power
law through those points says what compute is missing until pictures lie as near as a few times the distance of real
images from real images.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medviz import __version__
from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.models.manifest import read_manifest
from train.config import GuidedConfig, parse
from train.datasets.split import open_split
from train.evaluate.choose import ValidationLook
from train.evaluate.fidelity import distance_and_halves, kernel_distance
from train.evaluate.generated import caption_request, file_records, generate, weights_digest
from train.evaluate.real import RealImages, real_images
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.evaluate.statistics import half_sample_interval
from train.experiments.compute import PETA, cost, spent
from train.experiments.picture import draw_curve, require_matplotlib
from train.experiments.pieces import write_json
from train.rl.trainer import open_pipeline

SPLIT = "validation"
NEAR = 3.0
"""Times the distance of real images from real images that count as near."""
AT_LEAST = 3
"""Points of a power law: two lie on any."""

logger = logging.getLogger(__name__)


@dataclass
class CurveConfig(GuidedConfig):
    """Options of the experiment; all models are drawn at its one guidance. What is drawn is found again."""

    steps: int = 20
    """Denoising steps of a picture."""
    models: dict[str, str] = field(default_factory=dict)
    """Name -> model folder, at least two; they are sorted by compute. Real images are seen at the last one's size."""
    eyes: str = ""
    """Model folder whose judge and feature network look at all."""
    captions: int = 192
    """Validation images whose captions are drawn once by each (at most half of the split is used)."""
    batch: int = 16
    """Pictures drawn at a time."""
    bf16: bool = False
    """Draw in bf16: faster, where the processor has instructions for it."""
    picture: bool = True
    """Draw the curve; needs matplotlib (the extra `bench`)."""
    reports: str = "assets/reports"
    """Folder that also gets JSON and picture (empty: only `out`)."""


@dataclass(frozen=True)
class Trend:
    """distance = exp(intercept) * petaflops ** -exponent, through `points` of the models.

    low, high: 95 % interval of the exponent over half-samples of images; both None where too few of these leave all
    distances above zero.
    """

    exponent: float
    intercept: float
    low: float | None
    high: float | None
    points: int

    def petaflops_for(self, distance: float) -> float | None:
        """Where the power law reaches `distance`; None for a distance that none reaches, or beyond all counting."""
        if distance <= 0 or self.exponent <= 0:
            return None
        exponent = (self.intercept - math.log(distance)) / self.exponent
        return math.exp(exponent) if exponent < math.log(1e12) else None


def trend(petaflops: Sequence[float], distances: Sequence[float], halves: np.ndarray) -> Trend | None:
    """The power law through distances (M,) at petaflops (M,), by least squares of logarithms.

    halves (M, H): each distance on the same H half-samples. Points whose 95 % interval reaches zero say nothing of a
    slope and are left out. None where fewer than `AT_LEAST` are left, or all of one compute.
    """
    across = np.log(np.asarray(petaflops, np.float64))
    ends = [half_sample_interval(value, mine, n=0).low for value, mine in zip(distances, halves, strict=True)]
    clear = np.array([end is not None and end > 0 for end in ends])
    if clear.sum() < AT_LEAST or np.ptp(across[clear]) == 0:
        return None
    slope, intercept = np.polyfit(across[clear], np.log(np.asarray(distances)[clear]), 1)
    low = high = None
    usable = halves[clear][:, (halves[clear] > 0).all(axis=0)]
    if usable.shape[1] >= halves.shape[1] / 2:
        # Logarithms of small distances are skewed: the normal interval of the jackknife, not its quantiles.
        reach = 1.96 * float(np.std(np.polyfit(across[clear], np.log(usable), 1)[0]))
        low, high = float(-slope) - reach, float(-slope) + reach
    return Trend(float(-slope), float(intercept), low, high, int(clear.sum()))


def run(config: CurveConfig, command: str = "") -> dict[str, Any]:
    """Draw and measure every model and write the report, which is returned.

    Raises InputError for fewer than two models or for eyes that are missing, ModelError for a folder that does not say
    what its training cost.
    """
    if len(config.models) < 2 or not config.eyes:
        raise InputError("a curve needs at least two model folders, and the eyes that look at what they draw")
    if config.picture:
        require_matplotlib()
    costs = sorted(((name, *spent(Path(folder))) for name, folder in config.models.items()), key=lambda one: one[2])
    pipelines = {name: config.models[name] for name, _, _ in costs}
    size_px = _size_px(list(pipelines.values())[-1])
    real = real_images(
        open_split(config.domain, SPLIT), get_domain(config.domain), config.captions, size_px, config.seed
    )
    pictures = {name: _drawn(config, name, folder, real) for name, folder in pipelines.items()}
    found = report(config, command, costs, real, pictures)
    for folder in (Path(config.out), *([Path(config.reports)] if config.reports else [])):
        write_json(folder / f"curve-{config.domain}.json", found)
        if config.picture:
            draw_curve(found, folder / f"curve-{config.domain}.png")
    return found


def _size_px(folder: str) -> int:
    pipeline = open_pipeline(folder, "cpu")
    return int(pipeline.unet.config.sample_size) * int(pipeline.vae_scale_factor)


def _drawn(config: CurveConfig, name: str, folder: str, real: RealImages) -> np.ndarray:
    pipeline = open_pipeline(folder, config.device)
    if config.bf16:
        pipeline.to(torch.bfloat16)
    request = caption_request(real.captions, config.seed, config.steps, config.guidance)
    place = Path(config.out) / "pictures"
    return generate(pipeline, file_records(Path(folder)), None, request, place, batch=config.batch, label=name)


def report(
    config: CurveConfig,
    command: str,
    costs: Sequence[tuple[str, int, int]],
    real: RealImages,
    pictures: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """The JSON of the experiment. costs: name, images seen and operations, by operations; pictures: name -> uint8
    (N, S, S, 3), S each model's own."""
    domain = get_domain(config.domain)
    look = ValidationLook(f"{config.eyes}/judge", config.eyes, config.device, real, domain)
    petaflops = {name: operations / PETA for name, _, operations in costs}
    photographs, arms = look.seen(real.prompted), {name: look.seen(images) for name, images in pictures.items()}
    trends = {}
    for name, reference in look.reference.items():
        features = {arm: seen.features[name] for arm, seen in arms.items()}
        trends[name] = _trend_in(reference, photographs.features[name], petaflops, features)
    told = "; ".join(f"{space.description}: {trends[space.name]['told']}" for space in look.spaces)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "curve",
        "title": f"{domain.label}: distance from real images against the compute that trained the generator",
        "domain": config.domain,
        "command": command,
        "default_adapter": None,
        "rows": "arms",
        "arms": [{"name": name, "label": name.replace("_", " ")} for name in petaflops],
        "intervals": f"brackets hold 95 % intervals over images, Δ is the change against the first row; {told}",
        "settings": {
            "split": SPLIT,
            "captions": len(real.captions),
            "real_references": len(real.reference),
            "steps": config.steps,
            "seed": config.seed,
            "guidance_scale": str(config.guidance),
        },
        "trends": trends,
        "measured": {
            name: {
                "folder": config.models[name],
                "weights": weights_digest(read_manifest(Path(config.models[name])).files),
            }
            for name in petaflops
        },
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "figures": [
            figure.as_json()
            for figure in (
                *look.figures(arms, photographs, "Models"),
                cost("petaflops", "Training compute of the generator, PFLOP", petaflops, "Models"),
                cost("images_seen", "Images seen", {name: images for name, images, _ in costs}, "Models"),
            )
        ],
    }


def _trend_in(
    reference: np.ndarray, photographs: np.ndarray, petaflops: Mapping[str, float], features: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """The power law in one space and what it says of the last model, as JSON values; all features (N, D)."""
    measured = [distance_and_halves(features[name], reference) for name in petaflops]
    floor = kernel_distance(photographs, reference)
    near, bound = NEAR * floor.value, f"{NEAR:g} times the distance of real images from real images"
    if floor.value <= 0:
        near, bound = floor.high or 0.0, "the upper end of the interval of real images from real images"
    law = trend([*petaflops.values()], [value for value, _ in measured], np.stack([halves for _, halves in measured]))
    needed = law.petaflops_for(near) if law else None
    newest, compute = list(petaflops.items())[-1]
    if measured[-1][0] <= near:
        told = f"{newest.replace('_', ' ')} lies within {bound}, {near:.3g}"
    elif needed:
        told = f"{bound}, {near:.3g}, would take {needed / compute:.1f} times the compute of {newest.replace('_', ' ')}"
    else:
        told = f"{bound}, {near:.3g}, is not reached, and no slope says where it would be"
    if law:
        interval = "" if law.low is None or law.high is None else f" [{-law.high:.2f}, {-law.low:.2f}]"
        told += f" (distance goes as compute to the power of {-law.exponent:.2f}{interval}, {law.points} points)"
    return {
        "real": floor.as_json(),
        "near": near,
        "bound": bound,
        "law": asdict(law) if law else None,
        "petaflops_needed": needed,
        "told": told,
    }


def main(arguments: list[str]) -> None:
    """`python -m train curve RECIPE [overrides]`."""
    config = parse(arguments, CurveConfig)
    run(config, command=f"python -m train curve {shlex.join(arguments)}")
