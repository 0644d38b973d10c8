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
from torch import nn
from transformers import CLIPVisionModelWithProjection, PreTrainedModel, SegformerForSemanticSegmentation

from medviz.errors import ModelError
from medviz.models.manifest import read_json

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
                parts.append(self.network(as_pixels(images[start : start + batch]).to(device)).float().cpu())
        return torch.cat(parts).numpy()


def as_pixels(images: np.ndarray) -> torch.Tensor:
    """Images uint8 (N, H, W, 3) as float32 (N, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1.0


class BeforeHead:
    """What a classifier's last linear layer is given: its pooled features (B, D).

    `forward` is called with images in [-1, 1] and may do its own resizing and normalising; it must run `model`, in
    which the last linear layer in the order of definition is the head. Raises ModelError where there is none.
    """

    def __init__(self, model: nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        if not layers:
            raise ModelError(f"{type(model).__name__} has no linear layer, so it has no pooled features before one")
        self.head, self.forward = layers[-1], forward

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        hook = self.head.register_forward_pre_hook(lambda _layer, given: seen.append(given[0].detach()))
        try:
            self.forward(images)
        finally:
            hook.remove()
        return seen[-1].flatten(1)


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
    model = _frozen(CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True), device)
    side_px = int(model.config.image_size)

    def network(images: torch.Tensor) -> torch.Tensor:
        return model(pixel_values=resized(images, side_px)).image_embeds

    return FeatureSpace("image_encoder", "image encoder trained on image-caption pairs", network)


def segmenter_space(folder: Path, device: str = "cpu") -> FeatureSpace:
    """The segmenter's encoder, averaged over positions: trained on masks alone, without any label of a prompt."""
    classes = read_json(folder / "classes.json")
    model = _frozen(SegformerForSemanticSegmentation.from_pretrained(folder, use_safetensors=True), device)
    mean = torch.tensor(classes["mean"], device=device).view(1, 3, 1, 1)
    std = torch.tensor(classes["std"], device=device).view(1, 3, 1, 1)

    def network(images: torch.Tensor) -> torch.Tensor:
        given = (resized(images, int(classes["size_px"])) / 2.0 + 0.5 - mean) / std
        return model.segformer(pixel_values=given).last_hidden_state.mean(dim=(2, 3))

    return FeatureSpace("segmenter", "encoder of the anatomy segmenter", network)


def resized(images: torch.Tensor, side_px: int) -> torch.Tensor:
    """Square images (B, 3, H, W) at `side_px`, antialiased when they get smaller."""
    if images.shape[-2:] == (side_px, side_px):
        return images
    return nn.functional.interpolate(images, size=(side_px, side_px), mode="bilinear", antialias=True)


def _frozen(model: PreTrainedModel, device: str) -> PreTrainedModel:
    # In float32 whatever the files hold: transformers keeps what is stored, and a bf16 cosine has two digits.
    return model.to(device, torch.float32).eval().requires_grad_(False)
