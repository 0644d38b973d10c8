"""A domain's models in memory and the work done on them: drawing a pair, measuring it, grounding a phrase.

Requests that come here were checked by the studio, which also sees to it that one thread at a time works on a domain.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image

from medviz.domains import Domain, get_domain
from medviz.errors import InputError
from medviz.generation.guidance import RECIPE_OPTIONS, Guidance
from medviz.generation.inversion import attention_on_image
from medviz.generation.plan import FewSteps, step_count
from medviz.generation.sampling import decode, latent_hw, sample
from medviz.generation.spectrum import Spectra
from medviz.grounding.anatomy import Segmenter
from medviz.grounding.capture import AttentionMaps, capture
from medviz.grounding.heat_maps import grounding_heat_map, word_heat_maps
from medviz.grounding.metrics import cnr, mass_in_region
from medviz.grounding.words import content_indices, token_indices, truncated_text
from medviz.images import fit_square, to_pil, to_tensor
from medviz.limits import DEFAULT_GUIDANCE_SCALE, DEFAULT_STEPS, check_word
from medviz.models.adapters import using_adapter
from medviz.models.library import LOADING, LoadedDomain, ModelLibrary
from medviz.models.manifest import Manifest
from medviz.models.networks import keeping_random_state
from medviz.results import (
    Drawing,
    Grounding,
    HeatMap,
    Mask,
    Pair,
    Preview,
    RegionAttention,
    Request,
    Score,
    WordAttention,
)
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.scores import score_images

PREVIEW_EVERY_S = 1.0  # unfinished images are decoded no more often, nor when the finished ones are nearly there,
PREVIEW_SHARE = 0.1  # nor for a larger share of the time
BOX_THRESHOLD = 0.5  # of the heat map's maximum

Check = Callable[[], None]
"""Raises Cancelled when the request has to end."""
OnPreview = Callable[[Preview], None]


@dataclass(frozen=True)
class Models:
    """Everything of one domain in memory. classifiers: role ("attribute", "judge") -> network."""

    domain: Domain
    loaded: LoadedDomain
    segmenter: Segmenter
    classifiers: Mapping[str, AttributeClassifier]
    spectra: Spectra

    @property
    def image_size_px(self) -> int:
        """Side of the images that the pipeline draws."""
        pipeline = self.loaded.pipeline
        return latent_hw(pipeline.unet.config)[0] * int(pipeline.vae_scale_factor)

    def few_steps(self, request: Request) -> FewSteps | None:
        """How a request is drawn by the few-step adapter, where its number of steps and its guidance ask for that."""
        return FewSteps.of(self.loaded.manifest, request.steps, request.guidance_scale)

    @property
    def guidance(self) -> Guidance:
        """The guidance that the models are meant for; a request names another scale within its interval."""
        return Guidance.of_recipe(self.loaded.manifest.recipe, self.domain.name, DEFAULT_GUIDANCE_SCALE)


def load_models(library: ModelLibrary, domain: str) -> Models:
    """Verify and load a domain's pipeline, segmenter, reward and judge. Raises ModelError."""
    with LOADING, keeping_random_state():
        loaded = library.load(domain)
        folders = {path.parent.name: path.parent for path in sorted(loaded.folder.glob("rewards/*/heads.json"))}
        classifiers = {
            role: AttributeClassifier.load(folder, loaded.device)
            for role, folder in {**folders, "judge": loaded.folder / "judge"}.items()
        }
        segmenter, spectra = Segmenter.load(loaded.folder / "segmenter"), Spectra.of_manifest(loaded.manifest)
        return Models(get_domain(domain), loaded, segmenter, classifiers, spectra)


