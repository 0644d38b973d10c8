"""What the studio is asked and what it hands back: typed, frozen, readable without any model in memory."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HeatMap = NDArray[np.float32]
Mask = NDArray[np.bool_]
Role = Literal["reward", "judge"]

TABLES_NAME = "tables.md"  # beside the reports: the README's tables of results, for the app


@dataclass(frozen=True)
class Request:
    """A comparison whose every value was checked. adapter: a name of the domain's, None for the baseline."""

    domain: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    adapter: str | None


@dataclass(frozen=True, eq=False)
class Preview:
    """One denoising step of a running comparison.

    step counts from 1 to steps; images: the model's guess of the finished pictures (baseline, aligned) at this step,
    PIL RGB; None at most steps, because decoding takes time.
    """

    step: int
    steps: int
    images: tuple[Image.Image, Image.Image] | None


@dataclass(frozen=True)
class Score:
    """One figure of one classifier.

    name: what it measures. role: whether the classifier took part in alignment ("reward") or was held out ("judge").
    baseline, aligned: of the two images; of a single image it stands under `baseline` and `aligned` is None. None also
    where the prompt asks for nothing the classifier knows.
    """

    name: str
    role: Role
    baseline: float | None
    aligned: float | None
    higher_is_better: bool = True


@dataclass(frozen=True)
class RegionAttention:
    """How much of a word's attention fell on one region of either image.

    mass: share of the heat map's sum inside the region, 0 to 1. cnr: contrast to noise ratio, inside against outside.
    None where the region was not found or the figure is not defined.
    """

    name: str
    baseline_mass: float | None
    aligned_mass: float | None
    baseline_cnr: float | None
    aligned_cnr: float | None


@dataclass(frozen=True, eq=False)
class WordAttention:
    """Where one word looked. baseline, aligned: float32 (H, W) in [0, 1] on one scale for the pair."""

    word: str
    baseline: HeatMap
    aligned: HeatMap
    regions: tuple[RegionAttention, ...]

    def report(self) -> dict[str, Any]:
        """Return the JSON of /attention."""
        return {"word": self.word, "regions": [dict(vars(region)) for region in self.regions]}


@dataclass(frozen=True, eq=False)
class Drawing:
    """One generated image (PIL RGB, unlabelled) and the region masks, bool (H, W), found on it."""

    image: Image.Image
    outlines: Mapping[str, Mask] = field(repr=False)

    def copy(self) -> "Drawing":
        """Return an equal drawing with an image and masks of its own."""
        return Drawing(self.image.copy(), {name: mask.copy() for name, mask in self.outlines.items()})


@dataclass(frozen=True, eq=False)
class Pair:
    """Baseline and aligned images of one request, from the same noise, with everything measured on them.

    adapter: the adapter's resolved name, None when the baseline stands on both sides. guidance_scale as used.
    models: what drew and judged, per role. words: content words of the prompt that attention was kept for.
    """

    domain: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    adapter: str | None
    models: Mapping[str, Any]
    words: tuple[str, ...]
    baseline: Drawing
    aligned: Drawing
    scores: tuple[Score, ...]
    warnings: tuple[str, ...]
    timings_s: Mapping[str, float]
    look_up: Callable[[str], WordAttention] = field(repr=False, compare=False)

    def copy(self) -> "Pair":
        """Return an equal pair that shares nothing with this one that a caller could change."""
        return replace(
            self,
            models=deepcopy(self.models),
            baseline=self.baseline.copy(),
            aligned=self.aligned.copy(),
            timings_s=dict(self.timings_s),
        )

    @property
    def outlines(self) -> dict[str, Mapping[str, Mask]]:
        """Region masks of both images: {"baseline": {region: bool (H, W)}, "aligned": {...}}."""
        return {"baseline": self.baseline.outlines, "aligned": self.aligned.outlines}

    def attention(self, word: str) -> WordAttention:
        """Return where a word or phrase of the prompt looked; InputError when the prompt does not hold it."""
        return self.look_up(word)

    def report(self) -> dict[str, Any]:
        """Return the JSON of /compare."""
        return {
            "domain": self.domain,
            "prompt": self.prompt,
            "seed": self.seed,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "adapter": self.adapter or "none",
            "models": dict(self.models),
            "words": list(self.words),
            "scores": [dict(vars(score)) for score in self.scores],
            "warnings": list(self.warnings),
            "timings_s": dict(self.timings_s),
        }


@dataclass(frozen=True, eq=False)
class Grounding:
    """Where a phrase is found on a real image.

    image: PIL RGB as it was given, on whose grid heat_map float32 (H, W) in [0, 1], outlines and box stand.
    regions: dicts {name, mass, cnr, prior_mass, prior_cnr}; the prior is the same phrase read on mid-grey instead of
    the image: where the model points without seeing anything.
    box: (x0, y0, x1, y1) px, ends exclusive, around the largest connected part of the map above half of its maximum;
    None when the map is flat.
    """

    domain: str
    phrase: str
    adapter: str | None
    words: tuple[str, ...]
    image: Image.Image
    heat_map: HeatMap = field(repr=False)
    outlines: Mapping[str, Mask] = field(repr=False)
    regions: tuple[Mapping[str, Any], ...]
    box: tuple[int, int, int, int] | None
    warnings: tuple[str, ...]

    def report(self) -> dict[str, Any]:
        """Return the JSON of /ground."""
        return {
            "phrase": self.phrase,
            "words": list(self.words),
            "regions": [dict(region) for region in self.regions],
            "box": None if self.box is None else list(self.box),
            "warnings": list(self.warnings),
        }
