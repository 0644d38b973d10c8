"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `checkpoint-STEP` with one safetensors file, one JSON file for everything that is not a
tensor, and a manifest written last. It is written under a temporary name, flushed, renamed; only then do older ones go.
The newest and the one before it stay, so that a damaged one costs minutes and not the run.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from medviz.errors import ModelError

FORMAT_VERSION = 1
_FILES = ("tensors.safetensors", "state.json")
_NAME = re.compile(r"checkpoint-(\d{8})$")
WRITE_ERRORS = (OSError, SafetensorError)  # of a full or broken disk; safetensors has one of its own
logger = logging.getLogger(__name__)


def _pack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """`value` as JSON, its tensors moved to `tensors` under numbers (keys of a state may look alike)."""
    if isinstance(value, torch.Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"__tensor__": name}
    if isinstance(value, Mapping):
        return {"__items__": [[k, _pack(v, tensors)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(v, tensors) for v in value]
    return value


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {k: _unpack(v, tensors) for k, v in value["__items__"]}
    if isinstance(value, list):
        return [_unpack(v, tensors) for v in value]
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    folder: Path, step: int, state: Mapping[str, Any], recipe: Mapping[str, Any] | None = None, keep: int = 2
) -> Path:
    """Write `state` (nested dicts and lists of tensors and JSON values) as the checkpoint of `step`.

    recipe: the options of the run, as JSON holds them; they stand in the manifest.
    keep: how many checkpoints stay, this one and those before it. Later ones are of steps that are taken anew, and go.

    Floats are kept exactly (JSON writes the shortest text that reads back equal). Raises ModelError when the disk does
    not take it; the checkpoints before it are left as they were.
    """
    place = folder / f"checkpoint-{step:08d}"
    temporary = folder / f".writing-{place.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        _write(temporary, step, state, recipe)
        _move(temporary, place)
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        left = ", ".join(f"checkpoint-{old:08d}" for old in steps(folder)) or "none"
        raise ModelError(
            f"the checkpoint of step {step} cannot be written to {folder}: {error}. Checkpoints left as they were: "
            f"{left}. Make room, then {'go on with --resume' if steps(folder) else 'start again'}"
        ) from error
    found = steps(folder)
    kept = [old for old in found if old <= step][-keep:]
    for old in set(found) - set(kept):
        shutil.rmtree(folder / f"checkpoint-{old:08d}")
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return place


def _write(temporary: Path, step: int, state: Mapping[str, Any], recipe: Mapping[str, Any] | None) -> None:
    temporary.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(dict(state), tensors)
    save_file(tensors, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "state": tree}))
    for name in _FILES:
        _flush(temporary / name)
    files = {n: {"sha256": _sha256(temporary / n), "bytes": (temporary / n).stat().st_size} for n in _FILES}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "recipe": recipe, "files": files}
    (temporary / "manifest.json").write_text(json.dumps(manifest))
    _flush(temporary / "manifest.json")
    _flush(temporary)


def _move(temporary: Path, place: Path) -> None:
    if place.exists():  # a folder cannot replace a folder; the old one steps aside and comes back should that fail
        aside = place.with_name(f".writing-old-{place.name}-{os.getpid()}")
        place.rename(aside)
        try:
            os.replace(temporary, place)
        except OSError:
            aside.rename(place)
            raise
    else:
        os.replace(temporary, place)
    _flush(place.parent)


def steps(folder: Path) -> list[int]:
    """The steps of which `folder` holds a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := _NAME.match(p.name)))


def newest(folder: Path) -> Path:
    """The newest sound checkpoint in `folder`. A damaged one is passed over for the one before it, with a warning.

    Raises ModelError when there is none, or when each is damaged: a damaged checkpoint must never turn into a fresh
    start.
    """
    places = [folder / f"checkpoint-{step:08d}" for step in reversed(steps(folder))]
    if not places:
        raise ModelError(f"no checkpoint in {folder}: start without --resume, or name the folder of the run to resume")
    damages = []
    for place in places:
        try:
            _verify(place)
        except ModelError as error:
            damages.append(error)
            continue
        for damage in damages:
            logger.warning("%s: going on from %s", damage, place)
        return place
    raise ModelError(f"no sound checkpoint in {folder}: {'; '.join(map(str, damages))}")


def read(place: Path) -> tuple[int, dict[str, Any]]:
    """The checkpoint at `place`, which `newest` found sound, as (step, state)."""
    content = json.loads((place / "state.json").read_text())
    return content["step"], _unpack(content["state"], load_file(place / "tensors.safetensors"))


def load(folder: Path) -> tuple[int, dict[str, Any]]:
    """The newest sound checkpoint in `folder` as (step, state). Raises as `newest`."""
    return read(newest(folder))


def recipe(place: Path) -> dict[str, Any] | None:
    """The options of the run that wrote the checkpoint at `place`; None where it holds none. Raises ModelError when its
    manifest cannot be read."""
    found = _manifest(place).get("recipe")
    if found is not None and not isinstance(found, dict):
        raise ModelError(f"checkpoint {place} is damaged: its recipe is a {type(found).__name__}")
    return found


def _manifest(place: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"checkpoint {place} has no readable manifest: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise ModelError(f"checkpoint {place} has format {version}, this program reads {FORMAT_VERSION}")
    return manifest


def _verify(place: Path) -> None:
    """Raises ModelError when a file of the checkpoint is missing or does not match the manifest."""
    listed = _manifest(place).get("files")
    if not isinstance(listed, dict) or set(listed) != set(_FILES):
        raise ModelError(f"checkpoint {place} is damaged: its manifest does not list {' and '.join(_FILES)}")
    for name, expected in listed.items():
        path = place / name
        if not isinstance(expected, dict) or not {"bytes", "sha256"} <= expected.keys():
            raise ModelError(f"checkpoint {place} is damaged: its manifest lacks the size or the sha256 of {name}")
        try:
            sound = path.stat().st_size == expected["bytes"] and _sha256(path) == expected["sha256"]
        except OSError as error:
            raise ModelError(f"checkpoint {place} is damaged: {name} cannot be read: {error.strerror}") from error
        if not sound:
            raise ModelError(f"checkpoint {place} is damaged: {name} does not match its manifest")
