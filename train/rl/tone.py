"""How light and what colour a picture is, and rewards that do not speak of it.

Where a classifier likes the darker of two pictures of one prompt, whatever was asked for, each comparison is a small
vote for darker pictures, and all of them may drift together, far from real images. What the pictures' tones explain
of the rewards, alike for all prompts, is taken out of them by least squares; what one prompt asks of colour stays.

What is clearer to a classifier may be darker without a line that says so, so tones can be held as well, by integral
control: some pictures are drawn by the untrained model, too, from the same noise, and the sum of what the mean tones
have moved is a reward for moving back. That holds them on the prompts that are trained on, and on others as far as
these speak for them.
"""

from collections.abc import Mapping

import numpy as np
import torch

from train import processes
from train.rl.drawing import Drawing
from train.rl.recipe import RlConfig
from train.rl.rollout import Rollout, latent_seeds

RIDGE = 1e-3
"""Of the regression, as a share of a tone's variance: keeps it defined where pictures hardly differ in tone."""


def tones(images: torch.Tensor) -> torch.Tensor:
    """Mean colour of the middle and of what is around it: (N, 6) of images (N, 3, H, W)."""
    height, width = images.shape[-2:]
    middle = images[..., height // 4 : height - height // 4, width // 4 : width - width // 4]
    whole, inner = (part.flatten(2).double().sum(2) for part in (images, middle))
    around = (whole - inner) / (height * width - middle[0, 0].numel())
    return torch.cat([inner / middle[0, 0].numel(), around], dim=1)


class ToneKeeper:
    """Keeps rewards from moving the mean tones: see `tone_blind` and `tone_held` of the recipe."""

    def __init__(self, config: RlConfig, drawing: Drawing) -> None:
        self.config, self.drawing = config, drawing
        self.moved = np.zeros(6)
        """Of each tone, the sum over epochs of its mean's distance from the untrained model's."""

    def watch(self, epoch: int, rollout: Rollout) -> dict[str, float]:
        """See how far the mean tones of `rollout` are from the untrained model's, on `tone_held` of its images."""
        count = len(rollout.prompt_ids)
        rows = np.arange(self.config.tone_held) * count // max(self.config.tone_held, 1)
        if not len(rows):
            return {}
        seeds = latent_seeds(self.config.seed, "rl-latents", epoch, [rollout.indices[row] for row in rows])
        with self.drawing.policy.using(None):
            untrained = self.drawing.sample(
                self.drawing.table, rollout.prompt_ids[rows], seeds, self.config.rollout_steps
            )
        drawn, former = (tones(self.drawing.images(each)) for each in (rollout.latents[rows], untrained))
        moved = (drawn - former).mean(dim=0).numpy()
        self.moved = self.moved + moved
        return {"tone_moved": float(np.abs(moved).mean()), "tone_moved_middle": float(moved[:3].mean())}

    def rewards(
        self, rewards: np.ndarray, images: torch.Tensor, prompt_ids: np.ndarray, valid: np.ndarray
    ) -> np.ndarray:
        """`rewards` (N,) as they are learnt from. images: this process's share (n, 3, H, W) of the N."""
        config = self.config
        if not (config.tone_blind or config.tone_held):
            return rewards
        seen = processes.gather(tones(images), len(rewards)).numpy()
        found = without_tone(rewards, seen, prompt_ids, valid) if config.tone_blind else rewards
        return found + config.tone_rate * toward(-self.moved, found, seen, prompt_ids, valid)

    def state(self) -> dict[str, list[float]]:
        """What `load_state` takes back exactly."""
        return {"moved": self.moved.tolist()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Take back what `state` gave."""
        self.moved = np.array(state["moved"])


def within(values: np.ndarray, prompt_ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`values` (N, ...) less the mean of their prompt's valid ones; 0 where valid is False."""
    found = np.zeros(values.shape)
    for prompt_id in np.unique(prompt_ids[valid]):
        mine = valid & (prompt_ids == prompt_id)
        found[mine] = values[mine] - values[mine].mean(axis=0)
    return found


def toward(
    direction: np.ndarray, rewards: np.ndarray, tones: np.ndarray, prompt_ids: np.ndarray, valid: np.ndarray
) -> np.ndarray:
    """A reward (N,) for tones (N, K) that differ from those of their prompt's others as `direction` (K,) says.

    Both count in standard deviations of each tone within prompts: a direction of one, along one tone, makes rewards
    that spread like `rewards` do within theirs.
    """
    apart = within(tones, prompt_ids, valid)
    spread, of_rewards = (_spread(each, valid) for each in (apart, within(rewards, prompt_ids, valid)))
    scaled = np.divide(apart, spread, out=np.zeros_like(apart), where=spread > 0)
    return of_rewards * scaled @ np.divide(direction, spread, out=np.zeros_like(spread), where=spread > 0)


def _spread(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    return np.sqrt((values[valid] ** 2).mean(axis=0)) if valid.any() else np.zeros(values.shape[1:])


def without_tone(rewards: np.ndarray, tones: np.ndarray, prompt_ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`rewards` (N,) less what `tones` (N, K) explain of them within their prompts, by one line for all prompts.

    The mean of each prompt stays. Where valid is False rewards are returned as they are and have no say.
    """
    found = np.asarray(rewards, np.float64).copy()
    x, y = within(tones, prompt_ids, valid), within(found, prompt_ids, valid)
    spread = _spread(x, valid)
    x = np.divide(x, spread, out=np.zeros_like(x), where=spread > 0)
    slope = np.linalg.solve(x.T @ x + RIDGE * max(valid.sum(), 1) * np.eye(x.shape[1]), x.T @ y)
    found[valid] -= (x @ slope)[valid]
    return found
