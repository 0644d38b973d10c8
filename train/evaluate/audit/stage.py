"""`python -m train evaluate audit RECIPE`: do the instruments see what they are asked for, or what comes with it?

Every head of the classifiers and every attribute of the evidence detectors goes through the same trials: real images of
one source and view, the same images shrunk to 4x4 pixels, recoloured images, and counterfactual pairs whose addition is
pasted, erased again by inpainting, and blurred away. A gate says what a trial has to give.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from medviz import __version__
from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.models.manifest import hash_file
from train.config import StageConfig, parse
from train.datasets.counterfactuals import family
from train.datasets.evidence import radiology
from train.datasets.evidence.dermatology import ATTRIBUTES as ARTEFACTS
from train.datasets.evidence.labels import Labelled, labelled, labelled_head
from train.datasets.split import Split, open_split
from train.evaluate.audit.chest import place_rows, ratio_rows
from train.evaluate.audit.instruments import TRIALS, Instrument, Row, classifier_instrument, detector_instrument
from train.evaluate.audit.pairs import drawn_pairs, pair_rows
from train.evaluate.audit.real import Readings, auc_rows, read, real_rows, recoloured_row
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.experiments.pieces import write_json

CLASSIFIERS = {"reward": "rewards/attribute", "judge": "judge"}
DETECTORS = {"evidence a": "rewards/evidence", "evidence b": "evidence"}


@dataclass
class AuditConfig(StageConfig):
    """Options of the audit."""

    domain: str = "dermatology"
    models: str = "assets/models"
    """Folder that holds the domain's model folder, whose reward and judge are audited, and its detectors."""
    detectors: dict[str, str] = field(default_factory=dict)
    """Name -> folder of a detector that does not ship, in place of the model folder's."""
    classifiers: bool = True
    """Whether reward and judge are audited too."""
    split: str = "validation"
    """Real images: validation while choosing, test once to report."""
    unseen: bool = True
    """Beside them, the half of the training split that an instrument did not learn from."""
    families: tuple[str, ...] = ("a", "b")
    """Whose counterfactuals are pasted. While a detector is chosen, its own alone."""
    pairs: int = 100
    """Counterfactual pairs of each attribute and family."""
    least: int = 10
    """Images with and without an attribute that a source needs to be reported."""
    size_px: int = 256
    reports: str = "assets/reports"
    """Folder that also gets the JSON (empty: only `out`)."""
    suffix: str = ""
    """Ends the JSON's name there, so that it stands beside another."""


def run(config: AuditConfig, command: str = "") -> dict[str, Any]:
    """Audit every instrument and return the report that was written.

    Raises InputError for a recipe without instruments, ModelError for files that do not hold up.
    """
    instruments = _instruments(config)
    evaluated, training = _splits(config)
    rows: list[Row] = []
    for instrument in instruments:
        rows += _on_real_images(instrument, evaluated, training, config)
        rows += place_rows(instrument, [*evaluated, *training], config.size_px)
        rows += ratio_rows(instrument, [*evaluated, *training], config.size_px, config.seed)
    for name in config.families:
        drawn_by = family(config.domain, name)
        for attribute in attributes_of(config.domain):
            pairs = drawn_pairs(drawn_by, evaluated, attribute, config.pairs, config.size_px, config.seed)
            for instrument in instruments:
                rows += pair_rows(instrument, attribute, name, pairs)
    report = {
        "format_version": FORMAT_VERSION,
        "kind": "audit",
        "title": f"{get_domain(config.domain).label}: what the instruments answer to",
        "domain": config.domain,
        "command": command,
        "settings": {
            "split": config.split,
            "unseen_training_half": config.unseen,
            "families": list(config.families),
            "pairs": config.pairs,
            "seed": config.seed,
        },
        "trials": TRIALS,
        "intervals": "95 %: AUC bootstrapped by lesion or patient, shares by Wilson, medians bootstrapped",
        "instruments": {each.name: hash_file(each.file).sha256 for each in instruments},
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "rows": [row.as_json() for row in rows],
    }
    write_json(Path(config.out) / "metrics.json", report)
    if config.reports:
        name = "-".join(filter(None, ("audit", config.domain, config.suffix)))
        write_json(Path(config.reports) / f"{name}.json", report)
    return report


