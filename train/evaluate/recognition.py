"""Every class as often as any other: what the judge recognises, and what it takes a picture for instead.

Captions drawn as real images come hold a dermatofibroma or two in hundreds. Here every head that the judge has gets the
same number of real records, as far as there are as many, and each record's caption is drawn once: the judge is asked
the same of the pictures and of the records' own images.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import logit

from medviz.domains import Domain, ParsedPrompt
from train import seeding

WORDINGS = 20
"""Captions of a record that are tried before it counts as one that no caption asks for its head."""


def class_records(
    domain: Domain, records: Sequence[Mapping[str, object]], heads: Sequence[str], per_head: int, seed: int
) -> tuple[list[int], list[str]]:
    """(indices, captions) of records: for each of `heads` up to `per_head` that have it and whose caption says so.

    A record stands for one head. Heads with the fewest records choose first, in an order drawn from the seed.
    """
    having = {head: [i for i, r in enumerate(records) if domain.labels(r).get(head, 0.0) >= 0.5] for head in heads}
    chosen: dict[int, str] = {}
    for head in sorted(heads, key=lambda head: len(having[head])):
        found = 0
        for i in seeding.numpy_generator(seed, "evaluate", f"class-{head}").permutation(having[head]).tolist():
            if found == per_head:
                break
            if i in chosen or (caption := _caption_with(domain, records[i], head, seed, i)) is None:
                continue
            chosen[i] = caption
            found += 1
    indices = sorted(chosen)
    return indices, [chosen[i] for i in indices]


def _caption_with(domain: Domain, record: Mapping[str, object], head: str, seed: int, index: int) -> str | None:
    for attempt in range(WORDINGS):
        rng = random.Random(seeding.key(seed, "evaluate", "class-words", index, attempt))
        caption = domain.caption(record, rng)
        if domain.parse(caption).targets.get(head) == 1.0:
            return caption
    return None


def taken_for(
    heads: Sequence[str], thresholds: Mapping[str, float], members: Sequence[str], probabilities: np.ndarray
) -> list[str]:
    """Which of `members`, heads that exclude each other, each image is taken for.

    probabilities (N, K) of `heads`. It is the one farthest above its own threshold in logits: heads of rare classes
    have low thresholds, and the greatest probability alone would mostly be the frequent class's.
    """
    columns = [list(heads).index(member) for member in members]
    cut = np.array([thresholds.get(member, 0.5) for member in members])
    margins = logit(np.clip(probabilities[:, columns], 1e-6, 1 - 1e-6)) - logit(cut)
    return [members[i] for i in margins.argmax(axis=1)]


def confusions(
    domain: Domain,
    heads: Sequence[str],
    thresholds: Mapping[str, float],
    parsed: Sequence[ParsedPrompt],
    per_variant: Mapping[str, np.ndarray],
) -> list[dict[str, Any]]:
    """A table a group of heads that exclude each other, for each variant, real images among them.

    per_variant: probabilities (N, K) of `heads` for the pictures of N prompts. Counts are by row, what one prompt asked
    for, and column, what its picture was taken for; prompts that ask for none or several of the group are left out.
    """
    groups: dict[str, list[str]] = {}
    for head in domain.heads:
        if head.group and head.name in heads:
            groups.setdefault(head.group, []).append(head.name)
    found = []
    for group, members in groups.items():
        asked = [[m for m in members if prompt.targets.get(m) == 1.0] for prompt in parsed]
        rows = [row for row, wanted in enumerate(asked) if len(wanted) == 1]
        if len(members) < 2 or not rows:
            continue
        counts = {}
        for name, probabilities in per_variant.items():
            table = np.zeros((len(members), len(members)), dtype=int)
            for row, taken in zip(rows, taken_for(heads, thresholds, members, probabilities[rows]), strict=True):
                table[members.index(asked[row][0]), members.index(taken)] += 1
            counts[name] = table.tolist()
        found.append({"group": group, "heads": members, "counts": counts})
    return found
