"""`python -m train run DOMAIN`: every stage of a domain in its order, from images to a model folder.

The order follows from the recipes: a stage comes after those whose runs its options name. It starts from the assembly
recipe of the domain (`assemble-DOMAIN.yaml`). A finished run is used again only if its recipe and those of its inputs
are unchanged; one that was stopped goes on from its checkpoint. A run whose recipe changed is kept beside the new one.
With `--ship` model folder, test figures, examples and tables go to assets/ and the README; else model folder and
validation figures go to runs/unshipped.
"""

import importlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import tyro

from medviz.domains import DOMAINS
from medviz.errors import InputError, ModelError
from medviz.models.manifest import read_manifest
from train import checkpoint, lineage, recipe_file, shipping
from train.config import StageConfig, check_resumable, read_recipe
from train.lineage import METRICS_NAME
from train.recipe_file import RECIPES
from train.stages import STAGES

ASSEMBLE = "assemble"
CONFIGS = {
    "autoencoder": "AutoencoderConfig",
    "contrastive": "ContrastiveConfig",
    "diffusion": "DiffusionConfig",
    "distil": "DistilConfig",
    "classifier": "ClassifierConfig",
    "segmenter": "SegmenterConfig",
    "evidence": "EvidenceConfig",
    "anatomy_prompts": "AnatomyPromptsConfig",
    "rl": "RlConfig",
    "spectrum": "SpectrumConfig",
}
"""Stages that train a part of a model folder -> the class of their options, in the stage's module."""

logger = logging.getLogger(__name__)


@dataclass
class RunConfig:
    """Options of `run`."""

    domain: tyro.conf.Positional[str]
    """dermatology or radiology."""
    only: str = ""
    """One stage (e.g. rl) or run (e.g. rl-dermatology) alone, or assemble, evaluate, examples or report."""
    dry_run: bool = False
    """Print the stages, their state and their hours, and run nothing."""
    device: str = ""
    """Torch device of every stage; empty: each recipe's own."""


@dataclass
class Step:
    """One training run. stage: its command; inputs: the runs that its options name; state: see `plan`."""

    stage: str
    recipe: Path
    out: Path
    domain: str
    device: str
    inputs: list["Step"] = field(default_factory=list)
    state: str = ""

    @property
    def arguments(self) -> list[str]:
        """The command line after the stage."""
        shared = "${domain}" in " ".join(recipe_file.texts(recipe_file.raw(self.recipe)))
        return [
            _shown(self.recipe),
            *(["--domain", self.domain] if shared else []),
            *(["--device", self.device] if self.device else []),
        ]

    @cached_property
    def config(self) -> StageConfig:
        """Its options, with the device's overrides."""
        return self._read(self.arguments)

    def _read(self, arguments: Sequence[str]) -> StageConfig:
        module = importlib.import_module(STAGES[self.stage][0])
        return read_recipe(arguments[0], getattr(module, CONFIGS[self.stage]), arguments[1:])

    @cached_property
    def is_current(self) -> bool:
        """Whether the run is finished, was made by this recipe on any device, and its inputs are those there now."""
        if not (self.out / METRICS_NAME).is_file():
            return False
        made_by, recipe = lineage.recorded(self.out), lineage.recipe_of(self.config)
        others = ([*self.arguments, "--device", device] for device in recipe_file.DEVICES)
        allowed = {recipe["options"], *(lineage.recipe_of(self._read(each))["options"] for each in others)}
        if made_by.get("options") not in allowed:
            return False
        present = [each for each in self.inputs if (each.out / METRICS_NAME).is_file()]
        same = all(made_by["inputs"].get(run, now) == now for run, now in recipe["inputs"].items())
        return same and all(each.is_current for each in present)


@dataclass
class Chain:
    """The training runs of a domain, each after its inputs; roots: those that the model folder is made of."""

    steps: list[Step]
    roots: list[Step]


