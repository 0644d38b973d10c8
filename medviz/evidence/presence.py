"""Whether an attribute is in an image, read from its mask alone."""

from collections.abc import Sequence

import torch

FLOOR = 8.0
"""Largest size of a presence, in logits: beyond it a mask says no more."""


def presence(logits: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """Presence (B, K) in logits, within [-FLOOR, FLOOR], of mask logits (B, K, h, w).

    The logit of the mean probability of an attribute's most probable pixels. It grows with the area that is surely
    covered, up to its share of the image, and a spot much smaller than that is not enough. shares: one an attribute,
    the part of the image that a plain example covers, in (0, 1]. Differentiable.
    """
    pixels = logits.shape[-2] * logits.shape[-1]
    columns = []
    for column, share in enumerate(shares):
        most = logits[:, column].flatten(1).float().topk(max(1, round(share * pixels)), dim=1, sorted=False).values
        columns.append(torch.sigmoid(most).mean(dim=1))
    return torch.logit(torch.stack(columns, dim=1), eps=1e-6).clamp(-FLOOR, FLOOR)
