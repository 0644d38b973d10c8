"""Pairs of pictures for the generator: an image with an addition, and its twin without it or with it elsewhere."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from medviz.domains import get_domain
from medviz.domains.grammar import Mention
from medviz.errors import InputError
from train import seeding
from train.datasets.counterfactuals.base import Counterfactual, Family
from train.datasets.split import Split

IMAGES_TRIED = 100
"""How many images are tried for a pair before that is an error."""
PLACES_TRIED = 8
"""How often an addition is drawn anew for a twin that shows it at another place."""
WORDINGS = 8
"""Wordings of a caption that are tried or compared."""


@dataclass(frozen=True)
class Pair:
    """An image with an addition (0) and its twin (1), otherwise the same.

    images: uint8 RGB (2, S, S, 3). masks: float32 (2, S, S) in [0, 1], 1 where the addition to that picture is plain;
    0 all over where the twin has none. captions: one a picture. words: the phrases of captions[0] that name the
    addition and its place; at least one.
    """

    attribute: str
    images: np.ndarray
    masks: np.ndarray
    captions: tuple[str, str]
    words: tuple[str, ...]


class _Worded(NamedTuple):
    """Captions with and without an addition, and the phrases of the first that name it."""

    caption: str
    words: tuple[str, ...]
    without: str


class CounterfactualPairs:
    """Draws pairs of a split, each a function of the seed and the pair's number."""

    def __init__(
        self,
        split: Split,
        family: Family,
        shares: Mapping[str, float],
        weights: np.ndarray,
        size_px: int,
        seed: int,
        elsewhere: float = 0.0,
    ) -> None:
        """shares: attribute -> share of all samples that get it; weights (N,): how often each image of the split is
        drawn among those that may take an addition; elsewhere: share of the twins that show the same addition at
        another place, of those that have a place.

        Raises InputError for attributes that the family does not draw or no image takes, and for shares that are not
        above 0 or sum to more than half, which leaves a pasted image no twin.
        """
        if unknown := sorted(set(shares) - set(family.attributes)):
            raise InputError(f"family {family.name!r} draws no {unknown}; it draws {', '.join(family.attributes)}")
        if min(shares.values(), default=1.0) <= 0 or not 0 < sum(shares.values()) <= 0.5:
            raise InputError(f"shares of counterfactuals must be above 0 and sum to 0.5 at most, found {dict(shares)}")
        if not 0 <= elsewhere <= 1:
            raise InputError(f"the share of twins with the addition elsewhere must be in [0, 1], found {elsewhere}")
        self.split, self.family, self.size_px, self.seed = split, family, size_px, seed
        self.elsewhere, self.share = elsewhere, sum(shares.values())
        self.domain = get_domain(split.domain)
        self._names = tuple(shares)
        self._cumulative = np.cumsum(list(shares.values())) / self.share
        self._images: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for name in shares:
            eligible = family.eligible(split, name)
            if weights[eligible].sum() <= 0:
                raise InputError(f"no image of {split.domain} {split.name} may take {name!r}")
            self._images[name] = eligible, weights[eligible] / weights[eligible].sum()

    def count(self, step: int, batch: int) -> int:
        """How many pairs the batch of `step` holds: `share` of its samples in the mean over steps."""
        return int((step + 1) * batch * self.share) - int(step * batch * self.share)

    def draw(self, number: int) -> Pair:
        """The pair `number`. Raises InputError where no image of IMAGES_TRIED takes the addition."""
        rng = seeding.numpy_generator(self.seed, "counterfactual", number)
        attribute = self._names[int(np.searchsorted(self._cumulative, rng.random(), side="right"))]
        eligible, shares = self._images[attribute]
        for _ in range(IMAGES_TRIED):
            index = int(rng.choice(eligible, p=shares))
            added = self.family.add(self.split, index, attribute, rng, self.size_px)
            worded = None if added is None else self._worded(added, rng)
            if added is None or worded is None:
                continue
            twin, mask, twin_caption = added.without, np.zeros_like(added.mask), worded.without
            if added.place and rng.random() < self.elsewhere:
                moved = self._moved(added, index, rng)
                moved_worded = None if moved is None else self._worded(moved, rng)
                if moved is not None and moved_worded is not None:
                    twin, mask, twin_caption = moved.image, moved.mask, moved_worded.caption
            return Pair(
                attribute,
                np.stack([added.image, twin]),
                np.stack([added.mask, mask]),
                (worded.caption, twin_caption),
                worded.words,
            )
        raise InputError(f"none of {IMAGES_TRIED} images of {self.split.domain} {self.split.name} took {attribute!r}")

    def _moved(self, added: Counterfactual, index: int, rng: np.random.Generator) -> Counterfactual | None:
        """The same addition to the same image at another place; None where that fails."""
        for _ in range(PLACES_TRIED):
            moved = self.family.add(self.split, index, added.attribute, rng, self.size_px)
            if moved is not None and moved.place not in ("", added.place):
                return moved
        return None

    def _worded(self, added: Counterfactual, rng: np.random.Generator) -> _Worded | None:
        """Captions of both pictures, worded alike.

        None where no wording of WORDINGS names the addition: captions may pass over what a record says.
        """
        seeds = [int(seed) for seed in rng.integers(2**32, size=WORDINGS)]
        plain = [self.domain.caption(added.without_record, random.Random(seed)) for seed in seeds]
        said = {mention.term for caption in plain for mention in self._mentions(caption)}
        for seed, without in zip(seeds, plain, strict=True):
            caption = self.domain.caption(added.record, random.Random(seed))
            new = [mention for mention in self._mentions(caption) if mention.term not in said]
            if new:
                return _Worded(caption, tuple(dict.fromkeys(caption[m.start : m.end] for m in new)), without)
        return None

    def _mentions(self, caption: str) -> list[Mention]:
        mentions = self.domain.lexicon.read(caption).mentions
        return [mention for mention in mentions if mention.term.groundable and not mention.denied]