def attributes_of(domain: str) -> tuple[str, ...]:
    """What counterfactuals of a domain are drawn for, and detectors mark."""
    return radiology.FINDINGS if domain == radiology.DOMAIN else ARTEFACTS


def _on_real_images(
    instrument: Instrument, evaluated: Sequence[Split], training: Sequence[Split], config: AuditConfig
) -> list[Row]:
    """The rows of every head on real images that the instrument did not learn from.

    Heads that have no counterfactuals are read on the evaluated splits alone.
    """
    asked: list[tuple[str, str, bool]] = []
    for head in instrument.heads:
        attribute = next((name for name in attributes_of(config.domain) if instrument.head_of(name) == head), "")
        asked.append((head, attribute, False))
        if attribute and config.domain != radiology.DOMAIN:
            asked.append((head, attribute, True))
    known: dict[tuple[str, str, bool], list[tuple[Split, Labelled, Readings]]] = {each: [] for each in asked}
    for split in [*evaluated, *training]:
        labels: dict[tuple[str, str, bool], Labelled] = {}
        for head, attribute, published in asked:
            if split.name == "train" and not attribute:
                continue
            found = labelled(split, attribute, published=published) if attribute else labelled_head(split, head)
            if split.name == "train":
                found = found.only(split.halves[found.indices] != instrument.half)
            labels[head, attribute, published] = found
        indices = sorted({int(index) for found in labels.values() for index in found.indices})
        readings = read(instrument, split, indices, config.size_px, config.seed)
        for each, found in labels.items():
            known[each].append((split, found, readings.of(found)))
    rows: list[Row] = []
    for (head, attribute, published), parts in known.items():
        labels_of = Labelled.joined([found for _, found, _ in parts])
        if min(labels_of.truth.sum(), (~labels_of.truth).sum()) < config.least:
            continue
        readings = _joined([found for _, _, found in parts])
        if published:
            scores = readings.plain[:, instrument.heads.index(head)]
            rows += auc_rows(instrument.name, head, "auc_published", scores, labels_of, config.least, config.seed, "")
            continue
        rows += real_rows(instrument, head, readings, labels_of, config.least, config.seed, attribute)
        if attribute:
            rows.append(recoloured_row(instrument, head, attribute, parts, config.size_px))
    return rows


def _joined(parts: Sequence[Readings]) -> Readings:
    """Readings of several splits, one after the other; the rows are not kept."""
    named = ("plain", "thumbnail", "relit", "means")
    return Readings({}, *(np.concatenate([getattr(part, name) for part in parts]) for name in named))


def _instruments(config: AuditConfig) -> list[Instrument]:
    folder, found = Path(config.models) / config.domain, []
    if config.classifiers:
        found += [classifier_instrument(n, folder / place, config.device) for n, place in CLASSIFIERS.items()]
    shipped = {name: folder / place for name, place in DETECTORS.items() if (folder / place).is_dir()}
    detectors = {name: Path(place) for name, place in config.detectors.items()} or shipped
    found += [detector_instrument(name, place, config.device) for name, place in detectors.items()]
    if not found:
        raise InputError(f"nothing to audit: no detector in {folder}, none named, and classifiers are left out")
    return found


def _splits(config: AuditConfig) -> tuple[list[Split], list[Split]]:
    """The splits that are evaluated, and the training splits whose unseen half stands beside them."""
    more = (radiology.NLM_JSRT,) if config.domain == radiology.DOMAIN else ()
    evaluated = [open_split(config.domain, config.split, extra_folders=more if config.split != "test" else ())]
    if more and config.split == "test":
        evaluated.append(open_split(radiology.NLM_JSRT, "validation"))  # it has no test split
    return evaluated, [open_split(config.domain, "train", extra_folders=more)] if config.unseen else []


def main(arguments: list[str]) -> None:
    """`python -m train evaluate audit RECIPE [overrides]`."""
    if not arguments:
        raise InputError("name the recipe, e.g. train/recipes/audit.yaml --domain dermatology")
    config = parse(arguments, AuditConfig)
    run(config, command=f"python -m train evaluate audit {shlex.join(arguments)}")
