"""The reward of a run with the networks it looks through: one reward, or several weighted into one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.composite import Composite
from medviz.rewards.likeness import Likeness
from medviz.rewards.registry import STEPPED, AnatomyNetwork, Drawn, SafeRewards, TextImageNetwork, safe_rewards
from train import processes


@dataclass(frozen=True)
class Seen:
    """The rewards of N images: parts, each reward as it is, float64 (N,), on the CPU; valid bool (N,), False where any
    of them failed."""

    parts: dict[str, torch.Tensor]
    valid: np.ndarray

    def gathered(self, count: int) -> "Seen":
        """The rewards of all `count` images, of which each process saw its share."""
        parts = {name: processes.gather(part, count) for name, part in self.parts.items()}
        return Seen(parts, processes.gather(torch.from_numpy(self.valid), count).numpy())


class Scorer:
    """Rewards images, each part of the reward for itself; what could not be rewarded is masked."""

    def __init__(
        self,
        composite: Composite,
        *,
        classifier: AttributeClassifier | None = None,
        anatomy: AnatomyNetwork | None = None,
        alignment: TextImageNetwork | None = None,
        likeness: Likeness | None = None,
        aspects: Mapping[str, tuple[str, ...]] | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """device: where the networks are; the rest: see `Drawn` beside it."""
        self.composite, self.likeness, self.device = composite, likeness, device
        self._networks: dict[str, Any] = {
            "classifier": classifier, "anatomy": anatomy, "alignment": alignment, "likeness": likeness,
            "aspects": aspects or {},
        }  # fmt: skip

    def rewarded(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt], batch: int) -> Seen:
        """Each reward of images (N, 3, H, W) in [-1, 1] as it is, without gradient, `batch` images at a time."""
        found: dict[str, list[SafeRewards]] = {name: [] for name in self.composite.functions}
        for start in range(0, len(images), batch):
            rows = slice(start, start + batch)
            drawn = self._drawn(images[rows].to(self.device), parsed[rows])
            for name, reward in self.composite.functions.items():
                found[name].append(safe_rewards(reward, drawn))
        parts = {name: torch.cat([each.values for each in held]).double().cpu() for name, held in found.items()}
        valid = [torch.cat([each.valid for each in held]).cpu().numpy() for held in found.values()]
        return Seen(parts, np.logical_and.reduce(valid))

    def observe(self, seen: Seen) -> None:
        """Let the scale of each reward follow the images that have all of them."""
        valid = torch.from_numpy(seen.valid)
        self.composite.observe({name: part[valid] for name, part in seen.parts.items()})

    def values(self, seen: Seen, *, at_start: bool = False) -> np.ndarray:
        """One reward an image, float64 (N,), meaningless where it is not valid; at_start: see `Composite`."""
        return self.composite.combine(seen.parts, at_start=at_start).numpy()

    def with_gradient(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> torch.Tensor:
        """The reward (B,) by the running moments, from which gradients flow to `images`.

        Raises InputError when it has none: a reward that counts cannot be followed uphill.
        """
        rewards = self.composite.combine(self.composite.parts(self._drawn(images, parsed)))
        if images.requires_grad and not rewards.requires_grad:
            raise InputError(f"the reward {', '.join(self.composite.functions)} has no gradient for draft to follow")
        return rewards

    def _drawn(self, images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Drawn:
        return Drawn(images, tuple(parsed), **self._networks)


def refuse_stepped(rewards: Sequence[str], objective: str) -> None:
    """Raises InputError when one of `rewards` has no gradient and `objective` learns from nothing else."""
    stepped = sorted(STEPPED & set(rewards))
    if stepped:
        raise InputError(
            f"{objective} follows the reward's own gradient and {', '.join(stepped)} has none (it counts matches): "
            "choose a continuous reward such as attribute, or an objective that compares images"
        )
