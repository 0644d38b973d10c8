"""From what the sides measured to figures with 95 % intervals over seeds: Student's, for the seeds are few."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.evaluate.statistics import student_interval, student_ratio

Answers = Mapping[str, Sequence[Mapping[str, Any]]]
"""Method -> what `train.benchmarks.rl.task.measured` returned for each seed, in one order of seeds for all methods."""

COSTS = ("queries", "unet_rows", "seconds")


def speed(answer: Mapping[str, Any], images: int, warmup: int) -> dict[str, float]:
    """Throughput and memory of one side on one seed; seconds are medians over the epochs after the first `warmup`.

    images: an epoch's. cpu_s counts all threads, so it tells two sides apart where other programs disturb the clock.
    """
    epochs = answer["epochs"][warmup:]

    def middle(name: str) -> float:
        return float(np.median([epoch[name] for epoch in epochs]))

    total_s = float(np.median([epoch["sample_s"] + epoch["train_s"] for epoch in epochs]))
    cpu_s = float(np.median([epoch["sample_cpu_s"] + epoch["train_cpu_s"] for epoch in epochs]))
    rows = middle("sample_rows") + middle("train_rows")
    return {
        "images_per_s": images / total_s,
        "images_per_cpu_s": images / cpu_s,
        "unet_rows_per_s": rows / total_s,
        "unet_rows_per_image": rows / images,
        "rows_with_gradient_per_image": middle("rows_with_gradient") / images,
        "sample_s_per_image": middle("sample_s") / images,
        "train_s_per_image": middle("train_s") / images,
        "warmup_s": sum(epoch["sample_s"] + epoch["train_s"] for epoch in answer["epochs"][:warmup]),
        "peak_mib": answer["peak_bytes"] / 2**20,
        "peak_over_imports_mib": (answer["peak_bytes"] - answer["ready_bytes"]) / 2**20,
    }


def spent(answer: Mapping[str, Any], images: int, warmup: int) -> dict[str, np.ndarray]:
    """What had been spent before each look (E + 1,): reward queries, UNet rows, seconds of sampling and training.

    The first `warmup` epochs are charged the median second of the others: what compiling takes is reported apart.
    """
    rows = [epoch["sample_rows"] + epoch["train_rows"] for epoch in answer["epochs"]]
    seconds = [epoch["sample_s"] + epoch["train_s"] for epoch in answer["epochs"]]
    seconds[:warmup] = [float(np.median(seconds[warmup:]))] * warmup
    return {
        "queries": np.arange(len(rows) + 1) * float(images),
        "unet_rows": np.concatenate([[0.0], np.cumsum(rows)]),
        "seconds": np.concatenate([[0.0], np.cumsum(seconds)]),
    }


def rewards(answer: Mapping[str, Any]) -> np.ndarray:
    """The mean reward of each look (E + 1,)."""
    return np.array([seen["reward"] for seen in answer["looks"]])


def cost_to(answer: Mapping[str, Any], target: float, images: int, warmup: int) -> dict[str, float]:
    """What was spent at the first look whose mean reward is `target` or more; NaN where none is."""
    reached = np.flatnonzero(rewards(answer) >= target)
    return {
        name: float(values[reached[0]]) if len(reached) else float("nan")
        for name, values in spent(answer, images, warmup).items()
    }


def efficiency(answers: Answers, method: str, reference: str, images: int, warmup: int) -> dict[str, Any]:
    """What `method` spends to reach the final reward of `reference` on the same seed, over what `reference` spent.

    The reference is charged up to its own first look at that reward, not to its end. Ratios are over the seeds that
    reached it; `reached` says how many did.
    """
    pairs = list(zip(answers[method], answers[reference], strict=True))
    targets = [float(rewards(other)[-1]) for _, other in pairs]
    mine = [cost_to(one, target, images, warmup) for (one, _), target in zip(pairs, targets, strict=True)]
    theirs = [cost_to(other, target, images, warmup) for (_, other), target in zip(pairs, targets, strict=True)]
    found: dict[str, Any] = {
        "method": method,
        "reference": reference,
        "target_reward": student_interval(np.array(targets)).as_json(),
        "reached": sum(bool(np.isfinite(cost["queries"])) for cost in mine),
        "n": len(pairs),
    }
    for name in COSTS:
        one, other = (np.array([cost[name] for cost in costs]) for costs in (mine, theirs))
        found[name] = student_interval(one).as_json()
        found[f"reference_{name}"] = student_interval(other).as_json()
        found[f"{name}_ratio"] = student_ratio(one, other).as_json()
    return found


def curve(answers: Sequence[Mapping[str, Any]], images: int, warmup: int) -> list[dict[str, Any]]:
    """Reward and diversity of each look over the seeds, and what had been spent by then (means over the seeds)."""
    costs = [spent(answer, images, warmup) for answer in answers]
    points = []
    for index in range(len(answers[0]["looks"])):
        seen = [answer["looks"][index] for answer in answers]
        points.append(
            {
                **{name: float(np.mean([cost[name][index] for cost in costs])) for name in COSTS},
                **{
                    name: student_interval(np.array([one[name] for one in seen])).as_json()
                    for name in ("reward", "diversity")
                },
            }
        )
    return points


def summary(answers: Answers, images: int, warmup: int) -> dict[str, Any]:
    """All figures: each method's own, ours against the peer's, and what our other methods spend."""
    speeds = {name: [speed(one, images, warmup) for one in found] for name, found in answers.items()}
    methods = {
        name: {
            **{
                key: student_interval(np.array([one[key] for one in speeds[name]])).as_json() for key in speeds[name][0]
            },
            "curve": curve(found, images, warmup),
        }
        for name, found in answers.items()
    }
    found: dict[str, Any] = {"methods": methods, "against_peer": None, "efficiency": []}
    if "trl" in answers:
        found["against_peer"] = _against(answers, speeds, "ddpo", "trl")
    found["efficiency"] = [
        efficiency(answers, method, reference, images, warmup)
        for method in ("forward", "draft")
        for reference in ("ddpo", "trl")
        if reference in answers and method in answers
    ]
    return found


def _against(
    answers: Answers, speeds: Mapping[str, Sequence[Mapping[str, float]]], ours: str, peer: str
) -> dict[str, Any]:
    """Ratios of ours to the peer's, and reward differences at equal queries, paired by seed."""

    def both(key: str) -> tuple[np.ndarray, np.ndarray]:
        return np.array([one[key] for one in speeds[ours]]), np.array([one[key] for one in speeds[peer]])

    end = [np.array([rewards(one)[-1] for one in answers[name]]) for name in (ours, peer)]
    whole = [np.array([rewards(one).mean() for one in answers[name]]) for name in (ours, peer)]
    return {
        **{
            f"{key}_ratio": student_ratio(*both(key)).as_json()
            for key in ("images_per_s", "images_per_cpu_s", "sample_s_per_image", "train_s_per_image", "peak_mib")
        },
        "final_reward_difference": student_interval(np.subtract(*end)).as_json(),
        "mean_reward_difference": student_interval(np.subtract(*whole)).as_json(),
    }
