"""What the studio hands back, typed and frozen, and how its figures are taken from maps and masks; no model needed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

if TYPE_CHECKING:
    from medviz.models.manifest import Manifest
    from medviz.rewards.scores import Score

HeatMap = NDArray[np.float32]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Preview:
    """One denoising step of a running comparison.

    which: the image being drawn; step counts from 1 to steps; image: the model's guess of the finished picture at this
    step, PIL RGB; None at most steps, because decoding takes time.
    """

    which: Literal["baseline", "aligned"]
    step: int
    steps: int
    image: Image.Image | None


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


@dataclass(frozen=True)
class WordAttention:
    """Where one word looked. baseline, aligned: float32 (H, W) in [0, 1] on one scale for the pair."""

    word: str
    baseline: HeatMap
    aligned: HeatMap
    regions: tuple[RegionAttention, ...]

    def report(self) -> dict[str, Any]:
        """Return the JSON of /attention."""
        return {"word": self.word, "regions": [dict(vars(region)) for region in self.regions]}


@dataclass(frozen=True)
class Drawing:
    """One generated image (PIL RGB, unlabelled) and the region masks, bool (H, W), found on it."""

    image: Image.Image
    outlines: Mapping[str, Mask] = field(repr=False)


@dataclass(frozen=True)
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
            "scores": [score_report(score) for score in self.scores],
            "warnings": list(self.warnings),
            "timings_s": dict(self.timings_s),
        }


@dataclass(frozen=True)
class Grounding:
    """Where a phrase is found on a real image.

    image: PIL RGB, the upload cut square, on whose grid heat_map float32 (H, W) in [0, 1], outlines and box stand.
    regions: dicts {name, mass, cnr}. box: (x0, y0, x1, y1) px, x1 and y1 exclusive, around the largest connected part
    of the map above half of its maximum; None when the map is flat.
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


def score_report(score: Score) -> dict[str, Any]:
    """Return one row of a report's scores."""
    return {
        "name": score.name,
        "role": score.role,
        "baseline": score.baseline,
        "aligned": score.aligned,
        "higher_is_better": score.higher_is_better,
    }


def region_attention(
    names: Sequence[str], heat_maps: Sequence[HeatMap], masks: Sequence[Mapping[str, Mask]]
) -> tuple[RegionAttention, ...]:
    """Measure a word's heat maps (baseline, aligned) inside the regions found on either image.

    A region that was found on neither image is left out.
    """
    from medviz.grounding.metrics import cnr, mass_in_region

    figures = []
    for name in names:
        found = [side.get(name) for side in masks]
        if all(mask is None or not mask.any() for mask in found):
            continue
        mass, contrast = (
            [None if mask is None else _finite(measure(heat, mask)) for heat, mask in zip(heat_maps, found, strict=True)]
            for measure in (mass_in_region, cnr)
        )
        figures.append(RegionAttention(name, mass[0], mass[1], contrast[0], contrast[1]))
    return tuple(figures)


def placed(square: HeatMap, size: tuple[int, int]) -> HeatMap:
    """Lay a map of the central square (side, side) on the whole image's grid; 0 outside. size: (width, height) px."""
    width, height = size
    side = min(size)
    whole = np.zeros((height, width), np.float32)
    top, left = (height - side) // 2, (width - side) // 2
    resized = cv2.resize(np.asarray(square, np.float32), (side, side), interpolation=cv2.INTER_LINEAR)
    whole[top : top + side, left : left + side] = np.clip(resized, 0.0, 1.0)
    return whole


def brightest_box(heat_map: HeatMap, threshold: float) -> tuple[int, int, int, int] | None:
    """Box (x0, y0, x1, y1) px, ends exclusive, around the largest connected part above `threshold` of the maximum.

    None for a map that is 0 everywhere.
    """
    if not heat_map.max() > 0:
        return None
    hot = (heat_map > threshold * heat_map.max()).astype(np.uint8)
    _, _, boxes, _ = cv2.connectedComponentsWithStats(hot, connectivity=8)
    x, y, width, height, _ = (int(value) for value in max(boxes[1:], key=lambda box: int(box[cv2.CC_STAT_AREA])))
    return x, y, x + width, y + height


def model_hashes(manifest: Manifest, adapter: str | None) -> dict[str, Any]:
    """Name what drew and judged: the preset and, for each part, the sha256 of its weights (of their list when sharded)."""
    files = {**(manifest.hub.files if manifest.hub is not None else {}), **manifest.files}
    parts: dict[str, list[str]] = {}
    for name, record in sorted(files.items()):
        part = name.rpartition("/")[0]
        if name.endswith(".safetensors") and (not part.startswith("adapters/") or part == f"adapters/{adapter}"):
            parts.setdefault(part, []).append(record.sha256)
    hashes = {
        part: found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
        for part, found in parts.items()
    }
    return {"preset": manifest.preset, **hashes}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
