"""A generator that draws in a few steps what it draws in many: an adapter that learns its own trajectories.

Progressive distillation (Salimans and Ho 2022, arXiv 2202.00512, section 3) in one stage and with guidance folded in
(Meng et al. 2023, arXiv 2210.03142). The teacher is the generator itself at its own guidance and number of steps. The
student is a LoRA adapter on it that takes one deterministic step, of one unguided pass, where the teacher takes several
of two. It starts each step where its own last one ended, and learns to arrive where the teacher was: so a later step
mends what an earlier one missed, and one noise gives nearly the teacher's picture.

Captions of invented records and noise make the teacher's trajectories; real images are seen by the adversary alone,
where there is one (`train.adversary`).
"""

import hashlib
import json
import os
import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.generation.plan import FewSteps, fresh_scheduler
from medviz.generation.prompts import encode_prompts
from medviz.generation.sampling import decode, sample, signal_and_noise_level, split_prediction
from medviz.models.adapters import using_adapter
from medviz.models.manifest import hash_file
from train import seeding
from train.adversary import Adversary, shown_latents
from train.assemble import load_weakened
from train.compiling import compiled_forward
from train.config import GuidedConfig, parse
from train.evaluate.statistics import mean_interval
from train.loop import fit
from train.real_latents import RealLatentsConfig, open_real_latents
from train.rl.policy import LoraPolicy
from train.rl.trainer import open_pipeline

STAGE = "distil"
BESIDE = "beside"
"""What the adapter that the student must go with is called while it learns."""


@dataclass
class DistilConfig(RealLatentsConfig, GuidedConfig):
    """Options of the distil stage. Guidance is the teacher's, and becomes the student's own. Real latents are read for
    the adversary alone."""

    base: str = "runs/longer-dermatology-cpu/model"
    """Pipeline folder: teacher and, with the adapter, student."""
    beside: str = ""
    """Folder of a LoRA adapter that the student must go with, as the one that aligns: every second step is learnt with
    it on, from trajectories that were drawn with it on. Empty: none."""
    beside_strength: float = 1.0
    """Share of its change that ships."""
    start: str = ""
    """Folder of an adapter of the same shape to go on from; empty: none."""
    adapter: str = "few_steps"
    title: str = "In few steps"
    teacher_steps: int = 20
    starts: tuple[int, ...] = (0, 6, 11, 15)
    """Steps of the teacher, from 0, at which the student's begin."""
    trajectories: int = 4096
    """The teacher's, drawn once and kept beside the run."""
    held_out: int = 64
    """Trajectories beyond those that only measure."""
    draw_batch: int = 32
    batch: int = 32
    """Trajectories a step of the optimiser."""
    rank: int = 32
    lora_alpha: float = 32.0
    lora_convolutions: bool = True
    learning_rate: float = 5e-4
    warmup: int = 100
    average_decay: float = 0.995
    """Of the running average of the adapter, which is exported."""
    adversarial_weight: float = 0.0
    """Of a discriminator's opinion of what is finished, beside the distance from the teacher; 0: none."""
    adversary_learning_rate: float = 2e-4
    adversary_penalty: float = 1.0
    """Weight of its gradient penalties."""
    adversary_alone: int = 200
    """First steps, in which it learns and is not yet heeded."""
    bf16: bool = False
    """Teacher's and student's passes in bf16 by autocast; weights, optimiser and losses stay fp32."""
    compile: bool = False
    """Compile the UNet, for minutes at first: see `train.compiling`."""


@dataclass(frozen=True)
class Trajectories:
    """states (N, S + 1, C, h, w) fp16: the teacher's latents where the student's S steps begin, and finished ones.
    captions: of each."""

    states: torch.Tensor
    captions: tuple[str, ...]


def student_timesteps(config: DistilConfig, pipeline: StableDiffusionPipeline) -> list[int]:
    """Timesteps at which the student's steps begin. Raises InputError for steps that the teacher does not have."""
    starts = list(config.starts)
    if not starts or starts[0] != 0 or starts != sorted(set(starts)) or starts[-1] >= config.teacher_steps:
        raise InputError(f"starts must rise from 0 and stay below {config.teacher_steps} teacher steps, found {starts}")
    scheduler = fresh_scheduler(pipeline)
    scheduler.set_timesteps(config.teacher_steps)
    return [int(scheduler.timesteps[i]) for i in starts]


def _check(config: DistilConfig) -> None:
    for name, least in (("trajectories", 1), ("held_out", 2), ("batch", 1), ("draw_batch", 1), ("rank", 1)):
        if getattr(config, name) < least:
            raise InputError(f"{name} must be at least {least}, found {getattr(config, name)}")
    for name in ("adversarial_weight", "adversary_penalty", "adversary_alone"):
        if not getattr(config, name) >= 0:
            raise InputError(f"{name} must be at least 0, found {getattr(config, name)}")


