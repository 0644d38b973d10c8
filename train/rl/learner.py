"""The learner of the rl stage: align a generator with rewards by reinforcement learning.

One step of the run is one epoch: draw images from the policy, reward them, compare each with its prompt's others, and
take a few optimiser steps on the objective chosen in the recipe. Every number of evaluations a fixed set of prompts and
seeds is shown to the reward and to the held-out judge; the adapter that the judge likes best, of those that kept
diversity and did not move away from real images, is the one exported.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from medviz.domains.base import Domain
from medviz.errors import InputError, ModelError
from train import processes, seeding
from train.evaluate.statistics import paired_difference
from train.rl.advantages import ADVANTAGES, PromptStatistics
from train.rl.drawing import Drawing, open_schedule
from train.rl.gallery import Gallery
from train.rl.looking import Looks, RealImages
from train.rl.mean_held import MeanHeld
from train.rl.objectives import get_objective
from train.rl.policy import LoraPolicy
from train.rl.prompts import any_prompt_table, invented_prompts, prompt_table
from train.rl.recipe import RlConfig, check, needs_real_latents
from train.rl.replaying import Replayer
from train.rl.rollout import Rollout
from train.rl.safeguards import Anchor, Evaluation, Judge, Watch
from train.rl.scoring import Scorer
from train.rl.tone import tones, without_tone
from train.tracking import Tracker

logger = logging.getLogger(__name__)

RATIO_TOLERANCE = 1e-3
MAX_GRAD_NORM = 1.0
BY_PASS = ("ratio_deviation", "ratio", "clip_fraction")  # figures that are also logged timestep by timestep


@dataclass(frozen=True)
class Rewarded:
    """The rewards of N images: values float64 (N,), valid bool (N,), False where the reward failed."""

    values: np.ndarray
    valid: np.ndarray


class RlLearner:
    """Learns an adapter from rewards; see `train.loop.Learner`."""

    def __init__(
        self,
        config: RlConfig,
        pipeline: StableDiffusionPipeline,
        domain: Domain,
        scorer: Scorer,
        judge: Judge,
        anchor: Anchor | None = None,
        real: RealImages | None = None,
        tracker: Tracker | None = None,
        gallery: Sequence[str] = (),
    ) -> None:
        """real: what evaluations are held against, tracker: what is shown some of their images; or None. gallery:
        captions that the likeness reward has drawn, where the scorer looks for likeness."""
        check(config)
        if anchor is None and needs_real_latents(config):
            raise InputError(
                f"anchor_weight {config.anchor_weight} and mean_held {config.mean_held} need an anchor with real images"
            )
        self.config, self.pipeline, self.scorer, self.anchor = config, pipeline, scorer, anchor
        self.objective = get_objective(config.objective)
        self.advantages = ADVANTAGES[config.advantages or self.objective.advantages]
        self.policy = self._policy()
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(), config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.schedule = open_schedule(config, pipeline)
        pipeline.vae.requires_grad_(False)
        validation = domain.validation_prompts()
        self.table = prompt_table(
            pipeline,
            domain,
            dict.fromkeys(
                [*validation, *invented_prompts(domain, config.invented_prompts, config.seed), *config.prompts]
            ),
            config.guidance,
        )
        self.drawing = Drawing(config, pipeline, self.policy, self.table, self.schedule)
        self.replayer = Replayer(config, pipeline, self.policy, self.table, self.schedule, scorer.with_gradient)
        self.mean_held = self._mean_held(domain, anchor) if anchor and config.mean_held else None
        compared = None if real is None else any_prompt_table(pipeline, domain, real.captions, config.guidance)
        features = None if real is None else real.features
        self.gallery = None
        if scorer.likeness:
            drawn = any_prompt_table(pipeline, domain, gallery, config.guidance)
            self.gallery = Gallery(config, self.drawing, scorer.likeness, drawn)
        self.looks = Looks(config, self.drawing, scorer, judge, len(validation), features, compared, tracker)
        self.statistics = PromptStatistics(config.statistics_size, config.statistics_minimum)
        self.watch = Watch(patience=config.patience)
        self.best: dict[str, torch.Tensor] = {}
        self.failures = 0
        self.forwards: dict[str, int] = defaultdict(int)
        self._seen = {"all": 0, "with gradient": 0}
        pipeline.unet.register_forward_hook(self._count)
        processes.check_enough(
            [
                ("images an epoch", config.prompts_per_epoch * config.images_per_prompt),
                ("images a look", len(self.looks.prompts) * config.evaluation_images),
                *([] if real is None else [("captions of real images", len(real.captions))]),
                *([("captions drawn for likeness", config.likeness_redrawn)] if self.gallery else []),
                *([("captions drawn to hold the mean", config.mean_redrawn)] if config.mean_held else []),
            ]
        )

    def _policy(self) -> LoraPolicy:
        config = self.config
        policy = LoraPolicy(
            self.pipeline.unet,
            config.adapter,
            rank=config.rank,
            alpha=config.lora_alpha,
            convolutions=config.lora_convolutions,
            averaged=self.objective.replays == "forward",
            folded=not config.bf16,
            start=config.lora_start,
            seed=config.seed,
        )
        if config.start:
            policy.go_on_from(Path(config.start))
        return policy

    def _mean_held(self, domain: Domain, anchor: Anchor) -> MeanHeld:
        config = self.config
        held = anchor.captions(config.mean_held, "rl-mean-held")
        captions = any_prompt_table(self.pipeline, domain, held, config.guidance)
        replayer = Replayer(config, self.pipeline, self.policy, captions, None, self.scorer.with_gradient)
        return MeanHeld(config, self.drawing, captions, replayer)

    def _count(self, _: torch.nn.Module, arguments: tuple[torch.Tensor, ...], __: Any) -> None:
        self._seen["all"] += len(arguments[0])
        self._seen["with gradient"] += len(arguments[0]) if torch.is_grad_enabled() else 0

    @contextmanager
    def _counted(self, phase: str) -> Iterator[None]:
        """Count what passes through the unet inside, of all processes together, as `phase`."""
        self._seen = dict.fromkeys(self._seen, 0)
        yield
        seen = processes.total(self._seen)
        self.forwards[phase] += round(seen["all"])
        self.forwards["with gradient"] += round(seen["with gradient"])

    def update(self, step: int) -> dict[str, float]:
        """Epoch `step`: roll out, reward, learn; the judge looks every `evaluate_every` epochs and before the first.

        After the run was stopped early nothing happens any more. Raises ModelError when no image of the epoch could be
        rewarded, and when the first replay does not find the rollout's log-probabilities again.
        """
        if self.watch.stopped:
            return {"stopped": 1.0}
        figures: dict[str, float] = {}
        if self.gallery:
            with self._counted("likeness"):
                self.gallery.redraw(step)
        if not self.watch.history:
            figures |= self._look(0)
        rollout = self.draw(step)
        rewards = self.rewarded(rollout)
        figures |= self.learn(step, rollout, rewards)
        with self._counted("safeguards"):
            figures["reference_distance"] = self.replayer.drift(step, rollout)
        self.policy.average(self.config.average_decay)
        if (step + 1) % self.config.evaluate_every == 0 or step + 1 == self.config.steps:
            figures |= self._look(step + 1)
        return figures | {f"forwards_{k.replace(' ', '_')}": float(v) for k, v in self.forwards.items()}

    def draw(self, epoch: int) -> Rollout:
        """The images of `epoch`; see `Drawing.rollout`."""
        with self._counted("rollout"):
            return self.drawing.rollout(epoch)

    def rewarded(self, rollout: Rollout) -> Rewarded:
        """The reward of every image of `rollout`; failures are counted. Raises ModelError when none has a reward."""
        count, mine = len(rollout.prompt_ids), processes.share(len(rollout.prompt_ids))
        parsed = [self.table.parsed[i] for i in rollout.prompt_ids[mine]]
        images = self.drawing.images(rollout.latents[mine])
        seen = self.scorer.rewarded(images, parsed, self.config.rollout_batch).gathered(count)
        self.failures += int((~seen.valid).sum())
        if not seen.valid.any():
            raise ModelError(
                f"none of the {len(seen.valid)} images of this epoch could be rewarded; see the warnings above"
            )
        self.scorer.observe(seen)
        values = self.scorer.values(seen)
        if self.config.tone_blind:
            values = without_tone(
                values, processes.gather(tones(images), count).numpy(), rollout.prompt_ids, seen.valid
            )
        return Rewarded(values, seen.valid)

    def learn(self, step: int, rollout: Rollout, rewards: Rewarded) -> dict[str, float]:
        """The optimiser steps of epoch `step` on `rollout`; returns what to log."""
        config = self.config
        advantages = self.advantages(
            rollout.prompt_ids, rewards.values, rewards.valid, config.advantage_clip, self.statistics
        )
        rows = seeding.numpy_generator(config.seed, "rl-order", step).permutation(np.flatnonzero(rewards.valid))
        if self.mean_held:
            with self._counted("mean held"):
                pairs = self.mean_held.pairs(step)
        sums: dict[str, list[float]] = defaultdict(list)
        for update, mine in enumerate(part for part in np.array_split(rows, config.updates) if len(part)):
            self.optimizer.zero_grad(set_to_none=True)
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
            if self.mean_held:
                part = pairs.rows(update, config.updates)
                found = self.accumulate(
                    step, pairs.rollout, pairs.advantages, part,
                    replayer=self.mean_held.replayer, weight=config.mean_weight,
                )  # fmt: skip
                figures |= {f"mean_held_{key}": figure for key, figure in found.items()}
                figures["mean_moved"] = pairs.moved
            processes.sum_gradients(self.policy.parameters())
            norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), MAX_GRAD_NORM)
            if not norm.isfinite():
                return {"grad_norm": norm.item()}  # no step is taken; the loop ends the run by this figure
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

    def accumulate(
        self,
        step: int,
        rollout: Rollout,
        advantages: np.ndarray,
        rows: np.ndarray,
        *,
        replayer: Replayer | None = None,
        weight: float = 1.0,
    ) -> dict[str, float]:
        """Add `weight` times the gradient of the mean loss over `rows` and their timesteps of this epoch to the trained
        weights. replayer: of another table of prompts than the rewarded ones.

        Goes through the pairs of `rows` and their passes micro_batch at a time, those of one pass beside each other:
        the gradient does not depend on it.
        Several processes share `rows`: each adds its part of the gradient, and the figures are those of all.
        """
        figures: dict[str, float] = defaultdict(float)
        passes = (replayer or self.replayer).passes(step, rollout)
        mine = rows[processes.share(len(rows))]
        # A process that is left without rows replays the first at no weight: all have the same things to add up.
        mine, size = (mine, len(rows)) if len(mine) else (rows[:1], math.inf)
        pairs, which = np.tile(mine, len(passes.names)), np.repeat(np.arange(len(passes.names)), len(mine))
        with self._counted("replay"):
            for start in range(0, len(pairs), self.config.micro_batch):
                part = slice(start, start + self.config.micro_batch)
                weighed = torch.from_numpy(advantages[pairs[part]]).to(self.table.device)
                losses = passes.replay(pairs[part], which[part], rollout, weighed)
                (weight * losses.loss.sum() / (size * len(passes.names))).backward()
                for key, values in {"loss": losses.loss.detach(), **losses.figures}.items():
                    figures[key] += values.sum().item() / (size * len(passes.names))
                if "ratio" not in losses.figures:
                    continue
                deviation = (losses.figures["ratio"] - 1).abs()
                figures["ratio_deviation"] = max(figures["ratio_deviation"], deviation.max().item())
                for number in np.unique(which[part]):
                    of_pass = torch.from_numpy(which[part] == number)
                    for key, values in (losses.figures | {"ratio_deviation": deviation}).items():
                        if key in BY_PASS:
                            figures[f"{key}/{passes.names[number]}"] += values[of_pass].sum().item() / size
        summed = processes.total(figures)
        if "ratio_deviation" in figures:
            summed["ratio_deviation"] = processes.greatest(figures["ratio_deviation"])
        return summed

    def _look(self, epoch: int) -> dict[str, float]:
        """Show the fixed prompts and seeds to reward and judge; keep the adapter if it is the best so far."""
        with self._counted("evaluation"):
            evaluation = self.looks.evaluate(epoch)
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
            "reward": self.scorer.composite.state(),
            "watch": self.watch.state(),
            "looks": self.looks.state(),
            "mean_held": self.mean_held.state() if self.mean_held else {},
            "gallery": self.gallery.state() if self.gallery else {},
            "failures": self.failures,
            "forwards": dict(self.forwards),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.policy.set_weights(self.policy.behaviour, state["behaviour"])
        self.policy.set_weights(self.config.adapter, state["policy"])
        self.best = state["best"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.statistics.load_state(state["statistics"])
        self.scorer.composite.load_state(state["reward"])
        self.watch.load_state(state["watch"])
        self.looks.load_state(state["looks"])
        if self.mean_held:
            self.mean_held.load_state(state["mean_held"])
        if self.gallery:
            self.gallery.load_state(state["gallery"])
        self.failures = state["failures"]
        self.forwards = defaultdict(int, state["forwards"])

    def _gain(self, shown: Evaluation, baseline: Evaluation) -> dict[str, Any]:
        pair = (np.array(shown.judge_scores), np.array(baseline.judge_scores))
        return paired_difference(*pair, seed=self.config.seed).as_json()

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the kept adapter to `folder` and return what the run found, image by image the same prompts and seeds.

        Where no evaluation was eligible, the newest adapter is written and `kept_epoch` is None: no default
        before a share of it was found that keeps both. With `keep: newest` it is written whatever the looks said.
        """
        kept, baseline = self.watch.best if self.config.keep == "best" else None, self.watch.history[0]
        self.policy.set_weights(self.config.adapter, self.best if kept else self.policy.weights(self.policy.behaviour))
        if kept is None and self.config.keep == "best":
            logger.warning(
                "no adapter kept its diversity and its distance; the newest one is written: make it no default "
                "but at a share that keeps both on validation images (adapter_strengths of the assemble recipe)"
            )
        shown = kept or self.watch.history[-1]
        metrics: dict[str, Any] = {
            "objective": self.config.objective,
            "kept_epoch": kept.epoch if kept else None,
            "stopped_early": self.watch.stopped,
            "n_images": len(shown.judge_scores),
            "n_prompts": len(self.looks.prompts),
            "baseline": baseline.summary(),
            "aligned": shown.summary(),
            "judge_gain": self._gain(shown, baseline),
            "history": [{"epoch": e.epoch, **e.summary()} for e in self.watch.history],
            "reward_failures": self.failures,
            "unet_forwards": dict(self.forwards),
            "trained_parameters": sum(p.numel() for p in self.policy.parameters()),
        }
        details = {"title": self.config.title, "recipe": asdict(self.config), "metrics": metrics}
        self.policy.save(folder, details)
        return metrics
