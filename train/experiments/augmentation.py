"""`python -m train augmentation RECIPE`: does a disease classifier learn from synthetic pictures?

Four arms, the same network, steps, seeds and changes of the images: real images alone, and three that add as many extra
pictures each. The extra ones stand for the same records, resampled from under-represented subgroups: the real images of
these records once more (the honest rival of any synthetic picture), the baseline's pictures of their captions, and the
aligned model's from the same captions and noise. All arms are judged on real test images and all are reported. A run
that was stopped goes on; what is finished is found.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shlex
import shutil
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from diffusers import StableDiffusionPipeline

from medviz import __version__
from medviz.domains import get_domain
from medviz.errors import InputError, ModelError
from medviz.models.adapters import load_lora
from train import augment, checkpoint, seeding
from train.architectures import ARCHITECTURES
from train.config import GuidedConfig, parse
from train.datasets.split import Split, open_split
from train.evaluate.generated import Request, file_records, generate, weights_digest
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.experiments.classified import classified_figures, subgroups
from train.experiments.disease import DiseaseLearner, Pixels
from train.experiments.pieces import digest, piece, write_json
from train.experiments.subgroups import Described, cell_counts, described, drawn_again, prompt_of, rarest_cell
from train.loop import fit
from train.rl.trainer import open_pipeline

ARMS = {
    "real": "real only",
    "oversampled": "real + real images of rare subgroups again",
    "baseline": "real + baseline's synthetic",
    "aligned": "real + aligned synthetic",
}
"""Arm -> its column; the first is the one the others are held against."""
ADAPTER = "aligned"
LEAST_SEEDS = 5
INTERVALS = (
    "brackets hold 95 % intervals over training seeds and lesions, both drawn with replacement; Δ is the change "
    "against real only, on the same seeds and lesions"
)

logger = logging.getLogger(__name__)


@dataclass
class AugmentationConfig(GuidedConfig):
    """Options of the augmentation experiment. It goes on by itself: run the same command again."""

    steps: int = 800
    """Optimiser steps of every classifier."""
    base: str = ""
    """Folder of the fine-tuned pipeline: the baseline."""
    adapter: str = ""
    """Folder of the adapter that aligns it."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Training seeds, at least 5 and the same for every arm."""
    synthetic: int = 2000
    """Extra pictures of each arm but real."""
    picture_steps: int = 10
    """Denoising steps of a synthetic picture."""
    picture_batch: int = 16
    """Pictures drawn at a time; part of what names the stored pictures."""
    real_images: int = 0
    """Training images, whole lesions drawn at random (0: all). Few of them are what augmentation is for."""
    rare_below: int = 50
    """A diagnosis with an artefact, a site or an age band is under-represented with fewer training images."""
    artefacts: tuple[str, ...] = ("hair", "gel_bubble", "ruler", "ink")
    """Heads whose presence makes subgroups."""
    least_images: int = 5
    """Test images of a diagnosis that a subgroup must have for it to count there."""
    architecture: str = "resnet"
    """See the classifier stage."""
    width: float = 0.5
    depth: float = 0.5
    dropout: float = 0.1
    size_px: int = 64
    """Side of the square that the classifier reads."""
    batch: int = 48
    """Images a step."""
    learning_rate: float = 2e-3
    weight_decay: float = 0.05
    warmup: int = 60
    """Steps of linear warm-up, then cosine to zero."""
    ema_decay: float = 0.99
    """Of the weights that answer."""
    reports: str = "assets/reports"
    """Folder that also gets the JSON (empty: only `out`)."""


@dataclass(frozen=True)
class Material:
    """What all arms share. training: the chosen real images, with their rows in the train split; extra int (E,): which
    of them the extra pictures stand for; request: their captions and noise."""

    training: Described
    rows: np.ndarray
    extra: np.ndarray
    request: Request
    test: Described
    test_rows: np.ndarray


def run(config: AugmentationConfig, command: str = "") -> dict[str, Any] | None:
    """Draw and train what is missing and write the report, which is returned; None where `max_minutes` was over first.

    Raises InputError for options out of range and where train and test share a lesion.
    """
    began = time.monotonic()
    check(config)
    train, test = open_split(config.domain, "train"), open_split(config.domain, "test")
    material = gather(config, train, test)
    arms = Arms(config, material, train, test, Synthetic(config, material.request))
    answers: dict[str, list[Any]] = {arm: [] for arm in ARMS}
    for arm in ARMS:
        for seed in config.seeds:
            if 0 < config.max_minutes < (time.monotonic() - began) / 60:
                logger.warning("stopped before %s, seed %d; the same command goes on", arm, seed)
                return None
            answers[arm].append(arms.logits(arm, seed))
    found = report(config, command, material, {arm: np.array(each) for arm, each in answers.items()}, arms.models)
    for folder in (Path(config.out), *([Path(config.reports)] if config.reports else [])):
        write_json(folder / f"augmentation-{config.domain}.json", found)
    return found


