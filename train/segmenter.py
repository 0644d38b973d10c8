"""The segmenter stage: where the lesion lies, or which lung is which.

Dermatology has an expert's mask for every image. Radiology has masks of both lungs for few images, all of adults, and
boxes around each lung for some more: what lies outside both boxes is background, what lies inside is not known. Sides
are the patient's: the right lung is on the left of the image, also of one that was mirrored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import bootstrap
from transformers import SegformerConfig, SegformerForSemanticSegmentation

from medviz.errors import InputError
from medviz.grounding.anatomy import BACKGROUND, LESION, LUNGS, regions_of
from train import augment, seeding
from train.averaged import AveragedLearner, round_to_bfloat16
from train.config import StageConfig, parse
from train.datasets.split import Split, boxes, open_split
from train.loop import fit

CLASSES: dict[str, tuple[str, ...]] = {"dermatology": (BACKGROUND, *LESION), "radiology": (BACKGROUND, *LUNGS)}
SWAPPED: dict[str, tuple[tuple[int, int], ...]] = {"dermatology": (), "radiology": ((1, 2),)}
UNKNOWN = 255


@dataclass
class SegmenterConfig(StageConfig):
    """Options of the segmenter stage."""

    domain: str = "dermatology"
    size_px: int = 128
    """Side of the square the network reads."""
    hidden_sizes: tuple[int, ...] = (16, 32, 80, 128)
    """Channels at 1/4, 1/8, 1/16 and 1/32 of the side."""
    depths: tuple[int, ...] = (1, 1, 2, 1)
    """Blocks at each of them."""
    decoder_size: int = 64
    """Channels of the decoder."""
    batch: int = 16
    """Images a step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 40
    """Steps of linear warm-up, then cosine to zero."""
    ema_decay: float = 0.99
    dice_weight: float = 1.0
    """Of the Dice loss beside the cross-entropy."""
    source_shares: dict[str, float] = field(default_factory=dict)
    """Share of a batch from each source; those not named keep their own share."""


@dataclass(frozen=True)
class Masks:
    """images uint8 (N, S, S, 3); labels uint8 (N, S, S), classes or UNKNOWN; sources (N,)."""

    images: np.ndarray
    labels: np.ndarray
    sources: list[str]


def read_masks(split: Split, size_px: int) -> Masks:
    """The images of `split` that have a mask (or, for lungs, boxes), at `size_px`."""
    labels: dict[int, np.ndarray] = {}
    for i, record in enumerate(split.records):
        if split.domain == "dermatology":
            mask = split.mask(i, "lesion_mask", size_px)
            found = None if mask is None else mask.astype(np.uint8)
        else:
            found = lung_labels(split.mask(i, "lung_mask", size_px), boxes(record), size_px)
        if found is not None:
            labels[i] = found
    chosen = list(labels)
    stacked = np.stack([labels[i] for i in chosen]) if chosen else np.zeros((0, size_px, size_px), np.uint8)
    return Masks(split.images(size_px, chosen), stacked, [str(split.records[i].get("source")) for i in chosen])


