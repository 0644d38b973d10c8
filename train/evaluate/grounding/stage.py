"""`python -m train evaluate grounding RECIPE`: where phrases look in real images, beside rivals and image-free priors.

Every row reads the same phrases in the same images: the frozen generator and its tuned adapters by their attention, the
judge by Grad-CAM, priors that never see the image, and oracles that are told the region. The split is for reports alone
where it is `test`; priors are fitted on the training split whatever is reported.
"""

from __future__ import annotations

import importlib.metadata
import logging
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medviz import __version__
from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.grounding.metrics import MIOU_THRESHOLDS
from medviz.models.adapters import ADAPTER_CONFIG_NAME, load_adapter
from medviz.models.library import LoadedDomain, ModelLibrary
from medviz.models.manifest import NAME_PATTERN, read_json
from medviz.results import HeatMap
from medviz.rewards.classifier import AttributeClassifier
from train.config import StageConfig, parse
from train.datasets.grounded_phrases import SETS, PhraseSet
from train.datasets.split import open_split
from train.evaluate.generated import weights_digest
from train.evaluate.grounding.priors import PRIORS, SIGMAS_A_PLACE, Priors, oracle, uniform
from train.evaluate.grounding.readings import Reading, asked_head, cam_maps, phrase_maps
from train.evaluate.grounding.scores import Arm, figures, patient_means, score_maps
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.experiments.pieces import folder_digest, write_json

ORACLES = (3, 6)
"""Sigmas a side of the true box."""
CLASS_PRIOR, PLACE_PRIOR = "prior_class", "prior_place"
INTERVALS = (
    "brackets hold 95 % intervals over patients or lesions (tuned rows: and training seeds), drawn with replacement; "
    "Δ is the change against the frozen baseline, patient by patient; a macro figure is the mean of "
    "its classes"
)
NOTES = (
    "several boxes or parts of a mask count as one region",
    "a macro figure leaves out classes whose words the vocabulary lacks: the generator never read a caption with them",
    "where a phrase names no place, the prior of class and place is that of the class",
    "no training image has tubes outlined: their prior is the mediastinum",
    "Grad-CAM is not computed where the judge has no head; a map that is 0 everywhere has no mass",
    "hair, rulers and other artefacts have no mask, and airways no word: they are not measured",
)

logger = logging.getLogger(__name__)


@dataclass
class GroundingConfig(StageConfig):
    """Options of the grounding evaluation. Maps already made are found again, so a stopped run goes on by itself."""

    domain: str = "radiology"
    models: str = "assets/models"
    """Folder that holds the domain's model folder."""
    split: str = "test"
    """Images to read; the hand-drawn structures are of test images alone."""
    tuned: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Row -> folders of its adapters, one a training seed, for this base."""
    one_step_seeds: tuple[int, ...] = (0, 1, 2, 3)
    """Noises whose maps are averaged."""
    limit: int = 0
    """Phrases of a class, evenly spaced (0: all)."""
    batch: int = 16
    """Images in a pass of the UNet; part of what names the stored maps."""
    reports: str = "assets/reports"
    """Folder that also gets the JSON (empty: only `out`); of the test split, the tables are made of it."""
    suffix: str = ""
    """Ends the JSON's name there, so that it stands beside another of the domain."""

    def checked(self) -> GroundingConfig:
        """The configuration itself. Raises InputError naming the option that is out of range and what is allowed."""
        if self.domain not in SETS:
            raise InputError(f"domain must be one of {', '.join(SETS)}, found {self.domain!r}")
        for name, low in (("batch", 1), ("limit", 0)):
            if getattr(self, name) < low:
                raise InputError(f"{name} must be at least {low}, found {getattr(self, name)}")
        if not self.one_step_seeds:
            raise InputError("one_step_seeds must name at least one seed")
        for name, folders in self.tuned.items():
            if not NAME_PATTERN.fullmatch(name) or not folders:
                raise InputError(f"tuned needs names of {NAME_PATTERN.pattern} with a folder each, found {name!r}")
        return self


