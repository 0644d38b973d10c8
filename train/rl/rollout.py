"""Images drawn from the policy, and the same steps seen again.

One rollout and one replay serve every objective. The reverse process is rolled out by DDIM with its latents kept and,
of the steps that draw noise, their log-probabilities; the forward process needs only the clean latents that any solver
drew; a reward's own gradient goes through the last steps of a chain that draws no noise. Guidance is computed
by `medviz.generation.sampling.noise_pred` in both, with the same scale and the same [uncond, cond] order; the unet
stays in eval mode, so dropout is off in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.prompts import PromptEmbeds
from medviz.generation.sampling import initial_latents, noise_pred
from train import processes, seeding
from train.rl.log_prob import DdimSchedule, DdimStep, Steps, ddim_step, deterministic_step
from train.rl.prompts import PromptTable


@dataclass(frozen=True)
class Rollout:
    """N images as they were drawn, on the CPU in fp32.

    prompt_ids int (N,); indices: each image's number in its epoch, which names its noise; latents (N, C, h, w): clean.
    DDIM only: chain (N, T + 1, C, h, w) from noise to clean; weighed: the W steps that drew noise, ascending; log_probs
    (N, W) of what they drew.
    """

    prompt_ids: np.ndarray
    indices: tuple[int, ...]
    latents: torch.Tensor
    chain: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    weighed: tuple[int, ...] = ()

    def gathered(self, prompt_ids: np.ndarray) -> "Rollout":
        """The images of all of an epoch's `prompt_ids`, of which each process drew its share by DDIM."""
        if self.chain is None or self.log_probs is None:
            raise InputError("this rollout kept no chain: there is nothing to put together")
        count = len(prompt_ids)
        chain, log_probs = processes.gather(self.chain, count), processes.gather(self.log_probs, count)
        return Rollout(prompt_ids, tuple(range(count)), chain[:, -1], chain, log_probs, self.weighed)

    def at(self, rows: np.ndarray, index: Steps) -> torch.Tensor:
        """The latents (B, C, h, w) of `rows` before step `index`. InputError where no chain was kept."""
        if self.chain is None:
            raise InputError("this rollout kept no chain: it can be trained on by the forward objectives alone")
        return self.chain[torch.from_numpy(np.asarray(rows)), torch.as_tensor(index)]

    def old_log_prob(self, rows: np.ndarray, index: Steps) -> torch.Tensor:
        """The log-probability (B,) of step `index` when `rows` were drawn. InputError for a step that drew nothing."""
        if self.log_probs is None or not np.isin(index, self.weighed).all():
            raise InputError(f"step {index} of this rollout drew no noise: it has no log-probability to learn from")
        column = torch.as_tensor(np.searchsorted(self.weighed, index))
        return self.log_probs[torch.from_numpy(np.asarray(rows)), column]


def latent_seeds(seed: int, stage: str, step: int, indices: Sequence[int]) -> list[int]:
    """A 32-bit seed of the initial latents of each image, a function of (seed, stage, step, index)."""
    return [seeding.key(seed, stage, step, int(i)) & 0xFFFFFFFF for i in indices]


def roll_out(
    unet: UNet2DConditionModel,
    table: PromptTable,
    prompt_ids: np.ndarray,
    indices: Sequence[int],
    schedule: DdimSchedule,
    *,
    guidance_scale: float | Guidance,
    seed: int,
    epoch: int,
    batch: int,
) -> Rollout:
    """Draw one image for each of `prompt_ids` by DDIM, `batch` at a time, keeping latents and log-probs.

    Steps of the schedule without noise are deterministic and have no log-prob. The noise of an image is a function of
    (seed, epoch, its index) alone, whatever batch it is in.
    """
    device, chains, log_probs = table.device, [], []
    for start in range(0, len(prompt_ids), batch):
        mine = list(indices[start : start + batch])
        embeds = table.embeds(prompt_ids[start : start + batch])
        latents = initial_latents(unet.config, latent_seeds(seed, "rl-latents", epoch, mine)).to(device)
        chain, weighed = [latents.cpu()], []
        for index in range(len(schedule)):
            with torch.no_grad():
                if index in schedule.stochastic:
                    noise = seeding.normal(tuple(latents.shape[1:]), seed, f"rl-noise-{index}", epoch, mine).to(device)
                    step = policy_step(unet, latents, index, embeds, schedule, guidance_scale, noise=noise)
                    latents = step.prev_latents
                    weighed.append(step.log_prob.cpu())
                else:
                    latents = certain_steps(unet, latents, range(index, index + 1), embeds, schedule, guidance_scale)[0]
            chain.append(latents.cpu())
        chains.append(torch.stack(chain, 1))
        log_probs.append(torch.stack(weighed, 1) if weighed else torch.empty(len(mine), 0))
    whole = torch.cat(chains)
    numbers = tuple(int(i) for i in indices)
    return Rollout(np.asarray(prompt_ids), numbers, whole[:, -1], whole, torch.cat(log_probs), schedule.stochastic)


def policy_step(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    index: Steps,
    embeds: PromptEmbeds,
    schedule: DdimSchedule,
    guidance_scale: float | Guidance,
    *,
    noise: torch.Tensor | None = None,
    prev_latents: torch.Tensor | None = None,
) -> DdimStep:
    """One random step: guided prediction, then :func:`ddim_step`. The only one, for rollout and replay alike."""
    told = schedule.timestep(index).to(latents.device)
    prediction = noise_pred(unet, latents, told, embeds, guidance_scale)
    return ddim_step(schedule, index, prediction, latents, noise=noise, prev_latents=prev_latents)


def certain_steps(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    steps: Sequence[int],
    embeds: PromptEmbeds,
    schedule: DdimSchedule,
    guidance_scale: float | Guidance,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Steps that draw no noise, one after the other; keeps the gradient.

    Returns the latents (B, C, h, w) they end in and the guided predictions (B, K, C, h, w) on the way.
    """
    predictions = []
    for index in steps:
        told = schedule.timestep(index).to(latents.device)
        predictions.append(noise_pred(unet, latents, told, embeds, guidance_scale))
        latents = deterministic_step(schedule, index, predictions[-1], latents)
    return latents, torch.stack(predictions, 1)


def replay_step(
    unet: UNet2DConditionModel,
    table: PromptTable,
    rollout: Rollout,
    rows: np.ndarray,
    index: Steps,
    schedule: DdimSchedule,
    guidance_scale: float | Guidance,
) -> DdimStep:
    """Step `index` of the images `rows` of `rollout` again, by whatever adapter is on; keeps the gradient.

    index: one step for all, or one a row.
    """
    now, after = (rollout.at(rows, i).to(table.device) for i in (index, index + 1))
    embeds = table.embeds(rollout.prompt_ids[rows])
    return policy_step(unet, now, index, embeds, schedule, guidance_scale, prev_latents=after)
