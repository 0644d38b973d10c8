"""Attribute classifiers: reward and judge. A network with one calibrated yes-or-no head an attribute."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageClassification, PreTrainedModel

from medviz.errors import ModelError
from medviz.models.manifest import read_json
from medviz.models.networks import Preparation, load_network, read_names

CARD_NAME = "heads.json"


class AttributeClassifier:
    """A multi-label classifier with what it needs to be read: heads, size, temperatures and thresholds.

    heads: names, in the order of the outputs. thresholds: head -> calibrated probability from which on the head says
    yes, in the order of `heads`. card: heads.json, with the figures of each head on validation images.
    """

    def __init__(
        self, model: PreTrainedModel, card: Mapping[str, Any], where: Path, device: str | torch.device = "cpu"
    ) -> None:
        """Raises ModelError, naming `where`, when the card is damaged or does not fit the network."""
        self.model, self.card, self.device = model, dict(card), device
        self.heads = read_names(self.card, "heads", where, model.config.num_labels)
        self.prepare = Preparation(self.card, where, device)
        self.size_px = self.prepare.size_px
        temperatures = self._per_head("temperature", where)
        if min(temperatures.values()) <= 0:
            raise ModelError(f"{where} is damaged: a temperature must be above 0, found {temperatures}")
        self.thresholds = self._per_head("threshold", where)
        if not all(0 < threshold < 1 for threshold in self.thresholds.values()):
            raise ModelError(f"{where} is damaged: a threshold must lie between 0 and 1, found {self.thresholds}")
        self._temperatures = torch.tensor(list(temperatures.values()), dtype=torch.float32, device=device)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> AttributeClassifier:
        """Read a folder with config.json, model.safetensors and heads.json; ModelError when one does not hold up."""
        where = Path(folder) / CARD_NAME
        card = read_json(where)
        model = load_network(Path(folder), AutoModelForImageClassification, device)
        found = type(model).__name__
        if not isinstance(card, dict) or card.get("architecture") != found:
            raise ModelError(f"{where} does not describe the {found} that lies beside it")
        return cls(model.to(memory_format=torch.channels_last), card, where, device)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Calibrated logits (B, K) float32 of images (B, 3, H, W) in [-1, 1] of any size.

        Gradients flow to the images unless the caller turns them off; the images themselves are never changed. The
        whole batch runs at once: the caller chooses its size. Raises InputError for another shape.
        """
        return self.model(pixel_values=self.prepare(images)).logits.float() / self._temperatures

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Calibrated probabilities (B, K) in [0, 1]; see `logits`."""
        return torch.sigmoid(self.logits(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """What the last linear layer is given: pooled features (B, D) float32; see `logits`."""
        seen: list[torch.Tensor] = []
        hook = last_linear(self.model).register_forward_pre_hook(lambda _layer, given: seen.append(given[0]))
        try:
            self.model(pixel_values=self.prepare(images))
        finally:
            hook.remove()
        return seen[-1].flatten(1).float()

    def _per_head(self, key: str, where: Path) -> dict[str, float]:
        try:
            return {head: float(self.card[key][head]) for head in self.heads}
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{where} is damaged: {key} lacks a number for a head ({error!r})") from error


def last_linear(model: nn.Module) -> nn.Linear:
    """The head of a classifier: its last linear layer in the order of definition. Raises ModelError without one."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    if not layers:
        raise ModelError(f"{type(model).__name__} has no linear layer to classify with")
    return layers[-1]
