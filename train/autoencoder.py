"""The autoencoder both domains share: images to latents and back.

Architecture: diffusers' AutoencoderTiny (convolutions and ReLU, no normalisation: the fastest class on a CPU that
StableDiffusionPipeline decodes with). Trained on random crops, which costs a quarter of whole images a step and, the
network being convolutional with a small field of view, teaches the same thing. What keeps fine lines (hair, ruler
ticks, ribs): an L1 loss on finite differences at two scales beside the L1 on pixels. Noise on the latents and a weak
penalty on their size take the place of a variational bound: the decoder learns to bear the small errors that a
diffusion model makes.

Two things that decide how fast it learns on little compute: He's initialisation with residual blocks that start as
the identity (the class's default shrinks the signal at every layer), and many small batches (a crop of 64 px already
holds 4,096 targets).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers.models.autoencoders.vae import AutoencoderTinyBlock

from train import seeding
from train.config import StageConfig, read_recipe
from train.datasets.split import open_split
from train.loop import fit


@dataclass
class AutoencoderConfig(StageConfig):
    """Options of the autoencoder stage."""

    domains: tuple[str, ...] = ("dermatology", "radiology")
    """Whose training images; each domain fills an equal share of a batch."""
    size_px: int = 128
    """Side of the square image before cropping."""
    crop_px: int = 64
    """Side of the random training crop, a multiple of 8."""
    latent_channels: int = 12
    width: int = 48
    """Channels of every convolution."""
    encoder_blocks: tuple[int, ...] = (0, 1, 2, 2)
    """Residual blocks at 1/1, 1/2, 1/4, 1/8 of the side."""
    decoder_blocks: tuple[int, ...] = (3, 2, 1, 0)
    """Residual blocks at 1/8, 1/4, 1/2, 1/1 of the side."""
    batch: int = 4
    """Crops a step."""
    learning_rate: float = 7e-4
    warmup: int = 100
    """Steps of linear warm-up, then cosine to zero."""
    square_weight: float = 5.0
    """Weight of the squared error, which is what keeps the colour of large areas."""
    edge_weight: float = 0.5
    """Weight of the finite-difference loss."""
    latent_noise: float = 0.02
    """Standard deviation of the noise added to latents before decoding (latents are about unit size). It bounds what a
    latent can carry: at 0.1 colour and hair were lost."""
    latent_penalty: float = 1e-4
    """Weight of the mean square of the latents."""
    ema_decay: float = 0.999


def edge_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical finite differences at full and half resolution.

    output, target: (B, 3, H, W). A scalar.
    """
    loss = output.new_zeros(())
    for _ in range(2):
        for axis in (-1, -2):
            loss = loss + (output.diff(dim=axis) - target.diff(dim=axis)).abs().mean()
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def initialise(vae: AutoencoderTiny) -> None:
    """He's initialisation (He et al. 2015, eq. 10), then every residual block starts as the identity."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, AutoencoderTinyBlock):
            torch.nn.init.zeros_(module.conv[-1].weight)


class AutoencoderLearner:
    """Learns an AutoencoderTiny on crops of the images of several domains."""

    def __init__(self, config: AutoencoderConfig, images: list[np.ndarray]) -> None:
        """images: one uint8 array (N, size, size, 3) a domain."""
        self.config, self.images = config, images
        torch.manual_seed(seeding.key(config.seed, "autoencoder", "weights"))
        widths = (config.width,) * len(config.encoder_blocks)
        self.vae = AutoencoderTiny(
            encoder_block_out_channels=widths,
            decoder_block_out_channels=widths,
            num_encoder_blocks=config.encoder_blocks,
            num_decoder_blocks=config.decoder_blocks,
            latent_channels=config.latent_channels,
        )
        initialise(self.vae)
        self.vae.to(config.device, memory_format=torch.channels_last).train()
        self.optimizer = torch.optim.AdamW(self.vae.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.schedule = get_scheduler("cosine", self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps)
        self.ema = EMAModel(self.vae.parameters(), decay=config.ema_decay)

    def batch(self, step: int) -> torch.Tensor:
        """Crops of `step`, float32 (batch, 3, crop_px, crop_px) in [-1, 1], in equal shares from the domains."""
        config, crops = self.config, []
        share = config.batch // len(self.images)
        for d, images in enumerate(self.images):
            rng = seeding.numpy_generator(config.seed, "autoencoder", "crop", d, step)
            for i in seeding.batch_indices(len(images), share, step, config.seed, f"autoencoder-{d}"):
                top, left = rng.integers(0, config.size_px - config.crop_px + 1, 2)
                crop = images[i, top : top + config.crop_px, left : left + config.crop_px]
                crop = np.rot90(crop, rng.integers(4))
                crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        pixels = torch.from_numpy(np.stack(crops).transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1)
        return pixels.to(config.device).contiguous(memory_format=torch.channels_last)

    def update(self, step: int) -> dict[str, float]:
        config, pixels = self.config, self.batch(step)
        latents = self.vae.encode(pixels).latents
        indices = list(range(len(latents)))
        noise = seeding.normal(tuple(latents.shape[1:]), config.seed, "autoencoder-noise", step, indices)
        output = self.vae.decode(latents + config.latent_noise * noise.to(latents)).sample
        pixel, square, edge = (output - pixels).abs().mean(), (output - pixels).square().mean(), edge_loss(output, pixels)
        penalty = latents.square().mean()
        loss = pixel + config.square_weight * square + config.edge_weight * edge + config.latent_penalty * penalty
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.vae.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.vae.parameters())
        return {"pixel": pixel.item(), "square": square.item(), "edge": edge.item(), "latent_ms": penalty.item(), "grad_norm": norm.item()}

    def state(self) -> dict[str, Any]:
        return {
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load_state_dict(state["ema"])

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the averaged weights, with the scaling factor that gives latents unit variance, as a diffusers folder."""
        self.ema.copy_to(self.vae.parameters())
        self.vae.eval()
        metrics: dict[str, Any] = {"parameters": sum(p.numel() for p in self.vae.parameters())}
        latents = []
        for name, images in zip(self.config.domains, self.images, strict=True):
            chosen = seeding.batch_indices(len(images), min(256, len(images)), 0, self.config.seed, "autoencoder-export")
            pixels = torch.from_numpy(images[chosen].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1).to(self.config.device)
            mine, errors = [], []
            with torch.inference_mode():
                for part in pixels.split(16):
                    mine.append(self.vae.encode(part).latents)
                    decoded = self.vae.decode(mine[-1]).sample.clamp(-1, 1)
                    errors.append(((decoded - part) / 2).square().mean(dim=(1, 2, 3)))
            metrics[f"psnr_db_train_{name}"] = float((-10 * torch.log10(torch.cat(errors))).mean())
            latents.append(torch.cat(mine))
        std = torch.cat(latents).std().item()
        metrics["latent_std"] = std
        self.vae.register_to_config(scaling_factor=1.0 / std)
        self.vae.save_pretrained(folder)
        return metrics


def main(arguments: list[str]) -> None:
    """`python -m train autoencoder RECIPE [overrides]`."""
    config = read_recipe(arguments[0], AutoencoderConfig, arguments[1:])
    fit(AutoencoderLearner(config, [open_split(d, "train").images(config.size_px) for d in config.domains]), config)
