"""What reward and judge say of one image or of a pair, as rows to be read by a person."""

from collections.abc import Mapping, Sequence

import torch
from PIL import Image

from medviz.domains.base import Domain, ParsedPrompt
from medviz.errors import InputError
from medviz.images import to_tensor
from medviz.results import Role, Score
from medviz.rewards.attribute import attribute_reward, prompt_accuracy, prompt_targets
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.consistency import consistency

JUDGE: Role = "judge"


def score_images(
    classifiers: Mapping[str, AttributeClassifier],
    domain: Domain,
    parsed: ParsedPrompt,
    images: Sequence[Image.Image | torch.Tensor],
) -> list[Score]:
    """Score one image, or a pair (baseline, aligned), against a prompt.

    classifiers: role -> network; "judge" is the judge, every other name a reward. images: PIL, or tensors (3, H, W) in
    [-1, 1]. A classifier gives the share of what was asked that it finds as asked, the mean margin in [-1, 1], that of
    each part of a report where the domain's prompts have parts, and the probability of every head the prompt decides;
    of heads that exclude each other only the one asked for. Rewards come first. Raises InputError unless there are one
    or two images.
    """
    if len(images) not in (1, 2):
        raise InputError(f"one image or a pair can be scored, got {len(images)}")
    pixels = [image if isinstance(image, torch.Tensor) else to_tensor(image) for image in images]
    ordered = sorted(classifiers.items(), key=lambda item: item[0] == JUDGE)
    return [
        score
        for role, classifier in ordered
        for score in _scores(JUDGE if role == JUDGE else "reward", classifier, domain, parsed, pixels)
    ]


def score_pair(
    classifiers: Mapping[str, AttributeClassifier],
    domain: Domain,
    parsed: ParsedPrompt,
    baseline: Image.Image | torch.Tensor,
    aligned: Image.Image | torch.Tensor,
) -> list[Score]:
    """Score a baseline image and the aligned one of the same noise; see `score_images`."""
    return score_images(classifiers, domain, parsed, [baseline, aligned])


def _scores(
    role: Role,
    classifier: AttributeClassifier,
    domain: Domain,
    parsed: ParsedPrompt,
    pixels: Sequence[torch.Tensor],
) -> list[Score]:
    with torch.no_grad():
        # The two may differ in size, so they are not stacked.
        logits = torch.cat([classifier.logits(image[None]) for image in pixels]).cpu()
    targets, mask = prompt_targets([parsed] * len(pixels), classifier.heads)
    thresholds = classifier.thresholds
    rows = {
        "Prompt accuracy": prompt_accuracy(logits, targets, mask, thresholds),
        "Attribute margin": attribute_reward(logits, targets, mask, thresholds=thresholds),
    }
    parts = consistency(logits, targets, mask, thresholds, classifier.heads, domain.aspects)
    rows |= {f"{part.capitalize()} consistency": values for part, values in parts.items() if not values.isnan().all()}
    asked = {head for head, target in parsed.targets.items() if target >= 0.5}
    for index, name in enumerate(classifier.heads):
        head = domain.head(name)
        if name in asked:
            rows[head.label] = torch.sigmoid(logits[:, index])
        elif name in parsed.targets and head.group is None:
            rows[_denied(head.label)] = torch.sigmoid(-logits[:, index])
    return [Score(name, role, _figure(values, 0), _figure(values, 1)) for name, values in rows.items()]


def _denied(label: str) -> str:
    """ "Hair" as "No hair", "PA view" as "No PA view", "No finding" as "Some finding"."""
    if label.startswith("No "):
        return f"Some {label[3:]}"
    return f"No {label if label[:2].isupper() else label[0].lower() + label[1:]}"


def _figure(values: torch.Tensor, index: int) -> float | None:
    if index >= len(values) or not bool(torch.isfinite(values[index])):
        return None
    return float(values[index])
