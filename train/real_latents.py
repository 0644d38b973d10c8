"""Latents of real training images, drawn as the diffusion stage draws them: what drawn ones are held against."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from train.datasets.latents import split_latents
from train.datasets.split import Split, open_split
from train.datasets.weights import sample_weights


@dataclass
class RealLatentsConfig:
    """Options of a stage that looks at real latents, which the diffusion recipe has too."""

    domain: str = "dermatology"
    autoencoder: str = ""
    """Folder of the autoencoder that reads real images and draws pictures, its encoder the one that the generator
    learnt on; empty: the pipeline's own."""
    latents: str = "runs/latents"
    """Folder in which latents are kept; those of the diffusion stage with the same autoencoder are found there."""
    latents_seed: int = 0
    """Seed of the diffusion run whose latents these are."""
    size_px: int = 128
    """Side of the images the latents were made of."""
    orientations: int = 1
    """Orientations of each real image, as in the diffusion recipe."""
    source_shares: tuple[str, ...] = ()
    """SOURCE=SHARE of the real images, as in the diffusion recipe."""
    rarity_power: float = 0.5
    """How much rare labels are favoured among the real images, as in the diffusion recipe."""
    label_shares: tuple[str, ...] = ()
    """LABEL=SHARE of the real images, as in the diffusion recipe."""


@dataclass(frozen=True)
class RealLatents:
    """latents (V, N, C, h, w) fp16 of the N images of `split` in V orientations; weights (N,): how often each."""

    latents: torch.Tensor
    weights: np.ndarray
    split: Split


def open_real_latents(config: RealLatentsConfig, pipeline: StableDiffusionPipeline) -> RealLatents:
    """Those of the domain's training images, encoded now unless they were before."""
    split = open_split(config.domain, "train")
    vae = AutoencoderTiny.from_pretrained(config.autoencoder).eval() if config.autoencoder else pipeline.vae
    vae = vae.to(pipeline.device)  # where encoding takes seconds and not minutes
    latents = split_latents(vae, split, config.size_px, config.orientations, config.latents_seed, Path(config.latents))
    weights = sample_weights(split, config.source_shares, config.rarity_power, config.label_shares)
    return RealLatents(latents, weights, split)
