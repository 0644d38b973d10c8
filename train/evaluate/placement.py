"""`python -m train evaluate placement RECIPE`: is the finding drawn on the side and in the zone that the prompt names?

Every row draws the same prompts from the same noises, each noise once with every place, so that right and left differ
by a word alone. Where the finding is, the judge says by what it loses when a place is painted over with clear lung
(`medviz.rewards.placement`); real images with a reader's box go the same way, and are the ceiling.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from medviz import __version__
from medviz.domains import get_domain
from medviz.domains.chest_findings import PlacedHead, placed_head
from medviz.domains.lung_places import LEVELS, SIDES
from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.spectrum import Spectra
from medviz.grounding.anatomy import Segmenter
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS
from medviz.models.adapters import ADAPTER_CONFIG_NAME, load_adapter
from medviz.models.library import LoadedDomain, ModelLibrary
from medviz.models.manifest import FileRecord, hash_file, read_json
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.placement import ZONES, place_evidence, placement_margin
from train.config import StageConfig, parse
from train.datasets.latents import to_pixels
from train.datasets.placed_findings import DOMAIN, placed_boxes
from train.datasets.split import Split, boxes, open_split
from train.evaluate.figures import Figure
from train.evaluate.generated import Request, few_steps_of, generate, told, weights_digest
from train.evaluate.measure import BASELINE
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.evaluate.statistics import Estimate, mean_interval, paired_difference
from train.experiments.pieces import folder_digest, write_json

ROLES = {"judge": "judge", "reward": "rewards/attribute"}
EVIDENCE_BATCH = 16
INTERVALS = (
    "brackets hold 95 % intervals over images (right less left: over noises); Δ is the change against the baseline, "
    "from the same prompts and noises"
)
NOTES = (
    "the evidence of a place is what the classifier's logit of the finding loses when the place is painted over with "
    "the image's own clear lung",
    "chance is one half for the side and one sixth for the zone",
    "real images are those with readers' boxes of one finding on one side, in splits that no network learnt from; "
    "their place is that of the box, and no network is told it",
    "images whose lungs were not both found count for nothing, in any row",
)


@dataclass
class PlacementConfig(StageConfig):
    """Options of the placement evaluation. Pictures already drawn are found again: a stopped run goes on by itself."""

    steps: int = DEFAULT_STEPS
    """Denoising steps of a picture."""
    models: str = "assets/models"
    """Folder that holds the model folder of chest X-rays."""
    adapters: tuple[str, ...] = ()
    """Adapters of the model folder to hold against the baseline."""
    also: dict[str, str] = field(default_factory=dict)
    """Row -> folder of an adapter for this base that does not ship."""
    findings: tuple[str, ...] = ("lung opacity", "pneumonia")
    patients: tuple[str, ...] = ("an adult",)
    noises: int = 24
    """Pictures of each prompt and row."""
    real_splits: tuple[str, ...] = ("validation", "test")
    """Splits whose boxed images are the ceiling."""
    batch: int = 16
    """Pictures drawn at a time; part of what names the stored pictures."""
    bf16: bool = False
    """Draw in bf16: faster, where the processor has instructions for it."""
    reports: str = "assets/reports"
    """Folder that also gets the JSON (empty: only `out`)."""
    suffix: str = ""
    """Ends the JSON's name there, so that it stands beside another."""

    def checked(self) -> PlacementConfig:
        """The configuration itself. Raises InputError naming the option that is out of range and what is allowed."""
        for name in ("steps", "noises", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.findings or not self.patients:
            raise InputError("placement needs at least one finding and one patient")
        if not self.adapters and not self.also:
            raise InputError("placement needs an adapter to hold against the baseline: adapters, or also")
        return self


def placed_prompts(config: PlacementConfig) -> list[str]:
    """Every patient, finding and zone; a pair of prompts that differ in the side alone stands side by side."""
    return [
        f"a frontal chest X-ray of {patient}, {finding} in the {side} {level} zone"
        for patient, finding, level, side in product(config.patients, config.findings, LEVELS, SIDES)
    ]


def run(config: PlacementConfig, command: str = "") -> dict[str, Any]:
    """Draw, measure and return the report that was written.

    Raises InputError for options out of range and prompts that place nothing, ModelError for files that do not hold up.
    """
    config.checked()
    dtype = torch.bfloat16 if config.bf16 else None
    loaded = ModelLibrary(Path(config.models), config.device, dtype).load(DOMAIN)
    prompts, domain = placed_prompts(config), get_domain(DOMAIN)
    asked = {prompt: placed_head(domain.parse(prompt)) for prompt in prompts}
    if mute := [prompt for prompt, each in asked.items() if each is None]:
        raise InputError(f"{mute[0]!r} places no finding that the vocabulary knows")
    request = Request(
        prompts=tuple(prompt for _ in range(config.noises) for prompt in prompts),
        seeds=tuple(noise for noise in range(config.noises) for _ in prompts),
        steps=config.steps,
        guidance_scale=Guidance.of_recipe(loaded.manifest.recipe, loaded.manifest.domain, DEFAULT_GUIDANCE_SCALE),
    )
    placed = [each for prompt in request.prompts if (each := asked[prompt])]
    rows, labels, files = _rows(config, loaded)
    few_steps = few_steps_of(loaded.manifest, request.steps, request.guidance_scale)
    pictures = {
        name: generate(
            loaded.pipeline,
            files,
            adapter,
            request,
            Path(config.out) / "pictures",
            batch=config.batch,
            label=name,
            few_steps=few_steps,
            spectrum=Spectra.of_manifest(loaded.manifest).of(few_steps),
        )
        for name, adapter in rows.items()
    }
    size_px = int(next(iter(pictures.values())).shape[1])
    real = [each for name in config.real_splits for each in boxed_on_one_side(open_split(DOMAIN, name), size_px)]
    segmenter = Segmenter.load(loaded.folder / "segmenter", config.device)
    figures = []
    for role, place in ROLES.items():
        classifier = AttributeClassifier.load(loaded.folder / place, config.device)
        known = [each for each in real if each[1].head in classifier.heads]
        of_real = evidence(classifier, segmenter, np.stack([image for image, _ in known]), [p for _, p in known])
        found = {name: evidence(classifier, segmenter, images, placed) for name, images in pictures.items()}
        figures += placement_figures(role, placed, found, len(prompts), of_real, [p for _, p in known])
    report = {
        "format_version": FORMAT_VERSION,
        "kind": "placement",
        "title": f"{domain.label}: is the finding drawn where the prompt puts it, {size_px} px",
        "domain": DOMAIN,
        "command": command,
        "default_adapter": None,
        "arms": [{"name": name, "label": label} for name, label in labels.items()],
        "rows": "arms",
        "intervals": INTERVALS,
        "settings": {
            "steps": config.steps,
            "guidance_scale": told(loaded.manifest, request.steps, request.guidance_scale),
            "prompts": len(prompts),
            "noises": config.noises,
            "real_images": len(real),
        },
        "prompts": prompts,
        "notes": list(NOTES),
        "models": {
            "sha256": loaded.manifest.sha256,
            "weights": {name: weights_digest(files, adapter) for name, adapter in rows.items()},
        },
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "figures": [figure.as_json() for figure in figures],
    }
    write_json(Path(config.out) / "metrics.json", report)
    if config.reports:
        name = "-".join(filter(None, ("placement", DOMAIN, config.suffix)))
        write_json(Path(config.reports) / f"{name}.json", report)
    return report


def _rows(
    config: PlacementConfig, loaded: LoadedDomain
) -> tuple[dict[str, str | None], dict[str, str], dict[str, FileRecord]]:
    """Row -> adapter and row -> label, the baseline first, and the files that name the pictures."""
    rows: dict[str, str | None] = {BASELINE: None}
    labels = {BASELINE: BASELINE}
    files = {**({} if loaded.manifest.hub is None else loaded.manifest.hub.files), **loaded.manifest.files}
    if twice := {BASELINE, *config.adapters} & set(config.also):
        raise InputError(f"two rows are called {twice.pop()}: rename that of `also`")
    folders = {name: loaded.folder / "adapters" / str(loaded.resolve_adapter(name)) for name in config.adapters}
    for name, folder in (folders | {name: Path(folder) for name, folder in config.also.items()}).items():
        if name in config.also:
            folder_digest(folder)
            load_adapter(loaded.pipeline, folder, name)
            files |= {f"adapters/{name}/{path.name}": hash_file(path) for path in folder.iterdir() if path.is_file()}
        rows[name] = name
        labels[name] = f"{read_json(folder / ADAPTER_CONFIG_NAME).get('title') or name} (`{name}`)"
    return rows, labels, files


def boxed_on_one_side(split: Split, size_px: int) -> list[tuple[np.ndarray, PlacedHead]]:
    """Images uint8 (H, W, 3) whose readers' boxes mark one placed finding on one side, with where that is."""
    domain, found = get_domain(DOMAIN), []
    for index, record in enumerate(split.records):
        marks = [(finding, wordings) for _, finding, wordings in placed_boxes(boxes(record), None)]
        findings = {finding for finding, _ in marks}
        if len(findings) != 1 or not all(wordings for _, wordings in marks):
            continue
        places = " and the ".join(dict.fromkeys(wordings[0] for _, wordings in marks))
        each = placed_head(domain.parse(f"{findings.pop()} in the {places}"))
        if each is not None:
            found.append((split.image(index, size_px), each))
    return found


def evidence(
    classifier: AttributeClassifier, segmenter: Segmenter, images: np.ndarray, placed: Sequence[PlacedHead]
) -> np.ndarray:
    """`place_evidence` of images uint8 (N, H, W, 3), float64 (N, P)."""
    found = []
    with torch.inference_mode():
        for start in tqdm(range(0, len(images), EVIDENCE_BATCH), desc="evidence", unit="batch"):
            rows = slice(start, start + EVIDENCE_BATCH)
            pixels = to_pixels(images[rows]).to(classifier.device)
            found.append(place_evidence(classifier, pixels, [each.head for each in placed[rows]], segmenter).cpu())
    return torch.cat(found).double().numpy()


def scores(values: np.ndarray, placed: Sequence[PlacedHead]) -> dict[str, np.ndarray]:
    """Figure -> (N,) of the evidence (N, P) of images that were asked for a place; NaN where it has no meaning.

    side: 1 where the named lung holds more than the other; zone: 1 where the named zone holds the most of all six (an
    image whose place is no single zone has none); margin: `placement_margin`, in logits.
    """
    lungs, zones = values[:, : len(SIDES)], values[:, len(SIDES) :]
    known = np.isfinite(values).all(axis=1)
    named = np.array([SIDES.index(each.side) for each in placed])
    side = (lungs[range(len(named)), named] > lungs[range(len(named)), 1 - named]).astype(np.float64)
    single = np.array([len(each.regions) == 1 and each.regions[0] in ZONES for each in placed])
    wanted = np.array([ZONES.index(each.regions[0]) if ok else -1 for each, ok in zip(placed, single, strict=True)])
    zone = (np.where(np.isfinite(zones), zones, -np.inf).argmax(axis=1) == wanted).astype(np.float64)
    margin = np.array(
        [float(placement_margin(torch.from_numpy(row), each)) for row, each in zip(values, placed, strict=True)]
    )
    return {
        "side": np.where(known, side, np.nan),
        "zone": np.where(known & single, zone, np.nan),
        "margin": margin,
    }


def right_less_left(values: np.ndarray, prompts: int) -> np.ndarray:
    """What the word of the side changes, in logits (noises,): the right lung's evidence less the left's, as the prompt
    says right less as it says left, from one noise; mean over the pairs of prompts. values: (noises x prompts, P)."""
    balance = (values[:, 0] - values[:, 1]).reshape(-1, prompts // 2, 2)
    return _nanmean((balance[..., 0] - balance[..., 1]) / 2)


def _nanmean(rows: np.ndarray) -> np.ndarray:
    there = np.isfinite(rows)
    with np.errstate(invalid="ignore"):
        return np.where(there, rows, 0.0).sum(axis=1) / there.sum(axis=1)


def placement_figures(
    role: str,
    placed: Sequence[PlacedHead],
    found: Mapping[str, np.ndarray],
    prompts: int,
    of_real: np.ndarray,
    real_placed: Sequence[PlacedHead],
) -> list[Figure]:
    """The figures by one classifier. found: row -> evidence (noises x prompts, P), the baseline first."""
    by_row = {name: scores(values, placed) for name, values in found.items()}
    contrast = {name: right_less_left(values, prompts) for name, values in found.items()}
    real = scores(of_real, real_placed)
    wordings = {
        "side": f"Named side holds more of the finding, by the {role}",
        "zone": f"Named zone holds the most of six, by the {role}",
        "margin": f"Evidence in the named place less elsewhere (logits), by the {role}",
    }
    figures = [
        _figure(role, key, label, {name: row[key] for name, row in by_row.items()}, mean_interval(real[key]))
        for key, label in wordings.items()
    ]
    figures.append(
        _figure(role, "contrast", f"Right less left, from one noise (logits), by the {role}", contrast, None)
    )
    return figures


def _figure(role: str, key: str, label: str, rows: Mapping[str, np.ndarray], real: Estimate | None) -> Figure:
    before, others = rows[BASELINE], list(rows.items())[1:]
    return Figure(
        name=f"{key}_{role}",
        label=label,
        group="alignment",
        table=f"Placement, by the {role}",
        baseline=mean_interval(before),
        aligned={name: mean_interval(values) for name, values in others},
        change={name: paired_difference(values, before) for name, values in others},
        higher_is_better=True,
        role="judge" if role == "judge" else "reward",
        prompts="grid",
        real=real,
        headline=True,
        counts={"images": len(before), "lungs_found": int(np.isfinite(before).sum())},
    )


def main(arguments: list[str]) -> None:
    """`python -m train evaluate placement RECIPE [overrides]`."""
    if not arguments:
        raise InputError("name the recipe, e.g. train/recipes/placement-radiology.yaml")
    config = parse(arguments, PlacementConfig)
    run(config, command=f"python -m train evaluate placement {shlex.join(arguments)}")
