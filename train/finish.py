"""`python -m train finish RECIPE`: a decoder that gives a generator's own pictures the texture of real images.

What a generator draws holds less fine detail than the latents of real images, and what a decoder learns from real
latents by distances is the mean of what might be there: both make pictures smooth. Here the decoder goes on learning
from real images as before, and beside it from latents that the generator drew, which have no image: a discriminator
that sees fine structure alone says how unlike real images their pictures still look (`train.adversary`). Colour and
form are out of its sight, so what a picture shows stays the generator's.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.generation.sampling import sample
from medviz.models.adapters import using_adapter
from medviz.models.manifest import hash_file
from train import seeding
from train.adversary import Adversary
from train.assemble import load_weakened
from train.autoencoder import BLOCK_PX, AutoencoderConfig, AutoencoderLearner
from train.config import GuidedConfig, parse
from train.datasets.latents import check_same_encoder, to_pixels
from train.datasets.split import Split, open_split
from train.loop import fit
from train.rl.trainer import open_pipeline

STAGE = "finish"
ADAPTER = "aligned"
"""What the adapter is called while pictures are drawn with it."""
BLUR_PX = 9
"""Side of the mean that is taken from a picture to leave its texture."""
MEASURED_BATCHES = 64
"""Of drawn crops, that `texture_share` is measured on."""


@dataclass
class FinishConfig(AutoencoderConfig, GuidedConfig):
    """Options of the finish stage: those of the autoencoder stage, whose decoder `init` names, and whose pictures."""

    generator: str = ""
    """Pipeline folder that draws."""
    adapter: str = ""
    """Folder of a LoRA adapter that every second picture is drawn with; empty: none is."""
    adapter_strength: float = 1.0
    """Share of its change that ships."""
    drawn_images: int = 256
    """Pictures that are drawn, once, of captions of training images; they are kept beside the run."""
    drawn_steps: int = 20
    """Solver steps of each."""
    draw_batch: int = 16
    texture_weight: float = 0.02
    """Of the discriminator's opinion, beside the losses on real images."""
    adversary_learning_rate: float = 2e-4
    adversary_penalty: float = 1.0
    """Weight of its gradient penalties."""
    adversary_alone: int = 100
    """First steps, in which it learns and is not yet heeded."""


