"""The autoencoder both domains share: images to latents and back.

Class: diffusers' AutoencoderTiny, which StableDiffusionPipeline decodes with and which is the fastest on a CPU.

The encoder is not trained: it is the principal component analysis of 8x8 pixel blocks of the training images, written
exactly into the class's strided convolutions. On little compute this beats a learnt encoder by far (a linear decoder
recovers 37 dB from 12 principal components and 32 dB from 12 learnt channels after ten minutes), its latents never
change, so generators stay valid while the decoder learns on, and it costs almost nothing to run.
Components are scaled between raw (power 1) and whitened (power 0): coarse ones keep more variance, so that the noise
of diffusion hides fine structure first, as it does in pixels.

The decoder learns on random crops, which cost a quarter of whole images and, the network being convolutional with a
small field of view, teach the same. Fine lines (hair, ruler ticks, ribs) are kept by an L1 loss on finite differences
at two scales. Noise on the latents teaches it to bear the small errors that a diffusion model makes. He's
initialisation with residual blocks that start as the identity, and many small batches, decide how fast it learns.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.autoencoders.vae import AutoencoderTinyBlock
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from medviz.errors import InputError
from train import seeding
from train.ahead import Ahead
from train.config import StageConfig, parse
from train.datasets.latents import to_pixels
from train.datasets.split import open_split
from train.loop import fit
from train.pipeline_configs import drop_unknown_options

BLOCK_PX = 8
ENCODER_WIDTH = 48  # what a 4x4 block of RGB pixels needs


@dataclass
class AutoencoderConfig(StageConfig):
    """Options of the autoencoder stage."""

    domains: tuple[str, ...] = ("dermatology", "radiology")
    """Whose training images; each domain fills an equal share of a batch."""
    init: str = ""
    """Autoencoder folder to go on from, decoder and all; its encoder stays bit for bit. Empty: from scratch."""
    size_px: int = 128
    """Side of the square image before cropping."""
    crop_px: int = 64
    """Side of the random training crop, a multiple of 8."""
    latent_channels: int = 16
    """Principal components kept, at most 48."""
    component_power: float = 0.5
    """A component of standard deviation s (the first: 1) becomes a latent of s ** power: 1 raw, 0 whitened."""
    latent_std: float = 0.6
    """Standard deviation of the first latent channel: where the decoder's clamp 3 tanh(z / 3) is nearly linear."""
    fit_images: int = 1200
    """Images a domain that the components are computed from."""
    width: int = 48
    """Channels of every convolution of the decoder."""
    decoder_blocks: tuple[int, ...] = (3, 3, 2, 0)
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
    """Standard deviation of the noise added to latents before decoding; latents are about 0.1 to 0.6."""
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


@dataclass(frozen=True)
class Components:
    """Principal components of 8x8 blocks: basis (K, 3, 8, 8) orthonormal, mean (3, 8, 8), std (K,); pixels in 0..1."""

    basis: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor


def principal_components(images: list[np.ndarray], count: int) -> Components:
    """The first `count` components of the 8x8 blocks of images, one uint8 (N, H, W, 3) array a domain."""
    means, moments = [], []
    for domain in images:
        blocks = (
            F.unfold((to_pixels(domain) + 1) / 2, BLOCK_PX, stride=BLOCK_PX)
            .transpose(1, 2)
            .reshape(-1, 3 * BLOCK_PX**2)
        )
        means.append(blocks.double().mean(dim=0))
        moments.append(blocks.T.double() @ blocks.double() / len(blocks))
    mean = torch.stack(means).mean(dim=0)
    values, vectors = torch.linalg.eigh(torch.stack(moments).mean(dim=0) - torch.outer(mean, mean))
    basis = vectors.flip(1)[:, :count].T
    # an eigenvector's sign is arbitrary: the entry largest in size is made positive, so that every machine agrees
    basis = basis * basis.gather(1, basis.abs().argmax(dim=1, keepdim=True)).sign()
    std = values.flip(0)[:count].clamp(min=1e-12).sqrt()
    return Components(
        basis.reshape(count, 3, BLOCK_PX, BLOCK_PX).float(), mean.reshape(3, BLOCK_PX, BLOCK_PX).float(), std.float()
    )