def captions_of(config: DistilConfig, count: int) -> tuple[str, ...]:
    """A caption of an invented record for each of `count` trajectories; the domain's fixed prompts are among them."""
    domain, found = get_domain(config.domain), []
    fixed = domain.validation_prompts()
    for i in range(count):
        rng = random.Random(seeding.key(config.seed, STAGE, "caption", i))
        found.append(rng.choice(fixed) if rng.random() < 0.2 else domain.caption(domain.invented_record(rng), rng))
    return tuple(found)


def draw_trajectories(
    config: DistilConfig, pipeline: StableDiffusionPipeline, cache: Path, beside: bool = False
) -> Trajectories:
    """The teacher's trajectories, those that are held out last, drawn with the adapter BESIDE on or with none. Parts
    that a stopped run has drawn are read again.

    Their folder in `cache` is named by everything they depend on.
    """
    count = config.trajectories + config.held_out
    captions = captions_of(config, count)
    weights = sorted(Path(config.base).rglob("*.safetensors"))
    drawn = ("domain", "seed", "teacher_steps", "starts", "trajectories", "held_out", "draw_batch", "bf16")
    identity: list[Any] = [
        {name: getattr(config, name) for name in drawn},
        str(config.guidance),
        [hash_file(path).sha256 for path in weights],
    ]
    if beside:
        changed = [hash_file(path).sha256 for path in sorted(Path(config.beside).glob("*.safetensors"))]
        identity.append([changed, config.beside_strength])
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    folder = cache / f"trajectories-{config.domain}-{digest[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    with tqdm(total=count, unit="image", desc="teacher") as bar:
        for start in range(0, count, config.draw_batch):
            path = folder / f"states-{start:06d}.safetensors"
            rows = range(start, min(start + config.draw_batch, count))
            if not path.is_file():
                low = torch.autocast(pipeline.unet.device.type, torch.bfloat16, enabled=config.bf16)
                with using_adapter(pipeline.unet, BESIDE if beside else None), low:
                    states = _draw(config, pipeline, [captions[i] for i in rows], list(rows))
                writing = path.with_name(f".writing-{path.name}")
                save_file({"states": states}, writing)
                os.replace(writing, path)
            parts.append(load_file(path)["states"])
            bar.update(len(rows))
    return Trajectories(torch.cat(parts), captions)


def _draw(
    config: DistilConfig, pipeline: StableDiffusionPipeline, captions: list[str], numbers: list[int]
) -> torch.Tensor:
    trail: list[torch.Tensor] = []
    seeds = [seeding.key(config.seed, STAGE, "noise", i) for i in numbers]
    finished = sample(
        pipeline, captions, seeds, steps=config.teacher_steps, guidance_scale=config.guidance, trail=trail
    )
    return torch.stack([*(trail[i] for i in config.starts), finished.cpu()], dim=1).half().contiguous()


