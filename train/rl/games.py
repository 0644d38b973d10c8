"""Latents that are held against others of the same captions, whatever the rewards say: the better ones and the worse.

In the form of the forward objective (DiffusionNFT, arXiv 2509.16117): the better have the advantage 1, the worse -1,
both of a pair at the same noise and timesteps, so that what the two have in common cancels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from train.rl.policy import Policy
from train.rl.prompts import PromptTable
from train.rl.recipe import RlConfig
from train.rl.replaying import Replayer, RewardGradient
from train.rl.rollout import Rollout


@dataclass(frozen=True)
class Game:
    """An epoch's N pairs: rollout: 2 N latents, the better ones first, then the worse; advantages (2 N,); replayer: of
    their captions; weight: beside the reward's objective; figures: to be logged."""

    rollout: Rollout
    advantages: np.ndarray
    replayer: Replayer
    weight: float
    figures: dict[str, float]

    def rows(self, update: int, updates: int) -> np.ndarray:
        """The latents of one of an epoch's updates, each better one with its rival."""
        mine = np.array_split(np.arange(len(self.advantages) // 2), updates)[update]
        return np.concatenate([mine, mine + len(self.advantages) // 2])


class Games(Protocol):
    """What makes the game of each epoch; a function of (seed, epoch), of the policy, and of its own state."""

    def game(self, epoch: int) -> Game: ...

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` takes back exactly."""
        ...

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        ...


@dataclass(frozen=True)
class Arena:
    """Where games are played: what all of a run's have in common."""

    config: RlConfig
    pipeline: StableDiffusionPipeline
    policy: Policy
    reward: RewardGradient

    def game(
        self,
        captions: PromptTable,
        ids: np.ndarray,
        better: torch.Tensor,
        worse: torch.Tensor,
        *,
        weight: float = 1.0,
        figures: dict[str, float] | None = None,
    ) -> Game:
        """The game of better (N, C, h, w) against worse (N, C, h, w), whose captions are `ids` (N,) of `captions`."""
        number = tuple(range(len(ids)))  # rivals have one number, which names their noise
        rollout = Rollout(np.tile(ids, 2), number * 2, torch.cat([better, worse]))
        replayer = Replayer(self.config, self.pipeline, self.policy, captions, None, self.reward)
        advantages = np.repeat(np.array([1.0, -1.0], np.float32), len(ids))
        return Game(rollout, advantages, replayer, weight, figures or {})
