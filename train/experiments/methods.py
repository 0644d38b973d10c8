"""`python -m train methods RECIPE`: reinforcement learning methods side by side, at one budget of reward queries.

Each method is trained from each seed by the rl stage, in a folder of its own with the recipe that repeats it
(`python -m train rl OUT/METHOD-seedN/recipe.yaml`), and its newest adapter is measured on the same prompts, seeds and
captions as the baseline: no run stops early and the judge chooses nothing. A run that was stopped goes on; what is
finished is found.
"""

from __future__ import annotations

import json
import logging
import shlex
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.limits import DEFAULT_STEPS
from medviz.models.adapters import load_lora
from medviz.models.manifest import NAME_PATTERN
from medviz.rewards.classifier import AttributeClassifier
from train.config import StageConfig, parse, read_recipe
from train.datasets.split import open_split
from train.evaluate.contact_sheet import evenly_spaced
from train.evaluate.features import independent_space, judge_space
from train.evaluate.generated import (
    Request,
    caption_request,
    file_records,
    generate,
    grid_request,
    weights_digest,
)
from train.evaluate.measure import BASELINE, PromptSet
from train.evaluate.real import real_images
from train.evaluate.stage import training_features
from train.experiments.measured import Eyes, measure, threshold_of
from train.experiments.methods_report import Run, report
from train.experiments.picture import draw, require_matplotlib
from train.experiments.pieces import digest, folder_digest, options, piece, run_stage, write_json
from train.loop import METRICS_LOG, read_metrics
from train.rl import trainer
from train.rl.recipe import RlConfig, check

LEAST_SEEDS = 3
ADAPTER = "aligned"
"""What every run calls its adapter; who loads it names it."""
ALIKE = (
    "domain", "base", "reward", "judge", "size_px", "train_what", "evaluate_every", "evaluation_prompts",
    "evaluation_images", "evaluation_steps", "fidelity_images", "fidelity_captions",
)  # fmt: skip
"""Options in which methods may not differ: what they start from, and what looks at them."""

BACKWARD = 2
"""UNet forwards that a backward pass costs, about."""

logger = logging.getLogger(__name__)


@dataclass
class MethodsConfig(StageConfig):
    """Options of the methods experiment. It goes on by itself: run the same command again."""

    steps: int = DEFAULT_STEPS
    """Denoising steps of a measured picture."""
    rl: str = ""
    """The rl recipe that all methods share."""
    shared: str = ""
    """Overrides of it for all methods, as on the rl stage's command line."""
    methods: dict[str, str] = field(default_factory=dict)
    """Method -> its own overrides; its --title is its row's name."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Training seeds, at least 3 and the same for every method."""
    queries: int = 0
    """Reward queries of every run: epochs x images of an epoch. A method with another budget is refused."""
    features: str = ""
    """Folder that holds features/ (an image-caption encoder's) or segmenter/: the second feature space."""
    split: str = "validation"
    """Real images to compare with: validation where the table is chosen by, test to report once."""
    grid_prompts: int = 0
    """Validation prompts of the domain, evenly spaced (0: all)."""
    seeds_per_prompt: int = 4
    """Pictures of each of them and each run, at least 2."""
    captions: int = 128
    """Real images whose captions are drawn once by each run (at most half of the split is used), at least 4."""
    training_images: int = 0
    """Training images that memorisation is checked against (0: all)."""
    apr_heads: tuple[str, ...] = ()
    """Heads of the paper's artefact prevalence rate: all of them right at once."""
    batch: int = 16
    """Pictures drawn at a time; part of what names the stored pictures."""
    reports: str = "assets/reports"
    """Folder that also gets the JSON and the picture (empty: only `out`)."""
    picture: bool = True
    """Draw the curves; needs matplotlib (the extra `bench`)."""


def run(config: MethodsConfig, command: str = "") -> dict[str, Any] | None:
    """Train and measure what is missing and write the report, which is returned; None where `max_minutes` was over
    before all was done (looked at between the pieces).

    Raises InputError for options out of range, unequal budgets and a folder that another recipe filled.
    """
    began, plans = time.monotonic(), plan(config)
    if config.picture:
        require_matplotlib()

    def over() -> bool:
        return 0 < config.max_minutes < (time.monotonic() - began) / 60

    for name, by_seed in plans.items():
        for seed, wanted in by_seed.items():
            if over():
                logger.warning("stopped before %s, seed %d; the same command goes on", name, seed)
                return None
            train(wanted)
    shown = next(iter(next(iter(plans.values())).values()))
    table = _Table(config, shown)
    baseline = table.measured(BASELINE, None)
    runs: dict[str, list[Run]] = {}
    for name, by_seed in plans.items():
        for seed, wanted in by_seed.items():
            if over():
                logger.warning("stopped before measuring %s, seed %d; the same command goes on", name, seed)
                return None
            mine = table.measured(f"{name}-seed{seed}", Path(wanted.out) / "model")
            runs.setdefault(name, []).append(read_run(wanted, mine))
    found = report(config, shown.domain, command, runs, baseline, table.real(), table.about(plans))
    for folder in (Path(config.out), *([Path(config.reports)] if config.reports else [])):
        write_json(folder / f"methods-{shown.domain}.json", found)
        if config.picture:
            draw(found["curves"], found["arms"], folder / f"methods-{shown.domain}.png")
    return found


