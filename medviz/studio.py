"""The use cases: compare, attend, generate, score and ground; typed requests in, typed results out.

Knows no page and no server. Importing it is quick: torch and diffusers come with the first request, or with `warm_up`.
"""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from medviz.domains import DOMAINS, Domain, get_domain
from medviz.errors import Cancelled, InputError
from medviz.limits import (
    DEFAULT_GUIDANCE_SCALE,
    DEFAULT_STEPS,
    MAX_REQUEST_S,
    check_domain,
    check_guidance_scale,
    check_prompt,
    check_seed,
    check_steps,
    check_word,
)
from medviz.models.manifest import MANIFEST_NAME, Manifest, read_manifest
from medviz.results import (
    Drawing,
    Grounding,
    Pair,
    Preview,
    WordAttention,
    anatomy_warnings,
    brightest_box,
    model_hashes,
    placed,
    region_attention,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from medviz.grounding.anatomy import Segmenter
    from medviz.grounding.capture import AttentionMaps
    from medviz.models.library import LoadedDomain, ModelLibrary
    from medviz.rewards.classifier import AttributeClassifier
    from medviz.rewards.scores import Score

DEFAULT_ROOT = Path(__file__).resolve().parents[1] / "assets" / "models"
CACHED_PAIRS = 6  # pairs whose images and attention are kept for the next question about them
BATCH_SIZE = 8  # images drawn at once by `generate`
PREVIEW_EVERY_S = 0.25  # an unfinished image is decoded no more often
GROUND_STEPS = 20  # levels of the inversion's noise axis
BOX_THRESHOLD = 0.5  # of the heat map's maximum
_LOCK_POLL_S = 0.1

OnPreview = Callable[[Preview], None]
IsCancelled = Callable[[], bool]


@dataclass(frozen=True)
class _Request:
    """A comparison whose every value was checked; adapter is resolved."""

    domain: str
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    adapter: str | None


@dataclass(frozen=True)
class _Models:
    """Everything of one domain in memory."""

    domain: Domain
    loaded: LoadedDomain
    segmenter: Segmenter
    classifiers: Mapping[str, AttributeClassifier]


class Studio:
    """The embedded models behind a few calls; thread-safe, one request at a time in each domain.

    root: a folder of model folders (default: assets/models). device: a torch device; None takes CUDA when there is one.
    Models are verified and loaded by the first request that needs them. The same call gives the same pixels.
    """

    def __init__(
        self, root: Path | str | None = None, device: str | None = None, *, cached_pairs: int = CACHED_PAIRS
    ) -> None:
        self.root = Path(root) if root is not None else DEFAULT_ROOT
        self.device = device
        self._cached_pairs = cached_pairs
        self._pairs: OrderedDict[_Request, Pair] = OrderedDict()
        self._models: dict[str, _Models] = {}
        self._turns: dict[str, threading.Lock] = {name: threading.Lock() for name in DOMAINS}
        self._guard = threading.Lock()
        self._library: ModelLibrary | None = None

    @property
    def assets(self) -> Path:
        """The folder that holds models, examples and reports."""
        return self.root.parent

    def domains(self) -> tuple[str, ...]:
        """Names of the domains that have models, in alphabetical order; nothing is loaded."""
        return tuple(name for name in sorted(DOMAINS) if (self.root / name / MANIFEST_NAME).is_file())

    def manifest(self, domain: str) -> Manifest:
        """Read what is written of a domain's models. Raises InputError for an unknown domain, ModelError for none."""
        return read_manifest(self.root / check_domain(domain, tuple(DOMAINS)))

    def default_guidance_scale(self, domain: str) -> float:
        """The guidance scale a domain's models are meant for. Raises as `manifest`."""
        return float(self.manifest(domain).recipe.get("guidance_scale", DEFAULT_GUIDANCE_SCALE))

    def warm_up(self) -> None:
        """Import the libraries and load every domain's models, so that the first request need not wait for them."""
        for name in self.domains():
            with self._turn(name, _Stop(None)):
                self._load(name)

    def compare(
        self,
        domain: str,
        prompt: str,
        seed: int,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        adapter: str | None = "",
        on_preview: OnPreview | None = None,
        cancelled: IsCancelled | None = None,
    ) -> Pair:
        """Draw a prompt with the baseline and with the aligned model from the same noise, and measure both.

        guidance_scale: None takes the domain's own. adapter: a name, "" for the domain's default, None or "none" for
        the baseline on both sides. on_preview is called in this thread after every step. cancelled is asked between
        steps. Raises InputError before any model is loaded, Cancelled when cancelled or after MAX_REQUEST_S.
        """
        request = self._check(domain, prompt, seed, steps, guidance_scale, adapter)
        stop = _Stop(cancelled)
        with self._turn(domain, stop):
            if request in self._pairs:
                self._pairs.move_to_end(request)
                return self._pairs[request]
            models = self._load(domain)
            stop.start()
            pair = _compare(models, request, on_preview, stop)
            self._pairs[request] = pair
            while len(self._pairs) > self._cached_pairs:
                self._pairs.popitem(last=False)
            return pair

    def attention(
        self,
        domain: str,
        prompt: str,
        seed: int,
        word: str,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        adapter: str | None = "",
    ) -> tuple[Pair, WordAttention]:
        """Return a pair and where one of its words looked: at once for a pair that was just compared."""
        chosen = check_word(word)
        text = check_prompt(prompt)
        if " ".join(chosen.casefold().split()) not in " ".join(text.casefold().split()):
            raise InputError(f"{chosen!r} is not in the prompt; choose a word of the prompt as it is written there")
        pair = self.compare(domain, text, seed, steps, guidance_scale, adapter)
        return pair, pair.attention(chosen)

    def generate(
        self,
        domain: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        adapter: str | None = "",
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> list[Image.Image]:
        """Draw one image (PIL RGB, unlabelled) for each prompt and seed, `batch_size` at a time."""
        if isinstance(prompts, str) or len(prompts) != len(seeds) or batch_size < 1:
            raise InputError(f"prompts and seeds must be lists of one length, got {len(prompts)} and {len(seeds)}")
        requests = [
            self._check(domain, prompt, seed, steps, guidance_scale, adapter)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        images: list[Image.Image] = []
        for first in range(0, len(requests), batch_size):
            # The turn ends with each batch: a long job lets others in between.
            with self._turn(domain, _Stop(None)):
                images += _draw_batch(self._load(domain), requests[first : first + batch_size])
        return images

    def score(self, domain: str, image: bytes | Path | Image.Image, prompt: str) -> list[Score]:
        """Score how well a given image shows a prompt, by the reward and by the judge."""
        check_domain(domain, tuple(DOMAINS))
        text = check_prompt(prompt)
        from medviz.images import decode_image, fit_square

        picture = decode_image(image)
        with self._turn(domain, _Stop(None)):
            models = self._load(domain)
            return _scores(models, text, [fit_square(picture, _image_size_px(models.loaded))])

    def ground(
        self,
        domain: str,
        image: bytes | Path | Image.Image,
        phrase: str,
        adapter: str | None = "",
        cancelled: IsCancelled | None = None,
    ) -> Grounding:
        """Show where a phrase looks in a given image: DDIM inversion, then the phrase's attention on its noise.

        The models see the central square. heat_map, outlines and box are on the image's own grid.
        """
        check_domain(domain, tuple(DOMAINS))
        text = check_prompt(phrase)
        chosen = self._resolve(domain, adapter)
        from medviz.images import decode_image

        picture = decode_image(image)
        stop = _Stop(cancelled)
        with self._turn(domain, stop):
            models = self._load(domain)
            stop.start()
            return _ground(models, picture, text, chosen, stop)

    def _check(
        self, domain: object, prompt: object, seed: object, steps: object, guidance_scale: object, adapter: str | None
    ) -> _Request:
        name = check_domain(domain, tuple(DOMAINS))
        text, number, count = check_prompt(prompt), check_seed(seed), check_steps(steps)
        scale = self.default_guidance_scale(name) if guidance_scale is None else check_guidance_scale(guidance_scale)
        return _Request(name, text, number, count, scale, self._resolve(name, adapter))

    def _resolve(self, domain: str, adapter: str | None) -> str | None:
        """The adapter that a request means, from the manifest alone; InputError names the ones there are."""
        if adapter is None or adapter == "none":
            return None
        manifest = self.manifest(domain)
        if adapter == "":
            return manifest.default_adapter
        if adapter not in manifest.adapters:
            allowed = ", ".join((*manifest.adapters, "none"))
            raise InputError(f"unknown adapter {str(adapter)[:60]!r}; allowed: {allowed}, or empty for the default")
        return adapter

    def _load(self, domain: str) -> _Models:
        """Return a domain's models; call it inside the domain's turn."""
        if domain not in self._models:
            from medviz.grounding.anatomy import Segmenter
            from medviz.models.library import ModelLibrary
            from medviz.rewards.classifier import AttributeClassifier

            with self._guard:
                self._library = self._library or ModelLibrary(self.root, self.device)
            loaded = self._library.load(domain)
            folders = {path.name: path for path in sorted((loaded.folder / "rewards").glob("*")) if path.is_dir()}
            classifiers = {
                role: AttributeClassifier.load(folder, loaded.device)
                for role, folder in {**folders, "judge": loaded.folder / "judge"}.items()
            }
            segmenter = Segmenter.load(loaded.folder / "segmenter")
            self._models[domain] = _Models(get_domain(domain), loaded, segmenter, classifiers)
        return self._models[domain]

    @contextmanager
    def _turn(self, domain: str, stop: _Stop) -> Iterator[None]:
        """Hold the domain's models alone; whoever waits for them can be cancelled."""
        turn = self._turns[domain]
        while not turn.acquire(timeout=_LOCK_POLL_S):
            stop.check()
        try:
            stop.check()
            yield
        finally:
            turn.release()


class _Stop:
    """When a running request has to end: its owner took it back, or its time is over."""

    def __init__(self, cancelled: IsCancelled | None) -> None:
        self._cancelled = cancelled
        self._deadline = math.inf

    def start(self) -> None:
        """Start the clock: neither waiting for others nor loading models counts."""
        self._deadline = time.monotonic() + MAX_REQUEST_S

    def check(self, *_: object) -> None:
        """Raise Cancelled when it is time."""
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("Cancelled.")
        if time.monotonic() > self._deadline:
            raise Cancelled(f"Stopped after {MAX_REQUEST_S} s, the most a request may take; ask for fewer steps.")


def _compare(models: _Models, request: _Request, on_preview: OnPreview | None, stop: _Stop) -> Pair:
    from medviz.grounding.heat_maps import word_heat_maps

    timings_s: dict[str, float] = {}
    with _timed(timings_s, "total"):
        with _timed(timings_s, "baseline"):
            baseline = _draw(models, request, "baseline", on_preview, stop)
        with _timed(timings_s, "aligned"):
            # Without an adapter the second image would be the first one, bit for bit.
            aligned = baseline if request.adapter is None else _draw(models, request, "aligned", on_preview, stop)
        with _timed(timings_s, "regions"):
            drawings = [Drawing(image, models.segmenter.masks(image)) for image, _ in (baseline, aligned)]
        with _timed(timings_s, "scores"):
            scores = _scores(models, request.prompt, [drawing.image for drawing in drawings])
    tokenizer = models.loaded.pipeline.tokenizer
    words, warnings = _read(models, request.prompt)
    size_hw = (drawings[0].image.height, drawings[0].image.width)
    regions = [region.name for region in models.domain.regions]

    def look_up(word: str) -> WordAttention:
        heat_maps = word_heat_maps([baseline[1], aligned[1]], tokenizer, request.prompt, check_word(word), size_hw)
        return WordAttention(word, *heat_maps, region_attention(regions, heat_maps, [d.outlines for d in drawings]))

    return Pair(
        **vars(request),
        models=model_hashes(models.loaded.manifest, request.adapter),
        words=words,
        baseline=drawings[0],
        aligned=drawings[1],
        scores=tuple(scores),
        warnings=(*warnings, *anatomy_warnings(drawings)),
        timings_s=timings_s,
        look_up=look_up,
    )


def _draw(
    models: _Models, request: _Request, which: Literal["baseline", "aligned"], on_preview: OnPreview | None, stop: _Stop
) -> tuple[Image.Image, AttentionMaps]:
    """Draw one image of a pair and keep its attention."""
    from medviz.generation.sampling import decode, sample
    from medviz.grounding.capture import capture
    from medviz.images import to_pil
    from medviz.models.adapters import using_adapter

    pipeline, last_s = models.loaded.pipeline, -math.inf

    def on_step(index: int, x0: torch.Tensor) -> None:
        nonlocal last_s
        stop.check()
        if on_preview is None:
            return
        image = None
        if time.monotonic() - last_s >= PREVIEW_EVERY_S:
            image = to_pil(decode(pipeline, x0)[0])
            last_s = time.monotonic()
        on_preview(Preview(which, index + 1, request.steps, image))

    adapter = request.adapter if which == "aligned" else None
    with using_adapter(pipeline.unet, adapter), capture(pipeline.unet) as maps:
        latents = sample(
            pipeline,
            [request.prompt],
            [request.seed],
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            on_step=on_step,
            maps=maps,
        )
        return to_pil(decode(pipeline, latents)[0]), maps


def _draw_batch(models: _Models, requests: Sequence[_Request]) -> list[Image.Image]:
    """Draw requests that differ in prompt and seed alone."""
    from medviz.generation.sampling import decode, sample
    from medviz.images import to_pil
    from medviz.models.adapters import using_adapter

    pipeline, first = models.loaded.pipeline, requests[0]
    with using_adapter(pipeline.unet, first.adapter):
        latents = sample(
            pipeline,
            [request.prompt for request in requests],
            [request.seed for request in requests],
            steps=first.steps,
            guidance_scale=first.guidance_scale,
        )
        return [to_pil(image) for image in decode(pipeline, latents)]


def _read(models: _Models, prompt: str) -> tuple[tuple[str, ...], list[str]]:
    """Return the words of a prompt that the model read and attention can be shown for, and what to warn of."""
    from medviz.grounding.words import token_indices, truncated_text

    parsed, tokenizer, warnings = models.domain.parse(prompt), models.loaded.pipeline.tokenizer, []
    if parsed.unknown_words:
        warnings.append(f"Not in the vocabulary, and perhaps ignored: {', '.join(parsed.unknown_words)}.")
    lost = truncated_text(tokenizer, prompt)
    if lost:
        warnings.append(f"The prompt is longer than the model reads; it never saw: {lost!r}.")
    words = []
    for word in parsed.words:
        try:
            token_indices(tokenizer, prompt, word)
        except InputError:
            continue  # cut off with the rest, which was said above
        words.append(word)
    return tuple(words), warnings


def _ground(models: _Models, picture: Image.Image, phrase: str, adapter: str | None, stop: _Stop) -> Grounding:
    from medviz.generation.inversion import attention_on_image
    from medviz.grounding.heat_maps import grounding_heat_map
    from medviz.grounding.words import content_indices, token_indices
    from medviz.images import fit_square, to_tensor
    from medviz.models.adapters import using_adapter

    pipeline, side_px = models.loaded.pipeline, _image_size_px(models.loaded)
    square = fit_square(picture, side_px)
    words, warnings = _read(models, phrase)
    tokens = {index for word in words for index in token_indices(pipeline.tokenizer, phrase, word)}
    if not tokens:
        tokens = set(content_indices(pipeline.tokenizer, phrase))
        warnings.append("No word of the phrase is in the vocabulary; the map means little.")
    with using_adapter(pipeline.unet, adapter):
        maps = attention_on_image(pipeline, to_tensor(square), phrase, steps=GROUND_STEPS, on_step=stop.check)
    heat_map = grounding_heat_map(maps, sorted(tokens), (side_px, side_px))
    masks = models.segmenter.masks(square)
    names = [region.name for region in models.domain.regions]
    figures = region_attention(names, (heat_map, heat_map), (masks, masks))
    if picture.width != picture.height:
        warnings.append("The models read the central square of the image; nothing was looked at outside it.")
    whole = placed(heat_map, picture.size)
    return Grounding(
        domain=models.domain.name,
        phrase=phrase,
        adapter=adapter,
        words=words,
        image=picture,
        heat_map=whole,
        outlines={name: placed(mask.astype("float32"), picture.size) > 0.5 for name, mask in masks.items()},
        regions=tuple({"name": f.name, "mass": f.baseline_mass, "cnr": f.baseline_cnr} for f in figures),
        box=brightest_box(whole, BOX_THRESHOLD),
        warnings=tuple(warnings),
    )


def _image_size_px(loaded: LoadedDomain) -> int:
    from medviz.generation.sampling import latent_hw

    return latent_hw(loaded.pipeline.unet.config)[0] * int(loaded.pipeline.vae_scale_factor)


@contextmanager
def _timed(timings_s: dict[str, float], name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    timings_s[name] = round(time.perf_counter() - started, 3)
