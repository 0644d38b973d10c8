"""The classifier stage: a reward network or a judge, multi-label, from scratch.

Reward and judge differ in architecture and learn from disjoint halves of the train split, divided by lesion or
patient.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import expit
from torch import nn

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.rewards.classifier import last_linear
from train import augment, calibration, seeding
from train.architectures import ARCHITECTURES
from train.averaged import AveragedLearner, round_to_bfloat16
from train.config import StageConfig, parse
from train.datasets.split import Split, open_split, source_weights
from train.loop import fit

HALVES = {"reward": 0, "judge": 1}


@dataclass
class ClassifierConfig(StageConfig):
    """Options of the classifier stage."""

    domain: str = "dermatology"
    role: str = "reward"
    """reward learns on one half of the train split, judge on the other; the halves share no lesion or patient."""
    architecture: str = "regnet"
    """efficientnet (B0 at width 1, depth 1), regnet (Y, dense), resnet (18) or convnextv2 (atto)."""
    width: float = 0.5
    """Channels, as a multiple of the named network's."""
    depth: float = 0.5
    """Blocks a stage, as a multiple of the named network's; at least one."""
    dropout: float = 0.1
    """Before the heads, where the network has such a layer."""
    size_px: int = 128
    """Side of the square the network reads."""
    batch: int = 48
    """Images a step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 60
    """Steps of linear warm-up, then cosine to zero."""
    ema_decay: float = 0.995
    """Of the weights that are exported; the average starts faster."""
    source_shares: dict[str, float] = field(default_factory=dict)
    """Share of a batch from each source; those not named keep their own share."""
    rarity_power: float = 0.5
    """An image is drawn in proportion to (1 / prevalence) to this power of its rarest positive head."""
    max_rarity: float = 6.0
    """Bound of that factor."""
    artefact_weights: dict[str, float] = field(default_factory=lambda: {"manual": 1.0, "rl4med": 0.6})
    """Weight of artefact labels in the loss by where they come from (dermatology)."""
    min_auroc: float = 0.7
    """Heads below this on validation are left out of the exported network."""
    min_auroc_within_sources: float = 0.6
    """The same among images of one source, where that can be computed: a head must not only tell sources apart."""
    min_examples: int = 10
    """Heads with fewer positive or negative validation images are left out."""


@dataclass(frozen=True)
class Examples:
    """Labelled images. images uint8 (N, S, S, 3); targets float32 (N, K) in [0, 1], 0 where unknown; weights float32
    (N, K), 0 where unknown; sampling (N,) how often to draw an image; groups and sources (N,)."""

    images: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    sampling: np.ndarray
    groups: list[str]
    sources: list[str]

    def __len__(self) -> int:
        return len(self.groups)


def read_examples(split: Split, config: ClassifierConfig, heads: Sequence[str], half: int | None) -> Examples:
    """The images of `split` (of one half, where `half` is 0 or 1) whose labels say anything of `heads`."""
    domain = get_domain(config.domain)
    labels = [domain.labels(record) for record in split.records]
    known = np.array([any(head in label for head in heads) for label in labels])
    chosen = np.flatnonzero(known if half is None else known & (split.halves == half))
    targets, weights = np.zeros((2, len(chosen), len(heads)), np.float32)
    for row, i in enumerate(chosen):
        trust = config.artefact_weights.get(str(split.records[i].get("artefact_source")), 1.0)
        for column, head in enumerate(heads):
            if head in labels[i]:
                targets[row, column] = labels[i][head]
                weights[row, column] = trust if f"artefact_{head}" in split.records[i] else 1.0
    groups, shares = split.groups, source_weights(split, config.source_shares)
    return Examples(
        images=split.images(config.size_px, chosen.tolist()),
        targets=targets,
        weights=weights,
        sampling=shares[chosen] * rarity(targets, weights, config.rarity_power, config.max_rarity),
        groups=[groups[i] for i in chosen],
        sources=[str(split.records[i].get("source")) for i in chosen],
    )


def rarity(targets: np.ndarray, weights: np.ndarray, power: float, most: float) -> np.ndarray:
    """(N,) from 1 to `most`: (1 / prevalence) ** power of the rarest head that is positive in each image."""
    positive, known = (targets >= 0.5) & (weights > 0), weights > 0
    prevalence = positive.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    factors = np.minimum(np.maximum(prevalence, 1e-9) ** -power, most)
    return np.where(positive, factors, 1.0).max(axis=1)


class ClassifierLearner(AveragedLearner):
    """Learns a multi-label classifier; see `train.loop.Learner`."""

    def __init__(self, config: ClassifierConfig, heads: Sequence[str], train: Examples, validation: Examples) -> None:
        """Raises InputError for a role or architecture that does not exist, or without images."""
        if config.role not in HALVES:
            raise InputError(f"unknown role {config.role!r}; allowed: {', '.join(HALVES)}")
        if config.architecture not in ARCHITECTURES:
            raise InputError(f"unknown architecture {config.architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
        if len(train) == 0 or len(validation) == 0:
            raise InputError(f"no labelled images of {config.domain}: {len(train)} train, {len(validation)} validation")
        self.config, self.heads, self.train, self.validation = config, tuple(heads), train, validation
        torch.manual_seed(seeding.key(config.seed, "classifier", config.role, "weights"))
        build = ARCHITECTURES[config.architecture]
        model = build(len(heads), config.width, config.depth, config.dropout, config.size_px)
        model.to(config.device, memory_format=torch.channels_last)
        pixels = train.images[:: max(1, len(train) // 512)].reshape(-1, 3) / 255.0
        names = ("classifier", config.role)
        super().__init__(config, names, model, pixels.mean(axis=0), pixels.std(axis=0) + 1e-3)
        drawn = train.weights * (train.sampling / train.sampling.sum())[:, None]
        positives, negatives = (drawn * train.targets).sum(axis=0), (drawn * (1 - train.targets)).sum(axis=0)
        odds = np.sqrt(np.maximum(negatives, 1e-9) / np.maximum(positives, 1e-9))
        self.positive_weight = torch.from_numpy(np.clip(odds, 1, 4).astype(np.float32)).to(config.device)

    def changed(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Changed images of `step`, uint8 (B, S, S, 3), and which they are."""
        config, changes = self.config, augment.CLASSIFIER[self.config.domain]
        stage = f"classifier-{config.role}"
        rows = seeding.batch_indices(len(self.train), config.batch, step, config.seed, stage, self.train.sampling)
        changed = []
        for position, row in enumerate(rows):
            rng = seeding.numpy_generator(config.seed, stage, "augment", step * config.batch + position)
            changed.append(augment.draw(changes, config.size_px, rng).image(self.train.images[row]))
        return torch.from_numpy(np.stack(changed)), torch.from_numpy(rows)

    def loss(self, pixels: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        device = self.config.device
        targets, weights = (
            torch.from_numpy(a[known.numpy()]).to(device) for a in (self.train.targets, self.train.weights)
        )
        logits = self.model(pixel_values=pixels).logits
        losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=self.positive_weight, reduction="none")
        return (losses * weights).sum() / weights.sum().clamp(min=1e-6)

    def export(self, folder: Path) -> dict[str, Any]:
        """Average, choose heads, calibrate, write; returns the figures of every head, those left out too."""
        self.average()
        round_to_bfloat16(self.model)
        figures, dropped = self._screen(self._logits())
        kept = [head for head in self.heads if head not in dropped]
        if not kept:
            raise InputError(f"no head reaches AUROC {self.config.min_auroc} on validation: train longer; {dropped}")
        self._calibrate(kept)
        card, figures = self._card(kept, figures)
        self.model.config.id2label = dict(enumerate(kept))
        self.model.config.label2id = {head: index for index, head in enumerate(kept)}
        self.model.to(torch.bfloat16).save_pretrained(folder)
        self.model.float()
        (folder / "heads.json").write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
        areas = [figures[head]["auroc"] for head in kept]
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "images": {"train": len(self.train), "validation": len(self.validation)},
            "mean_auroc": float(np.mean(areas)),
            "heads": figures,
            "dropped": dropped,
        }

    def _logits(self) -> np.ndarray:
        """Validation logits (N, K) float32 of the network as it is, in eval mode."""
        self.model.eval()
        with torch.inference_mode():
            parts = [
                self.model(pixel_values=self.pixels(self.validation.images[i : i + 64])).logits.float().cpu()
                for i in range(0, len(self.validation), 64)
            ]
        return torch.cat(parts).numpy()

    def _judged(self, column: int) -> np.ndarray:
        """Validation images whose label of the head is known."""
        return self.validation.weights[:, column] > 0

    def _screen(self, logits: np.ndarray) -> tuple[dict[str, Any], dict[str, Any]]:
        """AUROC within sources of each head, and which heads are left out and why."""
        config, figures, dropped = self.config, {}, {}
        for column, head in enumerate(self.heads):
            rows = self._judged(column)
            truth, scores = self.validation.targets[rows, column] >= 0.5, logits[rows, column]
            sources = [s for s, judged in zip(self.validation.sources, rows, strict=True) if judged]
            least = config.min_examples
            within, each = calibration.auroc_within_sources(scores, truth, sources, least)
            area, positives, negatives = calibration.auroc(scores, truth), int(truth.sum()), int((~truth).sum())
            figures[head] = {"auroc_within_sources": within, "auroc_by_source": each}
            reason = ""
            if min(positives, negatives) < least:
                reason = f"fewer than {least} positive or negative validation images"
            elif area is None or area < config.min_auroc:
                reason = f"AUROC below {config.min_auroc}"
            elif within is not None and within < config.min_auroc_within_sources:
                reason = f"AUROC within sources below {config.min_auroc_within_sources}"
            if reason:
                counts = {"auroc": area, "positives": positives, "negatives": negatives}
                dropped[head] = {"reason": reason, **counts, **figures.pop(head)}
        return figures, dropped

    def _calibrate(self, kept: Sequence[str]) -> None:
        """Reduce the last layer to `kept` and move each head's bias to where its probabilities are right (Platt)."""
        columns = [self.heads.index(head) for head in kept]
        logits, layer = self._logits(), last_linear(self.model)
        shifts = []
        for column in columns:
            rows = self._judged(column)
            shifts.append(calibration.fit_platt(logits[rows, column], self.validation.targets[rows, column])[1])
        with torch.no_grad():
            weight, bias = layer.weight[columns].clone(), layer.bias[columns].clone()
            layer.weight, layer.out_features = nn.Parameter(weight), len(columns)
            layer.bias = nn.Parameter((bias + torch.tensor(shifts).to(bias)).bfloat16().float())
        self.model.num_labels = len(columns)

    def _card(self, kept: Sequence[str], figures: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """heads.json, and the figures of the network as it is shipped."""
        config, logits, temperature, threshold, measured = self.config, self._logits(), {}, {}, {}
        for index, head in enumerate(kept):
            column = self.heads.index(head)
            rows = self._judged(column)
            mine, targets = logits[rows, index], self.validation.targets[rows, column]
            groups = [g for g, judged in zip(self.validation.groups, rows, strict=True) if judged]
            temperature[head] = calibration.fit_temperature(mine, targets)
            threshold[head] = calibration.best_threshold(expit(mine / temperature[head]), targets >= 0.5)
            measured[head] = {**calibration.head_figures(mine, targets, groups, config.seed), **figures[head]}
        group = "lesion" if config.domain == "dermatology" else "patient"
        card = {
            "architecture": type(self.model).__name__,
            "heads": list(kept),
            "size_px": config.size_px,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "temperature": temperature,
            "threshold": threshold,
            "trained_on": f"half {'AB'[HALVES[config.role]]} of train by {group}",
            "metrics": measured,
        }
        return card, measured


def main(arguments: list[str]) -> None:
    """`python -m train classifier RECIPE [overrides]`."""
    config = parse(arguments, ClassifierConfig)
    if config.role not in HALVES:
        raise InputError(f"unknown role {config.role!r}; allowed: {', '.join(HALVES)}")
    heads = [head.name for head in get_domain(config.domain).heads]
    train = read_examples(open_split(config.domain, "train"), config, heads, HALVES[config.role])
    validation = read_examples(open_split(config.domain, "validation"), config, heads, None)
    fit(ClassifierLearner(config, heads, train, validation), config)
