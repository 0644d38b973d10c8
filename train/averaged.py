"""What learning a network on images has in common, whatever it tells of them: attributes, a disease, a segmentation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from train import seeding
from train.ahead import Ahead

NORMALISING_BATCHES = 16


class AveragedConfig(Protocol):
    """The options that such a learner reads."""

    seed: int
    device: str
    workers: int
    steps: int
    learning_rate: float
    weight_decay: float
    warmup: int
    ema_decay: float


class AveragedLearner(ABC):
    """Learns `model` by AdamW, its rate rising for a warm-up and then falling by a cosine; its running average is what
    is exported. See `train.loop.Learner`.

    names: of the stage, which every random draw is a function of beside the seed and the step. mean, std: (3,) of
    pixels in [0, 1], by which images are standardised.
    """

    max_grad_norm = 5.0

    def __init__(
        self, config: AveragedConfig, names: Sequence[str], model: nn.Module, mean: np.ndarray, std: np.ndarray
    ) -> None:
        self._options, self._names = config, tuple(names)
        self.model: Any = model
        self.mean, self.std = mean, std
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )
        self.ema = EMAModel(model.parameters(), decay=config.ema_decay)
        self.batches = Ahead(self.changed, config.steps, config.workers, config.device)

    @abstractmethod
    def changed(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Changed images of `step`, uint8 (B, S, S, 3), and what `loss` needs to know of them."""

    @abstractmethod
    def loss(self, pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        """The loss of a batch, a scalar with its gradient."""

    def pixels(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """uint8 (B, S, S, 3) as the network reads it: float32 (B, 3, S, S), standardised."""
        device = self._options.device
        mean, std = (torch.from_numpy(row.astype(np.float32)).to(device) for row in (self.mean, self.std))
        scaled = (torch.as_tensor(images).to(device, non_blocking=True).float() / 255.0 - mean) / std
        return scaled.permute(0, 3, 1, 2)

    def batch(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images of `step` as the network reads them, (B, 3, S, S), and what `loss` needs to know of them."""
        images, known = self.changed(step)
        return self.pixels(images), known

    def update(self, step: int) -> dict[str, float | torch.Tensor]:
        torch.manual_seed(seeding.key(self._options.seed, *self._names, "dropout", step))
        self.model.train()
        images, known = self.batches(step)
        loss = self.loss(self.pixels(images), known)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.model.parameters())
        return {"loss": loss.detach(), "grad_norm": norm, "learning_rate": self.schedule.get_last_lr()[0]}

    def average(self) -> None:
        """Put the running average in the network's place, with its batch normalisations measured anew."""
        self.ema.copy_to(self.model.parameters())
        renormalise(self.model, [self.batch(self._options.steps + i)[0] for i in range(NORMALISING_BATCHES)])

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "ema": self.ema.state_dict(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.ema.load_state_dict(state["ema"])


def renormalise(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """Measure the running statistics of every batch normalisation anew, for weights that were averaged."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over all batches
    model.train()
    with torch.no_grad():
        for batch in batches:
            model(pixel_values=batch)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()


def round_to_bfloat16(model: nn.Module) -> None:
    """Give every weight the value it is shipped with, so that figures are those of what ships."""
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16().float())
