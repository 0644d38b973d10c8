"""Whether the peer's DDPO and ours are one algorithm: both learn from the peer's first epoch.

`python -m train.benchmarks.rl.parity REQUEST.json ANSWER.json`, in a program of its own. The peer runs an epoch as it
is; our learner gets the images that it drew, with their rewards, and before each update the weights that the peer then
had. So log-probabilities, advantages and gradients can be compared value by value, at the later update with ratios that
have left 1 and a clip that acts. Where they agree, what differs between two runs of the benchmark is chance: each side
draws noise of its own.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.benchmarks.rl import ours, peer
from train.benchmarks.rl.task import Work, versions
from train.rl.learner import RlLearner
from train.rl.rollout import Rollout, replay_step


@dataclass(frozen=True)
class Update:
    """One optimiser step of the peer: the weights before it, their gradient, and what each pass was given."""

    weights: dict[str, torch.Tensor]
    gradient: torch.Tensor
    passes: list[tuple[torch.Tensor, ...]]


@dataclass(frozen=True)
class Epoch:
    """The peer's first epoch. images: tensors of N rows, by the peer's names; rewards (N,)."""

    images: Mapping[str, torch.Tensor]
    rewards: np.ndarray
    updates: list[Update]

    def rollout(self, learner: RlLearner, prompts: list[str]) -> Rollout:
        """The peer's images as ours would be kept."""
        chain = torch.cat([self.images["latents"], self.images["next_latents"][:, -1:]], 1)
        ids = np.array([learner.table.prompts.index(prompt) for prompt in prompts])
        steps = tuple(range(chain.shape[1] - 1))
        return Rollout(ids, tuple(range(len(ids))), chain[:, -1], chain, self.images["log_probs"], steps)

    def given(self, update: Update) -> tuple[np.ndarray, np.ndarray]:
        """The rows that an update learns from and the advantages it gives them, found by the latents of its first
        pass, in which every image is at a step of its own."""
        latents, timesteps, _, __, advantages, *___ = update.passes[0]
        order = self.images["timesteps"][0].tolist()
        rows = [
            int((self.images["latents"][:, order.index(int(t))] == x).flatten(1).all(1).nonzero()[0])
            for x, t in zip(latents, timesteps, strict=True)
        ]
        return np.array(rows), advantages.numpy()


def observed(work: Work) -> Epoch:
    """Run the peer's first epoch and keep what it did; its methods are listened to and do what they did."""
    rewards: list[float] = []
    trainer = peer.open_trainer(work, work.asked(0), rewards)
    live = {n.replace(".default.", "."): w for n, w in trainer.sd_pipeline.unet.named_parameters() if "lora_" in n}
    images: dict[str, torch.Tensor] = {}
    passes: list[tuple[torch.Tensor, ...]] = []
    updates: list[Update] = []
    generate, loss = trainer._generate_samples, trainer.calculate_loss

    def generated(*arguments: Any, **named: Any) -> Any:
        made = generate(*arguments, **named)
        images.update({key: torch.cat([part[key] for part in made[0]]) for key in made[0][0]})
        return made

    def replayed(*given: torch.Tensor) -> Any:
        passes.append(given)
        return loss(*given)

    def stepping(*_: Any) -> None:
        weights = {name: weight.detach().clone() for name, weight in live.items()}
        gradient = torch.cat([weight.grad.flatten() for weight in live.values() if weight.grad is not None])
        updates.append(Update(weights, gradient, passes.copy()))
        passes.clear()

    trainer._generate_samples, trainer.calculate_loss = generated, replayed
    trainer.optimizer.optimizer.register_step_pre_hook(stepping)
    trainer.step(0, 0)
    return Epoch(images, np.array(rewards), updates)


def compared(work: Work) -> dict[str, Any]:
    """The greatest differences between what the peer made of its first epoch and what ours makes of it; JSON values.

    log_probs, advantages: the greatest absolute difference. gradients: of each update, |ours - the peer's| over
    |the peer's|; clipped: of each update, the share of ratios outside the clip range.
    """
    epoch, learner = observed(work), ours.learner(work)
    rollout, all_rows = epoch.rollout(learner, work.asked(0)), np.arange(work.images)
    found = learner.advantages(
        rollout.prompt_ids, epoch.rewards, all_rows >= 0, learner.config.advantage_clip, learner.statistics
    ).values
    log_probs, advantages, gradients, clipped = 0.0, 0.0, [], []
    for number, update in enumerate(epoch.updates):
        learner.policy.set_weights(learner.config.adapter, update.weights)
        if number == 0:
            log_probs = _log_probs_differ(learner, rollout, all_rows)
        rows, theirs = epoch.given(update)
        advantages = max(advantages, float(np.abs(found[rows] - theirs).max()))
        learner.optimizer.zero_grad()
        clipped.append(learner.accumulate(0, rollout, found, rows)["clip_fraction"])
        names = learner.policy.weights(learner.config.adapter)
        by_name = dict(zip(names, learner.policy.parameters(), strict=True))
        mine = torch.cat([by_name[n].grad.flatten() for n in update.weights])  # type: ignore[union-attr]
        gradients.append(((mine - update.gradient).norm() / update.gradient.norm()).item())
    return {
        "images": work.images,
        "log_probs": log_probs,
        "advantages": advantages,
        "gradients": gradients,
        "clipped": clipped,
        "versions": versions(),
    }


def _log_probs_differ(learner: RlLearner, rollout: Rollout, rows: np.ndarray) -> float:
    schedule = learner.schedule
    if schedule is None or rollout.log_probs is None:
        raise ValueError("the methods compared replay a random chain")
    unet, scale, worst = learner.pipeline.unet, learner.config.guidance, 0.0
    for index in range(len(schedule)):
        with torch.no_grad():
            step = replay_step(unet, learner.table, rollout, rows, index, schedule, scale)
        worst = max(worst, (step.log_prob - rollout.log_probs[:, index]).abs().max().item())
    return worst


def main(arguments: list[str]) -> None:
    """Compare on the request in the first file, a request of our ddpo, and write the answer to the second."""
    asked, answer = map(Path, arguments)
    content = json.loads(asked.read_text())
    work = Work(**{**content, "prompts": tuple(content["prompts"])})
    torch.set_num_threads(work.threads)
    answer.write_text(json.dumps(compared(work), allow_nan=False))


if __name__ == "__main__":
    main(sys.argv[1:])
