"""How strongly the prompt pulls at each timestep: classifier-free guidance in a limited interval of noise levels.

Where noise hides all but the average colour, guidance drives pictures towards one look (fewer colours, farther from
real images); where shapes and lines are decided, it makes them follow the prompt. Full guidance is therefore kept to an
interval (Kynkaanniemi et al. 2024, arXiv 2404.07724), and a share of it may remain outside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from medviz.errors import InputError

WHOLE_INTERVAL = (0, 1000)
GUIDANCE_INTERVAL = ("guidance_interval", "guidance_outside")  # what a recipe says of it beside guidance_scale


@dataclass(frozen=True)
class Guidance:
    """`scale` (1 is none) at timesteps low <= t <= high of `interval`, and 1 + outside * (scale - 1) at the others.

    Raises InputError when scale is not finite, interval is not 0 <= low <= high, or outside is not in [0, 1].
    """

    scale: float = 1.0
    interval: tuple[int, int] = WHOLE_INTERVAL
    outside: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise InputError(f"guidance scale must be a finite number, found {self.scale!r}")
        low, high = self.interval
        object.__setattr__(self, "interval", (low, high))  # a recipe's list is no other guidance than a tuple
        if not 0 <= low <= high:
            raise InputError(f"the guidance interval must be two timesteps, 0 <= low <= high, found {self.interval!r}")
        if not 0.0 <= self.outside <= 1.0:
            raise InputError(f"the share of guidance outside its interval must be from 0 to 1, found {self.outside!r}")

    @classmethod
    def of_recipe(cls, recipe: Mapping[str, Any], default_scale: float) -> Guidance:
        """The guidance that a model folder's recipe names; a recipe that names none has `default_scale` throughout."""
        low, high = recipe.get("guidance_interval", WHOLE_INTERVAL)
        scale = float(recipe.get("guidance_scale", default_scale))
        return cls(scale, (int(low), int(high)), float(recipe.get("guidance_outside", 0.0)))

    def with_scale(self, scale: float) -> Guidance:
        """The same interval at another scale."""
        return replace(self, scale=scale)

    def at(self, t: torch.Tensor | float) -> float | torch.Tensor:
        """The scale at a timestep, or at one timestep a sample: (B, 1, 1, 1) for t (B,) with B > 1."""
        low, high = self.interval
        rest = 1.0 + self.outside * (self.scale - 1.0)
        if isinstance(t, torch.Tensor) and t.numel() > 1:
            inside = (t >= low) & (t <= high)
            return torch.where(inside, self.scale, rest).reshape(-1, 1, 1, 1)
        return self.scale if low <= float(t) <= high else rest

    def __str__(self) -> str:
        if self.interval == WHOLE_INTERVAL or self.outside == 1.0:
            return f"{self.scale:g}"
        return f"{self.scale:g} (timesteps {self.interval[0]} to {self.interval[1]}, else {self.at(-1.0):.3g})"
