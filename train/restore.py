"""`python -m train restore RECIPE [FOLDER]`: lay a model folder out as the runs that made it, to go on from what ships.

The inverse of `train.assemble`, by the same recipe: later stages, and `train run DOMAIN`, then find what they go on
from. What a model folder does not hold stays away: the runs in between (their figures are written, their weights are
gone), and the text projection of the contrastive model. A run that is there already is never touched.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from medviz.models.manifest import Manifest, read_manifest, verify
from train.assemble import Parts, read_parts
from train.chain import chain_of
from train.lineage import METRICS_NAME, recipe_of

PIPELINE = ("model_index.json", "scheduler", "text_encoder", "tokenizer", "unet", "vae")


def restore(parts: Parts, folder: Path) -> list[str]:
    """Copy the parts of the model folder `folder` to where the recipe says they came from; returns the places written.

    Raises ModelError when the folder's files are not those of its manifest, InputError when another preset's recipe
    made it: its runs would go by the names of others.
    """
    manifest = read_manifest(folder)
    if manifest.preset != parts.preset:
        raise InputError(f"{folder} was made by the preset {manifest.preset!r}, the recipe is of {parts.preset!r}")
    verify(folder, manifest)
    places = {
        parts.pipeline: PIPELINE,
        parts.features: ("features",),
        parts.reward: ("rewards/attribute",),
        parts.judge: ("judge",),
        parts.segmenter: ("segmenter",),
        parts.autoencoder: ("vae",),
        # the encoder that the generator learnt on; its decoder is the one that ships
        **({f"{parts.runs['autoencoder']}/model": ("vae",)} if "autoencoder" in parts.runs else {}),
        **{
            source: (f"adapters/{name}",)
            for name, source in parts.adapters.items()
            if parts.adapter_strengths.get(name, 1) == 1 and name in manifest.adapters
        },
    }
    written = [place for place, names in places.items() if place and _copy(folder, names, Path(place))]
    if parts.spectrum and manifest.spectra and not Path(parts.spectrum).exists():
        _write_json(Path(parts.spectrum), manifest.spectra)
        written.append(parts.spectrum)
    figures = _write_figures(parts, manifest)
    _record_recipes(parts.domain, figures)
    return written + figures


def _copy(folder: Path, names: tuple[str, ...], place: Path) -> bool:
    """Copy one part to `place`, its folder's own content where it is a single one; False where `place` exists."""
    if place.exists() or not all((folder / name).exists() for name in names):
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    if len(names) == 1:
        shutil.copytree(folder / names[0], place)
        return True
    place.mkdir()
    for name in names:
        (shutil.copytree if (folder / name).is_dir() else shutil.copy2)(folder / name, place / name)
    return True


def _write_figures(parts: Parts, manifest: Manifest) -> list[str]:
    """metrics.json of every run that the manifest has the figures of; a finished run is left alone."""
    written = []
    for stage, run in parts.runs.items():
        path = Path(run) / "metrics.json"
        if stage in manifest.metrics and not path.exists():
            _write_json(path, manifest.metrics[stage])
            written.append(str(path))
    return written


def _record_recipes(domain: str, figures: list[str]) -> None:
    """Say in the metrics.json of restored runs that the recipes of today made them, so that `train run` uses them."""
    for step in chain_of(domain).steps:
        path = step.out / METRICS_NAME
        if str(path) in figures:
            _write_json(path, {**json.loads(path.read_text()), "recipe": recipe_of(step.config)})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")


def main(arguments: list[str]) -> None:
    """FOLDER is assets/models/DOMAIN unless named."""
    if not arguments:
        raise InputError("name the assembly recipe, e.g. train/recipes/assemble-dermatology.yaml")
    parts = read_parts(arguments[0])
    folder = Path(arguments[1]) if len(arguments) > 1 else Path("assets/models") / parts.domain
    sys.stdout.write("\n".join(restore(parts, folder) or ["every run is there already"]) + "\n")
