"""Checkpoints that survive a kill at any moment.

A checkpoint is a folder `checkpoint-STEP` with one safetensors file, one JSON file for everything that is not a
tensor, and a manifest written last. It is written under a temporary name, flushed, renamed; only then do older ones go.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from medviz.errors import ModelError

FORMAT_VERSION = 1
_FILES = ("tensors.safetensors", "state.json")
_NAME = re.compile(r"checkpoint-(\d{8})$")


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


def save(folder: Path, step: int, state: Mapping[str, Any], keep: int = 1) -> Path:
    """Write `state` (nested dicts and lists of tensors and JSON values) as the checkpoint of `step`.

    The newest `keep` checkpoints stay. Floats are kept exactly (JSON writes the shortest text that reads back equal).
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / f"checkpoint-{step:08d}"
    temporary = folder / f".writing-{place.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    tree = _pack(dict(state), tensors)
    save_file(tensors, temporary / "tensors.safetensors")
    (temporary / "state.json").write_text(json.dumps({"step": step, "state": tree}))
    for name in _FILES:
        _flush(temporary / name)
    files = {n: {"sha256": _sha256(temporary / n), "bytes": (temporary / n).stat().st_size} for n in _FILES}
    (temporary / "manifest.json").write_text(
        json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": files})
    )
    _flush(temporary / "manifest.json")
    _flush(temporary)
    if place.exists():  # a folder cannot replace a folder; the old one steps aside and comes back should that fail
        aside = folder / f".writing-old-{place.name}-{os.getpid()}"
        place.rename(aside)
        try:
            os.replace(temporary, place)
        except OSError:
            aside.rename(place)
            raise
    else:
        os.replace(temporary, place)
    _flush(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(folder / f"checkpoint-{old:08d}")
    for stale in folder.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return place


def steps(folder: Path) -> list[int]:
    """The steps of which `folder` holds a checkpoint, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(m.group(1)) for p in folder.iterdir() if (m := _NAME.match(p.name)))


def load(folder: Path) -> tuple[int, dict[str, Any]]:
    """The newest checkpoint in `folder` as (step, state).

    Raises ModelError when there is none, or when a file of it is missing or does not match the manifest: a damaged
    checkpoint must never turn into a fresh start.
    """
    found = steps(folder)
    if not found:
        raise ModelError(f"no checkpoint in {folder}: start without --resume, or name the folder of the run to resume")
    place = folder / f"checkpoint-{found[-1]:08d}"
    try:
        manifest = json.loads((place / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"checkpoint {place} has no readable manifest: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version") if isinstance(manifest, dict) else type(manifest).__name__
        raise ModelError(f"checkpoint {place} has format {version}, this program reads {FORMAT_VERSION}")
    listed = manifest.get("files")
    if not isinstance(listed, dict) or set(listed) != set(_FILES):
        raise ModelError(f"checkpoint {place} is damaged: its manifest does not list {' and '.join(_FILES)}")
    for name, expected in listed.items():
        path = place / name
        if not path.is_file() or path.stat().st_size != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise ModelError(f"checkpoint {place} is damaged: {name} does not match its manifest")
    content = json.loads((place / "state.json").read_text())
    return content["step"], _unpack(content["state"], load_file(place / "tensors.safetensors"))
