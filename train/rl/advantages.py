"""Rewards into advantages: how much better than its prompt's other images is this one.

Running statistics a prompt: Black et al. (DDPO, arXiv 2305.13301). Statistics of one group
of images of one prompt: GRPO (arXiv 2402.03300) as applied to images by Flow-GRPO (arXiv 2505.05470); with the
spread of the whole batch, DiffusionNFT (arXiv 2509.16117). Against the mean of the other images
of the prompt, undivided: leave-one-out REINFORCE (Kool et al. 2019; RLOO, arXiv 2402.14740). All normalise
first and clamp afterwards, work in float64, and give exactly zero where all the rewards they compare are equal.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from medviz.errors import InputError

EPSILON = 1e-6


@dataclass(frozen=True)
class Advantages:
    """values (N,) float32, 0 for masked samples; zero_variance: share of the prompts whose rewards are all equal."""

    values: np.ndarray
    zero_variance: float


@dataclass
class PromptStatistics:
    """The newest rewards of each prompt, by prompt id.

    size: rewards kept a prompt; minimum: below so many a prompt is compared with the whole batch instead.
    """

    size: int = 32
    minimum: int = 16
    history: dict[int, deque[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.size:
            raise InputError(
                f"minimum is {self.minimum} of {self.size} rewards a prompt; allowed are 1 <= minimum <= size"
            )

    def add(self, prompt_id: int, rewards: Sequence[float]) -> None:
        """Remember `rewards` (finite) as the newest of `prompt_id`."""
        self.history.setdefault(int(prompt_id), deque(maxlen=self.size)).extend(float(r) for r in rewards)

    def seen(self, prompt_id: int) -> np.ndarray | None:
        """The rewards kept of `prompt_id`, float64, or None while they are fewer than `minimum`."""
        kept = self.history.get(int(prompt_id), ())
        return np.asarray(kept, np.float64) if len(kept) >= self.minimum else None

    def state(self) -> dict[str, Any]:
        """JSON values that `load_state` takes back exactly."""
        return {str(k): list(v) for k, v in self.history.items()}

    def load_state(self, state: Mapping[str, Sequence[float]]) -> None:
        """Take back what `state` gave."""
        self.history = {int(k): deque((float(r) for r in v), maxlen=self.size) for k, v in state.items()}


def normalise(rewards: np.ndarray, among: np.ndarray, spread: float | None = None) -> np.ndarray:
    """(rewards - mean of `among`) / (spread + 1e-6), float64; spread: by default the standard deviation of `among`.

    Exactly zero when every value of both is the same, where rounding of the mean would leave a remainder.
    """
    everything = np.concatenate([rewards, among]).astype(np.float64)
    if everything.size == 0 or everything.min() == everything.max():
        return np.zeros(len(rewards))
    spread = float(among.std(dtype=np.float64)) if spread is None else spread
    return (rewards.astype(np.float64) - among.mean(dtype=np.float64)) / (spread + EPSILON)


def running_advantages(
    prompt_ids: np.ndarray, rewards: np.ndarray, valid: np.ndarray, clip: float, statistics: PromptStatistics
) -> Advantages:
    """Compare each image with the newest images of its prompt, this batch included.

    prompt_ids int (N,), rewards (N,) of any number type, valid bool (N,). A prompt with too short a history is compared
    with the valid part of the batch. Clamped to [-clip, clip].
    """
    seen = {p: statistics.seen(p) for p in _add(prompt_ids, rewards, valid, statistics)}

    def compare(prompt_id: int, group: np.ndarray, batch: np.ndarray) -> np.ndarray:
        history = seen[prompt_id]
        return normalise(group, batch if history is None else history)

    return _advantages(prompt_ids, rewards, valid, clip, compare)


def group_advantages(
    prompt_ids: np.ndarray, rewards: np.ndarray, valid: np.ndarray, clip: float, statistics: PromptStatistics
) -> Advantages:
    """Compare each image with the images of its prompt in this batch alone; arguments as :func:`running_advantages`.

    A group of one has nothing to be compared with: its advantage is 0.
    """
    _add(prompt_ids, rewards, valid, statistics)
    return _advantages(prompt_ids, rewards, valid, clip, lambda _, group, __: normalise(group, group))


def centred_advantages(
    prompt_ids: np.ndarray, rewards: np.ndarray, valid: np.ndarray, clip: float, statistics: PromptStatistics
) -> Advantages:
    """As :func:`group_advantages`, but over the spread of the whole batch about its prompts' means.

    A prompt whose images all score nearly the same then weighs little instead of being blown up to unit spread.
    """
    _add(prompt_ids, rewards, valid, statistics)
    ids, scores, counted = np.asarray(prompt_ids), np.asarray(rewards).astype(np.float64), np.asarray(valid, bool)
    groups = [scores[counted & (ids == p)] for p in np.unique(ids[counted])]
    spread = float(np.sqrt(np.mean(np.concatenate([(g - g.mean()) ** 2 for g in groups])))) if groups else 0.0
    return _advantages(prompt_ids, rewards, valid, clip, lambda _, group, __: normalise(group, group, spread))


def leave_one_out_advantages(
    prompt_ids: np.ndarray, rewards: np.ndarray, valid: np.ndarray, clip: float, statistics: PromptStatistics
) -> Advantages:
    """As :func:`group_advantages`, but each reward less the mean of its prompt's other rewards, not divided.

    The baseline does not hold the image's own reward, so the estimate is unbiased; its size is that of the rewards.
    """
    _add(prompt_ids, rewards, valid, statistics)

    def compare(_: int, group: np.ndarray, __: np.ndarray) -> np.ndarray:
        if len(group) < 2 or group.min() == group.max():
            return np.zeros(len(group))
        return group - (group.sum() - group) / (len(group) - 1)

    return _advantages(prompt_ids, rewards, valid, clip, compare)


ADVANTAGES: dict[str, Callable[..., Advantages]] = {
    "running": running_advantages,
    "group": group_advantages,
    "centred": centred_advantages,
    "leave_one_out": leave_one_out_advantages,
}


def _add(prompt_ids: np.ndarray, rewards: np.ndarray, valid: np.ndarray, statistics: PromptStatistics) -> list[int]:
    """Remember the valid rewards; returns the prompts that have any, ascending."""
    ids, scores, counted = np.asarray(prompt_ids), np.asarray(rewards), np.asarray(valid, bool)
    present = [int(p) for p in np.unique(ids[counted])]
    for prompt_id in present:
        statistics.add(prompt_id, scores[counted & (ids == prompt_id)].tolist())
    return present


def _advantages(
    prompt_ids: np.ndarray,
    rewards: np.ndarray,
    valid: np.ndarray,
    clip: float,
    compare: Callable[[int, np.ndarray, np.ndarray], np.ndarray],
) -> Advantages:
    if not clip > 0:
        raise InputError(f"the advantage clip is {clip}; it must be above 0")
    prompt_ids, valid = np.asarray(prompt_ids), np.asarray(valid, bool)
    rewards = np.asarray(rewards).astype(np.float64)
    values, flat = np.zeros(len(rewards)), []
    for prompt_id in np.unique(prompt_ids[valid]):
        mine = valid & (prompt_ids == prompt_id)
        group = rewards[mine]
        values[mine] = compare(int(prompt_id), group, rewards[valid])
        flat.append(group.min() == group.max())
    return Advantages(np.clip(values, -clip, clip).astype(np.float32), float(np.mean(flat)) if flat else 1.0)
