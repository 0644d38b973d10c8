"""What a finished run was made by, in its metrics.json: its recipe and the runs that its options name."""

import hashlib
import json
from pathlib import Path
from typing import Any

from train.config import CHANGEABLE, StageConfig, options
from train.recipe_file import texts

METRICS_NAME = "metrics.json"


def recipe_of(config: StageConfig) -> dict[str, Any]:
    """What a run is made by.

    options: digest of all options but those of speed, memory and place (`CHANGEABLE`). inputs: finished run that an
    option names -> its `identity`, "" where it recorded none.
    """
    kept = {
        name: value for name, value in options(config).items() if name not in CHANGEABLE | {"resume", "export_only"}
    }
    inputs = {}
    for text in texts(options(config)):
        run = run_of(Path(text)) if text != config.out else None
        if run is not None:
            inputs[str(run)] = identity(run)
    return {"options": _digest(kept), "inputs": inputs}


def run_of(path: Path) -> Path | None:
    """The finished run that `path` is or lies in; None where there is none."""
    return next((p for p in (path, *path.parents) if p != Path() and (p / METRICS_NAME).is_file()), None)


def recorded(run: Path) -> dict[str, Any]:
    """What `recipe_of` said when a run was made; empty where it recorded nothing."""
    return json.loads((run / METRICS_NAME).read_text()).get("recipe") or {}


def identity(run: Path) -> str:
    """A digest of the recipe of a finished run and of those of its inputs; "" where it recorded none."""
    found = recorded(run)
    return _digest(found) if found else ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
