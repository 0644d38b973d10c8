"""Does the image show what the prompt says? The attribute reward of RL4Med-DDPO (arXiv 2503.15784) and what follows it.

The paper's reward counts heads whose thresholded answer equals the prompt: seven levels, no gradient, and many prompts
whose images all score the same. The continuous one measures how far on the right side of its threshold each head lies.
"""

from collections.abc import Mapping, Sequence

import torch

from medviz.domains.base import ParsedPrompt

Thresholds = torch.Tensor | Sequence[float] | Mapping[str, float]
"""Calibrated probabilities in (0, 1), one a head, in the order of the logits' columns."""


def prompt_targets(parsed: Sequence[ParsedPrompt], heads: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """What prompts ask of a classifier's heads: targets float32 (B, K) in [0, 1] and mask bool (B, K).

    The mask is False where a prompt leaves a head undecided; the target there is 0 and means nothing.
    """
    mask = torch.tensor([[head in prompt.targets for head in heads] for prompt in parsed], dtype=torch.bool)
    targets = torch.tensor([[prompt.targets.get(head, 0.0) for head in heads] for prompt in parsed])
    shape = (len(parsed), len(heads))
    return targets.float().reshape(shape), mask.reshape(shape)


def attribute_reward_paper(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, thresholds: Thresholds
) -> torch.Tensor:
    """Share of the decided heads whose thresholded prediction equals the prompt (arXiv 2503.15784): (B,) in [0, 1].

    logits, targets, mask: (B, K). NaN where a prompt decides no head.
    """
    targets, mask = targets.to(logits), mask.to(logits.device)
    matches = (logits >= _cuts(thresholds, logits)) == (targets >= 0.5)
    return _masked_mean(matches.to(logits.dtype), mask)


def attribute_reward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    clamp: float = 4.0,
    thresholds: Thresholds | None = None,
) -> torch.Tensor:
    """Mean signed margin of the decided heads, each clamped to +-clamp and divided by it: (B,) in [-1, 1].

    The margin of a head is its logit minus the logit of its threshold (0 without thresholds, which is a probability of
    one half), positive where the head agrees with the prompt. The clamp keeps one very sure head from outweighing all
    others, and gives nothing for being surer than sure. logits, targets, mask: (B, K). NaN where no head is decided.
    """
    targets, mask = targets.to(logits), mask.to(logits.device)
    margins = logits if thresholds is None else logits - _cuts(thresholds, logits)
    signed = (2.0 * targets - 1.0) * margins
    return _masked_mean(signed.clamp(-clamp, clamp) / clamp, mask)


def prompt_accuracy(
    logits: torch.Tensor, targets: torch.Tensor, mask: torch.Tensor, thresholds: Thresholds
) -> torch.Tensor:
    """Share of what was asked that the classifier finds as asked: (B,) in [0, 1]; the paper's reward as a figure."""
    return attribute_reward_paper(logits, targets, mask, thresholds)


def _cuts(thresholds: Thresholds, logits: torch.Tensor) -> torch.Tensor:
    values = list(thresholds.values()) if isinstance(thresholds, Mapping) else thresholds
    return torch.logit(torch.as_tensor(values, dtype=torch.float64)).to(logits)


def _masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the masked-in heads, NaN without any; a head outside the mask counts for nothing even if it is NaN."""
    mask = mask.bool()
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum(dim=1) / mask.sum(dim=1)
