"""What of the drawn images is seen again in an epoch: steps of the chain, noised images, or the chain's last steps.

A pass is one UNet step (or the few of the direct replay) on an image. Every image has the same passes; an objective
sees B (image, pass) pairs at a time, of several passes at once where they fit, and its gradient does not depend on how
they are cut into micro-batches.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError, ModelError
from medviz.generation.sampling import decode_latents, noise_pred
from train import processes, seeding
from train.rl.log_prob import DdimSchedule, Steps
from train.rl.objectives import Losses, ObjectiveOptions, Replay, get_objective
from train.rl.policy import LoraPolicy
from train.rl.prompts import PromptTable
from train.rl.recipe import RlConfig
from train.rl.rollout import Rollout, certain_steps, replay_step

RewardGradient = Callable[[torch.Tensor, Sequence[ParsedPrompt]], torch.Tensor]
"""(images (B, 3, H, W) in [-1, 1], their prompts) -> rewards (B,) that gradients flow from to the images."""


@dataclass(frozen=True)
class Passes:
    """What of each image is replayed, by name; replay: (rows (B,) of the rollout, the number (B,) of the pass that each
    is seen in, the rollout, advantages (B,)) -> losses of the B pairs."""

    names: tuple[str, ...]
    replay: Callable[[np.ndarray, np.ndarray, Rollout, torch.Tensor], Losses]


class Replayer:
    """The passes of each epoch, for the objective that the recipe names."""

    def __init__(
        self,
        config: RlConfig,
        pipeline: StableDiffusionPipeline,
        policy: LoraPolicy,
        table: PromptTable,
        schedule: DdimSchedule | None,
        reward: RewardGradient,
    ) -> None:
        """schedule: of the DDIM rollout, None where the solver draws the images. reward: the direct replay's alone."""
        self.config, self.pipeline, self.policy, self.table = config, pipeline, policy, table
        self.schedule, self.reward = schedule, reward
        self.objective = get_objective(config.objective)
        self.options = ObjectiveOptions(config.clip_range, config.beta, config.advantage_clip, config.kl_weight)
        self.noising = DDPMScheduler.from_config(pipeline.scheduler.config)

    @property
    def _ddim(self) -> DdimSchedule:
        if self.schedule is None:
            raise InputError(f"{self.config.objective} needs the schedule of a DDIM chain; there is none")
        return self.schedule

    def passes(self, epoch: int, rollout: Rollout) -> Passes:
        """What of each image is replayed in `epoch`. Raises InputError for a rollout of another kind."""
        config = self.config
        if self.objective.replays == "forward":
            names = tuple(f"stratum{j}" for j in range(config.timesteps_per_image))
            return Passes(names, partial(self._noised, epoch))
        if self.objective.replays == "direct":
            return Passes(("tail",), partial(self._tail, self.tail_length(epoch)))
        chosen = np.asarray(rollout.weighed)
        if 0 < config.timesteps_per_image < len(chosen):
            chosen = seeding.numpy_generator(config.seed, "rl-window", epoch).choice(
                chosen, config.timesteps_per_image, replace=False
            )
        steps = np.sort(chosen)
        return Passes(tuple(f"t{self._ddim.timesteps[i]:04d}" for i in steps), partial(self._chain, steps))

    def tail_length(self, epoch: int) -> int:
        """Steps K that gradients go through in `epoch`: draft_steps, or drawn from 1 .. draft_steps (AlignProp)."""
        if not self.config.draft_random:
            return self.config.draft_steps
        rng = seeding.numpy_generator(self.config.seed, "rl-tail", epoch)
        return int(rng.integers(1, self.config.draft_steps, endpoint=True))

    def drift(self, epoch: int, rollout: Rollout) -> float:
        """Mean squared distance of the policy's prediction from the adapter-free model's, on some images of `rollout`.

        Looks only: no gradient. At one noise level an image, spread over all of them.
        """
        count = min(self.config.micro_batch, len(rollout.indices))
        rows = processes.share(count)
        mean = self._drift(epoch, rollout, rows, (rows + 0.5) / count) if len(rows) else 0.0
        return processes.total({"drift": mean * len(rows) / count})["drift"]

    def _drift(self, epoch: int, rollout: Rollout, rows: np.ndarray, places: np.ndarray) -> float:
        noisy, timesteps, _ = self._noise_again(rollout, rows, places, self._noise(rollout, rows, "rl-drift", epoch))
        embeds = self.table.embeds(rollout.prompt_ids[rows])
        predict = partial(noise_pred, self.pipeline.unet, noisy, timesteps, embeds, 1.0)
        with torch.no_grad():
            policy = predict()
            with self.policy.using(None):
                return (policy - predict()).square().mean().item()

    def _chain(
        self, steps: np.ndarray, rows: np.ndarray, which: np.ndarray, rollout: Rollout, advantages: torch.Tensor
    ) -> Losses:
        unet, reference_mean = self.pipeline.unet, None
        # One number where all are at one step: where guidance rests there, the unet is then asked once, not twice.
        index: Steps = int(steps[which[0]]) if (which == which[0]).all() else steps[which]
        # One guidance scale for both: the rollout's. There is no other that this replay could take.
        again = partial(replay_step, unet, self.table, rollout, rows, index, self._ddim, self.config.guidance)
        if self.config.kl_weight > 0:
            with self.policy.using(None), torch.no_grad():
                reference_mean = again().mean
        old, weight = rollout.old_log_prob(rows, index).to(advantages.device), None
        if self.config.noise_weighted:
            weight = self._ddim.noise_weights[steps[which]].to(advantages.device)
        return self.objective.loss(Replay(advantages, again(), old, reference_mean, weight), self.options)

    def _noised(
        self, epoch: int, rows: np.ndarray, which: np.ndarray, rollout: Rollout, advantages: torch.Tensor
    ) -> Losses:
        config, unet, numbers = self.config, self.pipeline.unet, np.asarray(rollout.indices)
        drawn = np.stack(
            [
                seeding.numpy_generator(config.seed, "rl-timesteps", epoch, stratum).random(numbers.max() + 1)
                for stratum in range(config.timesteps_per_image)
            ]
        )
        places = (drawn[which, numbers[rows]] + which) / config.timesteps_per_image
        noise = self._noise_of_each(rollout, rows, which, "rl-forward", epoch)
        noisy, timesteps, target = self._noise_again(rollout, rows, places, noise)
        embeds = self.table.embeds(rollout.prompt_ids[rows])
        predict = partial(noise_pred, unet, noisy, timesteps, embeds, 1.0)
        old = reference = None
        with torch.no_grad():
            if self.objective.needs_old:
                with self.policy.using(self.policy.behaviour):
                    old = predict()
            if config.kl_weight > 0:
                with self.policy.using(None):
                    reference = predict()
        replay = Replay(
            advantages, prediction=predict(), target=target, old_prediction=old, reference_prediction=reference
        )
        return self.objective.loss(replay, self.options)

    def _noise_again(
        self, rollout: Rollout, rows: np.ndarray, places: np.ndarray, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps (places in [0, 1) of the noise levels) and the UNet's target, noise or velocity."""
        device = self.table.device
        timesteps = torch.from_numpy((places * self.noising.config.num_train_timesteps).astype(np.int64)).to(device)
        clean = rollout.latents[torch.from_numpy(rows)].to(device)
        velocity = self.noising.config.prediction_type == "v_prediction"
        target = self.noising.get_velocity(clean, noise, timesteps) if velocity else noise
        return self.noising.add_noise(clean, noise, timesteps), timesteps, target

    def _noise(self, rollout: Rollout, rows: np.ndarray, stage: str, epoch: int) -> torch.Tensor:
        shape, indices = tuple(rollout.latents.shape[1:]), [rollout.indices[r] for r in rows]
        return seeding.normal(shape, self.config.seed, stage, epoch, indices).to(self.table.device)

    def _noise_of_each(
        self, rollout: Rollout, rows: np.ndarray, which: np.ndarray, stage: str, epoch: int
    ) -> torch.Tensor:
        """Noise (B, C, h, w) of each pair, of a stage named for its pass."""
        made = torch.empty((len(rows), *rollout.latents.shape[1:]), device=self.table.device)
        for number in np.unique(which):
            mine = which == number
            made[torch.from_numpy(mine)] = self._noise(rollout, rows[mine], f"{stage}-{number}", epoch)
        return made

    def _tail(self, length: int, rows: np.ndarray, _: np.ndarray, rollout: Rollout, advantages: torch.Tensor) -> Losses:
        """DRaFT-K: the last `length` steps again from where the rollout stood, the reward's gradient through them."""
        start = rollout.at(rows, len(self._ddim) - length).to(advantages.device)
        return self._through(start, length, rows, rollout, advantages)

    def _through(
        self, start: torch.Tensor, length: int, rows: np.ndarray, rollout: Rollout, advantages: torch.Tensor
    ) -> Losses:
        unet, ids, total = self.pipeline.unet, rollout.prompt_ids[rows], len(self._ddim)
        steps, scale = range(total - length, total), self.config.guidance
        again = partial(certain_steps, unet, start, steps, self.table.embeds(ids), self._ddim, scale)
        reference = None
        if self.config.kl_weight > 0:
            with self.policy.using(None), torch.no_grad():
                reference = again()[1]
        latents, prediction = again()
        rewards = self.reward(decode_latents(self.pipeline.vae, latents), [self.table.parsed[i] for i in ids])
        if not bool(torch.isfinite(rewards).all()):
            raise ModelError("a reward that was finite on the rollout is not finite when it is differentiated")
        replay = Replay(advantages, rewards=rewards, prediction=prediction, reference_prediction=reference)
        return self.objective.loss(replay, self.options)