def compare(models: Models, request: Request, on_preview: OnPreview | None, check: Check) -> Pair:
    """Draw and measure a pair."""
    timings_s: dict[str, float] = {}
    with _timed(timings_s, "total"):
        with _timed(timings_s, "images"):
            images, maps = _draw(models, request, on_preview, check)
        check()
        with _timed(timings_s, "regions"):
            anatomies = [models.segmenter.segment(image) for image in images]
        with _timed(timings_s, "scores"):
            parsed = models.domain.parse(request.prompt)
            scores = score_images(models.classifiers, models.domain, parsed, images)
    tokenizer = models.loaded.pipeline.tokenizer
    words, warnings = read(models, request.prompt)
    if request.adapter is None:
        none = (
            "No adapter was chosen" if models.loaded.manifest.selectable else "This domain has no aligned adapter yet"
        )
        warnings.append(f"{none}: both sides show the baseline.")
    few_steps = models.few_steps(request)
    if few_steps and few_steps.lead is None:
        warnings.append(
            f"Drawn in {request.steps} steps by an adapter that learnt to: near to what "
            f"{DEFAULT_STEPS} steps draw from this noise, not the same."
        )
    for side, anatomy in zip(("Baseline", "Aligned"), anatomies, strict=True):
        warnings += [f"{side} image: {warning}" for warning in anatomy.warnings]
    size_hw, samples = (images[0].height, images[0].width), (0, maps.samples - 1)
    regions = [region.name for region in models.domain.regions]

    def look_up(word: str) -> WordAttention:
        heat_maps = word_heat_maps(maps, tokenizer, request.prompt, check_word(word), size_hw, samples=samples)
        figures = region_attention(regions, heat_maps, [anatomy.regions for anatomy in anatomies])
        return WordAttention(word, heat_maps[0], heat_maps[1], figures)

    return Pair(
        **vars(request),
        models=model_identity(models.loaded.manifest, request.adapter, few_steps),
        words=words,
        baseline=Drawing(images[0], anatomies[0].regions),
        aligned=Drawing(images[1], anatomies[1].regions),
        scores=tuple(scores),
        warnings=tuple(warnings),
        timings_s=timings_s,
        look_up=look_up,
    )


def score_image(models: Models, prompt: str, picture: Image.Image) -> list[Score]:
    """Score a given image, cut square, against a prompt."""
    square = fit_square(picture, models.image_size_px)
    return score_images(models.classifiers, models.domain, models.domain.parse(prompt), [square])


def draw_batch(models: Models, requests: Sequence[Request]) -> list[Image.Image]:
    """Draw requests that differ in prompt and seed alone."""
    pipeline, first = models.loaded.pipeline, requests[0]
    few_steps = models.few_steps(first)
    with using_adapter(pipeline.unet, first.adapter):
        latents = sample(
            pipeline,
            [request.prompt for request in requests],
            [request.seed for request in requests],
            steps=first.steps,
            guidance_scale=models.guidance.with_scale(first.guidance_scale),
            few_steps=few_steps,
            spectrum=models.spectra.of(few_steps),
        )
        return [to_pil(image) for image in decode(pipeline, latents)]


def ground(models: Models, picture: Image.Image, phrase: str, adapter: str | None, check: Check) -> Grounding:
    """Find where a phrase looks in a real image, and where it looks when there is no image to see.

    The second, on mid-grey instead of the image, is the prior that the first has to beat.
    """
    pipeline, side_px = models.loaded.pipeline, models.image_size_px
    square = fit_square(picture, side_px)
    words, warnings = read(models, phrase)
    tokens = {index for word in words for index in token_indices(pipeline.tokenizer, phrase, word)}
    if not tokens:
        tokens = set(content_indices(pipeline.tokenizer, phrase))
        warnings.append("No word of the phrase is in the vocabulary, so the map means little.")
    if not tokens:
        raise InputError("the phrase holds no word; write what to look for")
    with using_adapter(pipeline.unet, adapter):
        seen = to_tensor(square)
        maps = attention_on_image(
            pipeline,
            torch.stack([seen, torch.zeros_like(seen)]),
            phrase,
            on_step=lambda index, latents: check(),
        )
    heat_map, prior = (grounding_heat_map(maps, sorted(tokens), (side_px, side_px), sample=sample) for sample in (0, 1))
    anatomy = models.segmenter.segment(square)
    names = [region.name for region in models.domain.regions]
    figures = region_attention(names, (heat_map, prior), (anatomy.regions, anatomy.regions))
    warnings += anatomy.warnings
    if picture.width != picture.height:
        warnings.append("The models read the central square of the image; nothing outside it was looked at.")
    whole = placed(heat_map, picture.size)
    return Grounding(
        domain=models.domain.name,
        phrase=phrase,
        adapter=adapter,
        words=words,
        image=picture,
        heat_map=whole,
        outlines={name: placed(mask.astype(np.float32), picture.size) > 0.5 for name, mask in anatomy.regions.items()},
        regions=tuple(
            {
                "name": found.name,
                "mass": found.baseline_mass,
                "cnr": found.baseline_cnr,
                "prior_mass": found.aligned_mass,
                "prior_cnr": found.aligned_cnr,
            }
            for found in figures
        ),
        box=brightest_box(whole, BOX_THRESHOLD),
        warnings=tuple(warnings),
    )


