"""What one model's pictures measure, prompt by prompt, so that figures over several training runs can be made later.

The same prompts, seeds, captions and real images for every model; what is kept is small JSON, no picture, no feature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medviz.audit.memorisation import held_out_threshold, nearest_similarity
from medviz.domains import Domain, ParsedPrompt
from medviz.rewards.classifier import AttributeClassifier
from train.calibration import CALIBRATION_BINS
from train.evaluate.alignment import Agreement, agreement, balanced, target_matrix
from train.evaluate.diversity import per_prompt_distance
from train.evaluate.features import FeatureSpace
from train.evaluate.fidelity import distance_and_halves, frechet_distance
from train.evaluate.generated import Request
from train.evaluate.measure import PromptSet, Readings, Role
from train.evaluate.real import RealImages
from train.evaluate.stage import readings
from train.experiments.pieces import plain
from train.experiments.subgroups import DISEASES


@dataclass(frozen=True)
class Eyes:
    """All that looks at pictures, opened once.

    spaces: feature spaces, the one that no generator was trained or chosen with first, the judge's second; reference:
    by space, features (M, D) of real images that share no lesion or patient with those whose captions are drawn;
    training: features of the training images in the first space; threshold: the similarity to the nearest of them
    that 1 % of the reference exceeds. subset: heads that must all be right at once (APR).
    """

    domain: Domain
    classifiers: Mapping[Role, AttributeClassifier]
    spaces: tuple[FeatureSpace, ...]
    requests: Mapping[PromptSet, Request]
    seeds_per_prompt: int
    real: RealImages
    reference: Mapping[str, np.ndarray]
    training: np.ndarray
    threshold: float
    subset: tuple[str, ...]
    device: str


def threshold_of(reference: np.ndarray, training: np.ndarray) -> float:
    """Cosine similarity to the nearest of `training` (M, D) that 1 % of `reference` (N, D) exceeds."""
    return held_out_threshold(nearest_similarity(reference, training))


def measure(eyes: Eyes, pictures: Mapping[PromptSet, np.ndarray]) -> dict[str, Any]:
    """JSON of what pictures uint8 (N, H, W, 3) of each prompt set measure; real images have captions alone.

    units: figure -> one value a prompt, the mean over its pictures, null where the prompt leaves it undecided.
    calibration: prompt set -> excess (U, bins) and counts (U,) of `crossed.calibration_error`. kernel: space -> value
    and its values on half-samples. frechet: space -> value. spaces: space -> how a reader sees it, the independent
    first.
    """
    found: dict[str, Any] = {"units": {}, "calibration": {}, "kernel": {}, "frechet": {}}
    found["spaces"] = {space.name: space.description for space in eyes.spaces}
    for kind, images in pictures.items():
        parsed = _parsed(eyes.domain, eyes.requests[kind].prompts)
        each = eyes.seeds_per_prompt if kind == "grid" else 1
        for role, classifier in eyes.classifiers.items():
            read = readings(classifier, images, parsed, eyes.device)
            targets = [prompt.targets for prompt in parsed]
            values = aligned_values(eyes, classifier, targets, read)
            found["units"] |= {f"{role}_{name}_{kind}": per_prompt(v, each) for name, v in values.items()}
            if role == "judge":
                wanted = target_matrix(targets, classifier.heads)
                excess, counts = calibration_sums(read.probabilities, wanted, each)
                found["calibration"][kind] = {"excess": excess.tolist(), "counts": counts.tolist()}
    for space in eyes.spaces:
        _in_space(eyes, space, pictures, found)
    return found


def aligned_values(
    eyes: Eyes, classifier: AttributeClassifier, targets: Sequence[Mapping[str, float]], read: Readings
) -> dict[str, np.ndarray]:
    """Figure -> one value a picture (N,), NaN where its prompt leaves it undecided; means are the figures."""
    heads = classifier.heads
    found = agreement(read.probabilities, targets, heads, classifier.thresholds)
    wanted = target_matrix(targets, heads)
    values = {"accuracy": found.mean, "margin": read.margins, "complete": found.complete}
    if eyes.subset and set(eyes.subset) <= set(heads):
        values["apr"] = _all_right(found, eyes.subset)
    values |= {f"head_{h}": balanced(found.of_head(h), wanted[:, i]) for i, h in enumerate(heads)}
    diseases = [head.name for head in eyes.domain.heads if head.group == DISEASES and head.name in heads]
    if len(diseases) > 1:
        values["disease"] = likeliest_is_asked(read.probabilities, wanted, [heads.index(head) for head in diseases])
    return values


def likeliest_is_asked(probabilities: np.ndarray, wanted: np.ndarray, columns: Sequence[int]) -> np.ndarray:
    """(N,) 1.0 where the likeliest of the heads `columns` is the one asked for, NaN where none of them is.

    probabilities, wanted: (N, K).
    """
    chosen, asked = probabilities[:, columns], wanted[:, columns] >= 0.5
    right = chosen.argmax(axis=1) == asked.argmax(axis=1)
    return np.where(asked.sum(axis=1) == 1, right.astype(np.float64), np.nan)


def calibration_sums(probabilities: np.ndarray, wanted: np.ndarray, each: int) -> tuple[np.ndarray, np.ndarray]:
    """(excess (U, bins), counts (U,)) of the decided heads, summed over the `each` pictures of a prompt.

    probabilities, wanted: (N, K), wanted NaN where undecided, N = U x each in prompt order.
    """
    edges = np.linspace(0.0, 1.0, CALIBRATION_BINS + 1)[1:-1]
    decided = ~np.isnan(wanted)
    gap = np.where(decided, (wanted >= 0.5) - probabilities, 0.0)
    in_bin = np.digitize(probabilities, edges)[..., None] == np.arange(CALIBRATION_BINS)
    excess = (gap[..., None] * in_bin).sum(axis=1)
    units = len(probabilities) // each
    return (
        excess.reshape(units, each, CALIBRATION_BINS).sum(axis=1),
        decided.sum(axis=1).reshape(units, each).sum(axis=1).astype(np.float64),
    )


def per_prompt(values: np.ndarray, each: int) -> list[float | None]:
    """Means over the `each` pictures of a prompt of values (U x each,); null where the prompt decides nothing."""
    return plain(values.reshape(-1, each).mean(axis=1))


def _in_space(eyes: Eyes, space: FeatureSpace, pictures: Mapping[PromptSet, np.ndarray], found: dict[str, Any]) -> None:
    reference = eyes.reference[space.name]
    features = {kind: space.embed(images, device=eyes.device) for kind, images in pictures.items()}
    value, halves = distance_and_halves(features["captions"], reference)
    found["kernel"][space.name] = {"value": value, "halves": halves.tolist(), "n": len(features["captions"])}
    found["frechet"][space.name] = frechet_distance(features["captions"], reference)
    if "grid" in features:
        prompts = eyes.requests["grid"].prompts
        found["units"][f"diversity_{space.name}"] = plain(per_prompt_distance(features["grid"], prompts).values())
    if space is eyes.spaces[0]:
        similarity = nearest_similarity(features["captions"], eyes.training).similarity
        found["units"][f"memorisation_share_{space.name}"] = plain(similarity > eyes.threshold)
        found["units"][f"memorisation_similarity_{space.name}"] = plain(similarity)


def _parsed(domain: Domain, prompts: Sequence[str]) -> list[ParsedPrompt]:
    once = {prompt: domain.parse(prompt) for prompt in dict.fromkeys(prompts)}
    return [once[prompt] for prompt in prompts]


def _all_right(found: Agreement, heads: Sequence[str]) -> np.ndarray:
    each = np.stack([found.of_head(head) for head in heads], axis=1)
    # min is NaN where one is: a prompt that leaves one of the heads undecided cannot be right on all of them.
    return each.min(axis=1)
