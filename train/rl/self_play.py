"""Real images against the policy's own: self-play, which moves what is drawn toward what was photographed.

SPIN-Diffusion (Yuan et al., arXiv 2402.10210) takes a real image of a caption as better than the image that the policy
draws of it; once the two cannot be told apart, nothing is left to learn. Rewards compare pictures of one prompt with
each other and say nothing of what all of them share; this does. Here in the form of the forward objective
(DiffusionNFT, arXiv 2509.16117): the real image has the advantage 1, the drawn one -1, both at the same noise and
timesteps, so that what the two have in common cancels.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import StableDiffusionPipeline

from medviz.domains.base import Domain
from train import seeding
from train.rl.drawing import Drawing
from train.rl.prompts import any_prompt_table
from train.rl.recipe import RlConfig
from train.rl.replaying import Replayer, RewardGradient
from train.rl.rollout import Rollout, latent_seeds


@dataclass(frozen=True)
class Game:
    """An epoch's N captions: rollout: 2 N images, real ones first, then the policy's; advantages (2 N,); replayer: of
    their captions."""

    rollout: Rollout
    advantages: np.ndarray
    replayer: Replayer

    def rows(self, update: int, updates: int) -> np.ndarray:
        """The images of one of an epoch's updates, each real one with its rival."""
        mine = np.array_split(np.arange(len(self.advantages) // 2), updates)[update]
        return np.concatenate([mine, mine + len(self.advantages) // 2])


@dataclass(frozen=True)
class SelfPlay:
    """Makes the game of each epoch; a function of (seed, epoch) and of the policy.

    latents (O, N, C, h, w): of N real images in O orientations; caption(i, rng): a caption of image i. Images are taken
    as often as there are: what is drawn is to have the real mix.
    """

    config: RlConfig
    pipeline: StableDiffusionPipeline
    domain: Domain
    drawing: Drawing
    reward: RewardGradient
    latents: torch.Tensor
    caption: Callable[[int, random.Random], str]

    def game(self, epoch: int) -> Game:
        """The captions of `epoch`, each as photographed and as the behaviour policy draws it now."""
        config, count = self.config, self.config.self_play_images
        chosen = seeding.batch_indices(self.latents.shape[1], count, epoch, config.seed, "rl-self-play")
        captions, real = [], []
        for i in chosen.tolist():
            rng = random.Random(seeding.key(config.seed, "rl-self-play-caption", epoch, i))
            captions.append(self.caption(i, rng))
            real.append(self.latents[rng.randrange(len(self.latents)), i].float())
        table = any_prompt_table(self.pipeline, self.domain, captions)
        numbers = np.arange(count)
        seeds = latent_seeds(config.seed, "rl-self-play-latents", epoch, numbers.tolist())
        policy = self.drawing.policy
        with policy.using(policy.behaviour):
            drawn = self.drawing.sample(table, numbers, seeds, config.rollout_steps)
        twice = np.tile(numbers, 2)  # rivals have one number, which names their noise
        rollout = Rollout(twice, tuple(twice.tolist()), torch.cat([torch.stack(real), drawn]))
        replayer = Replayer(config, self.pipeline, policy, table, None, self.reward)
        return Game(rollout, np.repeat(np.array([1.0, -1.0], np.float32), count), replayer)
