"""From what the runs of each method measured to figures with 95 % intervals over training seeds and prompts.

A value is the mean over seeds and prompts. Its interval draws seeds and prompts (captions) with replacement, crossed; a
change is run less baseline, prompt by prompt. Kernel distances take half-samples of captions in place of the bootstrap;
Frechet distances, gains at the looks and costs have no units: Student's interval over seeds alone. See
`train.experiments.crossed`.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from medviz import __version__
from medviz.domains import Domain, get_domain
from train.evaluate.figures import Figure
from train.evaluate.measure import BASELINE, PromptSet, Role
from train.evaluate.report import FORMAT_VERSION
from train.evaluate.stage import VERSIONED
from train.evaluate.statistics import Estimate, student_interval
from train.experiments import crossed
from train.experiments.pieces import array

if TYPE_CHECKING:
    from train.experiments.methods import MethodsConfig

INTERVALS = (
    "brackets hold 95 % intervals over training seeds and prompts, both drawn with replacement (the baseline: over "
    "prompts); Δ is the change against the baseline, prompt by prompt"
)
NO_TRAINING = Estimate(0.0, None, None, 0)


@dataclass(frozen=True)
class Run:
    """One method trained from one seed.

    queries: images drawn and rewarded. forwards: latents that went through the UNet to train it (rollout, replay,
    anchor; guidance counts twice); with_gradient: those of them with a gradient, which cost about three times as much.
    looks: its history, each with the queries, forwards and compute (in forwards, backward passes counted as two more)
    spent by then. measured: of `measured.measure`.
    """

    title: str
    seed: int
    queries: int
    forwards: int
    with_gradient: int
    trained_s: float
    looks: tuple[Mapping[str, Any], ...]
    measured: Mapping[str, Any]


Runs = Mapping[str, Sequence[Run]]
"""Method -> its runs, one a seed."""


def report(
    config: MethodsConfig,
    domain: str,
    command: str,
    runs: Runs,
    baseline: Mapping[str, Any],
    real: Mapping[str, Any],
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """The JSON of the experiment; about: models, prompts, seeds, recipes and counts."""
    arms = [{"name": BASELINE, "label": "baseline (no adapter)"}]
    arms += [{"name": name, "label": f"{found[0].title} (`{name}`)"} for name, found in runs.items()]
    return {
        "format_version": FORMAT_VERSION,
        "kind": "methods",
        "title": f"{get_domain(domain).label}: reinforcement learning methods at one budget",
        "domain": domain,
        "command": command,
        "default_adapter": None,
        "arms": arms,
        "rows": "arms",
        "intervals": INTERVALS,
        "settings": {
            "split": config.split,
            "training_seeds": about["seeds"],
            "reward_queries_of_each_run": config.queries,
            "adapter": "the newest of each run",
            "steps": config.steps,
            "guidance_scale": about["guidance_scale"],
            "grid": about["grid"],
            "captions": about["captions"],
            "real_references": about["real_references"],
        },
        **{name: about[name] for name in ("models", "prompts", "seeds", "recipes")},
        "versions": {"medviz": __version__, **{name: importlib.metadata.version(name) for name in VERSIONED}},
        "runs": {name: [_spent(one) for one in found] for name, found in runs.items()},
        "curves": {name: curve(found) for name, found in runs.items()},
        "figures": [f.as_json() for f in figures(get_domain(domain), config.apr_heads, runs, baseline, real)],
    }


def curve(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """What the looks saw: of each look, queries, mean UNet forwards, and judge, reward and diversity over the seeds.

    judge_gain is the judge's score less that of the same run's look before training, at the same prompts and noise.
    """
    points = []
    for index, first in enumerate(runs[0].looks):
        seen = [one.looks[index] for one in runs]
        gains = [one.looks[index]["judge"] - one.looks[0]["judge"] for one in runs]
        names = [name for name in ("judge", "judge_accuracy", "reward", "diversity", "distance") if name in first]
        points.append(
            {
                "queries": first["queries"],
                **{name: float(np.mean([look[name] for look in seen])) for name in ("forwards", "compute")},
                **{name: over_seeds([look[name] for look in seen]).as_json() for name in names},
                "judge_gain": over_seeds(gains).as_json(),
            }
        )
    return points


def over_seeds(values: Sequence[float]) -> Estimate:
    """Mean of one number a run, with Student's interval over the seeds."""
    return student_interval(np.array(values, np.float64))


def gained(run: Run, cost: str, budget: float) -> float:
    """The judge's score of the run's looks at a `budget` of "queries" or "compute", less that before training; between
    two looks on the line from one to the other."""
    spent, judge = ([float(look[name]) for look in run.looks] for name in (cost, "judge"))
    return float(np.interp(budget, spent, judge)) - judge[0]


