"""Losses on cross-attention maps that move words to their place (arXiv 2506.10633).

Maps are (..., S, h, w), float32: attention to each of the S tokens of one prompt that are no special tokens, over a
grid of h x w cells; leading dimensions (noise levels, samples) are averaged. All losses are differentiable in the maps.
"""

import torch
from torch.nn import functional

from medviz.errors import InputError


def diversity_loss(maps: torch.Tensor) -> torch.Tensor:
    """L_div: mean over pairs of tokens i != j of cos^2(A_i, A_j), a scalar in [0, 1]; 0 for a single token.

    Each A is one token's map, flattened. Raises InputError for another shape.
    """
    _check(maps)
    tokens = maps.shape[-3]
    directions = functional.normalize(maps.flatten(-2), dim=-1)
    squares = (directions @ directions.transpose(-1, -2)).square()
    apart = 1.0 - torch.eye(tokens, dtype=squares.dtype, device=squares.device)
    return ((squares * apart).sum(dim=(-1, -2)) / max(1, tokens * (tokens - 1))).mean()


def location_loss(maps: torch.Tensor, region: torch.Tensor, alpha: float, eps: float) -> torch.Tensor:
    """L_loc: mean of 1 - cos(A, trg) with trg = 1[G > eps] * stopgrad(A) + alpha * G, a scalar in [0, 1].

    A (..., h, w) is the mean of the maps over the tokens, region (h, w) is G >= 0. Raises InputError when the grids
    differ, or alpha or eps is negative.
    """
    _check(maps)
    if region.shape != maps.shape[-2:]:
        raise InputError(f"maps and region must share one grid, found {tuple(maps.shape[-2:])}, {tuple(region.shape)}")
    if alpha < 0 or eps < 0:
        raise InputError(f"alpha and eps must be at least 0, found {alpha} and {eps}")
    mean = maps.mean(dim=-3)
    target = (region > eps) * mean.detach() + alpha * region
    return (1.0 - functional.cosine_similarity(mean.flatten(-2), target.flatten(-2), dim=-1)).mean()


def token_mask_loss(probs: torch.Tensor, words: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Share, squared, of some tokens' attention that falls outside their mask: (B,) in [0, 1].

    L_token of TokenCompose (Wang et al. 2023, arXiv 2312.03626, equation 4), on the mean map of the tokens. probs
    (B, h, w, L): attention to all tokens. words (B, L): 1 at the tokens that count. masks (B, H, W) in [0, 1], brought
    to the maps' grid by the greatest value of each cell. Raises InputError for shapes that do not agree.
    """
    if probs.shape[0] != masks.shape[0] or (probs.shape[0], probs.shape[-1]) != tuple(words.shape):
        raise InputError(
            f"maps, words and masks must agree, found {tuple(probs.shape)}, {tuple(words.shape)}, {tuple(masks.shape)}"
        )
    maps = torch.einsum("bhwl,bl->bhw", probs, words)
    inside = functional.adaptive_max_pool2d(masks[:, None], maps.shape[-2:])[:, 0]
    share = (maps * inside).sum(dim=(1, 2)) / maps.sum(dim=(1, 2)).clamp_min(1e-12)
    return (1.0 - share).square()


def _check(maps: torch.Tensor) -> None:
    if maps.ndim < 3 or min(maps.shape) < 1:
        raise InputError(f"attention maps must be (..., S, h, w) and hold something, found {tuple(maps.shape)}")
