"""What a caption names and the generator neglects, drawn more: a slider for one attribute, folded into an adapter.

A concept slider (Gandikota et al. 2023, arXiv 2311.12092, equations 5 to 8): the difference between what the generator
predicts for a caption with the attribute and for the same one without it points to the attribute, and an adapter learns
to go `weight` times as far along it wherever a caption names it. Guidance at that scale would drag the whole picture
along; this moves what the one word means. Everything else it learns to leave as it is, captions without the attribute
and no caption at all among them.

Of the difference only what is finer than its surroundings counts (`surroundings`): hair is lines, and the skin that
hair was seen on in training has a colour of its own, which no caption asks for.

Reinforcement learning cannot do this. It prefers what is drawn already, and where a generator hardly ever draws an
attribute there is nothing to prefer.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from medviz.domains import get_domain
from medviz.domains.base import Domain
from medviz.errors import InputError
from medviz.generation.sampling import encode_prompts
from medviz.models.adapters import ADAPTER_CONFIG_NAME, load_lora, using_adapter
from train import seeding
from train.config import StageConfig, parse
from train.loop import fit
from train.real_latents import RealLatents, RealLatentsConfig, open_real_latents
from train.rl.policy import LoraPolicy
from train.rl.trainer import open_pipeline

STAGE = "slider"
TEACHER = "slider-teacher"
"""What the adapter that is started from is called where it goes on being what it was."""
TRIES = 20
HELD_OUT = -1
"""Number of the batch that only measures; those that are learnt from count from 0."""


@dataclass
class SliderConfig(RealLatentsConfig, StageConfig):
    """Options of the slider stage."""

    base: str = "runs/diffusion-dermatology-gpu/model"
    """Pipeline folder of the generator."""
    start: str = ""
    """Folder of a LoRA adapter of the same shape to go on from, as the one that aligns: what the slider adds is added
    to what it does. Empty: none."""
    adapter: str = "attribute"
    title: str = "Attribute reward"
    head: str = "hair"
    """The attribute, by the name of its head."""
    weight: float = 6.0
    """How many times the difference that the attribute makes is added."""
    interval: tuple[int, int] = (150, 900)
    """Timesteps, lowest and highest, at which it is: above them noise hides lines, below them they are drawn."""
    surroundings: int = 9
    """Side, in latents, of the square over which the mean of the difference is left out; 0: nothing is left out."""
    named: float = 0.5
    """Share of the samples whose caption names the attribute; the others are to stay as they are."""
    caption_dropout: float = 0.2
    """Share of the others that have no caption, so that what guidance starts from stays where it was."""
    batch: int = 8
    rank: int = 16
    lora_alpha: float = 16.0
    lora_convolutions: bool = False
    learning_rate: float = 4e-4
    warmup: int = 20
    average_decay: float = 0.98
    """Of the running average of the adapter, which is exported."""
    measured: int = 64
    """Samples that measure at the end how far the adapter goes along the difference and how much it moves the rest."""
    bf16: bool = False
    """Passes in bf16 by autocast; weights, optimiser and loss stay fp32."""


@dataclass(frozen=True)
class Pair:
    """A caption that names the attribute as people word it, and two prompts that differ in the attribute alone."""

    caption: str
    present: str
    absent: str


def pair_of(domain: Domain, caption: str, head: str) -> Pair | None:
    """The pair of a caption, None where it does not name the attribute of `head`."""
    parsed, wanted = domain.parse(caption), domain.head_values(head)
    if parsed.targets.get(head) != 1.0:
        return None
    without = dict(parsed.values)
    for field, choices in wanted.items():
        named = {choices} if isinstance(choices, str) else set(choices)
        without[field] = tuple(choice for choice in without.get(field, ()) if choice not in named)
    return Pair(
        caption,
        domain.build_prompt({field: choices for field, choices in parsed.values.items() if choices}),
        domain.build_prompt({field: choices for field, choices in without.items() if choices}),
    )


def finer(difference: torch.Tensor, side: int) -> torch.Tensor:
    """`difference` (B, C, h, w) less its mean over the square of `side` latents around each; itself for a side of 0."""
    if not side:
        return difference
    return difference - torch.nn.functional.avg_pool2d(difference, side, 1, side // 2, count_include_pad=False)


@dataclass(frozen=True)
class Batch:
    """noisy (B, C, h, w), timesteps int64 (B,), captions of all B; pairs: of the first samples, which name the
    attribute."""

    noisy: torch.Tensor
    timesteps: torch.Tensor
    captions: tuple[str, ...]
    pairs: tuple[Pair, ...]


def _check(config: SliderConfig) -> None:
    low, high = config.interval
    allowed: list[tuple[str, bool, str]] = [
        ("batch", config.batch >= 2, "at least 2"),
        ("measured", config.measured >= 2, "at least 2"),
        ("rank", config.rank >= 1, "at least 1"),
        ("named", 0 < config.named < 1, "between 0 and 1"),
        ("caption_dropout", 0 <= config.caption_dropout <= 1, "from 0 to 1"),
        ("interval", 0 <= low < high, "two timesteps, 0 <= low < high"),
        ("surroundings", config.surroundings == 0 or config.surroundings % 2 == 1, "0 or an odd number of latents"),
    ]
    for name, fine, wanted in allowed:
        if not fine:
            raise InputError(f"{name} must be {wanted}, found {getattr(config, name)}")


class SliderLearner:
    """Learns the adapter; see `train.loop.Learner`."""

    def __init__(self, config: SliderConfig, pipeline: StableDiffusionPipeline, real: RealLatents) -> None:
        """Raises InputError for an option out of range, and for a split in which no image is known to have the
        attribute."""
        _check(config)
        self.config, self.pipeline, self.real = config, pipeline, real
        self.domain = get_domain(config.domain)
        self.domain.head(config.head)
        labels = [self.domain.labels(record).get(config.head, 0.0) for record in real.split.records]
        self.owners = np.flatnonzero(np.array(labels) >= 0.5)
        if not len(self.owners):
            raise InputError(f"no image of the {real.split.name} split of {config.domain} has {config.head}")
        if config.start:
            load_lora(pipeline.unet, Path(config.start), TEACHER)
        self.policy = LoraPolicy(
            pipeline.unet,
            config.adapter,
            rank=config.rank,
            alpha=config.lora_alpha,
            convolutions=config.lora_convolutions,
            averaged=True,
            seed=config.seed,
        )
        if config.start:
            self.policy.go_on_from(Path(config.start))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
        self.levels = pipeline.scheduler.alphas_cumprod.double()

    def batch(self, step: int, count: int) -> Batch:
        """`count` samples of `step`: real latents noised, every second one that names the attribute another image's
        than the caption's, so that the adapter also learns to draw it where nothing of it is there yet."""
        config, records = self.config, self.real.split.records
        number = step - HELD_OUT  # seeds count from 0
        named = min(count - 1, max(1, round(config.named * count)))
        images = seeding.batch_indices(len(records), count, number, config.seed, STAGE, self.real.weights)
        captions, pairs, clean = [], [], []
        for j, image in enumerate(images):
            rng = random.Random(seeding.key(config.seed, STAGE, "caption", number, j))
            if j < named:
                pair, owner = self._pair(rng)
                pairs.append(pair)
                captions.append(pair.caption)
                image = owner if j % 2 else image
            else:
                dropped = rng.random() < config.caption_dropout
                captions.append("" if dropped else self.domain.caption(records[int(image)], rng))
            clean.append(self.real.latents[rng.randrange(len(self.real.latents)), int(image)])
        latents = torch.stack(clean).float()
        noise = seeding.normal(tuple(latents.shape[1:]), config.seed, f"{STAGE}-noise", number, list(range(count)))
        offset = seeding.numpy_generator(config.seed, STAGE, "timesteps", number)
        low, high = config.interval
        places = np.concatenate(
            [
                low + (high - low) * (np.arange(named) + offset.random()) / named,
                len(self.levels) * (np.arange(count - named) + offset.random()) / (count - named),
            ]
        )
        timesteps = torch.from_numpy(places.astype(np.int64))
        share = self.levels[timesteps].view(-1, 1, 1, 1)
        noisy = (share.sqrt() * latents + (1 - share).sqrt() * noise).float()
        return Batch(noisy, timesteps, tuple(captions), tuple(pairs))

    def _pair(self, rng: random.Random) -> tuple[Pair, int]:
        for _ in range(TRIES):
            owner = int(self.owners[rng.randrange(len(self.owners))])
            pair = pair_of(self.domain, self.domain.caption(self.real.split.records[owner], rng), self.config.head)
            if pair is not None:
                return pair, owner
        raise InputError(f"captions of images with {self.config.head} hardly ever name it")

    def targets(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the adapter started from predicts (B, C, h, w), and what is to be added for the first samples."""
        config, count = self.config, len(batch.pairs)
        with torch.no_grad(), using_adapter(self.pipeline.unet, TEACHER if config.start else None):
            plain = self._predict(batch.noisy, batch.timesteps, batch.captions)
            noisy, timesteps = batch.noisy[:count], batch.timesteps[:count]
            present = self._predict(noisy, timesteps, [pair.present for pair in batch.pairs])
            absent = self._predict(noisy, timesteps, [pair.absent for pair in batch.pairs])
        return plain, config.weight * finer(present - absent, config.surroundings)

    def _predict(self, noisy: torch.Tensor, timesteps: torch.Tensor, captions: Sequence[str]) -> torch.Tensor:
        device = self.pipeline.unet.device
        with torch.no_grad():
            embeds = encode_prompts(self.pipeline, list(captions)).cond
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16):
            return self.pipeline.unet(
                noisy.to(device), timesteps.to(device), encoder_hidden_states=embeds, return_dict=False
            )[0].float()

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup, 1))
        rate *= 0.5 * (1 + np.cos(np.pi * step / config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.batch(step, config.batch)
        plain, added = self.targets(batch)
        target, count = plain.clone(), len(batch.pairs)
        target[:count] += added
        error = (self._predict(batch.noisy, batch.timesteps, batch.captions) - target).square().mean(dim=(1, 2, 3))
        self.optimizer.zero_grad(set_to_none=True)
        error.mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0, error_if_nonfinite=True)
        self.optimizer.step()
        self.policy.average(min(config.average_decay, (step + 1) / (step + 10)))
        return {
            "error/named": error[:count].mean().item(),
            "error/others": error[count:].mean().item(),
            "asked": added.square().mean().item(),
            "grad_norm": norm.item(),
        }

    def measure(self) -> dict[str, float]:
        """On samples that were not learnt from: along, the share of what was to be added that the adapter adds, by
        projection; off, what else it adds to them, and others, what it adds to those that were to stay, both as root
        mean squares in units of what was to be added."""
        batch = self.batch(HELD_OUT, self.config.measured)
        count = len(batch.pairs)
        plain, added = self.targets(batch)
        with torch.no_grad(), self.policy.using(self.policy.behaviour):
            moved = self._predict(batch.noisy, batch.timesteps, batch.captions) - plain
        named, others, asked = moved[:count], moved[count:], added.square().mean()
        along = ((named * added).mean() / asked).item()
        return {
            "along": along,
            "off": ((named - along * added).square().mean() / asked).sqrt().item(),
            "others": (others.square().mean() / asked).sqrt().item(),
            "measured_n": len(batch.captions),
        }

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.policy.weights(self.policy.name),
            "average": self.policy.weights(self.policy.behaviour),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy.set_weights(self.policy.behaviour, state["average"])
        self.policy.set_weights(self.policy.name, state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the averaged adapter and what `measure` finds of it."""
        metrics = {**self.measure(), "trained_parameters": sum(p.numel() for p in self.policy.parameters())}
        self.policy.set_weights(self.policy.name, self.policy.weights(self.policy.behaviour))
        recipe = {name: value for name, value in asdict(self.config).items() if name != "out"}
        details = {"title": self.config.title, "objective": self._objective(), "recipe": recipe, "metrics": metrics}
        self.policy.save(folder, details)
        return metrics

    def _objective(self) -> str:
        """What the model card says the adapter was trained by."""
        mine = f"concept slider ({self.config.head})"
        if not self.config.start:
            return mine
        before = json.loads((Path(self.config.start) / ADAPTER_CONFIG_NAME).read_text(encoding="utf-8"))
        former = before.get("objective") or before.get("recipe", {}).get("objective", "")
        return f"{former}, then {mine}" if former else mine


def main(arguments: list[str]) -> None:
    """`python -m train slider RECIPE [overrides]`."""
    config = parse(arguments, SliderConfig)
    pipeline = open_pipeline(config.base, config.device, config.autoencoder)
    fit(SliderLearner(config, pipeline, open_real_latents(config, pipeline)), config)
