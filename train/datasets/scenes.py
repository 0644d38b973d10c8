"""What the attention to prompts is taught on: images as latents, prompts for them, and where each should look."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from medviz.grounding.atlas import Atlas

Heat = Callable[[tuple[int, int]], NDArray[np.float32]]
"""A grid (h, w) -> G of arXiv 2506.10633 on it, float32 (h, w) in [0, 1]."""
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class ScenePrompt:
    """text: of a prompt for the image in row `index`. heat: where it should look."""

    index: int
    text: str
    heat: Heat


class Scene(Protocol):
    """The images that are learnt from, and what prompts can say of them."""

    @property
    def latents(self) -> torch.Tensor:
        """(N, C, h, w), float32."""

    @property
    def phrases(self) -> Sequence[str]:
        """Those whose words may learn."""

    @property
    def atlas(self) -> Atlas | None:
        """Written beside what is learnt, where there is one."""

    def __len__(self) -> int:
        """Number of prompts."""

    def prompt(self, row: int, rng: np.random.Generator | None = None) -> ScenePrompt:
        """The prompt of a row, as `rng` words it; without one, the canonical wording, with nothing left to chance."""


def drawn(several: Sequence[Choice], rng: np.random.Generator) -> Choice:
    """One of several, each as likely as the others."""
    return several[int(rng.integers(len(several)))]