def lung_labels(mask: np.ndarray | None, found: Sequence[Mapping[str, Any]], size_px: int) -> np.ndarray | None:
    """Labels uint8 (S, S) of an X-ray from a mask of both lungs bool (S, S), or from boxes {label, x, y, w, h}.

    With a mask: 0 background, 1 right and 2 left lung. With boxes of both lungs alone: 0 outside them, UNKNOWN inside.
    None where there is neither.
    """
    if mask is not None and mask.any():
        return split_lungs(mask)
    sides = {box["label"]: box for box in found if box["label"] in ("right lung", "left lung")}
    if len(sides) < 2:
        return None
    labels = np.zeros((size_px, size_px), np.uint8)
    for box in sides.values():
        left, top = int(np.floor(box["x"] * size_px)), int(np.floor(box["y"] * size_px))
        right = int(np.ceil((box["x"] + box["w"]) * size_px))
        bottom = int(np.ceil((box["y"] + box["h"]) * size_px))
        labels[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = UNKNOWN
    return labels


def split_lungs(mask: np.ndarray) -> np.ndarray:
    """1 for the right lung, 2 for the left, of a mask of both, bool (S, S) -> uint8 (S, S).

    Separate parts belong to the side of the mask's middle on which their centre lies; one part that reaches over most
    of the mask's width is cut at its narrowest column near the middle.
    """
    count, parts, figures, centres = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=4)
    columns = np.nonzero(mask.any(axis=0))[0]
    first, width = int(columns[0]), int(columns[-1] - columns[0] + 1)
    heights = mask[:, first + width // 3 : first + width - width // 3].sum(axis=0)
    cut = first + width // 3 + (int(np.argmin(heights)) if len(heights) else 0)
    labels = np.zeros(mask.shape, np.uint8)
    for part in range(1, count):
        mine = parts == part
        if figures[part, cv2.CC_STAT_WIDTH] > 0.7 * width:
            labels[mine] = 2
            labels[:, :cut][mine[:, :cut]] = 1
        else:
            labels[mine] = 1 if centres[part][0] < first + width / 2 else 2
    return labels


def segmentation_loss(logits: torch.Tensor, labels: torch.Tensor, dice_weight: float) -> torch.Tensor:
    """Cross-entropy plus `dice_weight` times the Dice loss of the foreground, over the pixels that are known.

    logits (B, C, h, w), enlarged to labels (B, H, W) of classes or UNKNOWN. The Dice is that of the whole batch: an
    image without a class then says nothing instead of dividing by zero. A scalar.
    """
    enlarged = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    known = labels != UNKNOWN
    losses = F.cross_entropy(enlarged, labels.long(), ignore_index=UNKNOWN, reduction="sum")
    cross_entropy = losses / known.sum().clamp(min=1)
    truth = F.one_hot(labels.long() * known, logits.shape[1]).movedim(-1, 1)[:, 1:] * known[:, None]
    guess = enlarged.softmax(dim=1)[:, 1:] * known[:, None]
    overlap, total = (guess * truth).sum(dim=(0, 2, 3)), (guess + truth).sum(dim=(0, 2, 3))
    dice = (2 * overlap + 1) / (total + 1)
    return cross_entropy + dice_weight * (1 - dice.mean())


class SegmenterLearner(AveragedLearner):
    """Learns a small SegFormer; see `train.loop.Learner`."""

    max_grad_norm = 1.0

    def __init__(self, config: SegmenterConfig, train: Masks, validation: Masks, others: Masks | None = None) -> None:
        """others: validation images without masks, on which only plausibility can be measured.

        Raises InputError for an unknown domain or without images.
        """
        if config.domain not in CLASSES:
            raise InputError(f"no classes are known for {config.domain!r}; allowed: {', '.join(CLASSES)}")
        if len(train.images) == 0 or len(validation.images) == 0:
            raise InputError(f"no masks: {len(train.images)} train and {len(validation.images)} validation images")
        self.config, self.train, self.validation, self.others = config, train, validation, others
        self.classes = CLASSES[config.domain]
        torch.manual_seed(seeding.key(config.seed, "segmenter", "weights"))
        # Attention heads of 32 channels, or one where that does not divide.
        heads = [size // 32 if size % 32 == 0 else 1 for size in config.hidden_sizes]
        model = SegformerForSemanticSegmentation(
            SegformerConfig(
                hidden_sizes=list(config.hidden_sizes),
                depths=list(config.depths),
                num_attention_heads=heads,
                mlp_ratios=[2] * len(config.hidden_sizes),
                decoder_hidden_size=config.decoder_size,
                drop_path_rate=0.0,
                classifier_dropout_prob=0.1,
                id2label=dict(enumerate(self.classes)),
                label2id={name: index for index, name in enumerate(self.classes)},
            )
        ).to(config.device)
        pixels = train.images[:: max(1, len(train.images) // 512)].reshape(-1, 3) / 255.0
        super().__init__(config, ("segmenter",), model, pixels.mean(axis=0), pixels.std(axis=0) + 1e-3)
        self.sampling = sampling_weights(train.sources, config.source_shares)

    def changed(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Changed images of `step`, uint8 (B, S, S, 3), and their labels uint8 (B, S, S)."""
        config, changes, swapped = self.config, augment.SEGMENTER[self.config.domain], SWAPPED[self.config.domain]
        count = len(self.train.images)
        rows = seeding.batch_indices(count, config.batch, step, config.seed, "segmenter", self.sampling)
        images, labels = [], []
        for position, row in enumerate(rows):
            rng = seeding.numpy_generator(config.seed, "segmenter", "augment", step * config.batch + position)
            change = augment.draw(changes, config.size_px, rng)
            images.append(change.image(self.train.images[row]))
            labels.append(change.labels(self.train.labels[row], swapped))
        return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(labels))

    def pixels(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        return super().pixels(images).contiguous()

    def loss(self, pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        labels = known.to(self.config.device)
        return segmentation_loss(self.model(pixel_values=pixels).logits, labels, self.config.dice_weight)

    def export(self, folder: Path) -> dict[str, Any]:
        """Write the averaged weights and classes.json; returns Dice on validation images."""
        self.average()
        round_to_bfloat16(self.model)
        figures = self.figures()
        card = {
            "classes": list(self.classes),
            "size_px": self.config.size_px,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "metrics": figures,
        }
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.model.float()
        (folder / "classes.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "images": {"train": len(self.train.images)}, **figures}

    def figures(self) -> dict[str, Any]:
        """Dice of each class on validation images with masks, and how often the regions could be found, by source."""
        labelled = [row for row, labels in enumerate(self.validation.labels) if not (labels == UNKNOWN).any()]
        guesses = self._classes(self.validation.images[labelled])
        truths = self.validation.labels[labelled]
        figures: dict[str, Any] = {"dice": {}}
        for index, name in list(enumerate(self.classes))[1:]:
            values = [dice(guess == index, truth == index) for guess, truth in zip(guesses, truths, strict=True)]
            figures["dice"][name] = dice_figure(values, self.config.seed)
        found: dict[str, list[bool]] = {}
        for masks in filter(None, (self.validation, self.others)):
            for source, guess in zip(masks.sources, self._classes(masks.images), strict=True):
                regions = regions_of({name: guess == index for index, name in enumerate(self.classes) if index})
                found.setdefault(source, []).append(not regions.warnings)
        figures["regions_found"] = {s: {"value": float(np.mean(f)), "n": len(f)} for s, f in sorted(found.items())}
        return figures

    def _classes(self, images: np.ndarray) -> np.ndarray:
        """The most likely class of every pixel, uint8 (N, S, S)."""
        self.model.eval()
        guesses = [np.zeros((0, self.config.size_px, self.config.size_px), np.uint8)]
        with torch.inference_mode():
            for start in range(0, len(images), 64):
                logits = self.model(pixel_values=self.pixels(images[start : start + 64])).logits
                enlarged = F.interpolate(logits, size=images.shape[1:3], mode="bilinear", align_corners=False)
                guesses.append(enlarged.argmax(dim=1).to(torch.uint8).cpu().numpy())
        return np.concatenate(guesses)


def sampling_weights(sources: Sequence[str], shares: Mapping[str, float]) -> np.ndarray:
    """(N,) how often to draw each image so that named sources make up their share; the others keep their own."""
    counts = {source: sources.count(source) for source in set(sources)}
    return np.array([shares.get(s, counts[s] / len(sources)) / counts[s] for s in sources])


def dice(one: np.ndarray, other: np.ndarray) -> float:
    """2 |A and B| / (|A| + |B|) of two masks; 1 where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 1.0 if total == 0 else 2.0 * int((one & other).sum()) / total


def dice_figure(values: Sequence[float], seed: int) -> dict[str, Any]:
    """Mean with a 95 % bootstrap interval over images and n; None for what cannot be computed."""
    if not values:
        return {"value": None, "low": None, "high": None, "n": 0}
    low, high = None, None
    if len(set(values)) > 1:
        rng = seeding.numpy_generator(seed, "dice-bootstrap")
        interval = bootstrap((values,), np.mean, method="percentile", n_resamples=2000, rng=rng).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {"value": float(np.mean(values)), "low": low, "high": high, "n": len(values)}


def read_others(split: Split, size_px: int) -> Masks:
    """The images of a radiology split without mask or boxes; none of dermatology, where every image has a mask."""
    chosen = [
        i
        for i, record in enumerate(split.records)
        if split.domain == "radiology"
        and lung_labels(split.mask(i, "lung_mask", size_px), boxes(record), size_px) is None
    ]
    labels = np.zeros((len(chosen), size_px, size_px), np.uint8)
    return Masks(split.images(size_px, chosen), labels, [str(split.records[i].get("source")) for i in chosen])


def main(arguments: list[str]) -> None:
    """`python -m train segmenter RECIPE [overrides]`."""
    config = parse(arguments, SegmenterConfig)
    train, validation = (open_split(config.domain, name) for name in ("train", "validation"))
    learner = SegmenterLearner(
        config,
        read_masks(train, config.size_px),
        read_masks(validation, config.size_px),
        read_others(validation, config.size_px),
    )
    fit(learner, config)
