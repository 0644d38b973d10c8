"""The use cases: compare, attend, generate, score and ground; typed requests in, typed results out.

Knows no page and no server. Importing it is quick: torch and diffusers come with the first request, or with `warm_up`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from medviz.domains import DOMAINS
from medviz.errors import Cancelled, InputError, ModelError
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
from medviz.results import Grounding, Pair, Preview, Request, Score, WordAttention

if TYPE_CHECKING:
    from PIL import Image

    from medviz.models.library import ModelLibrary
    from medviz.workbench import Models

DEFAULT_ROOT = Path(__file__).resolve().parents[1] / "assets" / "models"
CACHED_PAIRS = 6  # pairs whose images and attention are kept for the next question about them
BATCH_SIZE = 8  # images drawn at once by `generate`
_TURN_POLL_S = 0.1

logger = logging.getLogger(__name__)


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
        self._pairs: OrderedDict[Request, Pair] = OrderedDict()
        self._models: dict[str, Models] = {}
        self._library: ModelLibrary | None = None
        self._guard = threading.Lock()  # for what the domains share
        self._turns = {name: threading.Lock() for name in DOMAINS}

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
        """The guidance scale that a domain's models are meant for. Raises as `manifest`."""
        return float(self.manifest(domain).recipe.get("guidance_scale", DEFAULT_GUIDANCE_SCALE))

    def warm_up(self) -> None:
        """Import the libraries and load every domain's models, so that the first request need not wait for them.

        A domain that cannot be loaded is logged, and the others are loaded.
        """
        for name in self.domains():
            try:
                with self._turn(name, _Stop(None)):
                    self._load(name)
            except ModelError as error:
                logger.error("the models of %s cannot be loaded: %s", name, error)

    def compare(
        self,
        domain: str,
        prompt: str,
        seed: int,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        adapter: str | None = "",
        on_preview: Callable[[Preview], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> Pair:
        """Draw a prompt with the baseline and with the aligned model from the same noise, and measure both.

        steps: of the solver's; where the model folder says so, its few-step adapter takes the last of them at once, at
        the domain's own guidance scale. guidance_scale: None takes that. adapter: a name, "" for the domain's default,
        None or "none" for the baseline on both sides. on_preview is called in this thread after every step; cancelled
        is asked as often. A pair that was just compared is copied. Raises InputError before any model is loaded,
        Cancelled when cancelled or after MAX_REQUEST_S of drawing.
        """
        request = self._check(domain, prompt, seed, steps, guidance_scale, adapter)
        stop = _Stop(cancelled)
        with self._turn(request.domain, stop):
            kept = self._kept(request)
            if kept is not None:
                return kept
            models = self._load(request.domain)
            from medviz import workbench

            stop.start_clock()
            return self._keep(request, workbench.compare(models, request, on_preview, stop.check))

    def attention(
        self,
        domain: str,
        prompt: str,
        seed: int,
        word: str,
        steps: int = DEFAULT_STEPS,
        guidance_scale: float | None = None,
        adapter: str | None = "",
        cancelled: Callable[[], bool] | None = None,
    ) -> tuple[Pair, WordAttention]:
        """Return a pair and where one of its words looked; at once for a pair that was just compared.

        cancelled, errors: as `compare`.
        """
        chosen, text = check_word(word), check_prompt(prompt)
        if " ".join(chosen.casefold().split()) not in " ".join(text.casefold().split()):
            raise InputError(f"{chosen!r} is not in the prompt; choose a word of the prompt as it is written there")
        pair = self.compare(domain, text, seed, steps, guidance_scale, adapter, cancelled=cancelled)
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
        if isinstance(prompts, str) or len(prompts) != len(seeds):
            raise InputError("prompts and seeds must be lists of one length")
        if batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        requests = [
            self._check(domain, prompt, seed, steps, guidance_scale, adapter)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        images: list[Image.Image] = []
        for first in range(0, len(requests), batch_size):
            # A turn ends with each batch: a long job lets others in between.
            with self._turn(domain, _Stop(None)):
                models = self._load(domain)
                from medviz import workbench

                images += workbench.draw_batch(models, requests[first : first + batch_size])
        return images

    def score(
        self,
        domain: str,
        image: bytes | str | Path | Image.Image,
        prompt: str,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[Score]:
        """Score how well a given image shows a prompt, by the reward and by the judge.

        The figure of each score stands under `baseline`; there is no second image, so `aligned` is None. Whoever waits
        for the models can be cancelled.
        """
        check_domain(domain, tuple(DOMAINS))
        text = check_prompt(prompt)
        from medviz.images import decode_image

        picture = decode_image(image)
        with self._turn(domain, _Stop(cancelled)):
            models = self._load(domain)
            from medviz import workbench

            return workbench.score_image(models, text, picture)

    def ground(
        self,
        domain: str,
        image: bytes | str | Path | Image.Image,
        phrase: str,
        adapter: str | None = "",
        cancelled: Callable[[], bool] | None = None,
    ) -> Grounding:
        """Show where a phrase looks in a given image: its attention on the image half way into noise.

        adapter: "" is the one that the domain finds phrases with, not the one that it draws with. The models see the
        central square. heat_map, outlines and box stand on the image's own grid.
        """
        check_domain(domain, tuple(DOMAINS))
        text = check_prompt(phrase)
        chosen = self._resolve(domain, (adapter if adapter != "" else self.manifest(domain).grounding_adapter or ""))
        from medviz.images import decode_image

        picture, stop = decode_image(image), _Stop(cancelled)
        with self._turn(domain, stop):
            models = self._load(domain)
            from medviz import workbench

            stop.start_clock()
            found = workbench.ground(models, picture, text, chosen, stop.check)
        return replace(found, warnings=(*picture.info.get("warnings", ()), *found.warnings))

    def _check(
        self, domain: str, prompt: str, seed: int, steps: int, guidance_scale: float | None, adapter: str | None
    ) -> Request:
        name = check_domain(domain, tuple(DOMAINS))
        text, number, count = check_prompt(prompt), check_seed(seed), check_steps(steps)
        scale = self.default_guidance_scale(name) if guidance_scale is None else check_guidance_scale(guidance_scale)
        return Request(name, text, number, count, scale, self._resolve(name, adapter))

    def _resolve(self, domain: str, adapter: str | None) -> str | None:
        """The adapter that a request means, from the manifest alone; InputError names the ones there are."""
        if adapter is None or adapter == "none":
            return None
        manifest = self.manifest(domain)
        if adapter == "":
            return manifest.default_adapter
        if adapter not in manifest.selectable:
            allowed = ", ".join((*manifest.selectable, "none"))
            raise InputError(f"unknown adapter {str(adapter)[:60]!r}; allowed: {allowed}, or empty for the default")
        return adapter

    def _load(self, domain: str) -> Models:
        """Return a domain's models; call it in the domain's turn."""
        if domain not in self._models:
            from medviz.models.library import ModelLibrary
            from medviz.workbench import load_models

            with self._guard:
                self._library = self._library or ModelLibrary(self.root, self.device)
            self._models[domain] = load_models(self._library, domain)
        return self._models[domain]

    def _kept(self, request: Request) -> Pair | None:
        with self._guard:
            if request not in self._pairs:
                return None
            self._pairs.move_to_end(request)
            return self._pairs[request].copy()

    def _keep(self, request: Request, pair: Pair) -> Pair:
        with self._guard:
            self._pairs[request] = pair.copy()
            while len(self._pairs) > self._cached_pairs:
                self._pairs.popitem(last=False)
        return pair

    @contextmanager
    def _turn(self, domain: str, stop: _Stop) -> Iterator[None]:
        """Hold a domain's models alone; whoever waits for them can be cancelled."""
        turn = self._turns[domain]
        while not turn.acquire(timeout=_TURN_POLL_S):
            stop.check()
        try:
            stop.check()
            yield
        finally:
            turn.release()


class _Stop:
    """When a request has to end: its owner took it back, or its time is over."""

    def __init__(self, cancelled: Callable[[], bool] | None) -> None:
        self._cancelled = cancelled
        self._deadline = math.inf

    def start_clock(self) -> None:
        """Start counting: neither waiting for others nor loading models counts."""
        self._deadline = time.monotonic() + MAX_REQUEST_S

    def check(self) -> None:
        """Raise Cancelled when it is time."""
        if self._cancelled is not None and self._cancelled():
            raise Cancelled("Cancelled.")
        if time.monotonic() > self._deadline:
            raise Cancelled(f"Stopped after {MAX_REQUEST_S} s, the most a request may take; ask for fewer steps.")
