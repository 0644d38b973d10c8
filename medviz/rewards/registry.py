"""The rewards a generator can be aligned with: one function and one entry in REWARDS each, all of one signature."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch

from medviz.domains.base import ParsedPrompt
from medviz.domains.chest_findings import placed_head
from medviz.errors import InputError, MedvizError
from medviz.rewards.attribute import attribute_reward, attribute_reward_paper, prompt_targets
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.consistency import REPORT, consistency
from medviz.rewards.likeness import Likeness
from medviz.rewards.placement import CLAMP, PlacesNetwork, place_evidence, placement_margin

logger = logging.getLogger(__name__)


class AnatomyNetwork(PlacesNetwork, Protocol):
    """What the rewards that look at anatomy need of a segmenter."""

    classes: tuple[str, ...]

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Class probabilities (B, C, h, w) of images (B, 3, H, W) in [-1, 1]; class 0 is the background."""


class TextImageNetwork(Protocol):
    """What the alignment reward needs of a contrastive model."""

    def similarity(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Cosine (B,) in [-1, 1] of images (B, 3, H, W) in [-1, 1] with their prompts."""


@dataclass(frozen=True)
class Drawn:
    """B images and what a reward may look at beside them.

    images: (B, 3, H, W) in [-1, 1]. prompts: what was asked of each. classifier: the reward network, never the judge.
    anatomy: the segmenter, alignment: the contrastive model, likeness: real images and the policy's own, aspects: which
    heads belong to which part of a report (`Domain.aspects`), each for rewards that need it.
    """

    images: torch.Tensor
    prompts: tuple[ParsedPrompt, ...]
    classifier: AttributeClassifier | None = None
    anatomy: AnatomyNetwork | None = None
    alignment: TextImageNetwork | None = None
    likeness: Likeness | None = None
    aspects: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompts)

    def one(self, index: int) -> "Drawn":
        """The image at `index` alone."""
        return replace(self, images=self.images[index : index + 1], prompts=self.prompts[index : index + 1])


RewardFunction = Callable[[Drawn], torch.Tensor]
"""Drawn -> rewards (B,), higher is better; NaN where an image cannot be rewarded."""


def attribute(drawn: Drawn) -> torch.Tensor:
    """The continuous attribute reward, in [-1, 1]."""
    classifier = _classifier(drawn, "attribute")
    targets, mask = prompt_targets(drawn.prompts, classifier.heads)
    return attribute_reward(classifier.logits(drawn.images), targets, mask, thresholds=classifier.thresholds)


def attribute_paper(drawn: Drawn) -> torch.Tensor:
    """The attribute reward of RL4Med-DDPO (arXiv 2503.15784), in [0, 1] with few levels."""
    classifier = _classifier(drawn, "attribute_paper")
    targets, mask = prompt_targets(drawn.prompts, classifier.heads)
    return attribute_reward_paper(classifier.logits(drawn.images), targets, mask, classifier.thresholds)


def anatomy(drawn: Drawn) -> torch.Tensor:
    """How surely the image holds each structure the segmenter knows, in [-1, 1]; needs no word of the prompt.

    Mean, over the structures, of the mean probability inside the structure's own mask; 0 for one that is not there.
    Raises InputError without a segmenter.
    """
    if drawn.anatomy is None:
        raise InputError("the anatomy reward needs a segmenter")
    probabilities = drawn.anatomy.probabilities(drawn.images)
    inside = torch.nn.functional.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).movedim(-1, 1)
    sure = (probabilities * inside).sum(dim=(2, 3)) / inside.sum(dim=(2, 3)).clamp(min=1)
    return 2.0 * sure[:, 1:].mean(dim=1) - 1.0


def placement(drawn: Drawn) -> torch.Tensor:
    """Whether the finding that a prompt places on one side is seen there rather than elsewhere, in [-1, 1].

    :func:`medviz.rewards.placement.placement_margin`, clamped; 0 for a prompt that places none, NaN where the lungs
    were not found. Raises InputError without a segmenter or a classifier.
    """
    if drawn.anatomy is None:
        raise InputError("the placement reward needs a segmenter")
    classifier = _classifier(drawn, "placement")
    placed = [placed_head(parsed) for parsed in drawn.prompts]
    rows = [row for row, each in enumerate(placed) if each is not None]
    rewards = 0.0 * drawn.images[:, 0, 0, 0].float()  # a gradient of zero, where no prompt of a batch places anything
    if not rows:
        return rewards
    asked = [each for each in placed if each is not None]
    evidence = place_evidence(classifier, drawn.images[rows], [each.head for each in asked], drawn.anatomy)
    margins = torch.stack([placement_margin(row, each) for row, each in zip(evidence, asked, strict=True)])
    return rewards.index_put((torch.tensor(rows, device=rewards.device),), margins.clamp(-CLAMP, CLAMP) / CLAMP)


def alignment(drawn: Drawn) -> torch.Tensor:
    """Cosine of image and prompt in the contrastive model's space, in [-1, 1]. Raises InputError without that model."""
    if drawn.alignment is None:
        raise InputError("the alignment reward needs a contrastive model")
    return drawn.alignment.similarity(drawn.images, [parsed.prompt for parsed in drawn.prompts])


def likeness(drawn: Drawn) -> torch.Tensor:
    """How much more like real images than like the policy's, in [-1, 1]. Raises InputError without either."""
    if drawn.likeness is None:
        raise InputError("the likeness reward needs real images and the policy's own")
    return drawn.likeness.witness(drawn.images)


def report_consistency(aspect: str, drawn: Drawn) -> torch.Tensor:
    """One row of :func:`medviz.rewards.consistency.consistency`, in [-1, 1]; NaN where the prompt says nothing of it.

    Raises InputError for an aspect that the domain's heads do not have.
    """
    classifier = _classifier(drawn, f"{aspect}_consistency")
    targets, mask = prompt_targets(drawn.prompts, classifier.heads)
    logits, thresholds = classifier.logits(drawn.images), classifier.thresholds
    rows = consistency(logits, targets, mask, thresholds, classifier.heads, drawn.aspects)
    if aspect not in rows:
        raise InputError(f"this domain's reports have no part {aspect!r}; they have {', '.join(rows) or 'none'}")
    return rows[aspect]


def _classifier(drawn: Drawn, reward: str) -> AttributeClassifier:
    if drawn.classifier is None:
        raise InputError(f"the reward {reward} needs an attribute classifier")
    return drawn.classifier


REWARDS: Mapping[str, RewardFunction] = {
    "attribute": attribute,
    "attribute_paper": attribute_paper,
    "anatomy": anatomy,
    "placement": placement,
    "alignment": alignment,
    "likeness": likeness,
    "view_consistency": partial(report_consistency, "view"),
    "finding_consistency": partial(report_consistency, "finding"),
    "report_consistency": partial(report_consistency, REPORT),
}

STEPPED = frozenset({"attribute_paper"})
"""Rewards that count: they have no gradient, and only methods that need none can learn from them."""


def get_reward(name: str) -> RewardFunction:
    """The reward called `name`. Raises InputError naming the rewards there are."""
    if name not in REWARDS:
        raise InputError(f"unknown reward {name!r}; allowed: {', '.join(REWARDS)}")
    return REWARDS[name]


@dataclass(frozen=True)
class SafeRewards:
    """values float32 (B,), 0 where not valid; valid bool (B,); failures: what went wrong, each message once."""

    values: torch.Tensor
    valid: torch.Tensor
    failures: tuple[str, ...]


# What a reward may raise on an image it cannot read. Anything else (no memory, an interrupt) ends the run.
_FAILURES = (MedvizError, ArithmeticError, LookupError, OSError, RuntimeError, TypeError, ValueError)


def safe_rewards(reward: RewardFunction, drawn: Drawn) -> SafeRewards:
    """The rewards of a batch, without gradients; an image on which `reward` raises or is not finite is masked.

    Where the batch as a whole fails, its images are tried one by one, so that one bad image costs no other its reward.
    """
    failures: list[str] = []
    with torch.no_grad():
        try:
            values = _rewarded(reward, drawn)
        except _FAILURES as error:
            alone = len(drawn) == 1
            values, failures = (_nothing(drawn), [repr(error)]) if alone else _one_by_one(reward, drawn)
    valid = torch.isfinite(values)
    if not bool(valid.all()):
        failures = failures or ["the reward is not a finite number"]
        logger.warning("%d of %d images have no reward: %s", int((~valid).sum()), len(drawn), "; ".join(failures))
    return SafeRewards(torch.where(valid, values, torch.zeros_like(values)), valid, tuple(dict.fromkeys(failures)))


def _rewarded(reward: RewardFunction, drawn: Drawn) -> torch.Tensor:
    values = reward(drawn).detach().float()
    if values.shape != (len(drawn),):
        raise ValueError(f"a reward must have the shape ({len(drawn)},), got {tuple(values.shape)}")
    return values


def _one_by_one(reward: RewardFunction, drawn: Drawn) -> tuple[torch.Tensor, list[str]]:
    values, failures = _nothing(drawn), []
    for index in range(len(drawn)):
        try:
            values[index] = _rewarded(reward, drawn.one(index))[0]
        except _FAILURES as error:
            failures.append(repr(error))
    return values, failures


def _nothing(drawn: Drawn) -> torch.Tensor:
    return torch.full((len(drawn),), float("nan"), device=drawn.images.device)