def figures(
    domain: Domain, subset: Sequence[str], runs: Runs, baseline: Mapping[str, Any], real: Mapping[str, Any]
) -> list[Figure]:
    """All figures, those of the README's table first within their group."""
    found = [_of_units(row, runs, baseline, real) for row in _rows(domain, subset, baseline)]
    found += [_calibration(kind, runs, baseline, real) for kind in baseline["calibration"]]
    for space, label in baseline["spaces"].items():
        found += [_kernel(space, label, runs, baseline, real), _frechet(space, label, runs, baseline, real)]
    return [*found, *_gains(runs), *_costs(runs)]


def _gains(runs: Runs) -> list[Figure]:
    """What the judge's score gained by one budget of queries, and of compute: what the thriftiest method spent."""
    kinds = {"queries": "reward queries", "compute": "UNet forwards, a backward pass counted as two"}
    found = []
    for cost, unit in kinds.items():
        budget = min(float(one.looks[-1][cost]) for each in runs.values() for one in each)
        found.append(
            Figure(
                name=f"judge_gain_at_equal_{cost}",
                label=f"Judge's margin gained by {budget:,.0f} {unit}",
                group="alignment",
                role="judge",
                baseline=NO_TRAINING,
                aligned={name: over_seeds([gained(one, cost, budget) for one in each]) for name, each in runs.items()},
                change={},
                higher_is_better=True,
                headline=True,
                note="at the looks between epochs, their few prompts and noises; over seeds alone",
                counts={"seeds": len(next(iter(runs.values())))},
            )
        )
    return found


def _rows(domain: Domain, subset: Sequence[str], baseline: Mapping[str, Any]) -> list[Figure]:
    """The figures that are means over prompts, named as `measured.measure` names them, without values."""
    labels = {head.name: head.label.lower() for head in domain.heads}
    artefacts = ", ".join(labels[head] for head in subset)
    rows: list[Figure] = []

    def row(name: str, label: str, **options: Any) -> None:
        if name in baseline["units"]:
            rows.append(Figure(name, label, baseline=None, aligned={}, change={}, **options))

    kinds: dict[PromptSet, str] = {"grid": "", "captions": ", captions of real images"}
    roles: dict[Role, str] = {"judge": "judge", "reward": "reward network"}
    for role, who in roles.items():
        for kind, where in kinds.items():
            alike: dict[str, Any] = {
                "group": "alignment", "role": role, "prompts": kind, "higher_is_better": True,
            }  # fmt: skip
            judge, by = role == "judge", f"by the {who}{where}"
            row(f"{role}_accuracy_{kind}", f"Prompt accuracy {by}", headline=judge or kind == "grid", **alike)
            row(f"{role}_apr_{kind}", f"APR ({artefacts}) {by}", headline=judge and kind == "grid", **alike)
            row(f"{role}_disease_{kind}", f"Asked disease is the likeliest {by}", headline=judge, **alike)
            row(f"{role}_complete_{kind}", f"Every attribute right {by}", **alike)
            row(f"{role}_margin_{kind}", f"Mean signed margin {by}", **alike)
            for head, label in labels.items():
                shown = judge and kind == "grid" and head in subset
                row(f"{role}_head_{head}_{kind}", f"Balanced accuracy of {label} {by}", headline=shown, **alike)
    for index, (space, label) in enumerate(baseline["spaces"].items()):
        row(
            f"diversity_{space}",
            f"Distance between pictures of one prompt, {label}",
            group="diversity", prompts="grid", space=space, higher_is_better=True, change_kind="ratio",
            headline=not index,
        )  # fmt: skip
        memory: dict[str, Any] = {
            "group": "memorisation", "prompts": "captions", "space": space, "higher_is_better": False,
        }  # fmt: skip
        nearer = "Share nearer to a training image than 99 % of unseen real ones"
        row(f"memorisation_share_{space}", f"{nearer}, {label}", headline=True, **memory)
        row(f"memorisation_similarity_{space}", f"Cosine similarity to the nearest training image, {label}", **memory)
    return rows


def _of_units(row: Figure, runs: Runs, baseline: Mapping[str, Any], real: Mapping[str, Any]) -> Figure:
    before = array(baseline["units"][row.name])
    after = {name: np.stack([array(one.measured["units"][row.name]) for one in found]) for name, found in runs.items()}
    ratio = row.change_kind == "ratio"
    photographs = real["units"].get(row.name)
    return replace(
        row,
        real=None if photographs is None else crossed.crossed_mean(array(photographs)[None]),
        baseline=crossed.crossed_mean(before[None]),
        aligned={name: crossed.crossed_mean(values) for name, values in after.items()},
        change={
            name: crossed.crossed_ratio(values, before) if ratio else crossed.crossed_mean(values - before)
            for name, values in after.items()
        },
        counts={"seeds": len(next(iter(after.values()))), "prompts": int(np.isfinite(before).sum())},
    )


