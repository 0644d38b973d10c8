"""From arrays to figures: what classifiers, feature networks and the training images say of each model's pictures.

A variant is the baseline or an adapter; `per_variant` mappings hold BASELINE and every adapter, row i of all of them
drawn from the same prompt and seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from train.evaluate.alignment import Agreement, agreement, target_matrix
from train.evaluate.diversity import paired_distances, per_prompt_distance
from train.evaluate.fidelity import frechet_distance, kernel_distance, kernel_distance_change
from train.evaluate.figures import Figure
from train.evaluate.manifold import NEIGHBOURS, Manifold, manifold
from train.evaluate.statistics import Estimate, mean_interval, paired_difference, paired_ratio

BASELINE = "baseline"
CLASSES = "What the judge recognises, every class as often"
"""Heading of the table of heads."""
PromptSet = Literal["grid", "captions", "classes"]
Role = Literal["judge", "reward"]


@dataclass(frozen=True)
class Readings:
    """What one classifier said of images: probabilities (N, K) and margins (N,), the mean clamped signed margin."""

    probabilities: np.ndarray
    margins: np.ndarray


def alignment_figures(
    role: Role,
    prompts: PromptSet,
    heads: Sequence[str],
    labels: Mapping[str, str],
    thresholds: Mapping[str, float],
    targets: Sequence[Mapping[str, float]],
    per_variant: Mapping[str, Readings],
    *,
    real: Readings | None = None,
    subset: Sequence[str] = (),
) -> list[Figure]:
    """Accuracy over all decided heads, all heads right at once, the margin, and a balanced accuracy a head.

    real: the same classifier's readings of the real images whose captions the prompts are, a ceiling for any
    generator. subset: heads of one more "all right at once" figure (the paper's APR is over four artefacts).
    """
    found = {name: agreement(r.probabilities, targets, heads, thresholds) for name, r in per_variant.items()}
    found_real = None if real is None else agreement(real.probabilities, targets, heads, thresholds)
    wanted = target_matrix(targets, heads)
    who = "judge" if role == "judge" else "reward network"
    where = {"grid": "", "captions": ", captions of real images", "classes": ", every class as often"}[prompts]

    def figure(key: str, label: str, pick: Callable[[Agreement], np.ndarray], headline: bool, **more: Any) -> Figure:
        return _paired(
            name=f"{role}_{key}_{prompts}",
            label=label,
            prompts=prompts,
            role=role,
            values={name: pick(a) for name, a in found.items()},
            real=None if found_real is None else pick(found_real),
            headline=headline and prompts != "classes",
            **more,
        )

    figures = [
        figure("accuracy", f"Prompt accuracy by the {who}{where}", lambda a: a.mean, True),
        figure("complete", f"Every attribute right by the {who}{where}", lambda a: a.complete, role == "judge"),
    ]
    if subset and set(subset) <= set(heads):
        columns = [list(heads).index(head) for head in subset]
        named = ", ".join(labels.get(head, head).lower() for head in subset)
        figures.append(figure("apr", f"APR ({named}) by the {who}{where}", _all_right(columns), role == "judge"))
    figures.append(
        _paired(
            name=f"{role}_margin_{prompts}",
            label=f"Mean signed margin by the {who}{where}",
            prompts=prompts,
            role=role,
            values={name: r.margins for name, r in per_variant.items()},
            real=None if real is None else real.margins,
            headline=role == "reward" and prompts == "grid",
        )
    )
    for index, head in enumerate(heads):
        asked, refused = int((wanted[:, index] >= 0.5).sum()), int((wanted[:, index] < 0.5).sum())
        if asked + refused == 0:
            continue
        kind = "Balanced accuracy" if asked and refused else "Accuracy"
        figures.append(
            figure(
                f"head_{head}",
                f"{kind} of {labels.get(head, head).lower()} by the {who}{where}",
                _one_head(index),
                False,
                counts={"asked": asked, "refused": refused},
                table=CLASSES if prompts == "classes" and role == "judge" else "",
                kinds=wanted[:, index] >= 0.5,
            )
        )
    return figures


def fidelity_figures(
    space: str, label: str, reference: np.ndarray, real: np.ndarray, per_variant: Mapping[str, np.ndarray]
) -> list[Figure]:
    """Kernel and Frechet distance to the reference's features, with real images of the prompts' own records as floor.

    reference (M, D) and real (N, D) share no patient and no lesion; per_variant holds (N, D) of the pictures drawn from
    the captions of the very records behind `real`, so generated and real images have one mix of prompts.
    """
    baseline, adapters = per_variant[BASELINE], _adapters(per_variant)
    kernel = Figure(
        name=f"kernel_distance_{space}",
        label=f"Kernel distance (KID) to real images, {label}",
        group="fidelity",
        prompts="captions",
        space=space,
        higher_is_better=False,
        headline=True,
        real=kernel_distance(real, reference),
        baseline=kernel_distance(baseline, reference),
        aligned={name: kernel_distance(per_variant[name], reference) for name in adapters},
        change={name: kernel_distance_change(per_variant[name], baseline, reference) for name in adapters},
        counts={"reference": len(reference)},
    )
    distances = {name: frechet_distance(features, reference) for name, features in per_variant.items()}
    frechet = Figure(
        name=f"frechet_distance_{space}",
        label=f"Frechet distance to real images, {label}",
        group="fidelity",
        prompts="captions",
        space=space,
        higher_is_better=False,
        real=_bare(frechet_distance(real, reference), len(real)),
        baseline=_bare(distances[BASELINE], len(baseline)),
        aligned={name: _bare(distances[name], len(baseline)) for name in adapters},
        change={name: _bare(distances[name] - distances[BASELINE], len(baseline)) for name in adapters},
        counts={"reference": len(reference)},
        note="biased at this n, and without an interval: read it beside the real images' value only",
    )
    return [kernel, frechet, *_manifold_figures(space, label, reference, real, per_variant)]


def _manifold_figures(
    space: str, label: str, reference: np.ndarray, real: np.ndarray, per_variant: Mapping[str, np.ndarray]
) -> list[Figure]:
    """Density and coverage, precision and recall; arguments as of :func:`fidelity_figures`."""
    found = {name: manifold(features, reference) for name, features in per_variant.items()}
    floor = manifold(real, reference)

    def row(key: str, text: str, pick: Callable[[Manifold], np.ndarray], *, diverse: bool, headline: bool) -> Figure:
        return _paired(
            name=f"{key}_{space}",
            label=f"{text}, {label}",
            prompts="captions",
            role=None,
            values={name: pick(m) for name, m in found.items()},
            real=pick(floor),
            headline=headline,
            counts={"reference": len(reference)},
            group="diversity" if diverse else "fidelity",
            space=space,
            note=f"balls that reach to the {NEIGHBOURS}th neighbour; depends on both numbers of images",
        )

    return [
        row("density", "Density around real images", lambda m: m.density, diverse=False, headline=True),
        row("coverage", "Coverage of real images", lambda m: m.coverage, diverse=True, headline=True),
        row("precision", "Precision", lambda m: m.precision, diverse=False, headline=False),
        row("recall", "Recall", lambda m: m.recall, diverse=True, headline=False),
    ]


def diversity_figure(
    space: str, label: str, prompts: Sequence[str], per_variant: Mapping[str, np.ndarray], *, headline: bool
) -> Figure:
    """Mean over prompts of the mean cosine distance between a prompt's pictures; the change is aligned / baseline."""
    distances = {name: per_prompt_distance(features, prompts) for name, features in per_variant.items()}
    pairs = {name: paired_distances(distances[name], distances[BASELINE]) for name in _adapters(per_variant)}
    return Figure(
        name=f"diversity_{space}",
        label=f"Distance between pictures of one prompt, {label}",
        group="diversity",
        prompts="grid",
        space=space,
        higher_is_better=True,
        headline=headline,
        baseline=mean_interval(np.array(list(distances[BASELINE].values()))),
        aligned={name: mean_interval(np.array(list(distances[name].values()))) for name in pairs},
        change={name: paired_ratio(aligned, baseline) for name, (aligned, baseline) in pairs.items()},
        change_kind="ratio",
    )


def memorisation_figures(
    space: str, label: str, threshold: float, held_out: np.ndarray, per_variant: Mapping[str, np.ndarray]
) -> list[Figure]:
    """Nearest-training-image similarity, and the share of pictures above what real unseen images reach.

    held_out (M,) and per_variant (N,) hold cosine similarities to the nearest training image, held_out those of real
    images that no threshold was set on; `threshold` is the 99th percentile of other real unseen images.
    """

    def row(key: str, text: str, pick: Callable[[np.ndarray], np.ndarray], headline: bool) -> Figure:
        return _paired(
            name=f"memorisation_{key}_{space}",
            label=f"{text}, {label}",
            prompts=None,
            role=None,
            values={name: pick(similarity) for name, similarity in per_variant.items()},
            real=pick(held_out),
            headline=headline,
            counts={"held_out": len(held_out)},
            group="memorisation",
            space=space,
            higher_is_better=False,
            note=f"threshold {threshold:.4f}: 99th percentile of real images that no generator was trained on",
        )

    return [
        row("share", "Share nearer to a training image than 99 % of unseen real ones", _above(threshold), True),
        row("similarity", "Cosine similarity to the nearest training image", lambda s: s, False),
    ]


def _paired(
    *,
    name: str,
    label: str,
    prompts: PromptSet | None,
    role: Role | None,
    values: Mapping[str, np.ndarray],
    real: np.ndarray | None,
    headline: bool,
    group: Literal["alignment", "memorisation", "fidelity", "diversity"] = "alignment",
    space: str | None = None,
    higher_is_better: bool = True,
    note: str = "",
    table: str = "",
    counts: Mapping[str, int] | None = None,
    kinds: np.ndarray | None = None,
) -> Figure:
    baseline, adapters = values[BASELINE], _adapters(values)
    return Figure(
        name=name,
        label=label,
        group=group,
        role=role,
        prompts=prompts,
        space=space,
        higher_is_better=higher_is_better,
        headline=headline,
        note=note,
        counts=counts or {},
        table=table,
        real=None if real is None else mean_interval(real, kinds=kinds),
        baseline=mean_interval(baseline, kinds=kinds),
        aligned={adapter: mean_interval(values[adapter], kinds=kinds) for adapter in adapters},
        change={adapter: paired_difference(values[adapter], baseline, kinds=kinds) for adapter in adapters},
    )


def _adapters(per_variant: Mapping[str, object]) -> list[str]:
    return [name for name in per_variant if name != BASELINE]


def _all_right(columns: list[int]) -> Callable[[Agreement], np.ndarray]:
    # A prompt that leaves one of the heads undecided gives NaN: it cannot be right on all of them.
    return lambda found: np.where(
        np.isnan(found.matches[:, columns]).any(axis=1), np.nan, found.matches[:, columns].min(axis=1)
    )


def _one_head(index: int) -> Callable[[Agreement], np.ndarray]:
    return lambda found: found.matches[:, index]


def _above(threshold: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda similarity: (similarity > threshold).astype(np.float64)


def _bare(value: float, n: int) -> Estimate:
    return Estimate(value, None, None, n)