Draw = Callable[[PhraseSet], list[Sequence[HeatMap | None]]]
"""The maps of every phrase of a set, once a training seed."""


def run(config: GroundingConfig, command: str = "") -> dict[str, Any]:
    """Read every set by every row and return the report that was written.

    Raises InputError for options out of range and missing regions, ModelError for model files that do not hold up.
    """
    config.checked()
    loaded = ModelLibrary(Path(config.models), config.device).load(config.domain)
    size_px = int(loaded.pipeline.unet.config.sample_size) * int(loaded.pipeline.vae_scale_factor)
    priors = PRIORS[config.domain](open_split(config.domain, "train"), size_px)
    sets = SETS[config.domain](open_split(config.domain, config.split), priors.atlas, size_px, config.limit)
    judge = AttributeClassifier.load(loaded.folder / "judge", config.device)
    rows = {**_attention_rows(config, loaded), **_rival_rows(config, judge), **_told_rows(priors)}
    unseeing = [arm.name for arm in rows if arm.name in (CLASS_PRIOR, PLACE_PRIOR)]
    found = []
    for phrases in sets:
        known = _known_classes(config.domain, phrases)
        values = {}
        for arm, draw in rows.items():
            logger.info("%s: %s", phrases.label, arm.label)
            values[arm.name] = np.stack([patient_means(score_maps(maps, phrases), phrases) for maps in draw(phrases)])
        found += figures(phrases, list(rows), values, unseeing, known)
    report = {
        **_about(config, command, loaded, size_px, priors, list(rows)),
        "sets": {phrases.name: _about_set(config.domain, phrases, judge) for phrases in sets},
        "figures": [figure.as_json() for figure in found],
    }
    write_json(Path(config.out) / "metrics.json", report)
    if config.reports:
        parts = ("grounding", config.domain, config.suffix, "" if config.split == "test" else config.split)
        write_json(Path(config.reports) / f"{'-'.join(filter(None, parts))}.json", report)
    return report


def _attention_rows(config: GroundingConfig, loaded: LoadedDomain) -> dict[Arm, Draw]:
    """The frozen baseline, then the tuned adapters, whose weights are loaded; both read as the app reads."""
    base = weights_digest(
        {**({} if loaded.manifest.hub is None else loaded.manifest.hub.files), **loaded.manifest.files}, None
    )

    def reader(label: str, adapters: dict[str | None, str | None]) -> Draw:
        def draw(phrases: PhraseSet) -> list[Sequence[HeatMap | None]]:
            return [
                list(
                    phrase_maps(
                        loaded.pipeline, adapter, phrases, Reading(config.one_step_seeds), Path(config.out) / "maps",
                        {"base": base, "adapter": digest}, batch=config.batch, label=f"{label}, {phrases.name}",
                    )
                )
                for adapter, digest in adapters.items()
            ]  # fmt: skip

        return draw

    rows: dict[Arm, Draw] = {Arm("frozen_one_step", "frozen baseline"): reader("frozen baseline", {None: None})}
    for name, folders in config.tuned.items():
        adapters: dict[str | None, str | None] = {}
        for seed, folder in enumerate(map(Path, folders)):
            load_adapter(loaded.pipeline, folder, f"{name}-run{seed}")
            adapters[f"{name}-run{seed}"] = folder_digest(folder)
        title = read_json(Path(folders[0]) / ADAPTER_CONFIG_NAME).get("title") or name
        label = f"{title} (`{name}`, {len(folders)} training seed{'s' * (len(folders) > 1)})"
        rows[Arm(f"{name}_one_step", label)] = reader(label, adapters)
    return rows


def _rival_rows(config: GroundingConfig, judge: AttributeClassifier) -> dict[Arm, Draw]:
    domain = get_domain(config.domain)
    arm = Arm("judge_grad_cam", "Grad-CAM of the judge (classifier)")
    return {arm: lambda phrases: [cam_maps(judge, domain, phrases)]}


