"""The model card (README.md) of a model folder, written from its manifest.json, heads.json and what was measured."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from medviz.models.manifest import Manifest, read_json, read_manifest

LICENCE, LICENCE_TAG = "CC BY-NC-SA 4.0", "cc-by-nc-sa-4.0"
NOT_COMPUTED = "not computed"
CARD_NAME = "README.md"

_USE = """\
Research and teaching on synthetic images: alignment, grounding, and what rewards and judges see. Every image it makes
is synthetic and must stay marked as such. It is no medical device and serves no diagnosis, screening or treatment."""

_LIMITS = """\
- The images show what the training images' labels and captions say, with their errors and gaps. Rare findings, skin
  tones, ages, devices and hospitals that the sources hold few of are drawn badly or not at all.
- A prompt that names a finding does not guarantee that the image shows it; the figures above say how often a
  classifier agrees. Rewards that an adapter was trained on rise by that training: trust the held-out judge.
- Attention maps say where a model looked, not where a disease is.
- Do not train or test clinical software on these images without real ones beside them."""


def model_card(
    manifest: Manifest, classifiers: Mapping[str, Mapping[str, Any]] | None = None, measured: str | None = None
) -> str:
    """Return the card's Markdown.

    classifiers: role ("rewards/attribute", "judge") -> its heads.json; measured: Markdown of what was measured on
    pictures of these models.
    """
    parts = [
        _front_matter(manifest),
        f"# {_cell(manifest.domain).capitalize()}: synthetic images from text",
        "A text-to-image diffusion pipeline (diffusers, safetensors) with LoRA adapters that align it, "
        f"preset `{_cell(manifest.preset) or NOT_COMPUTED}`.",
        "## Use",
        _USE,
        "## What gives its pictures away",
        _tells(manifest.tells),
        "## Adapters",
        _table(
            ("adapter", "what it was trained for", "objective", "what the judge gained", "default for"),
            _adapters(manifest),
        ),
        "The judge's gain is in its mean margin on validation prompts, at the end of training, by the whole change. "
        "Each adapter's recipe and all its figures are in its `adapter.json`.",
        "## Measured",
        measured or NOT_COMPUTED.capitalize() + ".",
        "## Limits",
        _LIMITS,
        "## Training images and their licences",
        _table(("source", "licence", "citation"), _sources(manifest.data)),
        f"The weights are released under {LICENCE}: they learned from images that are licensed for non-commercial use.",
        "## Training",
        _table(("stage", "recipe", "steps", "minutes", "seed", "figures"), _stages(manifest)),
        _table(("drawn with", "value"), _settings(manifest)),
        *_classifier_parts(classifiers or {}),
        "## Files",
        f"{len(manifest.files)} files, {sum(record.bytes for record in manifest.files.values()) / 1e6:.1f} MB. "
        f"manifest.json holds the sha256 of each, and every figure; all files together have the sha256 "
        f"`{manifest.sha256}`.",
    ]
    if manifest.hub is not None:
        parts.append(
            f"The base pipeline is `{_cell(manifest.hub.repo_id)}` on the Hugging Face Hub at the commit "
            f"`{manifest.hub.revision}`, under its own licence."
        )
    return "\n\n".join(parts) + "\n"


def folder_card(folder: Path, measured: str | None = None) -> str:
    """Return the card of a model folder from its manifest.json and heads.json files; ModelError as read_manifest."""
    folder = Path(folder)
    heads = [*sorted(folder.glob("rewards/*/heads.json")), *folder.glob("judge/heads.json")]
    classifiers = {path.parent.relative_to(folder).as_posix(): read_json(path) for path in heads}
    return model_card(read_manifest(folder), classifiers, measured)


def write_card(folder: Path, measured: str | None = None) -> Path:
    """Write folder_card to README.md in the model folder; return its path."""
    path = Path(folder) / CARD_NAME
    path.write_text(folder_card(folder, measured), encoding="utf-8")
    return path


def _front_matter(manifest: Manifest) -> str:
    lines = [
        "---",
        f"license: {LICENCE_TAG}",
        "library_name: diffusers",
        "pipeline_tag: text-to-image",
        "tags:",
        *(f"- {tag}" for tag in ("medical", manifest.domain, "synthetic", "lora", "stable-diffusion")),
    ]
    if manifest.hub is not None:
        lines.append(f"base_model: {json.dumps(manifest.hub.repo_id)}")
    return "\n".join([*lines, "---"])


def _tells(tells: Sequence[str]) -> str:
    if not tells:
        return "Not written down yet."
    told = "\n".join(f"- {_cell(tell)}" for tell in tells)
    return f"Seen by eye, class by class, beside real images:\n\n{told}"


def _adapters(manifest: Manifest) -> list[tuple[Any, ...]]:
    uses = {
        "drawing": manifest.default_adapter,
        "grounding": manifest.grounding_adapter or manifest.default_adapter,
        "few steps": manifest.few_step_adapter,
    }
    rows = []
    for name, details in manifest.adapters.items():
        gain = details.get("metrics", {}).get("judge_gain") or {}
        interval = _interval(gain)
        gained = f"{_cell(gain['value'])} ({interval}, n {gain.get('n')})" if gain and interval else ""
        objective = details.get("recipe", {}).get("objective", "")
        used = ", ".join(use for use, which in uses.items() if which == name)
        rows.append((f"`{name}`", details.get("title"), objective, gained, used))
    return rows


def _sources(sources: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(source.get("source"), source.get("licence"), source.get("citation")) for source in sources]


def _stages(manifest: Manifest) -> list[tuple[Any, ...]]:
    """A row a stage that says what it cost, with those of its figures that are plain numbers."""
    rows = []
    for stage, cost in manifest.training_cost.items():
        seconds = cost.get("seconds")
        known = {"steps", "trained_s", "seed"}
        figures = manifest.metrics.get(stage) or {}
        shown = [
            f"{name.replace('_', ' ')} {_cell(value)}"
            for name, value in figures.items()
            if name not in known and isinstance(value, int | float) and not isinstance(value, bool)
        ]
        minutes = None if seconds is None else round(seconds / 60, 1)
        recipe = f"`{manifest.recipe[stage]}`" if stage in manifest.recipe else ""
        rows.append((stage, recipe, cost.get("steps"), minutes, manifest.seeds.get(stage), "; ".join(shown)))
    return rows


def _settings(manifest: Manifest) -> list[tuple[str, Any]]:
    return [
        (name.replace("_", " "), value) for name, value in manifest.recipe.items() if name not in manifest.training_cost
    ]


def _classifier_parts(classifiers: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for role, content in classifiers.items():
        yield f"## Classifier `{_cell(role)}`"
        yield f"{_cell(content.get('architecture'))}, trained on {_cell(content.get('trained_on'))}."
        rows = []
        for head in content.get("heads", ()):
            figures = content.get("metrics", {}).get(head) or {}
            rows.append(
                (
                    head,
                    figures.get("auroc"),
                    _interval(figures),
                    *(figures.get(key) for key in ("accuracy", "ece", "n")),
                )
            )
        yield _table(("head", "AUROC", "95 % interval", "accuracy", "calibration error", "n"), rows)


def _interval(figure: Mapping[str, Any]) -> str | None:
    low, high = figure.get("ci") or (figure.get("low"), figure.get("high"))
    return None if low is None or high is None else f"{_cell(low)} to {_cell(high)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]] | Iterator[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows]
    if not lines:
        return NOT_COMPUTED[0].upper() + NOT_COMPUTED[1:] + "."
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines])


def _cell(value: Any) -> str:
    """One value as Markdown text that can neither break a table nor bring HTML with it."""
    if value is None:
        return NOT_COMPUTED
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else NOT_COMPUTED
    if isinstance(value, (list, tuple)):
        return ", ".join(_cell(item) for item in value)
    text = " ".join(str(value).split())
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "\\|")
