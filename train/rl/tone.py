"""How light and what colour a picture is, and rewards that do not speak of it.

Where a classifier likes the darker of two pictures of one prompt, whatever was asked for, each comparison is a small
vote for darker pictures, and all of them may drift together, far from real images. What the pictures' tones explain
of the rewards, alike for all prompts, is taken out of them by least squares; what one prompt asks of colour stays.
"""

import numpy as np
import torch

RIDGE = 1e-3
"""Of the regression, as a share of a tone's variance: keeps it defined where pictures hardly differ in tone."""


def tones(images: torch.Tensor) -> torch.Tensor:
    """Mean colour of the middle and of what is around it: (N, 6) of images (N, 3, H, W)."""
    height, width = images.shape[-2:]
    middle = images[..., height // 4 : height - height // 4, width // 4 : width - width // 4]
    whole, inner = (part.flatten(2).double().sum(2) for part in (images, middle))
    around = (whole - inner) / (height * width - middle[0, 0].numel())
    return torch.cat([inner / middle[0, 0].numel(), around], dim=1)


def within(values: np.ndarray, prompt_ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`values` (N, ...) less the mean of their prompt's valid ones; 0 where valid is False."""
    found = np.zeros(values.shape)
    for prompt_id in np.unique(prompt_ids[valid]):
        mine = valid & (prompt_ids == prompt_id)
        found[mine] = values[mine] - values[mine].mean(axis=0)
    return found


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
