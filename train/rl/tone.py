"""How light and what colour a picture is, and rewards that do not speak of it.

Where a classifier likes the darker of two pictures of one prompt, whatever was asked for, each comparison is a small
vote for darker pictures, and all of them drift together, far from real images. What the pictures' tones explain
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


def without_tone(rewards: np.ndarray, tones: np.ndarray, prompt_ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`rewards` (N,) less what `tones` (N, K) explain of them within their prompts, by one line for all prompts.

    The mean of each prompt stays. Where valid is False rewards are returned as they are and have no say.
    """
    rewards, found = np.asarray(rewards, np.float64), np.asarray(rewards, np.float64).copy()
    x, y = np.zeros((len(rewards), tones.shape[1])), np.zeros(len(rewards))
    for prompt_id in np.unique(prompt_ids[valid]):
        mine = valid & (prompt_ids == prompt_id)
        x[mine], y[mine] = tones[mine] - tones[mine].mean(axis=0), rewards[mine] - rewards[mine].mean()
    spread = np.sqrt((x[valid] ** 2).mean(axis=0)) if valid.any() else np.zeros(tones.shape[1])
    x = np.divide(x, spread, out=np.zeros_like(x), where=spread > 0)
    slope = np.linalg.solve(x.T @ x + RIDGE * max(valid.sum(), 1) * np.eye(x.shape[1]), x.T @ y)
    found[valid] -= (x @ slope)[valid]
    return found