def chain_of(domain: str, recipes: Path = RECIPES, device: str = "") -> Chain:
    """The chain of a domain from its recipes. Raises InputError for an unknown domain, for recipes that need each other
    in a circle, and for a run that no recipe makes."""
    if domain not in DOMAINS:
        raise InputError(f"no domain {domain!r}; allowed are {', '.join(DOMAINS)}")
    contents = recipe_file.recipes_of(domain, recipes)
    makers = {c["out"]: path for path, c in contents.items() if c.get("stage") in CONFIGS}
    made: dict[str, Step] = {}

    def inputs(path: Path, below: tuple[str, ...], own: str = "") -> list[Step]:
        """The runs that the recipe at `path` names. below: runs that need it; own: the run that they are for."""
        found: dict[str, Step] = {}
        for text in recipe_file.texts({n: v for n, v in contents[path].items() if n != "out"}):
            places = (Path(text).resolve(), (RECIPES.parents[1] / text).resolve()) if text.endswith(".yaml") else ()
            recipe = next((p for p in contents if p.resolve() in places), None)
            run = next((out for out in makers if text == out or text.startswith(f"{out}/")), None)
            if recipe is not None:  # what that recipe puts together, but for this run
                found |= {str(each.out): each for each in inputs(recipe, below, own)}
            elif run is None and text.startswith("runs/") and text.endswith("/model"):
                raise InputError(f"{path} needs {text}, which no recipe in {recipes} makes")
            elif run is not None and run != own:
                found[run] = step(run, below)
        return list(found.values())

    def step(run: str, below: tuple[str, ...]) -> Step:
        if run in below:
            raise InputError(f"recipes need each other in a circle: {' <- '.join((*below, run))}")
        if run not in made:
            path = makers[run]
            needs = inputs(path, (*below, run), run)
            made[run] = Step(contents[path]["stage"], path, Path(run), domain, device, needs)
        return made[run]

    roots = inputs(_assembly(domain, recipes), ())
    return Chain(list(made.values()), roots)


def plan(domain: str, recipes: Path = RECIPES, device: str = "") -> Chain:
    """The chain of a domain, each run with its state.

    done: finished, to be used again; run; resume, from its checkpoint; changed: its recipe or an input is another than
    it was made by, so it is run again; not needed: missing, but all that is made from it is done.
    """
    chain = chain_of(domain, recipes, device)
    needed = list(chain.roots)
    for each in reversed(chain.steps):
        if each.is_current:
            each.state = "done"
        elif not any(each is other for other in needed):
            each.state = "not needed"
        else:
            each.state = "changed" if (each.out / METRICS_NAME).is_file() else "run"
            if each.state == "run" and checkpoint.steps(each.out):
                each.state = "resume" if _resumable(each) else "changed"
            needed += each.inputs
    return chain


def _resumable(step: Step) -> bool:
    """Whether the checkpoint of a stopped run is of this recipe. Raises ModelError when no checkpoint is sound."""
    try:
        check_resumable(step.config, checkpoint.recipe(checkpoint.newest(step.out)))
    except InputError:
        return False
    return True


def _assembly(domain: str, recipes: Path) -> Path:
    path = recipes / f"{ASSEMBLE}-{domain}.yaml"
    if not path.is_file():
        raise InputError(f"no recipe {path}: it names the parts of the model folder of {domain}")
    return path


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def hours(domain: str, recipes: Path, steps: Sequence[Step]) -> dict[Path, float | None]:
    """Hours that each run took before: its own, else those in the manifest of the shipped folder; None: not known."""
    labels = recipe_file.load(_assembly(domain, recipes)).get("runs", {})
    folder = Path("assets/models") / domain
    costs = read_manifest(folder).training_cost if (folder / "manifest.json").is_file() else {}
    before = {Path(run): costs.get(label, {}).get("seconds") for label, run in labels.items()}
    for each in steps:
        if (each.out / METRICS_NAME).is_file():
            before[each.out] = json.loads((each.out / METRICS_NAME).read_text()).get("trained_s", before.get(each.out))
    return {each.out: None if (s := before.get(each.out)) is None else s / 3600 for each in steps}


