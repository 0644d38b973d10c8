"""Images drawn from the policy, and the same steps seen again.

One rollout and one replay serve every objective. The reverse process is rolled out by stochastic DDIM with its latents
and log-probabilities kept; the forward process needs only the clean latents that any solver drew. Guidance is computed
by `medviz.generation.sampling.noise_pred` in both, with the same scale and the same [uncond, cond] order; the unet
stays in eval mode, so dropout is off in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import UNet2DConditionModel

from medviz.errors import InputError
from medviz.generation.sampling import PromptEmbeds, initial_latents, noise_pred
from train import seeding
from train.rl.log_prob import DdimSchedule, DdimStep, ddim_step
from train.rl.prompts import PromptTable


@dataclass(frozen=True)
class Rollout:
    """N images as they were drawn, on the CPU in fp32.

    prompt_ids int (N,); indices: each image's number in its epoch, which names its noise; latents (N, C, h, w): clean.
    Reverse process only: chain (N, T + 1, C, h, w) from noise to clean, and log_probs (N, T).
    """

    prompt_ids: np.ndarray
    indices: tuple[int, ...]
    latents: torch.Tensor
    chain: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None


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
    guidance_scale: float,
    seed: int,
    epoch: int,
    batch: int,
) -> Rollout:
    """Draw one image for each of `prompt_ids` by stochastic DDIM, `batch` at a time, keeping latents and log-probs.

    The noise of an image is a function of (seed, epoch, its index) alone, whatever batch it is in.
    """
    device, chains, log_probs = table.cond.device, [], []
    for start in range(0, len(prompt_ids), batch):
        mine = list(indices[start : start + batch])
        embeds = table.embeds(prompt_ids[start : start + batch])
        latents = initial_latents(unet.config, latent_seeds(seed, "rl-latents", epoch, mine)).to(device)
        chain, weighed = [latents.cpu()], []
        for index in range(len(schedule)):
            noise = seeding.normal(tuple(latents.shape[1:]), seed, f"rl-noise-{index}", epoch, mine).to(device)
            with torch.no_grad():
                step = policy_step(unet, latents, index, embeds, schedule, guidance_scale, noise=noise)
            latents = step.prev_latents
            chain.append(latents.cpu())
            weighed.append(step.log_prob.cpu())
        chains.append(torch.stack(chain, 1))
        log_probs.append(torch.stack(weighed, 1))
    whole = torch.cat(chains)
    return Rollout(np.asarray(prompt_ids), tuple(int(i) for i in indices), whole[:, -1], whole, torch.cat(log_probs))


def policy_step(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    index: int,
    embeds: PromptEmbeds,
    schedule: DdimSchedule,
    guidance_scale: float,
    *,
    noise: torch.Tensor | None = None,
    prev_latents: torch.Tensor | None = None,
) -> DdimStep:
    """One step of the policy: guided prediction, then :func:`ddim_step`. The only one, for rollout and replay alike."""
    prediction = noise_pred(unet, latents, schedule.timesteps[index], embeds, guidance_scale)
    return ddim_step(schedule, index, prediction, latents, noise=noise, prev_latents=prev_latents)


def replay_step(
    unet: UNet2DConditionModel,
    table: PromptTable,
    rollout: Rollout,
    rows: np.ndarray,
    index: int,
    schedule: DdimSchedule,
    guidance_scale: float,
) -> DdimStep:
    """Step `index` of the images `rows` of `rollout` again, by whatever adapter is on; keeps the gradient."""
    if rollout.chain is None:
        raise InputError("this rollout kept no chain: it can be trained on by the forward objective alone")
    device, chosen = table.cond.device, torch.from_numpy(np.asarray(rows))
    now, after = (rollout.chain[chosen, i].to(device) for i in (index, index + 1))
    embeds = table.embeds(rollout.prompt_ids[rows])
    return policy_step(unet, now, index, embeds, schedule, guidance_scale, prev_latents=after)
