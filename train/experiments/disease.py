"""A disease classifier, trained alike whatever images an arm of the experiment gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from train import augment, seeding
from train.architectures import ARCHITECTURES
from train.classifier import renormalise

if TYPE_CHECKING:
    from train.experiments.augmentation import AugmentationConfig

STAGE = "augmentation"


@dataclass(frozen=True)
class Pixels:
    """images uint8 (N, S, S, 3) to learn from, labels int (N,); test uint8 (M, S, S, 3); mean and std (3,) of the real
    training images in [0, 1], by which all arms are standardised."""

    images: np.ndarray
    labels: np.ndarray
    test: np.ndarray
    mean: np.ndarray
    std: np.ndarray


class DiseaseLearner:
    """Softmax over the diagnoses; see `train.loop.Learner`.

    Weights at the start, changes of the images and dropout are functions of the seed and the step, not of the arm. An
    epoch shows each image of the arm once.
    """

    def __init__(self, config: AugmentationConfig, classes: int, pixels: Pixels) -> None:
        self.config, self.pixels = config, pixels
        torch.manual_seed(seeding.key(config.seed, STAGE, "weights"))
        model = ARCHITECTURES[config.architecture](classes, config.width, config.depth, config.dropout, config.size_px)
        self.model = model.to(config.device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.schedule = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=config.warmup, num_training_steps=config.steps
        )
        self.ema = EMAModel(self.model.parameters(), decay=config.ema_decay)

    def batch(self, step: int) -> tuple[torch.Tensor, np.ndarray]:
        """Changed images of `step` as the network reads them, (B, 3, S, S), and which they are."""
        config, changes = self.config, augment.CLASSIFIER[self.config.domain]
        rows = seeding.batch_indices(len(self.pixels.labels), config.batch, step, config.seed, STAGE)
        changed = []
        for position, row in enumerate(rows):
            rng = seeding.numpy_generator(config.seed, STAGE, "augment", step * config.batch + position)
            changed.append(augment.draw(changes, config.size_px, rng).image(self.pixels.images[row]))
        return self._standardised(np.stack(changed)), rows

    def update(self, step: int) -> dict[str, float]:
        torch.manual_seed(seeding.key(self.config.seed, STAGE, "dropout", step))
        pixels, rows = self.batch(step)
        labels = torch.from_numpy(self.pixels.labels[rows]).to(self.config.device)
        loss = F.cross_entropy(self.model.train()(pixel_values=pixels).logits, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.schedule.step()
        self.ema.step(self.model.parameters())
        return {"loss": loss.item(), "grad_norm": norm.item()}

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

    def export(self, folder: Path) -> dict[str, Any]:
        """Average the weights and return the logits (M, K) of the test images; the network itself is not kept."""
        self.ema.copy_to(self.model.parameters())
        renormalise(self.model, [self.batch(self.config.steps + extra)[0] for extra in range(16)])
        test = self.pixels.test
        with torch.inference_mode():
            parts = [
                self.model(pixel_values=self._standardised(test[start : start + 64])).logits.float().cpu()
                for start in range(0, len(test), 64)
            ]
        return {"logits": torch.cat(parts).double().numpy().round(5).tolist()}

    def _standardised(self, images: np.ndarray) -> torch.Tensor:
        scaled = (images.astype(np.float32) / 255.0 - self.pixels.mean) / self.pixels.std
        return torch.from_numpy(scaled.astype(np.float32)).to(self.config.device).permute(0, 3, 1, 2)