def table(steps: Sequence[Step], seen: dict[Path, float | None], then: Sequence[Sequence[str]]) -> str:
    """The plan as text: state, hours before and command of every run, then the commands after them."""
    lines = [f"{'state':10s} {'hours':>6s}  command"]
    for each in steps:
        before = seen.get(each.out)
        taken = "?" if before is None else f"{before:.2f}"
        lines.append(f"{each.state:10s} {taken:>6s}  python -m train {each.stage} {' '.join(each.arguments)}")
    lines += [f"{'run':10s} {'':>6s}  python -m train {' '.join(command)}" for command in then]
    left = [seen.get(each.out) or 0.0 for each in steps if each.state in ("run", "resume", "changed")]
    return "\n".join([*lines, f"{len(left)} of {len(steps)} runs to make, {sum(left):.2f} hours as seen before"])


def _afterwards(config: RunConfig, recipes: Path, steps: Sequence[Step]) -> list[list[str]]:
    """The commands after the training runs: a model folder, its figures, and, to ship it, examples and tables."""
    assembly, assets = _assembly(config.domain, recipes), shipping.ROOT / "assets"
    models, reports = shipping.place(assets / "models"), shipping.place(assets / "reports")
    ships = models == assets / "models"
    evaluate = [
        "evaluate", _shown(recipes / "evaluate.yaml"), "--domain", config.domain,
        *(["--device", config.device] if config.device else []),
        "--models", _shown(models), "--reports", _shown(reports), *(["--split", "test"] if ships else []),
    ]  # fmt: skip
    parts = recipe_file.load(assembly)
    few = parts["adapters"].get(parts.get("few_step_adapter"), "")
    numbers = [str(len(each.config.starts)) for each in steps if few == f"{each.out}/model"]  # type: ignore[attr-defined]
    return [
        [ASSEMBLE, _shown(assembly), _shown(models / config.domain)],
        evaluate,
        *([*evaluate, "--steps", number] for number in numbers),
        *([["examples", config.domain], ["report"]] if ships else []),
    ]


def make(step: Step) -> None:
    """Run or resume one stage. Raises ModelError when it ends without its figures."""
    arguments = step.arguments
    if step.state == "changed":
        logger.warning("the recipe of %s changed: the run before is kept as %s", step.out, _set_aside(step.out))
    elif step.state == "resume":
        arguments = [*arguments, "--resume"]
    logger.info("%s: python -m train %s %s", step.out.name, step.stage, " ".join(arguments))
    importlib.import_module(STAGES[step.stage][0]).main(arguments)
    if not (step.out / METRICS_NAME).is_file():
        raise ModelError(f"{step.out} was stopped before its end; the same command goes on")


def _set_aside(out: Path) -> Path:
    place = next(p for n in range(1, 1000) if not (p := out.with_name(f"{out.name}.before-{n}")).exists())
    return out.rename(place)


def run(config: RunConfig, recipes: Path = RECIPES) -> None:
    """Make what is missing or changed, then the model folder and its figures. Raises InputError for an unknown domain
    or stage, and whatever a stage raises."""
    steps = plan(config.domain, recipes, config.device).steps
    then = _afterwards(config, recipes, steps)
    if config.only:
        steps = [each for each in steps if config.only in (each.stage, each.out.name)]
        then = [command for command in then if command[0] == config.only]
        if not steps and not then:
            raise InputError(f"no stage or run {config.only!r} of {config.domain}; see --dry-run")
    sys.stdout.write(table(steps, hours(config.domain, recipes, steps), then) + "\n")
    if config.dry_run:
        return
    for each in steps:
        if each.state in ("run", "resume", "changed") or (config.only and each.state == "not needed"):
            make(each)
    for stage, *arguments in then:
        importlib.import_module(STAGES[stage][0]).main(arguments)


def main(arguments: list[str]) -> None:
    """`python -m train run DOMAIN [--only STAGE] [--dry-run] [--device DEVICE] [--ship]`."""
    run(tyro.cli(RunConfig, args=arguments, prog="python -m train run"))
