"""What the policy draws now of real images' captions: the pictures that the likeness reward tells real ones from."""

from collections.abc import Mapping

import numpy as np
import torch

from medviz.rewards.likeness import Likeness
from train.rl.drawing import Drawing
from train.rl.prompts import PromptTable
from train.rl.recipe import RlConfig
from train.rl.rollout import latent_seeds


class Gallery:
    """A picture of each caption; each epoch draws `likeness_redrawn` of them anew, in turn, from noise of the epoch."""

    def __init__(self, config: RlConfig, drawing: Drawing, likeness: Likeness, captions: PromptTable) -> None:
        self.config, self.drawing, self.likeness, self.captions = config, drawing, likeness, captions

    def redraw(self, epoch: int) -> None:
        """Draw the pictures whose turn it is in `epoch` by the behaviour policy; at first, all of them."""
        config, count = self.config, len(self.captions.prompts)
        known = self.likeness.drawn
        start = epoch * config.likeness_redrawn
        ids = np.arange(start, start + min(count, config.likeness_redrawn)) % count if len(known) else np.arange(count)
        seeds = latent_seeds(config.seed, "rl-likeness", epoch, ids.tolist())
        with self.drawing.policy.using(self.drawing.policy.behaviour):
            latents = self.drawing.sample(self.captions, ids, seeds, config.rollout_steps)
        with torch.no_grad():
            parts = self.drawing.images(latents).split(config.rollout_batch)
            features = torch.cat([self.likeness.embed(part.to(config.device)) for part in parts])
        drawn = known.clone() if len(known) else torch.empty_like(features)
        drawn[torch.from_numpy(ids)] = features.to(drawn)
        self.likeness.drawn = drawn

    def state(self) -> dict[str, torch.Tensor]:
        """What `load_state` takes back exactly."""
        return {"drawn": self.likeness.drawn.cpu()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what `state` gave."""
        self.likeness.drawn = state["drawn"]
