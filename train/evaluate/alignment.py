"""Does the picture show what the prompt says, by the head of a classifier: accuracy a head, overall, and all at once.

The same arithmetic serves the judge (held out, the figure that counts) and the reward (trained on, reported beside
it: where the reward rises and the judge does not, the reward was gamed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Agreement:
    """What a classifier said of N images against what their N prompts asked for.

    matches: (N, K) 1.0 where the thresholded prediction equals the prompt's target, 0.0 where not, NaN where the
    prompt leaves the head undecided. mean: (N,) share of matching decided heads. complete: (N,) 1.0 where every
    decided head matches (the paper's APR, artefact prevalence rate, over all decided heads).
    """

    heads: tuple[str, ...]
    matches: np.ndarray
    mean: np.ndarray
    complete: np.ndarray

    def of_head(self, head: str) -> np.ndarray:
        """(N,) matches of one head."""
        return self.matches[:, self.heads.index(head)]


def target_matrix(targets: Sequence[Mapping[str, float]], heads: Sequence[str]) -> np.ndarray:
    """(N, K) targets in the order of `heads`, NaN where a prompt leaves the head undecided."""
    return np.array([[target.get(head, np.nan) for head in heads] for target in targets], dtype=np.float64)


def agreement(
    probabilities: np.ndarray,
    targets: Sequence[Mapping[str, float]],
    heads: Sequence[str],
    thresholds: Mapping[str, float],
) -> Agreement:
    """Compare probabilities (N, K) in [0, 1] with the targets that N prompts decide.

    A head without a threshold is cut at 0.5. Raises ValueError when the shapes do not belong together.
    """
    if probabilities.shape != (len(targets), len(heads)):
        raise ValueError(f"probabilities {probabilities.shape} for {len(targets)} prompts and {len(heads)} heads")
    wanted = target_matrix(targets, heads)
    cut = np.array([thresholds.get(head, 0.5) for head in heads])
    matches = np.where(np.isnan(wanted), np.nan, ((probabilities >= cut) == (wanted >= 0.5)).astype(np.float64))
    decided = ~np.isnan(matches)
    count = decided.sum(axis=1)
    hits = np.where(decided, matches, 0.0).sum(axis=1)
    mean = np.where(count > 0, hits / np.maximum(count, 1), np.nan)
    complete = np.where(count > 0, (hits == count).astype(np.float64), np.nan)
    return Agreement(tuple(heads), matches, mean, complete)


def balanced(matches: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Matches weighted so that their mean is the balanced accuracy: half from where the prompt asks for the head, half
    from where it asks for its absence.

    matches and wanted are (N,), NaN where undecided; where only one of the two kinds occurs the matches come back as
    they are. Plain accuracy of a rare head is high for a model that never draws it; this one is then 0.5.
    """
    asked, refused = wanted >= 0.5, wanted < 0.5
    if not asked.any() or not refused.any():
        return matches
    decided = int(asked.sum() + refused.sum())
    weight = np.where(asked, decided / (2.0 * asked.sum()), decided / (2.0 * refused.sum()))
    return matches * weight
