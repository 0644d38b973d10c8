"""The model card (README.md) of a model folder, written from its manifest.json and heads.json alone."""

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


def model_card(manifest: Manifest, classifiers: Mapping[str, Mapping[str, Any]] | None = None) -> str:
    """Return the card's Markdown. classifiers: role ("rewards/attribute", "judge") -> its heads.json."""
    parts = [
        _front_matter(manifest),
        f"# {_cell(manifest.domain).capitalize()}: synthetic images from text",
        "A text-to-image diffusion pipeline (diffusers, safetensors) with LoRA adapters that align it, "
        f"preset `{_cell(manifest.preset) or NOT_COMPUTED}`.",
        "## Use",
        _USE,
        "## Adapters",
        _adapters(manifest),
        "## Training images and their licences",
        _table(("source", "licence", "citation"), _sources(manifest.data)),
        f"The weights are released under {LICENCE}: they learned from images that are licensed for non-commercial use.",
        "## Training",
        _table(("setting", "value"), _settings(manifest)),
        "## Figures",
        _table(("figure", "value", "95 % interval", "n"), _figures(manifest.metrics)),
        *_classifier_parts(classifiers or {}),
        "## Limits",
        _LIMITS,
        "## Files",
        f"{len(manifest.files)} files, {sum(record.bytes for record in manifest.files.values()) / 1e6:.1f} MB. "
        f"manifest.json holds the sha256 of each; all of them together have the sha256 `{manifest.sha256}`.",
    ]
    if manifest.hub is not None:
        parts.append(
            f"The base pipeline is `{_cell(manifest.hub.repo_id)}` on the Hugging Face Hub at the commit "
            f"`{manifest.hub.revision}`, under its own licence."
        )
    return "\n\n".join(parts) + "\n"


def folder_card(folder: Path) -> str:
    """Return the card of a model folder from its manifest.json and heads.json files; ModelError as read_manifest."""
    folder = Path(folder)
    heads = [*sorted(folder.glob("rewards/*/heads.json")), *folder.glob("judge/heads.json")]
    classifiers = {path.parent.relative_to(folder).as_posix(): read_json(path) for path in heads}
    return model_card(read_manifest(folder), classifiers)


def write_card(folder: Path) -> Path:
    """Write folder_card to README.md in the model folder; return its path."""
    path = Path(folder) / CARD_NAME
    path.write_text(folder_card(folder), encoding="utf-8")
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


def _adapters(manifest: Manifest) -> str:
    uses = {
        "drawing": manifest.default_adapter,
        "grounding": manifest.grounding_adapter or manifest.default_adapter,
        "few steps": manifest.few_step_adapter,
    }
    rows = [
        (f"`{name}`", details.get("title"), ", ".join(use for use, which in uses.items() if which == name))
        for name, details in manifest.adapters.items()
    ]
    tables = [_table(("adapter", "what it was trained for", "default for"), rows)]
    for name, details in manifest.adapters.items():
        if details.get("recipe"):
            tables.append(f"Recipe of `{name}`:")
            tables.append(_table(("setting", "value"), _leaves(details["recipe"])))
        if details.get("metrics"):
            tables.append(f"Figures of `{name}`:")
            tables.append(_table(("figure", "value", "95 % interval", "n"), _figures(details["metrics"])))
    return "\n\n".join(tables)


def _sources(sources: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    return [(source.get("source"), source.get("licence"), source.get("citation")) for source in sources]


def _settings(manifest: Manifest) -> list[tuple[Any, ...]]:
    groups = {"recipe": manifest.recipe, "cost": manifest.training_cost, "seed": manifest.seeds}
    return [(f"{group}: {name}", value) for group, values in groups.items() for name, value in _leaves(values)]


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


def _figures(metrics: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of the nested figures; a leaf is a number, None, or a mapping with `value`, its interval and `n`.

    A list holds figures as train.evaluate writes them: see _evaluated.
    """
    rows: list[tuple[Any, ...]] = []
    for name, value in metrics.items():
        if isinstance(value, Mapping) and "value" in value:
            rows.append((name, value["value"], _interval(value), value.get("n")))
        elif isinstance(value, Mapping):
            rows.extend((f"{name} {inner[0]}", *inner[1:]) for inner in _figures(value))
        elif isinstance(value, (list, tuple)) and value and all(isinstance(item, Mapping) for item in value):
            rows.extend(row for item in value for row in _evaluated(item))
        else:
            rows.append((name, value, "", ""))
    return rows


def _evaluated(figure: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Rows of one figure of train.evaluate: of real images, of the baseline, and value and change of every adapter."""
    sides = {side: figure[side] for side in ("real", "baseline") if side in figure}
    for name, sizes in figure.get("adapters", {}).items():
        sides |= {f"`{name}`": sizes.get("value"), f"`{name}` against the baseline": sizes.get("change")}
    return _figures({str(figure.get("label") or figure.get("name")): sides})


def _interval(figure: Mapping[str, Any]) -> str | None:
    low, high = figure.get("ci") or (figure.get("low"), figure.get("high"))
    return None if low is None or high is None else f"{_cell(low)} to {_cell(high)}"


def _leaves(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            for inner, leaf in _leaves(value):
                yield f"{name}.{inner}", leaf
        else:
            yield name, "none" if value is None else value


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