def read(models: Models, prompt: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the words of a prompt that the model read and attention can be shown for, and what to warn of."""
    parsed, tokenizer, warnings = models.domain.parse(prompt), models.loaded.pipeline.tokenizer, []
    if parsed.unknown_words:
        warnings.append(f"Not in the vocabulary, and perhaps ignored: {', '.join(parsed.unknown_words)}.")
    lost = truncated_text(tokenizer, prompt)
    if lost:
        warnings.append(f"The prompt is longer than the models read; they never saw: {lost}")
    words = []
    for word in parsed.words:
        try:
            token_indices(tokenizer, prompt, word)
        except InputError:
            continue  # cut off with the rest, which was said above
        words.append(word)
    return tuple(words), warnings


def _draw(
    models: Models, request: Request, on_preview: OnPreview | None, check: Check
) -> tuple[tuple[Image.Image, Image.Image], AttentionMaps]:
    """Draw both images of a pair in the same passes and keep their attention, that of the baseline first."""
    pipeline, decoded_s = models.loaded.pipeline, 0.0
    begun_s = last_s = time.monotonic()

    def finish(latents: torch.Tensor) -> tuple[Image.Image, Image.Image]:
        images = [to_pil(image) for image in decode(pipeline, latents)]
        return images[0], images[-1]

    def on_step(index: int, x0: torch.Tensor) -> None:
        nonlocal decoded_s, last_s
        check()
        if on_preview is None:
            return
        images, now_s = None, time.monotonic()
        left_s = (now_s - begun_s) / (index + 1) * (count - index - 1)
        if now_s - last_s >= max(PREVIEW_EVERY_S, decoded_s / PREVIEW_SHARE) and left_s >= 2 * PREVIEW_EVERY_S:
            # As the finished picture will: its contrast must not jump at the end.
            images = finish(spectrum(x0) if spectrum else x0)
            last_s = time.monotonic()
            decoded_s = last_s - now_s
        on_preview(Preview(index + 1, count, images))

    # Without an adapter the second image would be the first one, bit for bit.
    adapters = (None,) if request.adapter is None else (None, request.adapter)
    few_steps = models.few_steps(request)
    spectrum = models.spectra.of(few_steps)
    count = step_count(pipeline, request.steps, few_steps)
    with using_adapter(pipeline.unet, None), capture(pipeline.unet) as maps:
        latents = sample(
            pipeline,
            [request.prompt],
            [request.seed],
            steps=request.steps,
            guidance_scale=models.guidance.with_scale(request.guidance_scale),
            few_steps=few_steps,
            adapters=adapters,
            spectrum=spectrum,
            on_step=on_step,
            maps=maps,
        )
        return finish(latents), maps


@contextmanager
def _timed(timings_s: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings_s[name] = round(time.perf_counter() - started, 3)


def region_attention(
    names: Sequence[str], heat_maps: Sequence[HeatMap], masks: Sequence[Mapping[str, Mask]]
) -> tuple[RegionAttention, ...]:
    """Measure a word's heat maps (baseline, aligned) inside the regions found on either image.

    A region that was found on neither image is left out.
    """
    figures = []
    for name in names:
        found = [side.get(name) for side in masks]
        if all(mask is None or not mask.any() for mask in found):
            continue
        mass, contrast = (
            [
                None if mask is None else _finite(measure(heat, mask))
                for heat, mask in zip(heat_maps, found, strict=True)
            ]
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


def model_identity(manifest: Manifest, adapter: str | None, few_steps: FewSteps | None = None) -> dict[str, Any]:
    """Name what drew and judged: the preset, the sha256 of each part's weights (of their list when sharded), and where
    guidance holds and what spectrum latents went through, without which the same weights draw other pictures."""
    files = {**(manifest.hub.files if manifest.hub is not None else {}), **manifest.files}
    drawn_with = [f"adapters/{each}" for each in (adapter, few_steps.adapter if few_steps else None)]
    parts: dict[str, list[str]] = {}
    for name, record in sorted(files.items()):
        part = name.rpartition("/")[0]
        if name.endswith(".safetensors") and (not part.startswith("adapters/") or part in drawn_with):
            parts.setdefault(part, []).append(record.sha256)
    hashes = {
        part: found[0] if len(found) == 1 else hashlib.sha256("\n".join(found).encode()).hexdigest()
        for part, found in parts.items()
    }
    guidance = {name: manifest.recipe[name] for name in RECIPE_OPTIONS if name in manifest.recipe}
    spectrum = Spectra.of_manifest(manifest).of(few_steps)
    return {"preset": manifest.preset, **guidance, **({"spectrum": str(spectrum)} if spectrum else {}), **hashes}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
