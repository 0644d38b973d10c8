"""Recipes: YAML files (see `train.recipe_file`) read into a dataclass and overridden on the command line."""

import argparse
import json
import logging
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeVar

import tyro

from medviz.errors import InputError
from medviz.generation.guidance import SEMANTIC_INTERVAL, WHOLE_INTERVAL, Guidance
from train import recipe_file, shipping


@dataclass
class StageConfig:
    """What every stage takes."""

    steps_may_change: ClassVar[bool] = False
    """Whether a resumed run may have another number of steps: only where nothing before the last step depends on it."""

    out: str
    """Folder the run writes to: checkpoints, metrics.json and the exported model."""
    seed: int = 0
    """Every random draw of the run is a function of it."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    workers: int = 0
    """Processes that make batches ahead, in the stages that learn from images; 0: none, the batch waits its turn. For a
    graphics card, with cores to spare."""
    steps: int = 1000
    """Optimiser steps of the whole run."""
    resume: bool = False
    """Go on from the newest sound checkpoint in `out`; an error without one, or or for options that change it."""
    checkpoint_every_s: float = 120.0
    """Seconds between checkpoints."""
    max_minutes: float = 0.0
    """Stop with a checkpoint after so many minutes (0: no limit); --resume goes on."""
    log_every: int = 20
    """Steps between lines in metrics.jsonl."""
    tracker: str = ""
    """tensorboard or trackio, which show what metrics.jsonl holds; empty: neither."""


@dataclass
class GuidedConfig(StageConfig):
    """Of a stage that draws pictures. A model folder records the same, chosen on validation captions."""

    domain: str = "dermatology"
    guidance_scale: float = 3.0
    """Of every picture that is drawn; 1 is none."""
    guidance_interval: tuple[int, int] = WHOLE_INTERVAL
    """Timesteps, lowest and highest, between which the scale holds in full."""
    guidance_outside: float = 0.0
    """Share of it, beyond 1, at the other timesteps."""
    semantic_heads: tuple[str, ...] = ()
    """Heads along whose words guidance goes beside that, where a prompt asks for one; empty: none."""
    semantic_scale: float = 0.0
    semantic_interval: tuple[int, int] = SEMANTIC_INTERVAL
    """Timesteps, lowest and highest, between which it does."""

    @property
    def guidance(self) -> Guidance:
        """All of it as one. Raises InputError for values out of range."""
        return Guidance.of_recipe(vars(self), self.domain, self.guidance_scale)


C = TypeVar("C", bound=StageConfig)
logger = logging.getLogger(__name__)
_PROGRAM = "python -m train STAGE RECIPE"

_OF_ONE_START = frozenset({"resume", "export_only"})
"""Options that are no part of the run."""
CHANGEABLE = frozenset(
    {
        # where it is written and what is shown of it
        *("out", "latents", "tracker", "log_every", "checkpoint_every_s", "max_minutes"),
        # what computes it, the same up to the rounding of floats
        *("device", "workers", "compile", "bf16"),
        # images in one pass: memory and speed alone
        *("rollout_batch", "micro_batch", "draw_batch", "gradient_checkpointing", "vae_slicing"),
    }
)
"""Options that a resumed run may change, beside `steps` where `steps_may_change`. All others change what is learnt."""


def options(config: StageConfig) -> dict[str, Any]:
    """A stage's options as YAML and JSON hold them."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}


def _defaults(config: StageConfig) -> dict[str, Any]:
    """The defaults of its stage's options, as `options` gives them, of those that have one."""
    given = {f.name: getattr(config, f.name) for f in fields(config) if f.default is f.default_factory is MISSING}
    return {name: v for name, v in json.loads(json.dumps(options(type(config)(**given)))).items() if name not in given}


def check_resumable(config: StageConfig, before: Mapping[str, Any] | None) -> None:
    """Check that `config` goes on with the run whose options were `before`, as its checkpoint holds them.

    Options in CHANGEABLE are named in a warning where they differ, and so are options that no longer exist. Raises
    InputError that names every other option that differs, with its old and new value. before None: the checkpoint
    holds no options, and nothing can be checked.
    """
    if before is None:
        logger.warning("the checkpoint in %s does not hold its run's options: they are not checked", config.out)
        return
    now = json.loads(json.dumps(options(config)))
    before = {**_defaults(config), **before}  # an option that is newer than the checkpoint had its default
    changed = [
        f"{name} was {json.dumps(before.get(name))} and is {json.dumps(now.get(name))}"
        for name in sorted(now.keys() - _OF_ONE_START)
        if before.get(name) != now.get(name)
    ]
    if gone := sorted(before.keys() - now.keys()):
        logger.warning(
            "resumed without options that no longer exist: %s", ", ".join(f"{n}={json.dumps(before[n])}" for n in gone)
        )
    allowed = CHANGEABLE | ({"steps"} if config.steps_may_change else frozenset())
    refused = [change for change in changed if change.split()[0] not in allowed]
    if refused:
        raise InputError(
            f"{config.out} holds another run: {'; '.join(refused)}. Resume it with the old values, or train with the "
            "new ones in a fresh --out"
        )
    if changed:
        logger.warning("resumed with other options, which leave what is learnt as it is: %s", "; ".join(changed))


