"""Is a finding drawn where the prompt puts it? A classifier's evidence, place by place, by occlusion.

A place of the lungs is painted over with clear lung, and what the classifier's logit of the finding loses is the
evidence that the place held (occlusion, Zeiler and Fergus, arXiv 1311.2901). The grey that is painted is the image's
own: a low quantile of both lungs, for a grey square is itself an opacity to a classifier of X-rays.
"""

from collections.abc import Sequence
from typing import Protocol

import cv2
import numpy as np
import torch

from medviz.domains.chest_findings import PlacedHead
from medviz.domains.lung_places import LEVELS, LUNGS, SIDES
from medviz.errors import InputError
from medviz.rewards.classifier import AttributeClassifier

ZONES = tuple(f"{side}_{level}_zone" for side in SIDES for level in LEVELS)
PLACES = (*LUNGS, *ZONES)
CLEAR_QUANTILE = 0.2
"""Of the brightness inside both lungs: what clear lung looks like in this image."""
SOFT_EDGE = 0.02
"""Sigma of the painted edge, as a share of the image's side: a hard edge would be evidence of its own."""
CLAMP = 4.0
"""Logits beyond which more evidence earns nothing more, as in the attribute reward."""


class PlacesNetwork(Protocol):
    """What finds the places in an image."""

    def places(self, images: torch.Tensor) -> list[dict[str, np.ndarray]]:
        """Name -> mask bool (H, W), for each of the images (B, 3, H, W) in [-1, 1]; what was not found is absent."""


def place_evidence(
    classifier: AttributeClassifier, images: torch.Tensor, heads: Sequence[str], anatomy: PlacesNetwork
) -> torch.Tensor:
    """Logits (B, P) that the head of each image loses when a place of PLACES is painted over with clear lung.

    images: (B, 3, H, W) in [-1, 1]; heads: one an image. A row is NaN where not all places were found. Gradients flow
    to the images. Raises InputError for a head that the classifier lacks.
    """
    missing = sorted(set(heads) - set(classifier.heads))
    if missing:
        raise InputError(f"the classifier has no head {', '.join(missing)}; it has {', '.join(classifier.heads)}")
    found = anatomy.places(images.detach())
    columns = [classifier.heads.index(head) for head in heads]
    whole = classifier.logits(images)[range(len(images)), columns]
    rows = []
    for image, column, logit, masks in zip(images, columns, whole, found, strict=True):
        if not all(place in masks for place in PLACES):
            rows.append(torch.full((len(PLACES),), torch.nan, device=images.device))
            continue
        cleared = classifier.logits(torch.stack([_cleared(image, masks, place) for place in PLACES]))
        rows.append(logit - cleared[:, column])
    return torch.stack(rows)


def _cleared(image: torch.Tensor, masks: dict[str, np.ndarray], place: str) -> torch.Tensor:
    lungs = torch.from_numpy(masks[LUNGS[0]] | masks[LUNGS[1]]).to(image.device)
    clear = image.detach()[:, lungs].mean(dim=0).quantile(CLEAR_QUANTILE)
    sigma = SOFT_EDGE * max(image.shape[-2:])
    painted = cv2.GaussianBlur(masks[place].astype(np.float32), (0, 0), sigma)
    share = torch.from_numpy(painted).to(image)
    return image * (1 - share) + clear * share


def placement_margin(evidence: torch.Tensor, placed: PlacedHead) -> torch.Tensor:
    """How much more evidence the named places hold than the others of their size, in logits: (...) of (..., P).

    The others of a zone are the zones of both lungs that were not named; of a lung, the other lung.
    """
    alike = LUNGS if placed.regions[0] in LUNGS else ZONES
    named = [PLACES.index(place) for place in alike if place in placed.regions]
    others = [PLACES.index(place) for place in alike if place not in placed.regions]
    return evidence[..., named].mean(dim=-1) - evidence[..., others].mean(dim=-1)
