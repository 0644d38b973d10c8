"""A disease classifier, trained alike whatever images an arm of the experiment gives it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from train import augment, seeding
from train.architectures import ARCHITECTURES
from train.averaged import AveragedLearner

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


class DiseaseLearner(AveragedLearner):
    """Softmax over the diagnoses; see `train.loop.Learner`.

    Weights at the start, changes of the images and dropout are functions of the seed and the step, not of the arm. An
    epoch shows each image of the arm once.
    """

    def __init__(self, config: AugmentationConfig, classes: int, pixels: Pixels) -> None:
        self.config, self.shown = config, pixels
        torch.manual_seed(seeding.key(config.seed, STAGE, "weights"))
        model = ARCHITECTURES[config.architecture](classes, config.width, config.depth, config.dropout, config.size_px)
        model.to(config.device, memory_format=torch.channels_last)
        super().__init__(config, (STAGE,), model, pixels.mean, pixels.std)

    def changed(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Changed images of `step`, uint8 (B, S, S, 3), and which they are."""
        config, changes = self.config, augment.CLASSIFIER[self.config.domain]
        rows = seeding.batch_indices(len(self.shown.labels), config.batch, step, config.seed, STAGE)
        changed = []
        for position, row in enumerate(rows):
            rng = seeding.numpy_generator(config.seed, STAGE, "augment", step * config.batch + position)
            changed.append(augment.draw(changes, config.size_px, rng).image(self.shown.images[row]))
        return torch.from_numpy(np.stack(changed)), torch.from_numpy(rows)

    def loss(self, pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        labels = torch.from_numpy(self.shown.labels[known.numpy()]).to(self.config.device)
        return F.cross_entropy(self.model(pixel_values=pixels).logits, labels)

    def export(self, folder: Path) -> dict[str, Any]:
        """Average the weights and return the logits (M, K) of the test images; the network itself is not kept."""
        self.average()
        test = self.shown.test
        with torch.inference_mode():
            parts = [
                self.model(pixel_values=self.pixels(test[start : start + 64])).logits.float().cpu()
                for start in range(0, len(test), 64)
            ]
        return {"logits": torch.cat(parts).double().numpy().round(5).tolist()}
