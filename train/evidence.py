"""The evidence stage: a network that marks attributes, from counterfactual pairs and real images.

A pair differs in one addition alone and is relit and moved alike, so that neither colour nor source tells its two
pictures apart. Real images come as often with an attribute as without it, among images of one source; where it lies is
known of few, and of the others only that it lies somewhere (multiple-instance learning over the most probable pixels).
Detectors of the families "a" and "b" learn from disjoint lesions or patients, other drawing code and other networks.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from medviz.errors import InputError
from medviz.evidence.detector import CONFIG_NAME, FORMAT_VERSION, WEIGHTS_NAME
from medviz.evidence.networks import ARCHITECTURES, build
from medviz.evidence.presence import presence
from train import augment, seeding
from train.averaged import NORMALISING_BATCHES, AveragedLearner, round_to_bfloat16
from train.calibration import auroc
from train.config import StageConfig, parse
from train.datasets.counterfactuals import family
from train.datasets.evidence import radiology
from train.datasets.evidence.dermatology import ArtefactExamples
from train.datasets.evidence.examples import SOMEWHERE, Example, Examples, changed, halved
from train.datasets.evidence.labels import labelled
from train.datasets.evidence.radiology import NLM_JSRT, ChestExamples, read_structures
from train.datasets.split import Split, open_split
from train.loop import fit

HALVES = {"a": 0, "b": 1}
"""Family -> half of the lesions or patients (`Split.halves`)."""
SHARES = {
    "hair": 0.01,
    "ruler": 0.01,
    "gel_bubble": 0.005,
    "ink": 0.01,
    "opacity": 0.02,
    "pleural_effusion": 0.01,
    "nodule": 0.003,
    "heart": 0.05,
    "right_lung": 0.05,
    "left_lung": 0.05,
}
"""Attribute -> part of the image that a plain example covers (`medviz.evidence.presence`)."""
MASK_THRESHOLDS = tuple(round(0.1 + 0.05 * number, 2) for number in range(15))
"""Those that a mask's threshold is chosen from."""
THRESHOLD_BATCHES = 24
POSITIVE_WEIGHT = 10.0
"""Of a pixel that shows an attribute, in the cross-entropy."""
SLACK = 0.1
"""Added to the probability that an attribute lies somewhere: an image that shows nothing of what its label says, since
the crop cut it away, then hardly asks for it."""
STATISTICS_IMAGES = 64
CALIBRATION_BATCH = 32
LEAST_EXAMPLES = 5
"""Images with and without an attribute that a calibration needs."""


@dataclass
class EvidenceConfig(StageConfig):
    """Options of the evidence stage."""

    domain: str = "dermatology"
    family: str = "a"
    """a may be learned from by anything; b serves acceptance alone."""
    architecture: str = "unet"
    """unet or upernet (`medviz.evidence.networks`)."""
    widths: tuple[int, ...] = ()
    """Channels at 1/4, 1/8, ... of the side; empty: the architecture's own."""
    size_px: int = 256
    """Side of the square the network reads."""
    batch: int = 16
    """Pictures a step, an even number."""
    pair_share: float = 0.625
    """Of the pictures of a step: those of counterfactual pairs; the others are real images."""
    distractors: float = 0.4
    """How often a pair has a second addition, in both pictures."""
    blank: float = 0.06
    """How often pictures are shrunk to thumbnails, which show no finding."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup: int = 60
    """Steps of linear warm-up, then cosine to zero."""
    ema_decay: float = 0.995
    dice_weight: float = 1.0
    """Of the Dice loss beside the cross-entropy."""
    somewhere_weight: float = 0.2
    """Of the demand that an attribute lies somewhere."""
    bf16: bool = False
    """Train in bf16 autocast: faster, where the processor has instructions for it."""

    def checked(self) -> "EvidenceConfig":
        """The configuration itself. Raises InputError naming the option that is out of range and what is allowed."""
        if self.family not in HALVES:
            raise InputError(f"unknown family {self.family!r}; allowed: {', '.join(HALVES)}")
        if self.architecture not in ARCHITECTURES:
            raise InputError(f"unknown architecture {self.architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
        if self.batch < 2 or self.batch % 2:
            raise InputError(f"batch must be an even number from 2 on, found {self.batch}")
        if not 0 < self.pair_share <= 1:
            raise InputError(f"pair_share must be above 0 and at most 1, found {self.pair_share}")
        return self


class Known(NamedTuple):
    """targets float16 (B, K, h, w), as in `Example`, on the masks' grid; weights float32 (B, K)."""

    targets: torch.Tensor
    weights: torch.Tensor


