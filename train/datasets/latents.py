"""Latents of a split, encoded once and kept beside the run: what the generator and the RL anchor learn from."""

import hashlib
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch.nn.functional import conv2d, interpolate
from tqdm import tqdm

from medviz.errors import InputError
from train import seeding
from train.datasets.split import Split

Autoencoder: TypeAlias = AutoencoderTiny | AutoencoderKL
SAME = 1e-4
"""Greatest difference of latents that are the same but for rounding, in their standard deviations."""


def dihedral(image: torch.Tensor, element: int) -> torch.Tensor:
    """The image (H, W, 3) turned by `element % 4` quarter turns, then mirrored if `element >= 4`.

    Skin has no up or left; a chest has, so radiology never uses more than element 0.
    """
    turned = torch.rot90(image, element % 4)
    return turned.flip(1) if element >= 4 else turned


def to_pixels(images: np.ndarray | torch.Tensor, device: str | torch.device = "cpu") -> torch.Tensor:
    """uint8 (B, H, W, 3) as float32 (B, 3, H, W) in [-1, 1] on `device`, where the work is done."""
    moved = (torch.from_numpy(np.ascontiguousarray(images)) if isinstance(images, np.ndarray) else images).to(device)
    return moved.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def check_same_encoder(learnt_on: AutoencoderTiny, other: AutoencoderTiny, source: str) -> None:
    """Raises InputError when the encoder of `other`, from the folder `source`, is not in bf16 that of `learnt_on`."""
    ours, theirs = (
        {name: t.to("cpu", torch.bfloat16) for name, t in vae.encoder.state_dict().items()}
        for vae in (learnt_on, other)
    )
    if ours.keys() != theirs.keys() or not all(torch.equal(ours[name], theirs[name]) for name in ours):
        raise InputError(f"the encoder of {source} is not the one that the generator was trained on")


def encode(vae: Autoencoder, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents (B, C, h, w) of pixels (B, 3, H, W) in [-1, 1]; the mode where the autoencoder is variational."""
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return latents * vae.config.scaling_factor


def encoder(vae: Autoencoder) -> Callable[[torch.Tensor], torch.Tensor]:
    """`encode` with `vae`, up to the rounding of floats: as one convolution, where its encoder is no more than that.

    A block-wise component analysis (`train.autoencoder.write_encoder`) is one; its own layers take a hundred times as
    long. Whether an encoder is one is measured on noise.
    """
    widths = getattr(vae.config, "encoder_block_out_channels", None) or vae.config.block_out_channels
    stride = 2 ** (len(widths) - 1)
    with torch.inference_mode():
        noise = torch.randn(1, 3, 8 * stride, 8 * stride, generator=torch.Generator().manual_seed(0))
        impulses = torch.eye(3 * stride**2).reshape(-1, 3, stride, stride)
        nothing, responses = (encode(vae, pixels)[..., 0, 0] for pixels in (torch.zeros_like(impulses[:1]), impulses))
        kernel = (responses - nothing).T.reshape(-1, 3, stride, stride)

    def convolved(pixels: torch.Tensor) -> torch.Tensor:
        return conv2d(pixels.to(kernel), kernel, nothing[0], stride)

    with torch.inference_mode():
        expected, found = encode(vae, noise), convolved(noise)
        same = expected.shape == found.shape and bool((expected - found).abs().max() < SAME * expected.std())
    return convolved if same else lambda pixels: encode(vae, pixels)


def cropped(image: torch.Tensor, share: float, rng: random.Random) -> torch.Tensor:
    """A square of uint8 image (H, H, 3), up to `share` of its side smaller and anywhere in it, at the image's size."""
    side = len(image)
    kept = side - round(rng.uniform(0, share) * side)
    top, left = rng.randint(0, side - kept), rng.randint(0, side - kept)
    part = image[top : top + kept, left : left + kept].permute(2, 0, 1)[None].float()
    resized = interpolate(part, size=(side, side), mode="bicubic", align_corners=False)
    return resized[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def split_latents(
    vae: Autoencoder,
    split: Split,
    size_px: int,
    variants: int,
    seed: int,
    cache: Path,
    batch: int = 32,
    crop: float = 0.0,
) -> torch.Tensor:
    """Latents of every image of a split in `variants` variants, fp16 (variants, N, C, h, w).

    Variant 0 is the image as it is; the others, drawn by image index, are dihedral elements, or with a `crop` above 0
    what `cropped` leaves of it. The file in `cache` is named by everything it depends on, the encoder's weights
    included, so that another autoencoder never finds it; the seed takes no part in one variant and not in its name.
    Raises InputError for a crop outside [0, 1).
    """
    if not 0 <= crop < 1:
        raise InputError(f"crop is {crop}; allowed are 0 <= crop < 1")
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().numpy().tobytes())
    drawn_by = seed if variants > 1 else 0
    digest.update(
        repr((split.domain, split.name, len(split), size_px, variants, drawn_by, vae.config.scaling_factor)).encode()
    )
    if crop:
        digest.update(repr(crop).encode())
    path = cache / f"latents-{split.domain}-{split.name}-{digest.hexdigest()[:16]}.safetensors"
    if path.is_file():
        return load_file(path)["latents"]
    images, encode_fast = split.images(size_px), encoder(vae)
    encoded = []
    with torch.inference_mode(), tqdm(total=variants * len(split), unit="image", desc=f"latents {split.name}") as bar:
        for variant in range(variants):
            for start in range(0, len(images), batch):
                part = torch.from_numpy(images[start : start + batch]).to(vae.device)
                if variant:
                    keys = [seeding.key(seed, "orientation", variant, start + j) for j in range(len(part))]
                    part = torch.stack(
                        [
                            cropped(image, crop, random.Random(key)) if crop else dihedral(image, key % 7 + 1)
                            for image, key in zip(part, keys, strict=True)
                        ]
                    )
                encoded.append(encode_fast(to_pixels(part, vae.device)).half().cpu())
                bar.update(len(part))
    latents = torch.cat(encoded).unflatten(0, (variants, len(images)))
    cache.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".{os.getpid()}-{path.name}")
    save_file({"latents": latents.contiguous()}, writing)
    os.replace(writing, path)
    return latents