class DistilLearner:
    """Learns the adapter; see `train.loop.Learner`."""

    def __init__(self, config: DistilConfig, pipeline: StableDiffusionPipeline, cache: Path) -> None:
        _check(config)
        self.config, self.pipeline = config, pipeline
        self.timesteps = student_timesteps(config, pipeline)
        self.few_steps = FewSteps(config.adapter, tuple(self.timesteps))
        self.beside = (None, BESIDE) if config.beside else (None,)
        if config.beside:
            load_weakened(pipeline, config.beside, config.beside_strength, BESIDE)
        drawn = [draw_trajectories(config, pipeline, cache, beside=name is not None) for name in self.beside]
        self.states, self.captions = torch.stack([each.states for each in drawn]), drawn[0].captions
        texts = list(dict.fromkeys(self.captions))
        self.embeds = torch.cat([encode_prompts(pipeline, texts[i : i + 64]).cond for i in range(0, len(texts), 64)])
        row = {text: number for number, text in enumerate(texts)}
        self.text_of = torch.tensor([row[caption] for caption in self.captions])
        pipeline.vae.requires_grad_(False)
        self.policy = LoraPolicy(
            pipeline.unet,
            config.adapter,
            rank=config.rank,
            alpha=config.lora_alpha,
            convolutions=config.lora_convolutions,
            averaged=True,
            folded=not config.bf16,
            seed=config.seed,
        )
        if config.start:
            self.policy.go_on_from(Path(config.start))
        # For passes of training alone: those that measure are few, of other shapes, and each would be compiled anew.
        self.predict = compiled_forward(pipeline.unet) if config.compile else pipeline.unet
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
        self.adversary = self._adversary()
        levels = [signal_and_noise_level(pipeline.scheduler, t) for t in self.timesteps]
        self.levels = [(float(signal), float(noise)) for signal, noise in levels] + [(1.0, 0.0)]

    def _adversary(self) -> Adversary | None:
        config = self.config
        if not config.adversarial_weight:
            return None
        real = open_real_latents(config, self.pipeline)
        return Adversary(
            shown_latents(real.latents, real.weights, config.seed),
            seed=config.seed,
            device=config.device,
            learning_rate=config.adversary_learning_rate,
            penalty=config.adversary_penalty,
        )

    def update(self, step: int) -> dict[str, float]:
        config = self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup, 1))
        rate *= 0.5 * (1 + np.cos(np.pi * step / config.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        rows = torch.from_numpy(seeding.batch_indices(config.trajectories, config.batch, step, config.seed, STAGE))
        self.optimizer.zero_grad(set_to_none=True)
        errors = []
        kind = step % len(self.beside)
        states = self.states[kind, rows].float().to(config.device)
        latents = states[:, 0]
        with using_adapter(self.pipeline.unet, self.policy.name, self.beside[kind]):
            for number in range(len(self.timesteps)):
                arrived = self._step(number, latents, rows)
                error = self._error(number, arrived, states)
                loss = error.mean() / len(self.timesteps)
                if self.adversary and number + 1 == len(self.timesteps) and step >= config.adversary_alone:
                    loss = loss + config.adversarial_weight * self.adversary.loss(arrived, step)
                loss.backward()
                errors.append(error.mean().item())
                latents = arrived.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        self.optimizer.step()
        self.policy.average(min(config.average_decay, (step + 1) / (step + 10)))
        told = self.adversary.update(latents, step) if self.adversary else {}
        by_step = {f"error/t{t:04d}": error for t, error in zip(self.timesteps, errors, strict=True)}
        return {"loss": float(np.mean(errors)), "grad_norm": norm.item(), **by_step, **told}

    def _step(self, number: int, latents: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Where the student's step `number` takes `latents` (B, C, h, w): one pass, one DDIM step without noise."""
        embeds = self.embeds[self.text_of[rows]].to(latents.device)
        timestep = torch.full((len(rows),), self.timesteps[number], device=latents.device)
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=self.config.bf16):
            prediction = self.predict(latents, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        seen = split_prediction(self.pipeline.scheduler, prediction.float(), latents, float(self.timesteps[number]))
        signal, noise = self.levels[number + 1]
        return signal * seen.x0 + noise * seen.noise

    def _error(self, number: int, arrived: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Mean squared distance (B,) from the teacher's latents of `states` (B, S + 1, C, h, w), in units of their
        signal.

        A miss of the clean latents by one step is then a miss by as much or less, however noisy the step ends.
        """
        return ((arrived - states[:, number + 1]) / self.levels[number + 1][0]).square().mean(dim=(1, 2, 3))

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.policy.weights(self.policy.name),
            "average": self.policy.weights(self.policy.behaviour),
            "optimizer": self.optimizer.state_dict(),
            **({"adversary": self.adversary.state()} if self.adversary else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy.set_weights(self.policy.behaviour, state["average"])
        self.policy.set_weights(self.policy.name, state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.adversary:
            self.adversary.load_state(state["adversary"])

    def held_out_errors(self) -> dict[str, np.ndarray]:
        """Root mean squared distance (H,) of pixels in [0, 255] from the teacher's pictures of held-out noises.

        student: of the adapter in its few steps; solver: of the generator without it, by its own solver in as many;
        student_beside, solver_beside: the same with the adapter on that the student must go with.
        """
        config, rows = self.config, torch.arange(self.config.trajectories, len(self.captions))
        averaged = replace(self.few_steps, adapter=self.policy.behaviour)
        found: dict[str, list[np.ndarray]] = {}
        for states, beside in zip(self.states, self.beside, strict=True):
            ending = "" if beside is None else f"_{BESIDE}"
            for start in range(0, len(rows), config.draw_batch):
                part = rows[start : start + config.draw_batch]
                teacher = decode(self.pipeline, states[part, -1].float())
                captions = [self.captions[i] for i in part]
                seeds = [seeding.key(config.seed, STAGE, "noise", int(i)) for i in part]
                with using_adapter(self.pipeline.unet, beside):
                    student = sample(self.pipeline, captions, seeds, few_steps=averaged)
                    solver = sample(
                        self.pipeline, captions, seeds, steps=len(self.timesteps), guidance_scale=config.guidance
                    )
                for name, latents in (("student", student), ("solver", solver)):
                    apart = (decode(self.pipeline, latents) - teacher) * 127.5
                    pixels = apart.square().mean(dim=(1, 2, 3)).sqrt().cpu().numpy()
                    found.setdefault(name + ending, []).append(pixels)
        return {name: np.concatenate(parts) for name, parts in found.items()}

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the averaged adapter and how far its pictures are from the teacher's."""
        errors = {name: mean_interval(values).as_json() for name, values in self.held_out_errors().items()}
        metrics = {
            "rmse_from_teacher": errors,
            "unet_passes": {"student": len(self.timesteps), "teacher": 2 * self.config.teacher_steps},
            "trained_parameters": sum(p.numel() for p in self.policy.parameters()),
        }
        self.policy.set_weights(self.policy.name, self.policy.weights(self.policy.behaviour))
        recipe = {name: value for name, value in asdict(self.config).items() if name != "out"}
        details = {"title": self.config.title, "timesteps": self.timesteps, "recipe": recipe, "metrics": metrics}
        self.policy.save(folder, details)
        return metrics


def main(arguments: list[str]) -> None:
    """`python -m train distil RECIPE [overrides]`."""
    config = parse(arguments, DistilConfig)
    pipeline = open_pipeline(config.base, config.device, config.autoencoder)
    fit(DistilLearner(config, pipeline, Path(config.out).parent), config)
