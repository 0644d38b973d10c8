"""Recipes: one YAML file a stage, domain and preset, read into a dataclass and overridden on the command line."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import tyro
import yaml

from medviz.errors import InputError


@dataclass
class StageConfig:
    """What every stage takes."""

    out: str
    """Folder the run writes to: checkpoints, metrics.json and the exported model."""
    seed: int = 0
    """Every random draw of the run is a function of it."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`; an error if there is none or it is damaged."""
    checkpoint_every_s: float = 120.0
    """Seconds between checkpoints."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after so many minutes (0: no limit); --resume goes on."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""


C = TypeVar("C", bound=StageConfig)


def read_recipe(path: str | Path, config_class: type[C], overrides: Sequence[str] = ()) -> C:
    """The recipe at `path` as a `config_class`, with command-line `overrides` such as ``--steps 5`` applied.

    Raises InputError for an unreadable file or a key the stage does not know.
    """
    try:
        content: Any = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"the recipe {path} must be a mapping of options, found {type(content).__name__}")
    known = {f.name for f in fields(config_class)}
    unknown = sorted(set(content) - known)
    if unknown:
        raise InputError(f"the recipe {path} has unknown options {unknown}; allowed are {sorted(known)}")
    content = {k: tuple(v) if isinstance(v, list) else v for k, v in content.items()}
    return tyro.cli(config_class, default=config_class(**content), args=list(overrides), prog="python -m train STAGE RECIPE")
