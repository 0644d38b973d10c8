"""The mean picture, held where the untrained model has it.

A reward compares pictures of one prompt with each other. What pleases it a little in each, a darker lesion, all of them
come to share, and the mean picture moves away from that of real images. Here some captions are drawn by the untrained
model, too, from the same noise: the latent with the mean put back is the better one, the latent as it was drawn the
worse. A pair differs in nothing but the mean, so nothing else is learnt from it.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from train.rl.drawing import Drawing
from train.rl.prompts import PromptTable
from train.rl.recipe import RlConfig
from train.rl.replaying import Replayer
from train.rl.rollout import Rollout, latent_seeds

CELLS = 8
"""Of a mean picture, along a side: finer than that it is noise of the captions that it was taken over."""


@dataclass(frozen=True)
class Pairs:
    """An epoch's N pairs of latents, in the form of the forward objective (DiffusionNFT, arXiv 2509.16117).

    rollout: 2 N latents, the better ones first, then the worse, a pair at the same noise and timesteps; advantages
    (2 N,): 1 and -1; moved: how far the mean picture lies from the untrained model's, in standard deviations.
    """

    rollout: Rollout
    advantages: np.ndarray
    moved: float

    def rows(self, update: int, updates: int) -> np.ndarray:
        """The latents of one of an epoch's updates, both of each pair."""
        mine = np.array_split(np.arange(len(self.advantages) // 2), updates)[update]
        return np.concatenate([mine, mine + len(self.advantages) // 2])


class MeanHeld:
    """Makes the pairs of each epoch from a fixed set of captions, each with a noise of its own.

    Each epoch draws `mean_redrawn` of them anew, in turn; the mean is over all of them, the others as they would be if
    they had moved since as those did. replayer: of the captions.
    """

    def __init__(self, config: RlConfig, drawing: Drawing, captions: PromptTable, replayer: Replayer) -> None:
        self.config, self.drawing, self.captions, self.replayer = config, drawing, captions, replayer
        self._untrained, self._drawn = torch.empty(0), torch.empty(0)

    def pairs(self, epoch: int) -> Pairs:
        """Latents of the captions whose turn it is in `epoch`, with the mean put back and as they were drawn."""
        config, policy, count = self.config, self.drawing.policy, len(self.captions.prompts)
        everyone, turn = np.arange(count), min(config.mean_redrawn, count)
        ids = np.arange(epoch * turn, (epoch + 1) * turn) % count
        if len(self._untrained):
            worse = self._draw(ids, policy.behaviour)
            now, turned = coarse(worse), torch.from_numpy(ids)
            # What the policy has learnt since is alike for all: the others take it over until it is their turn. Left as
            # they were, they would ask for what has been put back already.
            self._drawn = self._drawn + (now - self._drawn[turned]).mean(dim=0)
            self._drawn[turned] = now
        else:
            self._untrained = coarse(self._draw(everyone, None))
            drawn = self._draw(everyone, policy.behaviour)
            self._drawn, worse = coarse(drawn), drawn[torch.from_numpy(ids)]
        moved = (self._drawn - self._untrained).mean(dim=0)
        back = interpolate(-moved[None], size=worse.shape[2:], mode="bilinear")
        # In standard deviations between pictures: what a unit of latents is worth differs from channel to channel.
        figure = (moved.square().mean() / self._untrained.var(dim=0).mean().clamp(min=1e-12)).sqrt().item()
        # The optimum of the forward objective lies 1 / (2 beta advantage_clip) of the way from worse to better: there
        # the mean is back, and a large weight cannot go beyond.
        better = worse + 2 * config.beta * config.advantage_clip * back
        number = tuple(range(len(ids)))  # both of a pair have one number, which names their noise
        rollout = Rollout(np.tile(ids, 2), number * 2, torch.cat([better, worse]))
        return Pairs(rollout, np.repeat(np.array([1.0, -1.0], np.float32), len(ids)), figure)

    def _draw(self, ids: np.ndarray, adapter: str | None) -> torch.Tensor:
        seeds = latent_seeds(self.config.seed, "rl-mean-held", 0, ids.tolist())
        with self.drawing.policy.using(adapter):
            return self.drawing.sample(self.captions, ids, seeds, self.config.rollout_steps)

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` takes back exactly."""
        return {"untrained": self._untrained, "drawn": self._drawn}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        self._untrained, self._drawn = state["untrained"], state["drawn"]


def coarse(latents: torch.Tensor) -> torch.Tensor:
    """The means of CELLS x CELLS parts of latents (N, C, h, w), or of each element where there are fewer."""
    height, width = latents.shape[2:]
    return adaptive_avg_pool2d(latents, (min(CELLS, height), min(CELLS, width)))