@dataclass(frozen=True)
class Shown:
    """Real images by which presence is calibrated. images uint8 (N, S, S, 3); truth bool (N,)."""

    images: np.ndarray
    truth: np.ndarray


def mask_loss(logits: torch.Tensor, known: Known, shares: Sequence[float]) -> dict[str, torch.Tensor]:
    """cross_entropy, dice and somewhere, scalars with gradients, of mask logits (B, K, h, w).

    cross_entropy: weighted mean over the pixels that are known, by attribute, in which a pixel that shows it counts
    POSITIVE_WEIGHT times; the mean over attributes. dice: of the whole batch, by attribute. somewhere: -log(p + SLACK)
    of the mean probability p of the most probable SOMEWHERE pixels, as many as the attribute's share of the image.
    """
    logits, targets = logits.float(), known.targets.float()
    sure, truth = (targets >= 0).float(), targets.clamp(min=0)
    weight = sure * (1 + (POSITIVE_WEIGHT - 1) * truth)
    losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * weight
    cross_entropy = losses.sum(dim=(0, 2, 3)) / weight.sum(dim=(0, 2, 3)).clamp(min=1)
    guess = torch.sigmoid(logits) * sure
    overlap, total = (guess * truth).sum(dim=(0, 2, 3)), (guess + truth).sum(dim=(0, 2, 3))
    there = truth.sum(dim=(0, 2, 3)) > 0
    dice = (1 - (2 * overlap + 1) / (total + 1)) * there
    somewhere = logits.new_zeros(())
    for column, share in enumerate(shares):
        rows = torch.nonzero(known.weights[:, column] > 0).flatten()
        if len(rows) == 0:
            continue
        inside = logits[rows, column].masked_fill(targets[rows, column] != SOMEWHERE, -30.0).flatten(1)
        count = max(1, round(share * inside.shape[1]))
        most = torch.sigmoid(inside.topk(count, dim=1, sorted=False).values).mean(dim=1)
        somewhere = somewhere - (known.weights[rows, column] * torch.log(most + SLACK)).sum()
    return {
        "cross_entropy": cross_entropy.mean(),
        "dice": dice.sum() / there.sum().clamp(min=1),
        "somewhere": somewhere / len(logits),
    }


