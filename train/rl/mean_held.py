"""The mean picture, held where the untrained model has it.

A reward compares pictures of one prompt with each other. What pleases it a little in each, a darker lesion, all of them
come to share, and the mean picture moves away from that of real images. Here some captions are drawn by the untrained
model, too, from the same noise: the latent with the mean put back is the better one, the latent as it was drawn the
worse. A pair differs in nothing but the mean, so nothing else is learnt from it.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from train.rl.drawing import Drawing
from train.rl.games import Arena, Game
from train.rl.prompts import PromptTable
from train.rl.rollout import latent_seeds

CELLS = 8
"""Of a mean picture, along a side: finer than that it is noise of the captions that it was taken over."""


class MeanHeld:
    """Makes the game of each epoch from a fixed set of captions, each with a noise of its own.

    Each epoch draws `mean_redrawn` of them anew, in turn; the mean is over all of them, the others as they would be if
    they had moved since as those did.
    """

    def __init__(self, arena: Arena, drawing: Drawing, captions: PromptTable) -> None:
        self.arena, self.drawing, self.captions = arena, drawing, captions
        self._untrained, self._drawn = torch.empty(0), torch.empty(0)

    def game(self, epoch: int) -> Game:
        """Latents of the captions whose turn it is in `epoch`, with the mean put back and as they were drawn."""
        config, policy, count = self.arena.config, self.drawing.policy, len(self.captions.prompts)
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
        better, figures = worse + 2 * config.beta * config.advantage_clip * back, {"mean_moved": figure}
        return self.arena.game(self.captions, ids, better, worse, weight=config.mean_weight, figures=figures)

    def _draw(self, ids: np.ndarray, adapter: str | None) -> torch.Tensor:
        seeds = latent_seeds(self.arena.config.seed, "rl-mean-held", 0, ids.tolist())
        with self.drawing.policy.using(adapter):
            return self.drawing.sample(self.captions, ids, seeds, self.arena.config.rollout_steps)

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