def plan(config: MethodsConfig) -> dict[str, dict[int, RlConfig]]:
    """Method -> seed -> the rl recipe of that run.

    Raises InputError for fewer than 3 seeds, for names no adapter can have, for a method whose options contradict each
    other, whose reward queries are not `queries`, or that starts from or is looked at by anything else than the others.
    """
    _check(config)
    plans: dict[str, dict[int, RlConfig]] = {}
    for name, overrides in config.methods.items():
        flags = [*shlex.split(config.shared), *shlex.split(overrides)]
        shared = read_recipe(config.rl, RlConfig, flags)
        if shared.title == RlConfig.title:
            shared = replace(shared, title=name)
        # One line of metrics.jsonl an epoch, from which the curves are read; no early end: it would change the budget.
        fixed: dict[str, Any] = {"adapter": ADAPTER, "keep": "newest", "log_every": 1, "patience": shared.steps + 1}
        one = replace(shared, device=config.device, resume=False, max_minutes=0.0, **fixed)
        check(one)
        plans[name] = {s: replace(one, seed=s, out=f"{config.out}/{name}-seed{s}") for s in config.seeds}
    first = {name: by_seed[config.seeds[0]] for name, by_seed in plans.items()}
    unequal = {name: queries(one) for name, one in first.items() if queries(one) != config.queries}
    if unequal:
        raise InputError(
            f"every method must have {config.queries} reward queries (epochs x prompts_per_epoch x images_per_prompt); "
            f"found {unequal}"
        )
    for option in ALIKE:
        values = {name: getattr(one, option) for name, one in first.items()}
        if len({repr(value) for value in values.values()}) > 1:
            raise InputError(f"methods may not differ in {option}; found {values}")
    return plans


def queries(config: RlConfig) -> int:
    """Images that a run draws and has rewarded."""
    return config.steps * config.prompts_per_epoch * config.images_per_prompt


def _check(config: MethodsConfig) -> None:
    if len(set(config.seeds)) < len(config.seeds) or len(config.seeds) < LEAST_SEEDS:
        raise InputError(f"seeds must be at least {LEAST_SEEDS} different ones, found {config.seeds}")
    if not config.methods:
        raise InputError("name at least one method and its overrides")
    for name in config.methods:
        if not NAME_PATTERN.fullmatch(name) or name in (BASELINE, "none"):
            raise InputError(f"{name!r} cannot be a method's name; allowed: {NAME_PATTERN.pattern}, but not {BASELINE}")
    for option, low in (("seeds_per_prompt", 2), ("captions", 4), ("batch", 1), ("steps", 1), ("queries", 1)):
        if getattr(config, option) < low:
            raise InputError(f"{option} must be at least {low}, found {getattr(config, option)}")


def train(wanted: RlConfig) -> None:
    """Run the rl stage for one method and seed, or go on with it, unless it is finished; see `pieces.run_stage`."""
    run_stage(wanted, trainer.main)


def read_run(wanted: RlConfig, measured: Mapping[str, Any]) -> Run:
    """What one run cost and what its looks saw, from its metrics.json and metrics.jsonl."""
    out, images = Path(wanted.out), wanted.prompts_per_epoch * wanted.images_per_prompt
    metrics = json.loads((out / "metrics.json").read_text())
    spent, compute = {0: 0}, {0: 0}
    for logged in read_metrics(out / METRICS_LOG):
        # Work that trains; looks and safeguards are the same for all methods.
        spent[logged["step"]] = int(sum(logged.get(f"forwards_{part}", 0) for part in ("rollout", "replay", "anchor")))
        compute[logged["step"]] = spent[logged["step"]] + BACKWARD * int(logged.get("forwards_with_gradient", 0))
    looks = []
    for look in metrics["history"]:
        epoch = look["epoch"]
        looks.append({**look, "queries": epoch * images, "forwards": spent[epoch], "compute": compute[epoch]})
    forwards = metrics["unet_forwards"]
    return Run(
        title=wanted.title,
        seed=wanted.seed,
        queries=queries(wanted),
        forwards=spent[wanted.steps],
        with_gradient=int(forwards.get("with gradient", 0)),
        trained_s=float(metrics["trained_s"]),
        looks=tuple(looks),
        measured=measured,
    )


