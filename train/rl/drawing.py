"""The images of an epoch and of an evaluation, as the policy draws them."""

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from medviz.generation.sampling import decode, sample
from train import processes, seeding
from train.rl.log_prob import DdimSchedule, deterministic_schedule, stochastic_schedule
from train.rl.objectives import get_objective
from train.rl.policy import LoraPolicy
from train.rl.prompts import PromptTable
from train.rl.recipe import RlConfig
from train.rl.rollout import Rollout, latent_seeds, roll_out


def open_schedule(config: RlConfig, pipeline: StableDiffusionPipeline) -> DdimSchedule | None:
    """The DDIM chain that the recipe's objective replays: random, deterministic for draft, or None where the shipped
    solver draws the images. Raises as :func:`stochastic_schedule`."""
    replays = get_objective(config.objective).replays
    if replays == "forward":
        return None
    spaced = {**pipeline.scheduler.config, "timestep_spacing": config.timestep_spacing, "steps_offset": 1}
    if replays == "direct":
        return deterministic_schedule(spaced, config.rollout_steps)
    return stochastic_schedule(spaced, config.rollout_steps)


class Drawing:
    """Draws latents and images by the behaviour adapter; a function of (seed, epoch, image number).

    Several processes draw their shares of the latents and hand them to each other.
    """

    def __init__(
        self,
        config: RlConfig,
        pipeline: StableDiffusionPipeline,
        policy: LoraPolicy,
        table: PromptTable,
        schedule: DdimSchedule | None,
    ) -> None:
        """schedule: see :func:`open_schedule`."""
        self.config, self.pipeline, self.policy, self.table = config, pipeline, policy, table
        self.schedule = schedule

    def rollout(self, epoch: int) -> Rollout:
        """The images of `epoch`: images_per_prompt of each of prompts_per_epoch prompts."""
        config, unet = self.config, self.pipeline.unet
        chosen = seeding.batch_indices(
            len(self.table.prompts), config.prompts_per_epoch, epoch, config.seed, "rl-prompts"
        )
        prompt_ids = np.repeat(chosen, config.images_per_prompt)
        indices = range(len(prompt_ids))
        schedule = self.schedule_of(epoch)
        with self.policy.using(self.policy.behaviour):
            if schedule is not None:
                mine = processes.share(len(indices))
                part = roll_out(
                    unet,
                    self.table,
                    prompt_ids[mine],
                    mine.tolist(),
                    schedule,
                    guidance_scale=config.guidance,
                    seed=config.seed,
                    epoch=epoch,
                    batch=config.rollout_batch,
                )
                return part.gathered(prompt_ids)
            seeds = latent_seeds(config.seed, "rl-latents", epoch, indices)
            latents = self.sample(self.table, prompt_ids, seeds, config.rollout_steps)
        return Rollout(prompt_ids, tuple(indices), latents)

    def schedule_of(self, epoch: int) -> DdimSchedule | None:
        """The chain of `epoch`, its random steps those of the window, at a place drawn for the epoch."""
        if self.schedule is None or not self.config.window:
            return self.schedule
        rng = seeding.numpy_generator(self.config.seed, "rl-window-start", epoch)
        start = int(rng.integers(0, len(self.schedule) - self.config.window, endpoint=True))
        return self.schedule.windowed(start, self.config.window)

    def sample(self, table: PromptTable, prompt_ids: np.ndarray, seeds: Sequence[int], steps: int) -> torch.Tensor:
        """Clean latents (N, C, h, w) of prompts of `table` by the shipped solver and whatever adapter is on,
        rollout_batch at a time."""
        parts, mine = [], processes.share(len(seeds))
        for start in range(0, len(mine), self.config.rollout_batch):
            rows = mine[start : start + self.config.rollout_batch]
            latents = sample(
                self.pipeline,
                [table.prompts[i] for i in prompt_ids[rows]],
                [seeds[i] for i in rows],
                steps=steps,
                guidance_scale=self.config.guidance,
                prompt_embeds=table.embeds(prompt_ids[rows]),
            )
            parts.append(latents.float().cpu())
        return processes.gather(torch.cat(parts), len(seeds))

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        """Images (N, 3, H, W) in [-1, 1] of `latents`, on the CPU."""
        return torch.cat([decode(self.pipeline, part).cpu() for part in latents.split(self.config.rollout_batch)])
