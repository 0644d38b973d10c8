"""Randomness as a function of (seed, stage, step, sample index).

No stream is ever advanced by "whatever ran before": a resumed run, another worker count or another rank draws the
same numbers, because each draw is made from a key that names it.
"""

import hashlib

import numpy as np
import torch


def key(seed: int, *names: str | int) -> int:
    """A 63-bit integer that depends on every part of its name, equal on every machine."""
    parts = tuple(name if isinstance(name, str) else int(name) for name in names)
    digest = hashlib.blake2b(repr((int(seed), *parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator seeded by :func:`key`."""
    return torch.Generator().manual_seed(key(seed, *names))


def numpy_generator(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator seeded by :func:`key`."""
    return np.random.Generator(np.random.Philox(key(seed, *names)))


def normal(shape: tuple[int, ...], seed: int, stage: str, step: int, sample_indices: list[int]) -> torch.Tensor:
    """Standard normal noise (len(sample_indices), *shape), one generator a sample, fp32.

    Sample ``i`` gets the same noise whichever batch or rank it is in.
    """
    return torch.stack([torch.randn(shape, generator=torch_generator(seed, stage, step, i)) for i in sample_indices])


def batch_indices(
    count: int, batch: int, step: int, seed: int, stage: str, weights: np.ndarray | None = None
) -> np.ndarray:
    """Which examples the batch of ``step`` holds, int64 (batch,).

    Without weights every epoch is a permutation of ``range(count)`` of its own; position ``step * batch + j`` of the
    endless sequence of epochs decides. With weights each position draws independently, in proportion to them.
    """
    if weights is not None:
        cumulative = np.cumsum(np.asarray(weights, np.float64))
        draws = numpy_generator(seed, stage, "weighted", step).random(batch) * cumulative[-1]
        return np.minimum(np.searchsorted(cumulative, draws, side="right"), count - 1)
    positions = np.arange(step * batch, (step + 1) * batch)
    chosen = np.empty(batch, np.int64)
    for epoch in np.unique(positions // count):
        order = numpy_generator(seed, stage, "epoch", int(epoch)).permutation(count)
        mine = positions // count == epoch
        chosen[mine] = order[positions[mine] % count]
    return chosen
