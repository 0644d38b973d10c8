"""The learner of the rl stage: align a generator with rewards by reinforcement learning.

One step of the run is one epoch: draw images from the policy, reward them, compare each with its prompt's others, and
take a few optimiser steps on the objective chosen in the recipe. Every number of evaluations a fixed set of prompts and
seeds is shown to the reward and to the held-out judge; the adapter that the judge likes best, of those that kept
diversity, is the one exported.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline

from medviz.domains.base import Domain, ParsedPrompt
from medviz.errors import InputError, ModelError
from medviz.generation.sampling import decode, noise_pred, sample
from medviz.models.adapters import save_lora, using_adapter
from train import seeding
from train.evaluate.statistics import paired_difference
from train.rl.advantages import PromptStatistics
from train.rl.log_prob import stochastic_schedule
from train.rl.objectives import Losses, ObjectiveOptions, Replay, get_objective
from train.rl.policy import Policy
from train.rl.prompts import invented_prompts, prompt_table
from train.rl.recipe import RlConfig, check
from train.rl.rollout import Rollout, latent_seeds, replay_step, roll_out
from train.rl.safeguards import Anchor, Evaluation, Judge, Opinion, Scorer, Watch, diversity

logger = logging.getLogger(__name__)

RATIO_TOLERANCE = 1e-3

Replayed = Callable[[np.ndarray, Rollout, torch.Tensor], Losses]
"""(rows of the rollout, the rollout, their advantages) -> their losses at one timestep each."""


@dataclass(frozen=True)
class Rewarded:
    """The rewards of N images: values float64 (N,), valid bool (N,), False where the reward failed."""

    values: np.ndarray
    valid: np.ndarray


class RlLearner:
    """Learns a LoRA adapter from rewards; see `train.loop.Learner`."""

    def __init__(
        self,
        config: RlConfig,
        pipeline: StableDiffusionPipeline,
        domain: Domain,
        scorer: Scorer,
        judge: Judge,
        anchor: Anchor | None = None,
    ) -> None:
        check(config)
        if anchor is None and config.anchor_weight > 0:
            raise InputError(f"anchor_weight is {config.anchor_weight} but there is no anchor")
        self.config, self.pipeline, self.scorer, self.judge, self.anchor = config, pipeline, scorer, judge, anchor
        self.objective = get_objective(config.objective)
        self.options = ObjectiveOptions(config.clip_range, config.beta, config.advantage_clip, config.kl_weight)
        self.policy = Policy(
            pipeline.unet,
            config.adapter,
            rank=config.rank,
            alpha=config.lora_alpha,
            convolutions=config.lora_convolutions,
            averaged=self.objective.process == "forward",
            seed=config.seed,
        )
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), config.learning_rate, weight_decay=config.weight_decay
        )
        self.noising = DDPMScheduler.from_config(pipeline.scheduler.config)
        self.schedule = None
        if self.objective.process == "reverse":
            spaced = {**pipeline.scheduler.config, "timestep_spacing": config.timestep_spacing, "steps_offset": 1}
            self.schedule = stochastic_schedule(spaced, config.rollout_steps, config.eta)
        validation = domain.validation_prompts()
        self.table = prompt_table(
            pipeline, domain, [*validation, *invented_prompts(domain, config.invented_prompts, config.seed)]
        )
        self.looked_at = (
            np.linspace(0, len(validation) - 1, min(config.evaluation_prompts, len(validation))).round().astype(int)
        )
        self.statistics = PromptStatistics(config.statistics_size, config.statistics_minimum)
        self.watch = Watch(config.diversity_floor, config.patience)
        self.best: dict[str, torch.Tensor] = {}
        self.failures = 0
        self.forwards: dict[str, int] = defaultdict(int)
        self._phase = "other"
        pipeline.unet.register_forward_hook(self._count)

    def _count(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...], __: Any) -> None:
        self.forwards[self._phase] += len(arguments[0])
        self.forwards["with gradient"] += len(arguments[0]) if torch.is_grad_enabled() else 0

    @contextmanager
    def _counted(self, phase: str) -> Iterator[None]:
        self._phase, before = phase, self._phase
        try:
            yield
        finally:
            self._phase = before

    def update(self, step: int) -> dict[str, float]:
        """Epoch `step`: roll out, reward, learn; the judge looks every `evaluate_every` epochs and before the first.

        After the run was stopped early nothing happens any more. Raises ModelError when no image of the epoch could be
        rewarded, and when the first replay does not find the rollout's log-probabilities again.
        """
        if self.watch.stopped:
            return {"stopped": 1.0}
        figures: dict[str, float] = {}
        if not self.watch.history:
            figures |= self._look(0)
        with self._counted("rollout"):
            rollout = self.draw(step)
        rewards = self.rewarded(rollout)
        figures |= self.learn(step, rollout, rewards)
        self.policy.average(self.config.average_decay)
        if (step + 1) % self.config.evaluate_every == 0 or step + 1 == self.config.steps:
            figures |= self._look(step + 1)
        return figures | {f"forwards_{k.replace(' ', '_')}": float(v) for k, v in self.forwards.items()}

    def draw(self, epoch: int) -> Rollout:
        """The images of `epoch`: images_per_prompt of each of prompts_per_epoch prompts, by the behaviour adapter."""
        config, unet = self.config, self.pipeline.unet
        chosen = seeding.batch_indices(
            len(self.table.prompts), config.prompts_per_epoch, epoch, config.seed, "rl-prompts"
        )
        prompt_ids = np.repeat(chosen, config.images_per_prompt)
        indices = range(len(prompt_ids))
        with using_adapter(unet, self.policy.behaviour):
            if self.schedule is not None:
                return roll_out(
                    unet,
                    self.table,
                    prompt_ids,
                    indices,
                    self.schedule,
                    guidance_scale=config.guidance_scale,
                    seed=config.seed,
                    epoch=epoch,
                    batch=config.rollout_batch,
                )
            seeds = latent_seeds(config.seed, "rl-latents", epoch, indices)
            latents = self._sample(prompt_ids, seeds, config.rollout_steps)
        return Rollout(prompt_ids, tuple(indices), latents)

    def _sample(self, prompt_ids: np.ndarray, seeds: list[int], steps: int) -> torch.Tensor:
        parts = []
        for start in range(0, len(seeds), self.config.rollout_batch):
            rows = slice(start, start + self.config.rollout_batch)
            latents = sample(
                self.pipeline,
                [self.table.prompts[i] for i in prompt_ids[rows]],
                seeds[rows],
                steps=steps,
                guidance_scale=self.config.guidance_scale,
                prompt_embeds=self.table.embeds(prompt_ids[rows]),
            )
            parts.append(latents.float().cpu())
        return torch.cat(parts)

    def _images(self, latents: torch.Tensor) -> torch.Tensor:
        return torch.cat([decode(self.pipeline, part).cpu() for part in latents.split(self.config.rollout_batch)])

    def rewarded(self, rollout: Rollout) -> Rewarded:
        """The reward of every image of `rollout`; failures are counted. Raises ModelError when none has a reward."""
        parsed = [self.table.parsed[i] for i in rollout.prompt_ids]
        rewarded = self._rewarded(self._images(rollout.latents), parsed)
        self.failures += int((~rewarded.valid).sum())
        if not rewarded.valid.any():
            raise ModelError(
                f"none of the {len(rewarded.valid)} images of this epoch could be rewarded; see the warnings above"
            )
        return rewarded

    def _rewarded(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Rewarded:
        batch, device = self.config.rollout_batch, self.table.cond.device
        starts = range(0, len(images), batch)
        parts = [self.scorer(images[s : s + batch].to(device), parsed[s : s + batch]) for s in starts]
        values, valid = torch.cat([p.values for p in parts]), torch.cat([p.valid for p in parts])
        return Rewarded(values.double().cpu().numpy(), valid.cpu().numpy())

    def _opinion(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Opinion:
        batch, device = self.config.rollout_batch, self.table.cond.device
        starts = range(0, len(images), batch)
        with torch.no_grad():
            parts = [self.judge(images[s : s + batch].to(device), parsed[s : s + batch]) for s in starts]
        return Opinion(
            torch.cat([p.score for p in parts]).cpu(),
            torch.cat([p.accuracy for p in parts]).cpu(),
            torch.cat([p.features for p in parts]).cpu(),
        )

    def learn(self, step: int, rollout: Rollout, rewards: Rewarded) -> dict[str, float]:
        """The optimiser steps of epoch `step` on `rollout`; returns what to log."""
        config = self.config
        advantages = self.objective.advantages(
            rollout.prompt_ids, rewards.values, rewards.valid, config.advantage_clip, self.statistics
        )
        rows = seeding.numpy_generator(config.seed, "rl-order", step).permutation(np.flatnonzero(rewards.valid))
        sums: dict[str, list[float]] = defaultdict(list)
        for update, mine in enumerate(part for part in np.array_split(rows, config.updates) if len(part)):
            self.optimizer.zero_grad(set_to_none=True)
            with self._counted("replay"):
                figures = self.accumulate(step, rollout, advantages.values, mine)
            if update == 0 and abs(figures.get("ratio_deviation", 0.0)) > RATIO_TOLERANCE:
                raise ModelError(
                    f"the replay's ratio is off by {figures['ratio_deviation']:.2g} before any update, allowed is "
                    f"{RATIO_TOLERANCE}: rollout and replay do not compute the same"
                )
            if self.anchor is not None and config.anchor_weight > 0:
                with self._counted("anchor"):
                    figures["anchor"] = self.anchor.accumulate(
                        self.pipeline.unet, step * config.updates + update, config.anchor_batch, config.anchor_weight
                    )
            norm = torch.nn.utils.clip_grad_norm_(
                self.policy.parameters(), config.max_grad_norm, error_if_nonfinite=True
            )
            self.optimizer.step()
            for name, figure in (figures | {"grad_norm": norm.item()}).items():
                sums[name].append(figure)
        valid = rewards.values[rewards.valid]
        return {name: float(np.mean(figures)) for name, figures in sums.items()} | {
            "reward": float(valid.mean()),
            "reward_std": float(valid.std()),
            "reward_failures": float((~rewards.valid).sum()),
            "zero_variance_groups": advantages.zero_variance,
        }

    def accumulate(self, step: int, rollout: Rollout, advantages: np.ndarray, rows: np.ndarray) -> dict[str, float]:
        """Add the gradient of the mean loss over `rows` and their timesteps of this epoch to the trained weights.

        Goes through `rows` micro_batch at a time, each part weighted by its size: the gradient does not depend on it.
        """
        figures: dict[str, float] = defaultdict(float)
        passes = self._passes(step)
        for name, replay in passes.items():
            for start in range(0, len(rows), self.config.micro_batch):
                part = rows[start : start + self.config.micro_batch]
                weight = len(part) / len(rows)
                losses = replay(part, rollout, torch.from_numpy(advantages[part]).to(self.table.cond.device))
                (losses.loss.mean() * weight / len(passes)).backward()
                figures["loss"] += losses.loss.detach().mean().item() * weight / len(passes)
                for key, values in losses.figures.items():
                    figures[key] += values.mean().item() * weight / len(passes)
                if "ratio" in losses.figures:
                    deviation = (losses.figures["ratio"] - 1).abs()
                    figures["ratio_deviation"] = max(figures["ratio_deviation"], deviation.max().item())
                    figures[f"ratio_deviation/{name}"] += deviation.mean().item() * weight
        return dict(figures)

    def _passes(self, step: int) -> dict[str, Replayed]:
        """What of each image is replayed in epoch `step`, by name: steps of the chain, or strata of the noise level."""
        config = self.config
        if self.schedule is None:
            return {f"stratum{j}": partial(self._replay_noised, step, j) for j in range(config.timesteps_per_image)}
        chosen = np.arange(len(self.schedule))
        if 0 < config.timesteps_per_image < len(chosen):
            chosen = seeding.numpy_generator(config.seed, "rl-window", step).choice(
                chosen, config.timesteps_per_image, replace=False
            )
        return {f"t{self.schedule.timesteps[i]:04d}": partial(self._replay_chain, int(i)) for i in sorted(chosen)}

    def _replay_chain(self, index: int, rows: np.ndarray, rollout: Rollout, advantages: torch.Tensor) -> Losses:
        unet, reference_mean = self.pipeline.unet, None
        if rollout.log_probs is None or self.schedule is None:
            raise InputError("this rollout kept no log-probabilities: only the forward objective can learn from it")
        again = partial(replay_step, unet, self.table, rollout, rows, index, self.schedule, self.config.guidance_scale)
        if self.config.kl_weight > 0:
            with using_adapter(unet, None), torch.no_grad():
                reference_mean = again().mean
        old = rollout.log_probs[torch.from_numpy(rows), index].to(advantages.device)
        return self.objective.loss(Replay(advantages, again(), old, reference_mean), self.options)

    def _replay_noised(
        self, step: int, stratum: int, rows: np.ndarray, rollout: Rollout, advantages: torch.Tensor
    ) -> Losses:
        config, unet, device = self.config, self.pipeline.unet, advantages.device
        places = seeding.numpy_generator(config.seed, "rl-timesteps", step, stratum).random(len(rollout.indices))[rows]
        share = (places + stratum) / config.timesteps_per_image * self.noising.config.num_train_timesteps
        timesteps = torch.from_numpy(share.astype(np.int64)).to(device)
        clean = rollout.latents[torch.from_numpy(rows)].to(device)
        indices = [rollout.indices[r] for r in rows]
        noise = seeding.normal(tuple(clean.shape[1:]), config.seed, f"rl-forward-{stratum}", step, indices).to(device)
        noisy = self.noising.add_noise(clean, noise, timesteps)
        velocity = self.noising.config.prediction_type == "v_prediction"
        target = self.noising.get_velocity(clean, noise, timesteps) if velocity else noise
        embeds = self.table.embeds(rollout.prompt_ids[rows])
        predict = partial(noise_pred, unet, noisy, timesteps, embeds, config.train_guidance_scale)
        reference = None
        with torch.no_grad():
            with using_adapter(unet, self.policy.behaviour):
                old = predict()
            if config.kl_weight > 0:
                with using_adapter(unet, None):
                    reference = predict()
        replay = Replay(
            advantages, prediction=predict(), target=target, old_prediction=old, reference_prediction=reference
        )
        return self.objective.loss(replay, self.options)

    def _look(self, epoch: int) -> dict[str, float]:
        """Show the fixed prompts and seeds to reward and judge; keep the adapter if it is the best so far."""
        config = self.config
        prompt_ids = np.repeat(self.looked_at, config.evaluation_images)
        seeds = latent_seeds(config.seed, "rl-evaluation", 0, range(len(prompt_ids)))
        with self._counted("evaluation"), using_adapter(self.pipeline.unet, self.policy.behaviour if epoch else None):
            images = self._images(self._sample(prompt_ids, seeds, config.evaluation_steps))
        parsed = [self.table.parsed[i] for i in prompt_ids]
        rewards, opinion = self._rewarded(images, parsed), self._opinion(images, parsed)
        if not rewards.valid.any() or not bool(opinion.score.isfinite().any()):
            raise ModelError("reward or judge knows nothing of what the evaluation prompts ask: check their heads")
        evaluation = Evaluation(
            epoch=epoch,
            rewards=tuple(rewards.values[rewards.valid].tolist()),
            judge_scores=tuple(opinion.score.double().tolist()),
            judge_accuracy=float(opinion.accuracy.double().nanmean()),
            diversity=diversity(opinion.features, prompt_ids),
        )
        verdict = self.watch.consider(evaluation)
        if verdict.best:
            self.best = self.policy.weights(self.policy.behaviour)
        if verdict.stop:
            logger.warning("stopping after epoch %d: %s", epoch, verdict.stop)
        logger.info("epoch %d: %s%s", epoch, evaluation.summary(), " (best so far)" if verdict.best else "")
        return {f"look_{name}": figure for name, figure in evaluation.summary().items()}

    def state(self) -> dict[str, Any]:
        return {
            "policy": self.policy.weights(self.config.adapter),
            "behaviour": self.policy.weights(self.policy.behaviour),
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "statistics": self.statistics.state(),
            "watch": self.watch.state(),
            "failures": self.failures,
            "forwards": dict(self.forwards),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy.set_weights(self.policy.behaviour, state["behaviour"])
        self.policy.set_weights(self.config.adapter, state["policy"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state(state["statistics"])
        self.watch.load_state(state["watch"])
        self.failures = state["failures"]
        self.forwards = defaultdict(int, state["forwards"])

    def _gain(self, shown: Evaluation, baseline: Evaluation) -> dict[str, Any]:
        pair = (np.array(shown.judge_scores), np.array(baseline.judge_scores))
        return paired_difference(*pair, seed=self.config.seed).as_json()

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the kept adapter to `folder` and return what the run found, image by image the same prompts and seeds.

        Where no evaluation was eligible, the newest adapter is written and `kept_epoch` is None: do not ship that one.
        """
        kept, baseline = self.watch.best, self.watch.history[0]
        self.policy.set_weights(self.config.adapter, self.best if kept else self.policy.weights(self.policy.behaviour))
        if kept is None:
            logger.warning(
                "no adapter kept diversity above its floor; the newest one is written and must not be shipped"
            )
        shown = kept or self.watch.history[-1]
        metrics: dict[str, Any] = {
            "objective": self.config.objective,
            "kept_epoch": kept.epoch if kept else None,
            "stopped_early": self.watch.stopped,
            "n_images": len(shown.judge_scores),
            "n_prompts": len(self.looked_at),
            "baseline": baseline.summary(),
            "aligned": shown.summary(),
            "judge_gain": self._gain(shown, baseline),
            "history": [{"epoch": e.epoch, **e.summary()} for e in self.watch.history],
            "reward_failures": self.failures,
            "unet_forwards": dict(self.forwards),
            "lora_parameters": sum(p.numel() for p in self.policy.parameters()),
        }
        details = {"title": self.config.title, "recipe": asdict(self.config), "metrics": metrics}
        save_lora(self.pipeline.unet, folder, self.config.adapter, details=details)
        return metrics