def check(config: AugmentationConfig) -> None:
    """Raises InputError for options out of range."""
    if len(set(config.seeds)) < len(config.seeds) or len(config.seeds) < LEAST_SEEDS:
        raise InputError(f"seeds must be at least {LEAST_SEEDS} different ones, found {config.seeds}")
    if config.architecture not in ARCHITECTURES:
        raise InputError(f"unknown architecture {config.architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    if config.domain not in augment.CLASSIFIER:
        raise InputError(f"no domain {config.domain!r}; allowed: {', '.join(augment.CLASSIFIER)}")
    for name, low in (("synthetic", 1), ("real_images", 0), ("rare_below", 1), ("least_images", 1), ("steps", 1)):
        if getattr(config, name) < low:
            raise InputError(f"{name} must be at least {low}, found {getattr(config, name)}")


def gather(config: AugmentationConfig, train: Split, test: Split) -> Material:
    """Choose the real images, the records of the extra pictures and their prompts: functions of the seed alone.

    Raises InputError where train and test share a lesion.
    """
    shared = sorted(set(train.groups) & set(test.groups))
    if shared:
        raise InputError(
            f"train and test share {len(shared)} lesions, e.g. {shared[0]}: nothing can be reported on them"
        )
    domain = get_domain(config.domain)
    everything, known = described(domain, train.records, train.groups, config.artefacts)
    kept = _whole_lesions(everything, config.real_images, config.seed)
    training, rows = everything.chosen(kept), known[kept]
    extra = drawn_again(training, config.rare_below, config.synthetic, config.seed)
    prompts = tuple(
        prompt_of(domain, train.records[rows[i]], training.diseases[training.labels[i]], config.seed, number)
        for number, i in enumerate(extra)
    )
    seeds = tuple(seeding.key(config.seed, "augmentation", "noise", number) % 2**32 for number in range(len(extra)))
    request = Request(prompts, seeds, config.picture_steps, config.guidance)
    test_images, test_rows = described(domain, test.records, test.groups, config.artefacts)
    return Material(training, rows, extra, request, test_images, test_rows)


def _whole_lesions(images: Described, count: int, seed: int) -> np.ndarray:
    """Rows of `count` images (0 or too many: all) or a few more: whole lesions in an order drawn from the seed."""
    if not 0 < count < len(images):
        return np.arange(len(images))
    lesions, of_image = np.unique(np.array(images.groups), return_inverse=True)
    order = seeding.numpy_generator(seed, "augmentation", "lesions").permutation(len(lesions))
    sizes = np.bincount(of_image)[order]
    needed = int(np.searchsorted(np.cumsum(sizes), count)) + 1
    return np.flatnonzero(np.isin(of_image, order[:needed]))


class Synthetic:
    """The extra pictures of the arms that draw them, drawn when they are first asked for.

    models: arm -> sha256 of the weights that draw its pictures.
    """

    def __init__(self, config: AugmentationConfig, request: Request) -> None:
        self.config, self.request = config, request
        base, adapter = (
            file_records(Path(config.base)),
            file_records(Path(config.adapter), f"adapters/{ADAPTER}/"),
        )
        self._files = {**base, **adapter}
        self._adapters = {"baseline": None, "aligned": ADAPTER}
        self.models = {arm: weights_digest(self._files, adapter) for arm, adapter in self._adapters.items()}
        self._drawn: dict[str, np.ndarray] = {}

    @cached_property
    def _pipeline(self) -> StableDiffusionPipeline:
        pipeline = open_pipeline(self.config.base, self.config.device)
        load_lora(pipeline.unet, Path(self.config.adapter), ADAPTER)
        return pipeline

    def pictures(self, arm: str) -> np.ndarray:
        """Those of an arm, at the classifier's size, uint8 (E, S, S, 3)."""
        if arm not in self._drawn:
            config, place = self.config, Path(self.config.out) / "pictures"
            drawn = generate(
                self._pipeline, self._files, self._adapters[arm], self.request, place,
                batch=config.picture_batch, label=f"pictures, {arm}",
            )  # fmt: skip
            self._drawn[arm] = np.stack([_resized(image, config.size_px) for image in drawn])
        return self._drawn[arm]


def _resized(image: np.ndarray, size_px: int) -> np.ndarray:
    if image.shape[:2] == (size_px, size_px):
        return image
    return cv2.resize(image, (size_px, size_px), interpolation=cv2.INTER_AREA)


class Arms:
    """The images of each arm, read once, and what each arm's classifiers answer on the test images."""

    def __init__(
        self,
        config: AugmentationConfig,
        material: Material,
        train: Split,
        test: Split,
        synthetic: Synthetic,
    ) -> None:
        self.config, self.material, self._synthetic = config, material, synthetic
        self.models = synthetic.models
        self._train, self._test = train, test
        self._read: tuple[np.ndarray, np.ndarray] | None = None
        # Everything that an answer depends on but the seed and the arm's pictures.
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items() if k not in _FREE}
        self._shared = {
            **options,
            "images": [train.records[i]["image_id"] for i in material.rows],
            "test": [test.records[i]["image_id"] for i in material.test_rows],
            "extra": material.extra.tolist(),
            "request": asdict(material.request),
        }

    def logits(self, arm: str, seed: int) -> list[list[float]]:
        """Answers (M, K) of the classifier of one arm and seed, trained where they are not there yet."""
        identity = {**self._shared, "arm": arm, "seed": seed, "pictures": self.models.get(arm)}
        name = f"{arm}-seed{seed}"
        # Named by all that it depends on: a checkpoint of other images or options is never gone on from.
        folder = Path(self.config.out) / "runs" / f"{name}-{digest(identity)[:12]}"

        def make() -> dict[str, Any]:
            resume = bool(checkpoint.steps(folder))
            config = replace(self.config, out=str(folder), seed=seed, resume=resume, max_minutes=0.0)
            logger.info("training %s", name)
            metrics = fit(DiseaseLearner(config, len(self.material.test.diseases), self.pixels(arm)), config)
            if metrics is None:
                raise ModelError(f"{folder} stopped before its last step")
            return {"logits": metrics["logits"], "trained_s": metrics["trained_s"]}

        found = piece(Path(self.config.out) / "answers" / f"{name}.json", identity, make)["logits"]
        shutil.rmtree(folder, ignore_errors=True)  # what it answered is kept, the checkpoint that led there is not
        return found

    def pixels(self, arm: str) -> Pixels:
        """The images of an arm: the real ones, and its extra pictures behind them with the labels of their records."""
        if self._read is None:
            size_px = self.config.size_px
            self._read = (
                self._train.images(size_px, self.material.rows.tolist()),
                self._test.images(size_px, self.material.test_rows.tolist()),
            )
        real, test = self._read
        labels, extra = self.material.training.labels, self.material.extra
        sample = real[:: max(1, len(real) // 512)].reshape(-1, 3) / 255.0
        mean, std = sample.mean(axis=0), sample.std(axis=0) + 1e-3
        if arm == "real":
            return Pixels(real, labels, test, mean, std)
        added = real[extra] if arm == "oversampled" else self._synthetic.pictures(arm)
        return Pixels(np.concatenate([real, added]), np.concatenate([labels, labels[extra]]), test, mean, std)


_FREE = (
    "out",
    "seeds",
    "resume",
    "reports",
    "max_minutes",
    "checkpoint_every_s",
    "log_every",
    "device",
    "base",
    "adapter",
)
"""Options on which no answer depends, or only by an arm's pictures."""


def report(
    config: AugmentationConfig, command: str, material: Material, answers: dict[str, np.ndarray], models: dict[str, str]
) -> dict[str, Any]:
    """The JSON of the experiment from the answers (S, M, K) of each arm."""
    domain, test = get_domain(config.domain), material.test
    labels = {head.name: head.label for head in domain.heads}
    rarest = rarest_cell(test, cell_counts(material.training))
    groups = subgroups(test, rarest, config.rare_below, labels)
    return {
        "format_version": FORMAT_VERSION,
        "kind": "augmentation",
        "title": f"{domain.label}: a disease classifier with and without synthetic pictures",
        "domain": config.domain,
        "command": command,
        "default_adapter": None,
        "arms": [{"name": name, "label": label} for name, label in ARMS.items()],
        "rows": "figures",
        "intervals": INTERVALS,
        "settings": {
            "split": "test",
            "test_images": len(test),
            "training_seeds": list(config.seeds),
            "real_images": len(material.training),
            "extra_pictures": len(material.extra),
            "records_they_stand_for": len(np.unique(material.extra)),
            "under_represented_below": config.rare_below,
            "classifier": f"{config.architecture} {config.width:g}/{config.depth:g} at {config.size_px} px",
            "steps": config.steps,
            "picture_steps": config.picture_steps,
            "guidance_scale": str(config.guidance),
        },
        "seeds": list(config.seeds),
        "models": {"sha256": digest(models), "weights": models},
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "extra_by_diagnosis": _counted(material.training, material.extra),
        "real_by_diagnosis": _counted(material.training, np.arange(len(material.training))),
        "figures": [f.as_json() for f in classified_figures(answers, test, groups, config.least_images, labels)],
    }


def _counted(images: Described, rows: np.ndarray) -> dict[str, int]:
    counts = np.bincount(images.labels[rows], minlength=len(images.diseases))
    return dict(zip(images.diseases, counts.tolist(), strict=True))


def main(arguments: list[str]) -> None:
    """`python -m train augmentation RECIPE [overrides]`."""
    config = parse(arguments, AugmentationConfig)
    run(config, command=f"python -m train augmentation {shlex.join(arguments)}")
