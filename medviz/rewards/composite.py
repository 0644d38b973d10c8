"""Several rewards as one: a weighted sum, each on the scale of the images it was seen on.

Rewards have scales of their own (a margin in [-1, 1], a cosine that moves by hundredths), so a weight would mean little
without a common one. Mean and spread run along by Welford's method (1962), which needs no history and loses no digits.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from medviz.errors import InputError
from medviz.rewards.registry import Drawn, RewardFunction, get_reward

LEAST_SPREAD = 1e-6


@dataclass
class RunningMoments:
    """Count, mean and sum of squared distances from the mean of the values seen, as Python floats (float64)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, values: torch.Tensor) -> None:
        """See `values` (any shape); those that are not finite are left out."""
        for value in values.detach().double().flatten().tolist():
            if math.isfinite(value):
                self.count += 1
                away = value - self.mean
                self.mean += away / self.count
                self.squares += away * (value - self.mean)

    @property
    def spread(self) -> float:
        """Standard deviation; 1 while fewer than two values were seen, or all of them were the same."""
        spread = math.sqrt(self.squares / self.count) if self.count > 1 else 0.0
        return spread if spread > LEAST_SPREAD else 1.0


@dataclass
class Composite:
    """The weighted sum of the rewards in `functions`, each less its mean and over its spread.

    functions and weights: by name. running: moments of all rewards observed, which training goes by. start: those of
    the first rewards observed, which never change: what an image is worth to an onlooker must not depend on when it is
    asked. A composite of one reward is that reward as it is.
    """

    functions: Mapping[str, RewardFunction]
    weights: Mapping[str, float]
    running: dict[str, RunningMoments] = field(default_factory=dict)
    start: dict[str, RunningMoments] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.functions or self.functions.keys() != self.weights.keys():
            raise InputError(
                f"a reward needs functions and their weights by the same names, found {sorted(self.functions)} and "
                f"{sorted(self.weights)}"
            )
        for name, weight in self.weights.items():
            if not math.isfinite(weight) or weight == 0:
                raise InputError(f"the weight of {name!r} is {weight}; it must be a finite number other than 0")

    def parts(self, drawn: Drawn) -> dict[str, torch.Tensor]:
        """Each reward as it is, (B,); gradients flow to the images where a reward has any."""
        return {name: reward(drawn) for name, reward in self.functions.items()}

    def combine(self, parts: Mapping[str, torch.Tensor], *, at_start: bool = False) -> torch.Tensor:
        """The sum (B,) of `parts` by the running moments, or by those of the start; changes neither."""
        moments = self.start if at_start else self.running
        if len(self.weights) == 1:
            return next(iter(parts.values()))
        terms = []
        for name, weight in self.weights.items():
            seen = moments.get(name, RunningMoments())
            terms.append(weight * (parts[name] - seen.mean) / seen.spread)
        return torch.stack(terms).sum(0)

    def observe(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Let the running moments see `parts`, (B,) each; the first that are seen set those of the start, too."""
        for name in self.weights:
            self.running.setdefault(name, RunningMoments()).add(parts[name])
        if not self.start:
            self.start = {name: RunningMoments(**vars(seen)) for name, seen in self.running.items()}

    def state(self) -> dict[str, Any]:
        """JSON values that `load_state` takes back exactly."""
        moments = {"running": self.running, "start": self.start}
        return {kind: {name: vars(seen).copy() for name, seen in held.items()} for kind, held in moments.items()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.running, self.start = (
            {name: RunningMoments(**seen) for name, seen in state[kind].items()} for kind in ("running", "start")
        )


def composite(weights: Mapping[str, float]) -> Composite:
    """The composite of rewards of the registry. Raises InputError for a name it does not have, or without any."""
    return Composite({name: get_reward(name) for name in weights}, dict(weights))