def texture(images: torch.Tensor) -> torch.Tensor:
    """What is finer than BLUR_PX, (B, 12, H/2, W/2), each cell the four pixels of images (B, 3, H, W)."""
    # Edges are left out of the mean's count, so that no border is told from a texture.
    smooth = F.avg_pool2d(images, BLUR_PX, 1, BLUR_PX // 2, count_include_pad=False)
    return F.pixel_unshuffle(images - smooth, 2)


def draw_latents(config: FinishConfig, pipeline: StableDiffusionPipeline, split: Split, cache: Path) -> torch.Tensor:
    """Latents (N, C, h, w) fp16 of `drawn_images` captions, every second with the adapter where there is one.

    Kept in a file of `cache` that is named by what it depends on.
    """
    domain, count = get_domain(split.domain), config.drawn_images
    rows = seeding.batch_indices(len(split.records), count, 0, config.seed, f"{STAGE}-captions")
    captions = [
        domain.caption(split.records[row], random.Random(seeding.key(config.seed, STAGE, "caption", i)))
        for i, row in enumerate(rows)
    ]
    folders = [folder for folder in (config.generator, config.adapter) if folder]
    weights = [hash_file(path).sha256 for folder in folders for path in sorted(Path(folder).rglob("*.safetensors"))]
    identity = [weights, config.adapter_strength, captions, config.seed, config.drawn_steps, str(config.guidance)]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    path = cache / f"drawn-{split.domain}-{digest[:16]}.safetensors"
    if path.is_file():
        return load_file(path)["latents"]
    if config.adapter:
        load_weakened(pipeline, config.adapter, config.adapter_strength, ADAPTER)
    kinds = (None, ADAPTER) if config.adapter else (None,)
    latents: dict[int, torch.Tensor] = {}
    with tqdm(total=count, unit="image", desc="drawing") as bar:
        for number, kind in enumerate(kinds):
            mine = range(number, count, len(kinds))
            for start in range(0, len(mine), config.draw_batch):
                part = list(mine[start : start + config.draw_batch])
                seeds = [seeding.key(config.seed, STAGE, "noise", i) for i in part]
                with using_adapter(pipeline.unet, kind):
                    drawn = sample(
                        pipeline,
                        [captions[i] for i in part],
                        seeds,
                        steps=config.drawn_steps,
                        guidance_scale=config.guidance,
                    )
                latents |= dict(zip(part, drawn.half().cpu(), strict=True))
                bar.update(len(part))
    made = torch.stack([latents[i] for i in range(count)])
    cache.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing-{path.name}")
    save_file({"latents": made}, writing)
    os.replace(writing, path)
    return made


class FinishLearner(AutoencoderLearner):
    """Learns the decoder on crops of real images and of latents that were drawn."""

    def __init__(self, config: FinishConfig, images: np.ndarray, drawn: torch.Tensor) -> None:
        """images: uint8 (M, size, size, 3), the domain's training images; drawn: latents (N, C, h, w) of a generator.

        Raises InputError without `init`, and for latents that are smaller than a crop.
        """
        if not config.init:
            raise InputError("init must name the autoencoder whose decoder is to be finished")
        self.options, self.cells = config, config.crop_px // BLOCK_PX
        if min(drawn.shape[-2:]) < self.cells:
            raise InputError(f"crop_px is {config.crop_px}; what was drawn has {drawn.shape[-1] * BLOCK_PX} px a side")
        super().__init__(config, [images])
        self.drawn = drawn / self.vae.config.scaling_factor
        self.adversary = Adversary(
            self._real_texture,
            seed=config.seed,
            device=config.device,
            learning_rate=config.adversary_learning_rate,
            penalty=config.adversary_penalty,
        )

    def _real_texture(self, step: int, count: int) -> torch.Tensor:
        return texture(to_pixels(self.crops(step, count, STAGE)))

    def drawn_crops(self, step: int) -> torch.Tensor:
        """Crops (batch, C, h, w) of drawn latents, as the decoder takes them: a function of the step."""
        config, cells = self.options, self.cells
        rng = seeding.numpy_generator(config.seed, STAGE, "drawn-crop", step)
        rows = seeding.batch_indices(len(self.drawn), config.batch, step, config.seed, f"{STAGE}-drawn")
        corners = rng.integers(0, np.subtract(self.drawn.shape[-2:], cells) + 1, (config.batch, 2))
        return torch.stack(
            [self.drawn[i, :, y : y + cells, x : x + cells] for i, (y, x) in zip(rows, corners, strict=True)]
        ).float()

    def beside(self, step: int) -> dict[str, float | torch.Tensor]:
        config = self.options
        crops = self.drawn_crops(step).to(config.device, memory_format=torch.channels_last)
        pictured = texture(self.vae.decode(crops).sample)
        if step >= config.adversary_alone:
            (config.texture_weight * self.adversary.loss(pictured, step)).backward()
        return dict(self.adversary.update(pictured, step))

    def state(self) -> dict[str, Any]:
        return super().state() | {"adversary": self.adversary.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.adversary.load_state(state["adversary"])

    def export(self, folder: Path) -> dict[str, Any]:
        """As that of the autoencoder stage; beside it what share of real fine structure drawn pictures have."""
        metrics = super().export(folder)
        with torch.inference_mode():
            drawn = torch.cat(
                [
                    texture(self.vae.decode(self.drawn_crops(i).to(self.options.device)).sample)
                    for i in range(MEASURED_BATCHES)
                ]
            )
        real = self._real_texture(0, len(drawn)).to(drawn)
        return metrics | {"texture_share": (_strength(drawn) / _strength(real)).item()}


def _strength(textures: torch.Tensor) -> torch.Tensor:
    """Geometric mean over crops of the root mean square of their textures (B, 12, h, w)."""
    return textures.square().mean(dim=(1, 2, 3)).clamp(min=1e-12).sqrt().log().mean().exp()


def main(arguments: list[str]) -> None:
    """`python -m train finish RECIPE [overrides]`."""
    config = parse(arguments, FinishConfig)
    if len(config.domains) != 1:
        raise InputError(f"a generator draws one domain; name it alone, found {', '.join(config.domains)}")
    split = open_split(config.domains[0], "train")
    pipeline = open_pipeline(config.generator, config.device)
    drawn = draw_latents(config, pipeline, split, Path(config.out).parent)
    learner = FinishLearner(config, split.images(config.size_px), drawn)
    check_same_encoder(pipeline.vae, learner.vae, config.init)
    fit(learner, config)
