"""A discriminator: what tells drawn latents, or textures, from those of real images, a neighbourhood at a time.

A squared error asks for the mean of what might be there, and the mean of many possible hairs is none. A discriminator
asks for one of them. It sees the few cells around each cell only, so it judges texture and lines and has little to say
on which pictures are drawn how often. Its loss is the relativistic one with zero-centred gradient penalties on real and
drawn latents (Huang et al. 2024, arXiv 2501.05441, equations 2 and 5), which converges without further tricks.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F

from train import seeding

STAGE = "adversary"
SCALED_BY = 512  # real ones that a channel's scale is computed from
Shown: TypeAlias = Callable[[int, int], torch.Tensor]
"""What is real: (step, batch) -> (batch, C, h, w), float32, a function of the step."""


class Discriminator(torch.nn.Module):
    """Logits (B, 1, h, w) of latents (B, C, h, w): higher where a cell's surroundings look real.

    scale (C,): the standard deviation of each channel in real latents, so that faint channels, which hold fine lines,
    count like strong ones. A cell sees `blocks` + 1 cells in each direction.
    """

    def __init__(self, scale: torch.Tensor, width: int = 96, blocks: int = 3) -> None:
        super().__init__()
        self.scale: torch.Tensor
        self.register_buffer("scale", scale.clone().view(1, -1, 1, 1))
        self.first = torch.nn.Conv2d(len(scale), width, 3, padding=1)
        self.blocks = torch.nn.ModuleList(torch.nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.last = torch.nn.Conv2d(width, 1, 1)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        hidden = self.first(latents / self.scale)
        for block in self.blocks:
            hidden = hidden + block(F.leaky_relu(hidden, 0.2))
        return self.last(F.leaky_relu(hidden, 0.2))


def shown_latents(latents: torch.Tensor, weights: np.ndarray, seed: int) -> Shown:
    """Of latents (V, N, C, h, w) of N real images in V orientations, each shown as often as weights (N,) say."""

    def shown(step: int, batch: int) -> torch.Tensor:
        rows = seeding.batch_indices(latents.shape[1], batch, step, seed, f"{STAGE}-real", weights)
        turns = seeding.numpy_generator(seed, STAGE, "orientation", step).integers(latents.shape[0], size=batch)
        return latents[torch.from_numpy(turns), torch.from_numpy(rows)].float()

    return shown


class Adversary:
    """A discriminator that learns beside what it judges.

    penalty: weight of the gradient penalties, which count in standard deviations of each channel.
    """

    def __init__(self, shown: Shown, *, seed: int, device: str, learning_rate: float, penalty: float) -> None:
        self.shown, self.device, self.penalty = shown, device, penalty
        torch.manual_seed(seeding.key(seed, STAGE, "weights"))
        self.network = Discriminator(shown(0, SCALED_BY).std(dim=(0, 2, 3))).to(device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), learning_rate, betas=(0.0, 0.99), weight_decay=0.0, fused=True
        )

    def _real(self, step: int, batch: int) -> torch.Tensor:
        return self.shown(step, batch).to(self.device)

    def loss(self, drawn: torch.Tensor, step: int) -> torch.Tensor:
        """How much realer than `drawn` (B, C, h, w) what is shown at the step looks: a scalar with a gradient to it."""
        self.network.requires_grad_(False)
        with torch.no_grad():
            real = self.network(self._real(step, len(drawn)))
        return F.softplus(real - self.network(drawn)).mean()

    def update(self, drawn: torch.Tensor, step: int) -> dict[str, float]:
        """One optimiser step of the discriminator against `drawn` (B, C, h, w). Returns figures to log."""
        self.network.requires_grad_(True)
        real = self._real(step, len(drawn)).requires_grad_(True)
        drawn = drawn.detach().requires_grad_(True)
        of_real, of_drawn = self.network(real), self.network(drawn)
        slopes = torch.autograd.grad(of_real.sum() + of_drawn.sum(), (real, drawn), create_graph=True)
        steepness = sum((slope * self.network.scale).square().sum() for slope in slopes) / of_real.numel()
        loss = F.softplus(of_drawn - of_real).mean() + self.penalty / 2 * steepness
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        told = (of_real.mean(dim=(1, 2, 3)) > of_drawn.mean(dim=(1, 2, 3))).float().mean()
        return {"adversary": loss.item(), "told_apart": told.item()}

    def state(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"network": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what `state` gave."""
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