class EvidenceLearner(AveragedLearner):
    """Learns a mask network; see `train.loop.Learner`."""

    max_grad_norm = 1.0

    def __init__(self, config: EvidenceConfig, examples: Examples, shown: Mapping[str, Shown]) -> None:
        """shown: attribute -> real images to calibrate its presence on; those not named keep the mask's own.

        Raises InputError for options out of range.
        """
        self.config, self.examples, self.shown = config.checked(), examples, shown
        self.shares = [SHARES[name] for name in examples.attributes]
        self.options = {"widths": list(config.widths)} if config.widths else {}
        torch.manual_seed(seeding.key(config.seed, "evidence", "weights"))
        model = build(config.architecture, len(examples.attributes), self.options)
        model.to(config.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        rng = seeding.numpy_generator(config.seed, "evidence", "statistics")
        pixels = np.concatenate([examples.real(rng).image.reshape(-1, 3) for _ in range(STATISTICS_IMAGES)])
        self._parts: dict[str, torch.Tensor] = {}
        super().__init__(config, ("evidence",), model, pixels.mean(axis=0) / 255, pixels.std(axis=0) / 255 + 1e-3)

    def changed(self, step: int) -> tuple[torch.Tensor, Known]:  # type: ignore[override]
        """Pictures of `step`, uint8 (B, S, S, 3), and what is known of them."""
        config, found = self.config, []
        pairs = max(1, round(config.pair_share * config.batch / 2))
        for position in range(config.batch - pairs):
            rng = seeding.numpy_generator(config.seed, "evidence", "examples", step * config.batch + position)
            drawn = self.examples.pair(rng) if position < pairs else [self.examples.real(rng)]
            changes = augment.EVIDENCE[config.domain]
            found += changed(drawn, changes, rng, config.blank, self.examples.findings)
        return torch.from_numpy(np.stack([each.image for each in found])), _known(found)

    def pixels(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        return super().pixels(images).contiguous(memory_format=torch.channels_last)

    def loss(self, pixels: torch.Tensor, known: Known) -> torch.Tensor:  # type: ignore[override]
        config = self.config
        with torch.autocast(torch.device(config.device).type, torch.bfloat16, enabled=config.bf16):
            logits = self.model(pixel_values=pixels)
        parts = mask_loss(logits, Known(*(tensor.to(config.device) for tensor in known)), self.shares)
        self._parts = {name: part.detach() for name, part in parts.items()}
        return (
            parts["cross_entropy"] + config.dice_weight * parts["dice"] + config.somewhere_weight * parts["somewhere"]
        )

    def update(self, step: int) -> dict[str, float | torch.Tensor]:
        return {**super().update(step), **self._parts}

    def export(self, folder: Path) -> dict[str, Any]:
        """Average, calibrate presence on real images, write config.json and model.safetensors; returns the figures."""
        config = self.config
        self.average()
        round_to_bfloat16(self.model)
        entries, figures = {}, {}
        thresholds = self.mask_thresholds()
        for column, name in enumerate(self.examples.attributes):
            entry = {"share": self.shares[column], "mask_threshold": thresholds[column], "slope": 1.0, "intercept": 0.0}
            if name in self.shown:
                found = self.presence(self.shown[name].images)[:, column]
                slope, intercept = fit_presence(found, self.shown[name].truth)
                entry |= {"slope": slope, "intercept": intercept}
                truth = self.shown[name].truth
                figures[name] = {"auroc": auroc(found, truth), "n": len(truth), "positives": int(truth.sum())}
            entries[name] = entry
        group = "lesion" if config.domain == "dermatology" else "patient"
        card = {
            "format_version": FORMAT_VERSION,
            "architecture": config.architecture,
            "network": self.options,
            "attributes": list(self.examples.attributes),
            "size_px": config.size_px,
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
            "presence": entries,
            "family": config.family,
            "trained_on": f"half {'AB'[HALVES[config.family]]} of train by {group}",
            "metrics": figures,
        }
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.to(torch.bfloat16).contiguous() if tensor.is_floating_point() else tensor.contiguous()
            for name, tensor in self.model.state_dict().items()
        }
        save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / CONFIG_NAME).write_text(json.dumps(card, indent=1, allow_nan=False) + "\n")
        return {"parameters": sum(p.numel() for p in self.model.parameters()), "attributes": figures}

    def mask_thresholds(self) -> list[float]:
        """For each attribute, the probability from which on pixels are marked so that Dice is highest.

        Measured on fresh pictures of the training's own kind, where it is known what pixels show.
        """
        self.model.eval()
        levels = torch.tensor(MASK_THRESHOLDS)
        overlap, total = torch.zeros(2, len(MASK_THRESHOLDS), len(self.shares))
        for number in range(THRESHOLD_BATCHES):
            images, known = self.changed(self.config.steps + NORMALISING_BATCHES + number)
            with torch.inference_mode():
                found = torch.sigmoid(self.model(pixel_values=self.pixels(images)).float()).cpu()
            sure, truth = known.targets >= 0, known.targets >= 0.5
            for row, level in enumerate(levels):
                marked = (found >= level) & sure
                overlap[row] += (marked & truth).sum(dim=(0, 2, 3))
                total[row] += marked.sum(dim=(0, 2, 3)) + truth.sum(dim=(0, 2, 3))
        best = (2 * overlap / total.clamp(min=1)).argmax(dim=0)
        return [MASK_THRESHOLDS[int(row)] for row in best]

    def presence(self, images: np.ndarray) -> np.ndarray:
        """`medviz.evidence.presence` of images uint8 (N, S, S, 3), float32 (N, K), in logits."""
        self.model.eval()
        found = [np.zeros((0, len(self.shares)), np.float32)]
        with torch.inference_mode():
            for start in range(0, len(images), CALIBRATION_BATCH):
                logits = self.model(pixel_values=self.pixels(images[start : start + CALIBRATION_BATCH]))
                found.append(presence(logits, self.shares).cpu().numpy())
        return np.concatenate(found)


