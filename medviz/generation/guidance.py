"""How strongly the prompt pulls at each timestep: classifier-free guidance in a limited interval of noise levels.

Where noise hides all but the average colour, guidance drives pictures towards one look (fewer colours, farther from
real images); where shapes and lines are decided, it makes them follow the prompt. Full guidance is therefore kept to an
interval (Kynkaanniemi et al. 2024, arXiv 2404.07724), and a share of it may remain outside. A word that is drawn too
seldom all the same may be given guidance of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from medviz.domains import get_domain
from medviz.errors import InputError

WHOLE_INTERVAL = (0, 1000)
SEMANTIC_INTERVAL = (150, 900)
# What a recipe says of guidance beside its scale: without these the same weights and scale draw other pictures.
RECIPE_OPTIONS = (
    "guidance_interval",
    "guidance_outside",
    "semantic_heads",
    "semantic_scale",
    "semantic_interval",
    "few_step_semantic_interval",
    "few_step_finish",
)


@dataclass(frozen=True)
class SemanticGuidance:
    """Guidance along a single word, for what a generator draws too seldom though the prompt asks for it.

    Where a prompt asks for one of `heads` of `domain`, `scale` times the difference between two predictions is added to
    the guided one at timesteps low <= t <= high: of the prompt in the domain's own words, and of the same less that
    word (Brack et al. 2023, arXiv 2301.12247, where the difference is to no prompt at all). Other prompts are drawn as
    without it.

    Raises InputError for an unknown domain or head, for no head, and for numbers out of range.
    """

    domain: str
    heads: tuple[str, ...]
    scale: float
    interval: tuple[int, int] = SEMANTIC_INTERVAL

    def __post_init__(self) -> None:
        low, high = self.interval
        object.__setattr__(self, "heads", tuple(self.heads))
        object.__setattr__(self, "interval", (low, high))
        if not self.heads:
            raise InputError("semantic guidance needs at least one head of its domain, found none")
        for head in self.heads:
            get_domain(self.domain).head(head)
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise InputError(f"the semantic scale must be a finite number above 0, found {self.scale!r}")
        if not 0 <= low <= high:
            raise InputError(f"the semantic interval must be two timesteps, 0 <= low <= high, found {self.interval!r}")

    def contrast(self, prompt: str) -> tuple[str, str] | None:
        """See `medviz.domains.Domain.contrast`."""
        return get_domain(self.domain).contrast(prompt, self.heads)

    def at(self, t: torch.Tensor | float) -> float | torch.Tensor:
        """The scale at a timestep, or at one timestep a sample: (B, 1, 1, 1) for t (B,) with B > 1."""
        return _within(self.interval, t, self.scale, 0.0)

    def __str__(self) -> str:
        return f"{', '.join(self.heads)} by {self.scale:g} (timesteps {self.interval[0]} to {self.interval[1]})"


@dataclass(frozen=True)
class Guidance:
    """`scale` (1 is none) at timesteps low <= t <= high of `interval`, and 1 + outside * (scale - 1) at the others.

    `semantic` goes along single words beside that.
    Raises InputError when scale is not finite, interval is not 0 <= low <= high, or outside is not in [0, 1].
    """

    scale: float = 1.0
    interval: tuple[int, int] = WHOLE_INTERVAL
    outside: float = 0.0
    semantic: SemanticGuidance | None = None

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
    def of_recipe(cls, recipe: Mapping[str, Any], domain: str, default_scale: float) -> Guidance:
        """The guidance that a recipe of `domain` names; a recipe that names none has `default_scale` throughout."""
        low, high = recipe.get("guidance_interval", WHOLE_INTERVAL)
        scale = float(recipe.get("guidance_scale", default_scale))
        semantic = None
        if heads := tuple(recipe.get("semantic_heads", ())):
            first, last = recipe.get("semantic_interval", SEMANTIC_INTERVAL)
            semantic = SemanticGuidance(
                domain, heads, float(recipe.get("semantic_scale", 0.0)), (int(first), int(last))
            )
        return cls(scale, (int(low), int(high)), float(recipe.get("guidance_outside", 0.0)), semantic)

    def as_recipe(self) -> dict[str, Any]:
        """What `of_recipe` reads back."""
        said: dict[str, Any] = {
            "guidance_scale": self.scale,
            "guidance_interval": list(self.interval),
            "guidance_outside": self.outside,
        }
        if along := self.semantic:
            said |= {"semantic_heads": list(along.heads), "semantic_scale": along.scale}
            said["semantic_interval"] = list(along.interval)
        return said

    def with_scale(self, scale: float) -> Guidance:
        """The same at another scale; at 1 there is no guidance of any kind."""
        return replace(self, scale=scale, semantic=None if scale == 1.0 else self.semantic)

    def at(self, t: torch.Tensor | float) -> float | torch.Tensor:
        """The scale at a timestep, or at one timestep a sample: (B, 1, 1, 1) for t (B,) with B > 1."""
        return _within(self.interval, t, self.scale, 1.0 + self.outside * (self.scale - 1.0))

    def __str__(self) -> str:
        along = f", {self.semantic}" if self.semantic else ""
        if self.interval == WHOLE_INTERVAL or self.outside == 1.0:
            return f"{self.scale:g}{along}"
        low, high = self.interval
        return f"{self.scale:g} (timesteps {low} to {high}, else {self.at(-1.0):.3g}){along}"


def _within(interval: tuple[int, int], t: torch.Tensor | float, inside: float, outside: float) -> float | torch.Tensor:
    low, high = interval
    if isinstance(t, torch.Tensor) and t.numel() > 1:
        return torch.where((t >= low) & (t <= high), inside, outside).reshape(-1, 1, 1, 1)
    return inside if low <= float(t) <= high else outside