def _told_rows(priors: Priors) -> dict[Arm, Draw]:
    """Rows that see no image: uniform, priors (of places where the domain has some), and oracles, told the region."""
    rows: dict[Arm, Draw] = {
        Arm("uniform", "uniform map (no image)", held=False): lambda phrases: [uniform(phrases)],
        Arm(CLASS_PRIOR, "training mean of the class (no image)"): lambda phrases: [priors.of_class(phrases)],
    }
    if priors.atlas:
        placed = Arm(PLACE_PRIOR, "training mean of the side and zone, else of the class (no image)")
        rows[placed] = lambda phrases: [priors.of_place(phrases)]
    for sides in ORACLES:
        told = Arm(f"oracle_{sides}", f"oracle: Gaussian on the true boxes, sigma = side / {sides}", held=False)
        rows[told] = partial(_oracle_maps, sides)
    return rows


def _oracle_maps(sides: int, phrases: PhraseSet) -> list[Sequence[HeatMap | None]]:
    return [oracle(phrases, sides)]


def _known_classes(domain: str, phrases: PhraseSet) -> list[str]:
    """Classes with a phrase that the domain's vocabulary has whole; of others the generator never read a caption."""
    said = get_domain(domain)
    unread = {each.kind for each in phrases.phrases if said.parse(each.phrase).unknown_words}
    return [each.name for each in phrases.classes if each.name not in unread]


def _about_set(domain: str, phrases: PhraseSet, judge: AttributeClassifier) -> dict[str, Any]:
    """What a set rests on, class by class."""
    known, said = _known_classes(domain, phrases), get_domain(domain)
    classes = {}
    for kind in phrases.classes:
        mine = [each for each in phrases.phrases if each.kind == kind.name]
        classes[kind.name] = {
            "phrases": sorted({each.phrase for each in mine}),
            "count": len(mine),
            "images": len({each.image for each in mine}),
            "patients": len({phrases.groups[each.image] for each in mine}),
            "region_share": float(np.mean([each.region.mean() for each in mine])),
            "in_vocabulary": kind.name in known,
            "judge_head": asked_head(said, mine[0].phrase, judge),
        }
    return {
        "label": phrases.label,
        "images": len(phrases.images),
        "patients": len(set(phrases.groups)),
        "macro": known,
        "classes": classes,
    }


def _about(
    config: GroundingConfig, command: str, loaded: LoadedDomain, size_px: int, priors: Priors, arms: Sequence[Arm]
) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "kind": "grounding",
        "title": f"{get_domain(config.domain).label}: where phrases look in real images of {size_px} px",
        "domain": config.domain,
        "command": command,
        "default_adapter": None,
        "arms": [{"name": arm.name, "label": arm.label} for arm in arms],
        "rows": "arms",
        "tables": config.split == "test",
        "intervals": INTERVALS,
        "settings": {
            "split": config.split,
            "noises": len(config.one_step_seeds),
            "miou_thresholds": f"{MIOU_THRESHOLDS[0]} to {MIOU_THRESHOLDS[-1]}",
            "sigma_of_a_place": f"its side / {SIGMAS_A_PLACE:g}",
            **({"phrases_of_a_class": f"at most {config.limit}"} if config.limit else {}),
        },
        "notes": list(NOTES),
        "priors_fitted_on": {"split": "train", "images": dict(priors.fitted_on)},
        "models": {
            "sha256": loaded.manifest.sha256,
            "tuned": {name: [folder_digest(Path(folder)) for folder in them] for name, them in config.tuned.items()},
        },
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
    }


def main(arguments: list[str]) -> None:
    """`python -m train evaluate grounding RECIPE [overrides]`."""
    if not arguments:
        raise InputError("name the recipe, e.g. train/recipes/grounding.yaml")
    config = parse(arguments, GroundingConfig)
    run(config, command=f"python -m train evaluate grounding {shlex.join(arguments)}")