def parse(arguments: Sequence[str], config_class: type[C]) -> C:
    """The configuration of a stage from its command line: a recipe, then overrides; `--help` alone lists the options.

    On a CPU without instructions for bf16 a recipe that asks for it computes in fp32, and says so: there bf16
    takes forty times as long. Reports that are meant for assets/ go where `train.shipping` places them.

    Raises InputError when no recipe is named, for a CUDA device on a machine without one, and as `read_recipe`.
    """
    if not arguments:
        raise InputError("name a recipe, e.g. one of train/recipes/, or --help for the options")
    if arguments[0] in ("-h", "--help"):
        return tyro.cli(config_class, args=["--help"], prog=_PROGRAM)
    config = read_recipe(arguments[0], config_class, arguments[1:])
    places = {name: getattr(config, name) for name in ("report", "reports") if getattr(config, name, "")}
    config = replace(config, **{name: str(shipping.place(path)) for name, path in places.items()})  # type: ignore[arg-type]
    if config.device.startswith("cuda") and not _has_cuda():
        raise InputError(f"the device {config.device} is not there: this machine has no CUDA card. Pass --device cpu")
    if getattr(config, "bf16", False) and config.device.startswith("cpu") and not _cpu_has_bf16():
        logger.warning("this CPU has no instructions for bf16: computing in fp32")
        config = replace(config, bf16=False)  # type: ignore[call-arg]
    return config


def _has_cuda() -> bool:
    import torch  # heavy, and few commands get here

    return torch.cuda.is_available()


def _cpu_has_bf16() -> bool:
    import torch  # heavy, and few commands get here

    found = torch.cpu.get_capabilities()  # amx_bf16 and avx512_bf16 on x86, bf16 on Arm
    return any(there for name, there in found.items() if name.endswith("bf16"))


def read_recipe(path: str | Path, config_class: type[C], overrides: Sequence[str] = ()) -> C:
    """The recipe at `path` as a `config_class`, with command-line `overrides` such as ``--steps 5`` applied.

    ``--device`` and ``--domain`` also choose the recipe's blocks.
    Raises InputError for an unreadable file, a key the stage does not know, or a value of the wrong type.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--device", default="")
    first.add_argument("--domain", default="")
    chosen, overrides = first.parse_known_args(list(overrides))
    content = recipe_file.load(path, device=chosen.device, domain=chosen.domain)
    content.pop("stage", None)
    known = {f.name: f for f in fields(config_class)}
    if chosen.domain and "domain" in known:
        content["domain"] = chosen.domain
    elif chosen.domain and not any("${domain}" in text for text in recipe_file.texts(recipe_file.raw(path))):
        raise InputError(f"the recipe {path} is not for any domain: leave --domain out")
    unknown = sorted(map(str, set(content) - set(known)))
    if unknown:
        raise InputError(f"the recipe {path} has unknown options {unknown}; allowed are {sorted(known)}")
    types = typing.get_type_hints(config_class)
    values = {name: _typed(value, types[name], f"{path}: {name}") for name, value in content.items()}
    for name, option in known.items():
        if name not in values and option.default is MISSING and option.default_factory is MISSING:
            values[name] = tyro.MISSING  # the command line must give it
    return tyro.cli(config_class, default=config_class(**values), args=list(overrides), prog=_PROGRAM)


def _typed(value: Any, wanted: Any, name: str) -> Any:
    """`value` as YAML gave it, as the type `wanted`; InputError with `name` when it is none.

    YAML 1.1 reads 1e-3, which lacks a dot, as text: a text that reads as a number is one where a number is wanted.
    """
    origin, inner = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, UnionType):
        if value is None and NoneType in inner:
            return None
        return _typed(value, next(t for t in inner if t is not NoneType), name)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(item, inner[0], name) for item in value)
    if (origin or wanted) in (dict, Mapping) and isinstance(value, dict):
        return {key: _typed(item, inner[1], name) if inner else item for key, item in value.items()}
    if wanted is float and not isinstance(value, bool) and isinstance(value, int | float | str):
        try:
            return float(value)
        except ValueError:
            pass
    if wanted in (int, bool, str) and type(value) is wanted:
        return value
    raise InputError(f"{name} must be {getattr(wanted, '__name__', wanted)}, found {value!r}")
