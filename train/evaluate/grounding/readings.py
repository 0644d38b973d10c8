"""Maps that do see the image: the generator's attention to a phrase, and a classifier's Grad-CAM as its rival.

Attention costs minutes, so it is kept on disk batch by batch in a folder named by all that it depends on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from medviz.domains import Domain
from medviz.generation.inversion import attention_on_image
from medviz.grounding.capture import resize
from medviz.grounding.heat_maps import grounding_heat_map, joint_scale
from medviz.grounding.words import content_indices
from medviz.models.adapters import using_adapter
from medviz.results import HeatMap
from medviz.rewards.classifier import AttributeClassifier
from train.datasets.grounded_phrases import PhraseSet
from train.datasets.latents import to_pixels
from train.experiments.pieces import digest, write_arrays

CAM_BATCH = 32


@dataclass(frozen=True)
class Reading:
    """How attention is read from an image noised once to a mid-schedule timestep; see `attention_on_image`.

    seeds: noises whose maps are averaged; blur_sigma_px: of the finished map.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3)
    blur_sigma_px: float = 2.5


def phrase_maps(
    pipeline: StableDiffusionPipeline,
    adapter: str | None,
    phrases: PhraseSet,
    reading: Reading,
    folder: Path,
    weights: Mapping[str, Any],
    *,
    batch: int,
    label: str = "phrases",
) -> np.ndarray:
    """Where every phrase looks in its image: float32 (P, H, W) in [0, 1], `batch` images in a pass of the UNet.

    adapter: loaded on the pipeline, None for the baseline. weights: what names the weights of both. Batches that lie
    in `folder` are read.
    """
    identity = {"weights": dict(weights), "phrases": phrases.digest, "batch": batch, **asdict(reading)}
    place = folder / digest(identity)[:16]
    place.mkdir(parents=True, exist_ok=True)
    (place / "request.json").write_text(json.dumps(identity, indent=1))
    parts = []
    with using_adapter(pipeline.unet, adapter), tqdm(total=len(phrases.phrases), unit="phrase", desc=label) as bar:
        for start in range(0, len(phrases.phrases), batch):
            path = place / f"maps-{start:06d}.npz"
            if not path.is_file():
                write_arrays(path, maps=_read(pipeline, phrases, slice(start, start + batch), reading))
            with np.load(path) as stored:
                parts.append(stored["maps"])
            bar.update(len(parts[-1]))
    return np.concatenate(parts)


def _read(pipeline: StableDiffusionPipeline, phrases: PhraseSet, rows: slice, reading: Reading) -> np.ndarray:
    chosen = phrases.phrases[rows]
    maps = attention_on_image(
        pipeline,
        to_pixels(phrases.images[[each.image for each in chosen]]),
        [each.phrase for each in chosen],
        method="one_step",
        seeds=reading.seeds,
    )
    return np.stack(
        [
            grounding_heat_map(
                maps,
                content_indices(pipeline.tokenizer, each.phrase),
                phrases.size_hw,
                sample=sample,
                blur_sigma_px=reading.blur_sigma_px,
            )
            for sample, each in enumerate(chosen)
        ]
    )


def asked_head(domain: Domain, phrase: str, classifier: AttributeClassifier) -> str | None:
    """The head that answers whether the image shows what a phrase names; None where the classifier has none."""
    asked = [head for head, target in domain.parse(phrase).targets.items() if target == 1.0]
    return next((head for head in asked if head in classifier.heads), None)


def cam_maps(classifier: AttributeClassifier, domain: Domain, phrases: PhraseSet) -> list[HeatMap | None]:
    """Grad-CAM (arXiv 1610.02391) of each phrase's head at the network's last feature map; None without a head."""
    heads = [asked_head(domain, each.phrase, classifier) for each in phrases.phrases]
    found: list[HeatMap | None] = [None] * len(heads)
    asked = [row for row, head in enumerate(heads) if head is not None]
    for start in range(0, len(asked), CAM_BATCH):
        rows = asked[start : start + CAM_BATCH]
        images = to_pixels(phrases.images[[phrases.phrases[row].image for row in rows]])
        outputs = [classifier.heads.index(str(heads[row])) for row in rows]
        for row, heat in zip(rows, grad_cam(classifier, images, outputs), strict=True):
            found[row] = joint_scale(resize(heat, phrases.size_hw).numpy())[0]
    return found


def grad_cam(classifier: AttributeClassifier, images: torch.Tensor, outputs: list[int]) -> torch.Tensor:
    """ReLU of the last feature map's channels, weighted by the mean gradient of output `outputs[i]` of image i.

    images (B, 3, H, W) in [-1, 1]; returns float32 (B, h, w) on the feature map's grid, on the CPU.
    """
    # The weights are frozen: without this no graph would be built.
    pixels = classifier.prepare(images).requires_grad_(True)
    seen = classifier.model(pixel_values=pixels, output_hidden_states=True)
    asked = seen.logits[torch.arange(len(outputs)), outputs].sum()
    (gradient,) = torch.autograd.grad(asked, seen.hidden_states[-1])
    weighted = (gradient.mean(dim=(-1, -2), keepdim=True) * seen.hidden_states[-1]).sum(dim=1)
    return weighted.relu().detach().float().cpu()
