"""`python -m train anatomy_variants RECIPE`: ways of tuning words to anatomy side by side, each from several seeds.

Each variant is trained from each seed by the anatomy_prompts stage, in a folder of its own, and all of them are read in
the same images as the frozen baseline by `train.evaluate.grounding`. What is trained is found again, so a run that was
stopped goes on by the same command.
"""

from __future__ import annotations

import logging
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from medviz.errors import InputError
from medviz.models.manifest import NAME_PATTERN
from train import anatomy_prompts, checkpoint
from train.anatomy_prompts import AnatomyPromptsConfig
from train.config import StageConfig, parse, read_recipe
from train.evaluate.grounding import stage
from train.evaluate.grounding.stage import GroundingConfig

LEAST_SEEDS = 3

logger = logging.getLogger(__name__)


@dataclass
class AnatomyVariantsConfig(StageConfig):
    """Options of the comparison. `steps` is left to the recipes that it names."""

    prompts: str = ""
    """The anatomy_prompts recipe that the variants share."""
    variants: dict[str, str] = field(default_factory=dict)
    """Variant -> its own overrides, as on the stage's command line; its --title is its row's name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, at least 3 and the same for every variant."""
    grounding: str = ""
    """The grounding recipe: the images, and how they are read."""
    inversion: tuple[str, ...] = ()
    """Variants that are read by DDIM inversion as well."""
    split: str = "validation"
    """Images to read: validation to choose by, test to report once."""


def plan(config: AnatomyVariantsConfig) -> dict[str, list[AnatomyPromptsConfig]]:
    """Variant -> its recipe for each seed. Raises InputError for fewer than 3 seeds, for names that no adapter can
    have, and for overrides that the stage does not take."""
    if len(set(config.seeds)) < max(LEAST_SEEDS, len(config.seeds)):
        raise InputError(f"seeds must be at least {LEAST_SEEDS} different ones, found {config.seeds}")
    if not config.variants:
        raise InputError("name at least one variant and its overrides")
    plans = {}
    for name, overrides in config.variants.items():
        if not NAME_PATTERN.fullmatch(name):
            raise InputError(f"{name!r} cannot be a variant's name; allowed: {NAME_PATTERN.pattern}")
        shared = read_recipe(config.prompts, AnatomyPromptsConfig, shlex.split(overrides)).checked()
        if shared.title == AnatomyPromptsConfig.title:
            shared = replace(shared, title=name)
        one = replace(shared, device=config.device, max_minutes=0.0)
        plans[name] = [replace(one, seed=seed, out=f"{config.out}/{name}-seed{seed}") for seed in config.seeds]
    return plans


def run(config: AnatomyVariantsConfig, command: str = "") -> dict[str, Any]:
    """Train what is missing, read all of it and return the report that was written; see `plan` for what is refused."""
    plans = plan(config)
    for wanted in (one for by_seed in plans.values() for one in by_seed):
        if not (Path(wanted.out) / "metrics.json").is_file():
            logger.info("training %s", wanted.out)
            anatomy_prompts.run(replace(wanted, resume=bool(checkpoint.steps(Path(wanted.out)))))
    tuned = {name: tuple(f"{one.out}/model" for one in by_seed) for name, by_seed in plans.items()}
    reading = read_recipe(config.grounding, GroundingConfig)
    reading = replace(reading, tuned=tuned, inversion=config.inversion, split=config.split)
    return stage.run(replace(reading, out=config.out, device=config.device), command=command)


def main(arguments: list[str]) -> None:
    """`python -m train anatomy_variants RECIPE [overrides]`."""
    config = parse(arguments, AnatomyVariantsConfig)
    run(config, command=f"python -m train anatomy_variants {shlex.join(arguments)}")
