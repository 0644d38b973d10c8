"""What is audited: classifiers and evidence detectors under one view, and the rows of the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medviz.errors import InputError
from medviz.evidence.detector import EvidenceDetector
from medviz.rewards.classifier import AttributeClassifier
from train.datasets.latents import to_pixels
from train.datasets.split import Split
from train.evaluate.statistics import Estimate

HEADS = {"pleural_effusion": "effusion"}
"""Attribute -> the classifiers' name of it, where they have another."""

THIN = ("hair", "ruler", "gel_bubble")
BATCH = 32

GATES: Mapping[str, Mapping[str, tuple[str, float]]] = {
    "auc": {
        "ruler": (">=", 0.95),
        "hair": (">=", 0.90),
        "ink": (">=", 0.90),
        "gel_bubble": (">=", 0.85),
        "opacity": (">=", 0.85),
    },
    "auc_thumbnail": {"": ("<=", 0.55)},
    "paste": {"": (">=", 0.90)},
    "recolour": {"": ("<", 0.05)},
    "recolour_to_other": {"": ("<", 0.05)},
    "erase": {"": (">=", 0.80)},
    "blur": dict.fromkeys(THIN, (">=", 0.80)),
    "side": {"opacity": (">=", 0.90)},
    "zone": {"opacity": (">=", 0.75)},
    "ratio_error": {"heart": ("<=", 0.03)},
}
"""Trial -> attribute ("": all that have counterfactuals) -> what it has to give."""

TRIALS = {
    "auc": "AUC on real images of one source and view",
    "auc_published": "the same by the published labels, which describe the full frame",
    "auc_thumbnail": "AUC on the same images shrunk to 4x4 pixels",
    "recolour": "share of real images whose answer changes under another light or white balance",
    "recolour_to_other": "the same when each image gets the mean colour of the images with the other answer",
    "paste": "share of pictures that are seen to have the attribute once it is added, of those that were not before",
    "erase": "share of those that are not seen to have it once it is inpainted",
    "blur": "share of those that are not seen to have it once blurred with a standard deviation of 8 pixels",
    "side": "share of real films with boxes on one side whose opacity lies mostly on that side",
    "zone": "share of those with boxes in one zone whose opacity lies mostly in that zone",
    "ratio_error": "median absolute error of the cardiothoracic ratio",
}


@dataclass(frozen=True)
class Instrument:
    """What is audited. heads: names of its answers. thresholds: head -> score from which on the answer is yes.

    score: uint8 (N, S, S, 3) -> float (N, K) in [0, 1]. half: of the training split that it learnt from. detector:
    where it is one. file: its weights.
    """

    name: str
    heads: tuple[str, ...]
    thresholds: Mapping[str, float]
    half: int
    score: Callable[[np.ndarray], np.ndarray]
    file: Path
    detector: EvidenceDetector | None = None

    def head_of(self, attribute: str) -> str | None:
        """What it calls an attribute; None where it does not answer for it."""
        name = attribute if attribute in self.heads else HEADS.get(attribute, attribute)
        return name if name in self.heads else None


@dataclass(frozen=True)
class Row:
    """One figure. trial: of TRIALS. where: source and view, or the family that drew; bound: the gate, or None."""

    instrument: str
    head: str
    trial: str
    where: str
    estimate: Estimate
    bound: tuple[str, float] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain values. passed is null where there is no gate, or no figure."""
        passed = None
        if self.bound and np.isfinite(self.estimate.value):
            sign, limit = self.bound
            value = self.estimate.value
            passed = {"<": value < limit, "<=": value <= limit, ">=": value >= limit}[sign]
        return {
            "instrument": self.instrument,
            "head": self.head,
            "trial": self.trial,
            "where": self.where,
            **self.estimate.as_json(),
            "gate": "{} {:g}".format(*self.bound) if self.bound else None,
            "passed": passed,
            **self.counts,
        }


def scored(instrument: Instrument, pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Scores (N, K) of pictures uint8 (S, S, 3)."""
    parts = [instrument.score(np.stack(pictures[start : start + BATCH])) for start in range(0, len(pictures), BATCH)]
    return np.concatenate(parts) if parts else np.zeros((0, len(instrument.heads)))


def gate(trial: str, attribute: str) -> tuple[str, float] | None:
    """What a trial has to give for an attribute; None where it has no gate, or the attribute is empty."""
    found = GATES.get(trial, {})
    return None if not attribute else found.get(attribute, found.get(""))


def unseen_rows(split: Split, half: int) -> list[int]:
    """The images of a split that an instrument of one half did not learn from."""
    return np.flatnonzero(split.halves != half).tolist() if split.name == "train" else list(range(len(split)))


def classifier_instrument(name: str, folder: Path, device: str) -> Instrument:
    """The audit's view of a classifier. Raises ModelError for files that do not hold up."""
    network = AttributeClassifier.load(folder, device)

    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network.probabilities(to_pixels(images, device)).cpu().numpy()

    half = _half(network.card, folder)
    return Instrument(name, network.heads, network.thresholds, half, score, folder / "model.safetensors")


def detector_instrument(name: str, folder: Path, device: str) -> Instrument:
    """The audit's view of an evidence detector. Raises ModelError for files that do not hold up."""
    network = EvidenceDetector.load(folder, device)

    def score(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network.scores(to_pixels(images, device)).cpu().numpy()

    thresholds = dict.fromkeys(network.attributes, 0.5)
    half = _half(network.card, folder)
    return Instrument(name, network.attributes, thresholds, half, score, folder / "model.safetensors", network)


def _half(card: Mapping[str, Any], folder: Path) -> int:
    words = str(card.get("trained_on", "")).split()
    if len(words) < 2 or words[1] not in ("A", "B"):
        raise InputError(f"the card in {folder} does not say which half it was trained on: {card.get('trained_on')!r}")
    return "AB".index(words[1])
