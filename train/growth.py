"""A wider UNet that draws what a narrower one drew, for training to go on from (Net2Net, arXiv 1511.05641, section 2).

Every channel of the wider network is a copy of one of the narrower's, in the same order, so that the groups of norms
and the heads of attention keep their members. What reads a copied channel shares its weight out among the copies,
unequally by chance: copies that are read alike would have one gradient and stay copies.

Exact where all widths are multiplied by one number. Elsewhere it is near: groups of a norm over channels of two levels,
which the decoder half concatenates, get other members.
"""

from itertools import accumulate, pairwise

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from medviz.errors import InputError

TIMESTEPS = 1000  # of every schedule here
Layer = nn.Conv2d | nn.Linear | nn.GroupNorm | nn.LayerNorm
Widths = tuple[int, ...]
Segments = list[tuple[int, int]]
"""(old, new) widths of what lies beside each other on one axis."""


def grown(
    unet: UNet2DConditionModel, channels: Widths, cross_attention: tuple[bool, ...], seed: int = 0
) -> UNet2DConditionModel:
    """`unet` with `channels` at its levels, finest first, and encoder attention where `cross_attention` says.

    An attention that it did not have adds nothing at first. fp32; a function of the seed.

    Raises InputError for another number of levels, for a level that would get narrower or lose its attention, for
    widths that the groups of its norms do not divide, and for neighbours of one width that had two, or the reverse.
    """
    config = dict(unet.config)
    old, groups = tuple(config["block_out_channels"]), config["norm_num_groups"]
    had = tuple("CrossAttn" in kind for kind in config["down_block_types"])
    if len(channels) != len(old) or len(cross_attention) != len(old):
        raise InputError(
            f"the UNet has {len(old)} levels; found {len(channels)} channels, {len(cross_attention)} others"
        )
    if any(n < o for o, n in zip(old, channels, strict=True)) or any(c % groups for c in channels):
        raise InputError(f"channels must be at least {old} and multiples of {groups} to grow, found {channels}")
    if any((a == b) != (c == d) for (a, b), (c, d) in zip(pairwise(old), pairwise(channels), strict=True)):
        # between equal widths a block reads its input as it is, between others through a learnt layer
        raise InputError(
            f"neighbouring channels must differ where they did in {old}, and there alone; found {channels}"
        )
    if any(h and not c for h, c in zip(had, cross_attention, strict=True)):
        raise InputError(f"attention cannot be taken away: the UNet has {had}, found {cross_attention}")
    changes = {
        "block_out_channels": channels,
        "down_block_types": tuple("CrossAttnDownBlock2D" if c else "DownBlock2D" for c in cross_attention),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wide = UNet2DConditionModel.from_config({**config, **changes})
    generator = torch.Generator().manual_seed(seed)
    narrow = dict(unet.named_modules())
    beside = _concatenated(old, channels, config["layers_per_block"])
    with torch.no_grad():
        for name, module in wide.named_modules():
            if name not in narrow:
                if name.endswith("proj_out"):
                    module.weight.zero_()
                    module.bias.zero_()
            elif isinstance(module, Layer):
                reads_both = name.endswith(("norm1", "conv1", "conv_shortcut"))
                _copy(narrow[name], module, beside.get(name.rpartition(".")[0]) if reads_both else None, generator)
        _tell_time_alike(unet, wide)
        for name, module in wide.named_modules():
            if name.endswith("to_q") and name in narrow:  # a head's products are summed over more channels now
                module.weight.mul_((narrow[name].weight.shape[0] / module.weight.shape[0]) ** 0.5)
    return wide


def _concatenated(old: Widths, new: Widths, layers: int) -> dict[str, Segments]:
    """What lies beside each other in what the residual blocks of the decoder half read: hidden channels, a skip's."""
    levels = list(zip(old, new, strict=True))[::-1]
    found: dict[str, Segments] = {}
    for number, here in enumerate(levels):
        before, finer = levels[max(number - 1, 0)], levels[min(number + 1, len(levels) - 1)]
        for j in range(layers + 1):
            found[f"up_blocks.{number}.resnets.{j}"] = [before if j == 0 else here, finer if j == layers else here]
    return found


def _sources(segments: Segments) -> torch.Tensor:
    """The old channel that each new one is a copy of, ascending within each segment."""
    starts = [0, *accumulate(old for old, _ in segments)]
    return torch.cat([s + torch.arange(new) * old // new for s, (old, new) in zip(starts, segments, strict=False)])


def _copy(source: Layer, target: Layer, beside: Segments | None, generator: torch.Generator) -> None:
    rows = _sources([(len(source.weight), len(target.weight))])
    if isinstance(target, nn.GroupNorm | nn.LayerNorm):
        rows = _sources(beside) if beside else rows
        weight = source.weight[rows]
    else:
        columns = _sources(beside or [(source.weight.shape[1], target.weight.shape[1])])
        shares = 0.5 + torch.rand((len(rows), len(columns)), generator=generator)
        of_all = torch.zeros((len(rows), source.weight.shape[1])).index_add_(1, columns, shares)
        shares /= of_all[:, columns]
        weight = source.weight[rows][:, columns] * shares.view(*shares.shape, *[1] * (source.weight.ndim - 2))
    target.weight.copy_(weight)
    if target.bias is not None and source.bias is not None:
        target.bias.copy_(source.bias[rows])


def _tell_time_alike(unet: UNet2DConditionModel, wide: UNet2DConditionModel) -> None:
    """The first layer on the timestep's sines and cosines, which have other frequencies now: what comes nearest."""
    times = torch.arange(TIMESTEPS)
    before, after = unet.time_proj(times).double(), wide.time_proj(times).double()
    reading = torch.linalg.lstsq(after, before, driver="gelsd").solution
    source, target = unet.time_embedding.linear_1.weight, wide.time_embedding.linear_1.weight
    target.copy_((source.double() @ reading.T)[_sources([(len(source), len(target))])])