def fit_presence(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """(slope, intercept) of sigmoid(slope * presence + intercept), by logistic regression (Platt 1999).

    found (N,) in logits, truth bool (N,); both kinds of images count the same in all, so that a score of 0.5 parts
    them. Raises InputError for too few images of a kind, and where a fuller mask means absence.
    """
    if min(truth.sum(), (~truth).sum()) < LEAST_EXAMPLES:
        raise InputError(f"calibration needs {LEAST_EXAMPLES} images of both kinds, found {int(truth.sum())} "
                         f"with and {int((~truth).sum())} without the attribute")  # fmt: skip
    fitted = LogisticRegression(C=10.0, class_weight="balanced").fit(found[:, None].astype(np.float64), truth)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    if slope <= 0:
        raise InputError(f"masks are fuller on images without the attribute (slope {slope:.3g}): train longer")
    return slope, intercept


def _known(found: Sequence[Example]) -> Known:
    targets = np.stack([halved(each.targets) for each in found]).astype(np.float16)
    return Known(torch.from_numpy(targets), torch.from_numpy(np.stack([each.weights for each in found])))


def shown_images(splits: Sequence[Split], attributes: Sequence[str], half: int, size_px: int) -> dict[str, Shown]:
    """Attribute -> real images of splits to calibrate on; of a training split, those of the other half's patients."""
    found = {}
    for name in attributes:
        images, truth = [], []
        for split in splits:
            known = labelled(split, name)
            mine = np.ones(len(known.indices), bool)
            if split.name == "train":
                mine = split.halves[known.indices] != half
            images.append(split.images(size_px, known.indices[mine].tolist()))
            truth.append(known.truth[mine])
        answers = np.concatenate(truth)
        if answers.any():
            found[name] = Shown(np.concatenate(images), answers)
    return found


def main(arguments: list[str]) -> None:
    """`python -m train evidence RECIPE [overrides]`."""
    config = parse(arguments, EvidenceConfig).checked()
    half, drawn_by = HALVES[config.family], family(config.domain, config.family)
    options: dict[str, Any] = {"size_px": config.size_px, "distractors": config.distractors}
    examples: Examples
    if config.domain == "dermatology":
        examples = ArtefactExamples(open_split(config.domain, "train"), drawn_by, half, **options)
        calibrated, splits = examples.attributes, [open_split(config.domain, "validation")]
    else:
        splits = [open_split(config.domain, name, extra_folders=(NLM_JSRT,)) for name in ("train", "validation")]
        structures = read_structures("train", config.size_px)
        examples = ChestExamples(splits[0], drawn_by, half, structures, **options)
        calibrated = radiology.FINDINGS
    fit(EvidenceLearner(config, examples, shown_images(splits, calibrated, half, config.size_px)), config)
