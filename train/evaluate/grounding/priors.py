"""Maps that never see the image: uniform, the training set's mean region of a class or place, and oracles.

An oracle is told the true region's boxes and draws a Gaussian on each: what a map of that form can earn at most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from medviz.domains.chest_findings import UNPLACED
from medviz.domains.lung_places import MEDIASTINUM
from medviz.domains.radiology import PUBLISHED
from medviz.errors import InputError
from medviz.grounding.anatomy import Mask, lung_regions
from medviz.grounding.atlas import SIGMAS_A_SIDE, Atlas, Box, Gaussian
from medviz.grounding.heat_maps import joint_scale
from medviz.results import HeatMap
from train.datasets.grounded_phrases import PhraseSet, dermoscopic_masks, filled
from train.datasets.placed_findings import fit_atlas
from train.datasets.split import Split, boxes
from train.segmenter import split_lungs

SIGMAS_A_PLACE = 3.0
"""A place's Gaussian has its box's side over this as sigma: twice the width of the one that prompts are tuned to, for
that width is the better guess (see the two oracles) and a prior is to be hard to beat."""


@dataclass(frozen=True)
class Priors:
    """What is known before an image is seen, of training images alone.

    regions: name -> mean region, float32 (H, W) in [0, 1]. fitted_on: name -> number of images. atlas: places that
    have no mean region; None where the domain has no places.
    """

    regions: Mapping[str, HeatMap]
    fitted_on: Mapping[str, int]
    atlas: Atlas | None = None

    def of_class(self, phrases: PhraseSet) -> list[HeatMap | None]:
        """The mean region of each phrase's class, stretched to [0, 1]; None where no training image has one."""
        means = {each.name: self.regions.get(each.prior) for each in phrases.classes}
        maps = {name: None if mean is None else joint_scale(mean)[0] for name, mean in means.items()}
        return [maps[each.kind] for each in phrases.phrases]

    def of_place(self, phrases: PhraseSet) -> list[HeatMap | None]:
        """The mean region, or the atlas' Gaussian, of the places that each phrase names, else of its class.

        Raises InputError for a place that the atlas lacks.
        """
        return [
            self._placed(each.places, phrases.size_hw) if each.places else known
            for each, known in zip(phrases.phrases, self.of_class(phrases), strict=True)
        ]

    def _placed(self, places: Iterable[str], size_hw: tuple[int, int]) -> HeatMap:
        heats = []
        for place in places:
            if place in self.regions:
                heats.append(self.regions[place])
            elif self.atlas is None:
                raise InputError(f"no training image has a region for {place}")
            else:
                heats.append(self.atlas.heat((place,), size_hw, spread=SIGMAS_A_SIDE / SIGMAS_A_PLACE))
        return joint_scale(np.max(heats, axis=0))[0]


def uniform(phrases: PhraseSet) -> list[HeatMap]:
    """1 everywhere: what it earns is the region's share of the image."""
    return [np.ones(phrases.size_hw, np.float32) for _ in phrases.phrases]


def oracle(phrases: PhraseSet, sigmas_a_side: float) -> list[HeatMap]:
    """A Gaussian on every box of the true region with sigma = side / `sigmas_a_side`, the greatest counting."""
    return [oracle_map(each.outlines, sigmas_a_side, phrases.size_hw) for each in phrases.phrases]


def oracle_map(outlines: Iterable[Box], sigmas_a_side: float, size_hw: tuple[int, int]) -> HeatMap:
    """See `oracle`: float32 (H, W) in [0, 1]."""
    heats = [
        Gaussian(
            (box.x0 + box.x1) / 2,
            (box.y0 + box.y1) / 2,
            (box.x1 - box.x0) / sigmas_a_side,
            (box.y1 - box.y0) / sigmas_a_side,
        ).heat(size_hw)
        for box in outlines
    ]
    return joint_scale(np.max(heats, axis=0))[0]


@dataclass
class _Means:
    """Running means of masks, by name."""

    sums: dict[str, HeatMap] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, mask: Mask) -> None:
        if mask.any():
            self.sums[name] = self.sums.get(name, np.zeros(mask.shape, np.float32)) + mask
            self.counts[name] = self.counts.get(name, 0) + 1

    def priors(self, atlas: Atlas | None = None) -> Priors:
        means = {name: total / np.float32(self.counts[name]) for name, total in self.sums.items()}
        return Priors(means, dict(self.counts), atlas)


def radiology_priors(split: Split, size_px: int) -> Priors:
    """Lungs, each side, mediastinum and the boxes of every finding; the atlas for all finer places.

    Raises InputError for a split that is not for training.
    """
    atlas, means = fit_atlas(split), _Means()
    for index, record in enumerate(split.records):
        both = split.mask(index, "lung_mask", size_px) if record.get("lung_mask") else None
        if both is not None and both.any():
            sides = split_lungs(both)
            regions = lung_regions(sides == 1, sides == 2).regions
            if {"right_lung", "left_lung"} <= set(regions):
                means.add("lungs", both)
                means.add("right lung", sides == 1)
                means.add("left lung", sides == 2)
            if MEDIASTINUM in regions:
                means.add(MEDIASTINUM, regions[MEDIASTINUM])
        marked: dict[str, list[Box]] = {}
        for box in boxes(record):
            for finding in PUBLISHED.get(str(box["label"]).lower(), ()):
                if finding not in UNPLACED:
                    outline = Box(box["x"], box["y"], box["x"] + box["w"], box["y"] + box["h"])
                    marked.setdefault(finding, []).append(outline)
        for finding, outlines in marked.items():
            means.add(finding, filled(outlines, size_px))
    return means.priors(atlas)


def dermatology_priors(split: Split, size_px: int) -> Priors:
    """The mean mask of the lesion and of every dermoscopic structure. Raises InputError as `radiology_priors`."""
    if split.name != "train":
        raise InputError(f"a prior is fitted on the train split alone, found {split.name!r}")
    means = _Means()
    for kind, (column, _) in dermoscopic_masks().items():
        for index, record in enumerate(split.records):
            mask = split.mask(index, column, size_px) if record.get(column) else None
            if mask is not None:
                means.add(kind, mask)
    return means.priors()


PRIORS: Mapping[str, Callable[[Split, int], Priors]] = {
    "dermatology": dermatology_priors,
    "radiology": radiology_priors,
}