def write_encoder(vae: AutoencoderTiny, components: Components, power: float, latent_std: float) -> None:
    """Make the encoder of `vae` (no residual blocks, 48 channels) compute scaled principal components exactly.

    Each strided convolution gathers a 2x2 neighbourhood into channels; the last of the three projects.
    """
    convolutions = [layer for layer in vae.encoder.layers if isinstance(layer, torch.nn.Conv2d)]
    if len(convolutions) != 5:
        raise InputError(f"the encoder must be five convolutions without residual blocks, found {len(convolutions)}")
    entry, half, quarter, eighth, last = convolutions
    count = len(components.basis)
    gain = latent_std * (components.std / components.std[0]) ** power / components.std
    with torch.no_grad():
        for convolution in convolutions:
            convolution.weight.zero_()
            if convolution.bias is not None:
                convolution.bias.zero_()
        for c in range(3):
            entry.weight[c, c, 1, 1] = 1
        for y in (0, 1):
            for x in (0, 1):
                place = 2 * y + x
                # kernel index 1 is the pixel at twice the output's position, 2 the one after it
                for c in range(3):
                    half.weight[3 * place + c, c, 1 + y, 1 + x] = 1
                for c in range(12):
                    quarter.weight[12 * place + c, c, 1 + y, 1 + x] = 1
                for c in range(48):
                    at_quarter, rest = divmod(c, 12)
                    at_half, colour = divmod(rest, 3)
                    row = 4 * y + 2 * (at_quarter // 2) + at_half // 2
                    column = 4 * x + 2 * (at_quarter % 2) + at_half % 2
                    eighth.weight[:count, c, 1 + y, 1 + x] = components.basis[:, colour, row, column]
        for k in range(count):
            last.weight[k, k, 1, 1] = gain[k]
        last.bias = torch.nn.Parameter(-gain * (components.basis * components.mean).sum(dim=(1, 2, 3)))


def initialise(decoder: torch.nn.Module) -> None:
    """He's initialisation (He et al. 2015, eq. 10), then every residual block starts as the identity."""
    for module in decoder.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for module in decoder.modules():
        if isinstance(module, AutoencoderTinyBlock):
            torch.nn.init.zeros_(module.conv[-1].weight)


class AutoencoderLearner:
    """Learns the decoder of an AutoencoderTiny on crops of the images of several domains."""

    def __init__(self, config: AutoencoderConfig, images: list[np.ndarray]) -> None:
        """images: one uint8 array (N, size, size, 3) a domain."""
        self.config, self.images = config, images
        self.vae = self._vae().to(config.device, memory_format=torch.channels_last).train()
        self.vae.encoder.requires_grad_(False)
        self.parameters = list(self.vae.decoder.parameters())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
        )
        self.schedule = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )
        self.ema = EMAModel(self.parameters, decay=config.ema_decay)
        self.batches = Ahead(self.batch, config.steps, config.workers, config.device)

    def _vae(self) -> AutoencoderTiny:
        config = self.config
        if config.init:
            return AutoencoderTiny.from_pretrained(config.init)
        torch.manual_seed(seeding.key(config.seed, "autoencoder", "weights"))
        vae = AutoencoderTiny(
            encoder_block_out_channels=(ENCODER_WIDTH,) * 4,
            decoder_block_out_channels=(config.width,) * len(config.decoder_blocks),
            num_encoder_blocks=(0, 0, 0, 0),
            num_decoder_blocks=config.decoder_blocks,
            latent_channels=config.latent_channels,
        )
        initialise(vae.decoder)
        shown = [self._shown(images, config.fit_images) for images in self.images]
        write_encoder(
            vae, principal_components(shown, config.latent_channels), config.component_power, config.latent_std
        )
        with torch.inference_mode():
            latents = torch.cat([vae.encode(part).latents for images in shown for part in to_pixels(images).split(32)])
        vae.register_to_config(scaling_factor=1 / latents.std().item())
        return vae

    def _shown(self, images: np.ndarray, count: int) -> np.ndarray:
        """The same `count` whole images of a domain each time, to compute and to measure on."""
        return images[
            seeding.batch_indices(len(images), min(count, len(images)), 0, self.config.seed, "autoencoder-shown")
        ]

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Crops of `step`, uint8 (batch, crop_px, crop_px, 3), and noise for their latents, fp32."""
        config, crops = self.config, self.crops(step, self.config.batch, "autoencoder")
        indices = list(range(step * config.batch, step * config.batch + len(crops)))
        shape = (config.latent_channels, config.crop_px // BLOCK_PX, config.crop_px // BLOCK_PX)
        return torch.from_numpy(crops), seeding.normal(shape, config.seed, "autoencoder-noise", 0, indices)

    def crops(self, step: int, count: int, purpose: str) -> np.ndarray:
        """Turned crops of real images for `purpose`, uint8 (count, crop_px, crop_px, 3), in equal shares from the
        domains: a function of the step."""
        config, crops = self.config, []
        for d, images in enumerate(self.images):
            rng = seeding.numpy_generator(config.seed, purpose, "crop", d, step)
            for i in seeding.batch_indices(len(images), count // len(self.images), step, config.seed, f"{purpose}-{d}"):
                top, left = rng.integers(0, config.size_px - config.crop_px + 1, 2)
                crop = images[i, top : top + config.crop_px, left : left + config.crop_px]
                crop = np.rot90(crop, int(rng.integers(4)))
                crops.append(crop[:, ::-1] if rng.random() < 0.5 else crop)
        return np.stack(crops)

    def update(self, step: int) -> dict[str, float | torch.Tensor]:
        config = self.config
        crops, noise = self.batches(step)
        pixels = to_pixels(crops, config.device).contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            latents = self.vae.encode(pixels).latents
        output = self.vae.decode(latents + config.latent_noise * noise.to(latents)).sample
        pixel, square, edge = (
            (output - pixels).abs().mean(),
            (output - pixels).square().mean(),
            edge_loss(output, pixels),
        )
        loss = pixel + config.square_weight * square + config.edge_weight * edge
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        told = self.beside(step)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.parameters)
        return {"pixel": pixel.detach(), "square": square.detach(), "edge": edge.detach(), "grad_norm": norm} | told

    def beside(self, step: int) -> dict[str, float | torch.Tensor]:
        """Add the gradient of what else the decoder is to learn at `step`: nothing here. Returns figures to log."""
        return {}

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
        """Write the averaged weights as a diffusers folder; return the reconstruction error on training images."""
        self.ema.copy_to(self.parameters)
        self.vae.eval()
        metrics: dict[str, Any] = {
            "parameters": sum(p.numel() for p in self.vae.parameters()),
            "scaling_factor": self.vae.config.scaling_factor,
        }
        for name, images in zip(self.config.domains, self.images, strict=True):
            errors = []
            with torch.inference_mode():
                for part in to_pixels(self._shown(images, 256), self.config.device).split(16):
                    decoded = self.vae.decode(self.vae.encode(part).latents).sample.clamp(-1, 1)
                    errors.append(((decoded - part) / 2).square().mean(dim=(1, 2, 3)))
            metrics[f"psnr_db_train_{name}"] = float((-10 * torch.log10(torch.cat(errors))).mean())
        self.vae.save_pretrained(folder)
        drop_unknown_options(folder)
        return metrics


def main(arguments: list[str]) -> None:
    """`python -m train autoencoder RECIPE [overrides]`."""
    config = parse(arguments, AutoencoderConfig)
    fit(AutoencoderLearner(config, [open_split(d, "train").images(config.size_px) for d in config.domains]), config)
