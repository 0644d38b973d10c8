"""A network that marks what it sees: a mask, a calibrated score and a place in words for each attribute.

Whether an attribute is there is read from its mask alone, so that nothing can be seen that cannot be shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from medviz.domains.lung_places import LUNGS
from medviz.errors import InputError, ModelError
from medviz.evidence.chest import ENLARGED_RATIO, cardiothoracic_ratio, finding_place, side_place
from medviz.evidence.networks import ARCHITECTURES, build
from medviz.evidence.places import place_of
from medviz.evidence.presence import presence
from medviz.images import to_tensor
from medviz.models.manifest import read_json
from medviz.models.networks import Preparation, read_names

CONFIG_NAME, WEIGHTS_NAME = "config.json", "model.safetensors"
FORMAT_VERSION = 1
HEART, CARDIOMEGALY = "heart", "cardiomegaly"
STRUCTURES = (HEART, *LUNGS)
"""Attributes that are anatomy: they help to place and to measure, and are no answer to a prompt."""
SIDED = ("pleural_effusion",)
"""Findings that have a side and no zone."""
RATIO_SPREAD = 0.02
"""Cardiothoracic ratio beyond ENLARGED_RATIO at which an enlarged heart is scored sigmoid(1)."""
GAP = 0.03
"""Parts of a mask nearer than this share of the side count as one when it is boxed: ticks and broken hairs."""


@dataclass(frozen=True)
class Evidence:
    """What is seen of one attribute in one image.

    score: in [0, 1], calibrated on real images in which it is as often there as not. seen: score >= 0.5. where: "lower
    edge", "right lower zone"; "" where it is not seen or no single place holds it. box: fractions x, y, w, h around the
    largest part; None where it is not seen. mask: float32 (H, W) in [0, 1] on the image's own grid. measure: the
    cardiothoracic ratio of "cardiomegaly"; None of all others.
    """

    name: str
    score: float
    seen: bool
    where: str
    box: tuple[float, float, float, float] | None
    mask: NDArray[np.float32]
    measure: float | None = None


class EvidenceDetector:
    """A mask network with its attributes, thresholds and calibration.

    attributes: names in the order of the logits' channels. A detector of "heart" and both lungs also answers
    "cardiomegaly", which is read from their widths.
    """

    def __init__(
        self, model: nn.Module, card: Mapping[str, Any], where: Path, device: str | torch.device = "cpu"
    ) -> None:
        """card: config.json. Raises ModelError, naming `where`, when it does not hold up."""
        self.model, self.card, self.device = model, dict(card), device
        self.attributes = read_names(self.card, "attributes", where, len(self.card.get("attributes") or ()))
        self.prepare = Preparation(self.card, where, device)
        self.size_px = self.prepare.size_px
        self.shares = self._numbers("share", where, low=0.0, high=1.0)
        self.thresholds = self._numbers("mask_threshold", where, low=0.0, high=1.0)
        self._slopes = torch.tensor(self._numbers("slope", where, low=0.0), device=device)
        self._intercepts = torch.tensor(self._numbers("intercept", where), device=device)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> EvidenceDetector:
        """Read a folder with config.json and model.safetensors; ModelError when one does not hold up.

        The network is frozen, in eval mode and float32.
        """
        where = Path(folder) / CONFIG_NAME
        card = read_json(where)
        if not isinstance(card, dict) or card.get("format_version") != FORMAT_VERSION:
            raise ModelError(f"{where} is no evidence detector of version {FORMAT_VERSION}")
        architecture, names = card.get("architecture"), card.get("attributes")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES or not isinstance(names, list):
            raise ModelError(
                f"{where} names the architecture {architecture!r} and the attributes {names!r}; architectures are "
                f"{', '.join(ARCHITECTURES)}"
            )
        try:
            model = build(architecture, len(names), card.get("network", {}))
            weights = load_file(Path(folder) / WEIGHTS_NAME)
            model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
        except (OSError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ModelError(f"the weights in {folder} cannot be loaded: {error}") from error
        model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return cls(model.eval().requires_grad_(False), card, where, device)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """Mask logits (B, K, h, w) float32 of images (B, 3, H, W) in [-1, 1] of any size, stretched to a square.

        Gradients flow to the images. Raises InputError for another shape.
        """
        return self.model(self.prepare(images)).float()

    def score_logits(self, mask_logits: torch.Tensor) -> torch.Tensor:
        """Calibrated presence (B, K) in logits, from mask logits (B, K, h, w); differentiable."""
        return presence(mask_logits, self.shares) * self._slopes + self._intercepts

    def scores(self, images: torch.Tensor) -> torch.Tensor:
        """Calibrated presence (B, K) in [0, 1] of images (B, 3, H, W) in [-1, 1]; see `Evidence.score`."""
        return torch.sigmoid(self.score_logits(self.logits(images)))

    def __call__(self, images: Sequence[Image.Image | NDArray[np.uint8]]) -> list[list[Evidence]]:
        """What is seen in each image (PIL, or uint8 (H, W, 3)), an entry an attribute; images may differ in size.

        Raises InputError for an array of another shape or type.
        """
        pictures = [_picture(image) for image in images]
        found = []
        for picture in pictures:
            with torch.inference_mode():
                logits = self.logits(to_tensor(picture)[None])
                scores = torch.sigmoid(self.score_logits(logits))[0].tolist()
                size = (picture.height, picture.width)
                masks = torch.sigmoid(F.interpolate(logits, size=size, mode="bilinear", align_corners=False))[0]
            found.append(self._read(dict(zip(self.attributes, scores, strict=True)), masks.cpu().numpy()))
        return found

    def _read(self, scores: Mapping[str, float], planes: NDArray[np.float32]) -> list[Evidence]:
        masks = dict(zip(self.attributes, planes, strict=True))
        thresholds = dict(zip(self.attributes, self.thresholds, strict=True))
        structures = {
            name: largest_part(masks[name] >= thresholds[name])
            for name in STRUCTURES
            if name in masks and scores[name] >= 0.5
        }
        entries = [self._entry(name, scores[name], masks[name], thresholds[name], structures) for name in masks]
        if set(STRUCTURES) <= set(masks):
            ratio = cardiothoracic_ratio(structures)
            entries.append(_heart_size(ratio, masks[HEART]))
        return entries

    def _entry(
        self,
        name: str,
        score: float,
        mask: NDArray[np.float32],
        threshold: float,
        structures: Mapping[str, NDArray[np.bool_]],
    ) -> Evidence:
        inside = mask >= threshold
        if score < 0.5 or not inside.any():
            return Evidence(name, min(score, 0.499), False, "", None, mask)
        part = largest_part(inside, gap=GAP)
        where = ""
        if name not in STRUCTURES:
            weights = np.where(inside, mask, 0.0)
            where = self._place(name, weights, structures)
        return Evidence(name, score, True, where, _box(part), mask)

    def _place(self, name: str, mask: np.ndarray, structures: Mapping[str, NDArray[np.bool_]]) -> str:
        if not set(LUNGS) <= set(self.attributes):
            return place_of(mask)
        empty = np.zeros(mask.shape, bool)
        right, left = (structures.get(lung, empty) for lung in LUNGS)
        return side_place(mask, right, left) if name in SIDED else finding_place(mask, right, left)

    def _numbers(self, key: str, where: Path, low: float = -math.inf, high: float = math.inf) -> tuple[float, ...]:
        """The card's number `key` of every attribute, above `low` and at most `high`."""
        try:
            numbers = tuple(float(self.card["presence"][name][key]) for name in self.attributes)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{where} is damaged: presence lacks {key} of an attribute ({error!r})") from error
        if not all(math.isfinite(number) and low < number <= high for number in numbers):
            raise ModelError(f"{where} is damaged: {key} must lie above {low} and at most at {high}, found {numbers}")
        return numbers


