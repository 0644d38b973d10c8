"""An experiment's pieces on disk: each is made once, and found again by a run that goes on.

A piece is JSON with a digest of all that it depends on; one made from anything else is made again. A trained model is
not: hours may lie in it, so a folder that another recipe filled is refused.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from medviz.errors import InputError
from medviz.models.manifest import hash_file
from train import checkpoint
from train.config import StageConfig, options

logger = logging.getLogger(__name__)


def digest(identity: Mapping[str, Any]) -> str:
    """sha256 of JSON values, whatever their order."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 over the names and contents of every file below `folder`. Raises InputError where it is no folder."""
    if not folder.is_dir():
        raise InputError(f"no folder {folder}: train that stage first")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest({path.relative_to(folder).as_posix(): hash_file(path).sha256 for path in paths})


def piece(path: Path, identity: Mapping[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `make` returned for this identity: read from `path` where it lies there, made and written otherwise.

    Written beside its place and renamed, so a piece that a stop cut short is not there. Raises InputError for a file
    that is no JSON.
    """
    mine = digest(identity)
    if path.is_file():
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}): delete it to make it again") from error
        if isinstance(stored, dict) and stored.get("identity") == mine:
            return stored["found"]
    found = make()
    write_json(path, {"identity": mine, "found": found})
    return found


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing-{path.name}")
    writing.write_text(json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(writing, path)


def write_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write arrays as a compressed .npz, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writing = path.with_name(f".writing-{path.name}")
    with writing.open("wb") as stream:
        np.savez_compressed(stream, **arrays)  # type: ignore[arg-type]
    os.replace(writing, path)


def run_stage(wanted: StageConfig, main: Callable[[list[str]], None]) -> bool:
    """Run a stage by its `main` on a recipe that is written into its folder, or go on with it, unless it is finished;
    returns whether there was anything to do.

    Raises InputError where its folder was filled by another recipe.
    """
    out = Path(wanted.out)
    text, path = yaml.safe_dump(options(wanted), sort_keys=False), out / "recipe.yaml"
    if path.is_file() and path.read_text() != text:
        raise InputError(f"{out} was made by another recipe ({path}): delete it, or choose another out")
    if (out / "metrics.json").is_file():
        return False
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    logger.info("training %s", out.name)
    main([str(path), *(["--resume"] if checkpoint.steps(out) else [])])
    return True


def plain(values: Iterable[float]) -> list[float | None]:
    """Numbers for JSON, None where one is not finite."""
    return [float(value) if np.isfinite(value) else None for value in values]


def array(values: Iterable[float | None]) -> np.ndarray:
    """The numbers (N,) that `plain` was given, NaN where one was not finite."""
    return np.array([np.nan if value is None else value for value in values], np.float64)
