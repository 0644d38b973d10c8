"""Does a model still draw different pictures of one prompt from different noise? Reinforcement learning's usual price.

The figure is the mean cosine distance between the features of all pairs of images of one prompt, the counterpart in a
medical feature space of the intra-prompt LPIPS that text-to-image papers report.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def per_prompt_distance(features: np.ndarray, prompts: Sequence[str]) -> dict[str, float]:
    """prompt -> mean cosine distance in [0, 2] over the pairs of its images.

    `features` is (N, D), row i an image of prompts[i]. A prompt with one image has no pair and is left out.
    Raises ValueError when the counts differ.
    """
    if len(features) != len(prompts):
        raise ValueError(f"{len(features)} feature rows for {len(prompts)} prompts")
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    rows_of: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows_of.setdefault(prompt, []).append(index)
    distances = {}
    for prompt, rows in rows_of.items():
        if len(rows) < 2:
            continue
        cosine = unit[rows] @ unit[rows].T
        upper = np.triu_indices(len(rows), k=1)
        distances[prompt] = float(np.mean(1.0 - cosine[upper]))
    return distances


def paired_distances(aligned: dict[str, float], baseline: dict[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """The distances of the prompts that both models were given, (P,) and (P,) in one order."""
    shared = [prompt for prompt in baseline if prompt in aligned]
    return (
        np.array([aligned[prompt] for prompt in shared]),
        np.array([baseline[prompt] for prompt in shared]),
    )