def largest_part(mask: NDArray[np.bool_], gap: float = 0.0) -> NDArray[np.bool_]:
    """The largest connected part of a mask (H, W); parts nearer than `gap` sides of the image count as connected."""
    joined = mask.astype(np.uint8)
    reach = round(gap * max(mask.shape))
    if reach > 1:
        joined = cv2.morphologyEx(joined, cv2.MORPH_CLOSE, np.ones((reach, reach), np.uint8))
    count, labels, _, _ = cv2.connectedComponentsWithStats(joined, connectivity=8)
    if count < 2:
        return np.zeros(mask.shape, bool)
    areas = np.bincount(labels[mask], minlength=count)
    areas[0] = 0
    return mask & (labels == int(areas.argmax()))


def _box(mask: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    rows, columns = (np.nonzero(mask.any(axis=axis))[0] for axis in (1, 0))
    height, width = mask.shape
    return (
        float(columns[0]) / width,
        float(rows[0]) / height,
        float(columns[-1] + 1 - columns[0]) / width,
        float(rows[-1] + 1 - rows[0]) / height,
    )


def _heart_size(ratio: float | None, heart: NDArray[np.float32]) -> Evidence:
    score = 0.0 if ratio is None else 1 / (1 + math.exp(-(ratio - ENLARGED_RATIO) / RATIO_SPREAD))
    seen = score >= 0.5
    box = _box(largest_part(heart >= 0.5)) if seen else None
    return Evidence(CARDIOMEGALY, score, seen, "", box, heart, ratio)


def _picture(image: Image.Image | NDArray[np.uint8]) -> Image.Image:
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise InputError(f"an image array must be uint8 (H, W, 3), got {array.dtype} {array.shape}")
    return Image.fromarray(array)