def _calibration(kind: PromptSet, runs: Runs, baseline: Mapping[str, Any], real: Mapping[str, Any]) -> Figure:
    def statistic(measured: Sequence[Mapping[str, Any]]) -> crossed.Statistic:
        sums = [one["calibration"][kind] for one in measured]
        return crossed.calibration_error(np.array([s["excess"] for s in sums]), np.array([s["counts"] for s in sums]))

    units = len(baseline["calibration"][kind]["counts"])
    before = statistic([baseline])
    after = {name: statistic([one.measured for one in found]) for name, found in runs.items()}

    def of_runs(make: Callable[[str], crossed.Statistic]) -> dict[str, Estimate | None]:
        return {name: crossed.crossed_interval(make(name), len(found), units) for name, found in runs.items()}

    return Figure(
        name=f"judge_calibration_{kind}",
        label="Calibration error: the judge's probabilities against what was asked"
        + ("" if kind == "grid" else ", captions of real images"),
        group="calibration",
        role="judge",
        prompts=kind,
        higher_is_better=False,
        headline=True,
        real=crossed.crossed_interval(statistic([real]), 1, units) if kind in real["calibration"] else None,
        baseline=crossed.crossed_interval(before, 1, units),
        aligned=of_runs(lambda name: after[name]),
        change=of_runs(lambda name: crossed.difference(after[name], crossed.single_run(before))),
        note="a bootstrap raises such an error a little, so that its interval may lie above the value",
        counts={"seeds": len(next(iter(runs.values()))), "prompts": units},
    )


def _kernel(space: str, label: str, runs: Runs, baseline: Mapping[str, Any], real: Mapping[str, Any]) -> Figure:
    def sums(measured: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        parts = [one["kernel"][space] for one in measured]
        return np.array([part["value"] for part in parts]), np.array([part["halves"] for part in parts])

    n = int(baseline["kernel"][space]["n"])
    before, before_halves = sums([baseline])
    after = {name: sums([one.measured for one in found]) for name, found in runs.items()}
    return Figure(
        name=f"kernel_distance_{space}",
        label=f"Kernel distance (KID) to real images, {label}",
        group="fidelity",
        prompts="captions",
        space=space,
        higher_is_better=False,
        headline=True,
        real=crossed.kernel_interval(*sums([real]), n),
        baseline=crossed.kernel_interval(before, before_halves, n),
        aligned={name: crossed.kernel_interval(values, halves, n) for name, (values, halves) in after.items()},
        change={
            name: crossed.kernel_interval(values - before, halves - before_halves, n)
            for name, (values, halves) in after.items()
        },
        counts={"seeds": len(next(iter(runs.values())))},
    )


def _frechet(space: str, label: str, runs: Runs, baseline: Mapping[str, Any], real: Mapping[str, Any]) -> Figure:
    before, n = float(baseline["frechet"][space]), int(baseline["kernel"][space]["n"])
    after = {name: [float(one.measured["frechet"][space]) for one in found] for name, found in runs.items()}
    return Figure(
        name=f"frechet_distance_{space}",
        label=f"Frechet distance (FID's formula) to real images, {label}",
        group="fidelity",
        prompts="captions",
        space=space,
        higher_is_better=False,
        headline=True,
        real=Estimate(float(real["frechet"][space]), None, None, n),
        baseline=Estimate(before, None, None, n),
        aligned={name: over_seeds(values) for name, values in after.items()},
        change={name: over_seeds([value - before for value in values]) for name, values in after.items()},
        note="biased at this n; its interval is over seeds alone: read it beside the real images' value only",
        counts={"seeds": len(next(iter(runs.values())))},
    )


def _costs(runs: Runs) -> list[Figure]:
    kinds: dict[str, tuple[str, Callable[[Run], float]]] = {
        "queries": ("Reward queries of a run", lambda one: float(one.queries)),
        "forwards": ("UNet forwards of a run (latents)", lambda one: float(one.forwards)),
        "with_gradient": ("UNet forwards with a gradient", lambda one: float(one.with_gradient)),
        "trained_s": ("Seconds of a run, looks included", lambda one: one.trained_s),
    }
    return [
        Figure(
            name=f"cost_{name}",
            label=label,
            group="cost",
            baseline=NO_TRAINING,
            aligned={method: over_seeds([pick(one) for one in found]) for method, found in runs.items()},
            change={},
            higher_is_better=False,
            headline=True,
        )
        for name, (label, pick) in kinds.items()
    ]


def _spent(one: Run) -> dict[str, Any]:
    names = ("seed", "queries", "forwards", "with_gradient", "trained_s")
    return {**{name: getattr(one, name) for name in names}, "looks": [dict(look) for look in one.looks]}
