"""Real images against the policy's own: self-play, which moves what is drawn toward what was photographed.

SPIN-Diffusion (Yuan et al., arXiv 2402.10210) takes a real image of a caption as better than the image that the policy
draws of it; once the two cannot be told apart, nothing is left to learn. Rewards compare pictures of one prompt with
each other and say nothing of what all of them share; this does.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from medviz.domains.base import Domain
from train import seeding
from train.rl.drawing import Drawing
from train.rl.games import Arena, Game
from train.rl.prompts import any_prompt_table
from train.rl.rollout import latent_seeds


@dataclass(frozen=True)
class SelfPlay:
    """Makes the game of each epoch; a function of (seed, epoch) and of the policy.

    latents (O, N, C, h, w): of N real images in O orientations; caption(i, rng): a caption of image i. Images are taken
    as often as there are: what is drawn is to have the real mix.
    """

    arena: Arena
    domain: Domain
    drawing: Drawing
    latents: torch.Tensor
    caption: Callable[[int, random.Random], str]

    def game(self, epoch: int) -> Game:
        """The captions of `epoch`, each as photographed and as the behaviour policy draws it now."""
        config, policy = self.arena.config, self.drawing.policy
        chosen = seeding.batch_indices(
            self.latents.shape[1], config.self_play_images, epoch, config.seed, "rl-self-play"
        )
        captions, real = [], []
        for i in chosen.tolist():
            rng = random.Random(seeding.key(config.seed, "rl-self-play-caption", epoch, i))
            captions.append(self.caption(i, rng))
            real.append(self.latents[rng.randrange(len(self.latents)), i].float())
        prompts = any_prompt_table(self.arena.pipeline, self.domain, captions, config.guidance)
        ids = np.arange(len(captions))
        seeds = latent_seeds(config.seed, "rl-self-play-latents", epoch, ids.tolist())
        with policy.using(policy.behaviour):
            drawn = self.drawing.sample(prompts, ids, seeds, config.rollout_steps)
        return self.arena.game(prompts, ids, torch.stack(real), drawn, weight=config.self_play_weight)

    def state(self) -> dict[str, torch.Tensor]:
        """Nothing: all of it is a function of the epoch and of the policy."""
        return {}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """See `state`."""
