"""Is an image consistent with each part of its report? Chest X-rays: CXRL (arXiv 2403.06516), reported separately.

The paper rewards posture, diagnosis and the report as a whole. Here each part is the mean margin of the classifier
heads that belong to it; which do, a domain says (`Domain.aspects`): posture is its view, diagnosis its findings.
"""

from collections.abc import Mapping, Sequence

import torch

from medviz.rewards.attribute import Thresholds, attribute_reward

REPORT = "report"


def consistency(
    logits: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor,
    thresholds: Thresholds,
    heads: Sequence[str],
    aspects: Mapping[str, Sequence[str]],
) -> dict[str, torch.Tensor]:
    """Aspect -> (B,) in [-1, 1], NaN where the prompt decides none of its heads; and "report", the mean over aspects.

    logits, targets, mask: (B, K), columns in the order of `heads`. aspects: aspect -> its heads; heads that the
    classifier lacks are left out, and an aspect without any is absent. In the report each aspect that the prompt speaks
    of weighs alike, so that one view is not outvoted by eleven findings. Empty where there are no aspects.
    """
    rows: dict[str, torch.Tensor] = {}
    for aspect, mine in aspects.items():
        belongs = torch.tensor([head in mine for head in heads], dtype=torch.bool, device=mask.device)
        if bool(belongs.any()):
            rows[aspect] = attribute_reward(logits, targets, mask & belongs, thresholds=thresholds)
    if rows:
        rows[REPORT] = torch.stack(list(rows.values())).nanmean(dim=0)
    return rows