class _Table:
    """Draws and measures the models of the experiment; what looks at them is opened when it is first needed."""

    def __init__(self, config: MethodsConfig, rl: RlConfig) -> None:
        self.config, self.rl = config, rl
        self.pipeline: StableDiffusionPipeline = trainer.open_pipeline(rl.base, config.device)
        self.files = file_records(Path(rl.base))
        self._eyes: Eyes | None = None
        size_px = int(self.pipeline.unet.config.sample_size) * int(self.pipeline.vae_scale_factor)
        domain = get_domain(rl.domain)
        self._images = real_images(open_split(rl.domain, config.split), domain, config.captions, size_px, config.seed)
        prompts = domain.validation_prompts()
        prompts = tuple(prompts[i] for i in evenly_spaced(len(prompts), config.grid_prompts or len(prompts)))
        settings = (config.steps, rl.guidance)
        self.requests: dict[PromptSet, Request] = {
            "grid": grid_request(prompts, config.seeds_per_prompt, *settings),
            "captions": caption_request(self._images.captions, config.seed, *settings),
        }
        self._size_px = size_px
        self._looked_at_by = {
            **{name: folder_digest(Path(folder)) for name, folder in self._folders().items()},
            **{name: getattr(config, name) for name in ("split", "captions", "training_images", "seed")},
            "apr_heads": list(config.apr_heads),
            "requests": {kind: digest(asdict(request)) for kind, request in self.requests.items()},
        }

    def _folders(self) -> dict[str, str]:
        found = {"judge": self.rl.judge, "reward": self.rl.reward}
        inside = [Path(self.config.features) / name for name in ("features", "segmenter")]
        return {**found, "features": next((str(path) for path in inside if path.is_dir()), self.config.features)}

    def measured(self, name: str, adapter: Path | None) -> dict[str, Any]:
        """What the adapter in folder `adapter`, or the baseline, measures; made once."""
        files = self.files if adapter is None else {**self.files, **file_records(adapter, f"adapters/{name}/")}
        mine = None if adapter is None else name
        identity = {"weights": weights_digest(files, mine), **self._looked_at_by}

        def make() -> dict[str, Any]:
            if adapter is not None:
                load_lora(self.pipeline.unet, adapter, name)
            place = Path(self.config.out) / "pictures"
            pictures = {
                kind: generate(
                    self.pipeline, files, mine, request, place, batch=self.config.batch, label=f"{kind}, {name}"
                )
                for kind, request in self.requests.items()
            }
            return measure(self.eyes(), pictures)

        return piece(Path(self.config.out) / "measured" / f"{name}.json", identity, make)

    def real(self) -> dict[str, Any]:
        """What the real images measure whose captions are drawn: the ceiling, and the floor of distances."""
        return piece(
            Path(self.config.out) / "measured" / "real.json",
            {"real": True, **self._looked_at_by},
            lambda: measure(self.eyes(), {"captions": self._images.prompted}),
        )

    def eyes(self) -> Eyes:
        """All that looks at pictures."""
        if self._eyes is None:
            config, rl = self.config, self.rl
            judge = AttributeClassifier.load(rl.judge, config.device)
            spaces = (independent_space(Path(config.features), config.device), judge_space(judge))
            reference = {space.name: space.embed(self._images.reference, device=config.device) for space in spaces}
            training = training_features(rl.domain, spaces[0], self._size_px, config.training_images, config.device)
            self._eyes = Eyes(
                domain=get_domain(rl.domain),
                classifiers={"judge": judge, "reward": AttributeClassifier.load(rl.reward, config.device)},
                spaces=spaces,
                requests=self.requests,
                seeds_per_prompt=config.seeds_per_prompt,
                real=self._images,
                reference=reference,
                training=training,
                threshold=threshold_of(reference[spaces[0].name], training),
                subset=config.apr_heads,
                device=config.device,
            )
        return self._eyes

    def about(self, plans: Mapping[str, Mapping[int, RlConfig]]) -> dict[str, Any]:
        """What the report says of models, prompts and recipes."""
        grid = self.requests["grid"]
        return {
            "models": {"sha256": weights_digest(self.files, None)},
            "prompts": list(dict.fromkeys(grid.prompts)),
            "seeds": list(self.config.seeds),
            "real_references": len(self._images.reference),
            "captions": len(self._images.captions),
            "grid": f"{len(grid) // self.config.seeds_per_prompt} prompts x {self.config.seeds_per_prompt} seeds",
            "guidance_scale": str(grid.guidance_scale),
            "recipes": {name: options(next(iter(by_seed.values()))) for name, by_seed in plans.items()},
        }


def main(arguments: list[str]) -> None:
    """`python -m train methods RECIPE [overrides]`."""
    config = parse(arguments, MethodsConfig)
    run(config, command=f"python -m train methods {shlex.join(arguments)}")
