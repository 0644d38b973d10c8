"""Feature spaces in which images are compared: a name and a function images -> (N, D).

Two stand side by side in every report, because a generator can drift towards what one network likes: the judge's
pooled features, and those of a network that no generator was trained or chosen with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import CLIPVisionModelWithProjection

from medviz.errors import ModelError
from medviz.grounding.anatomy import Segmenter
from medviz.models.networks import load_network
from medviz.rewards.classifier import AttributeClassifier
from train.datasets.latents import to_pixels

Network = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class FeatureSpace:
    """network takes images (B, 3, H, W) in [-1, 1] of any size and returns (B, D); name is a short word for reports."""

    name: str
    description: str
    network: Network

    def embed(self, images: np.ndarray, *, batch: int = 64, device: str = "cpu") -> np.ndarray:
        """Features (N, D) float32 of images uint8 (N, H, W, 3)."""
        parts = []
        with torch.inference_mode():
            for start in range(0, len(images), batch):
                parts.append(self.network(to_pixels(images[start : start + batch]).to(device)).float().cpu())
        return torch.cat(parts).numpy()


def judge_space(judge: AttributeClassifier) -> FeatureSpace:
    """The judge's pooled features, which its head reads."""
    return FeatureSpace("judge", "features of the judge", judge.features)


def independent_space(folder: Path, device: str = "cpu") -> FeatureSpace:
    """The second feature space of a model folder: `features/` where it exists, otherwise the segmenter's encoder.

    Raises ModelError where the folder has neither.
    """
    if (folder / "features" / "config.json").is_file():
        return image_encoder_space(folder / "features", device)
    if (folder / "segmenter" / "config.json").is_file():
        return segmenter_space(folder / "segmenter", device)
    raise ModelError(f"{folder} has neither features/ nor segmenter/: a second feature space needs one of them")


def image_encoder_space(folder: Path, device: str = "cpu") -> FeatureSpace:
    """The embedding of a contrastively trained image encoder, which reads pixels in [-1, 1]."""
    model = load_network(folder, CLIPVisionModelWithProjection, device)
    side_px = int(model.config.image_size)

    def network(images: torch.Tensor) -> torch.Tensor:
        if images.shape[-2:] != (side_px, side_px):
            images = interpolate(images, size=(side_px, side_px), mode="bilinear", antialias=True)
        return model(pixel_values=images).image_embeds

    return FeatureSpace("image_encoder", "features of the image-caption encoder", network)


def segmenter_space(folder: Path, device: str = "cpu") -> FeatureSpace:
    """The segmenter's encoder, averaged over positions: trained on masks alone, without any label of a prompt."""
    segmenter = Segmenter.load(folder, device)

    def network(images: torch.Tensor) -> torch.Tensor:
        found = segmenter.model.segformer(pixel_values=segmenter.prepare(images))
        return found.last_hidden_state.mean(dim=(2, 3))

    return FeatureSpace("segmenter", "features of the anatomy segmenter", network)
