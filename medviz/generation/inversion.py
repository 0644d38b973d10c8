"""From a real image to noise, and the attention a phrase draws on that image.

DDIM inversion: arXiv 2010.02502, section 4.3 (the sampling ODE run backwards), along the unconditional path as
arXiv 2506.10633 does. The one-step variant adds noise of known seeds once and needs one forward pass a seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from medviz.errors import InputError
from medviz.generation.prompts import encode_prompts
from medviz.generation.sampling import (
    OnStep,
    encode_image,
    noise_pred,
    seeded_generators,
    signal_and_noise_level,
    split_prediction,
)
from medviz.grounding.capture import AttentionMaps, capture

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

Method = Literal["inversion", "one_step"]

# Fractions of the noise axis in which attention is read: early enough in the noise that the image still decides the
# layout, late enough that the model has something to add. The paper reads steps 30 to 60 of 100.
T_WINDOW = (0.3, 0.7)


@dataclass(frozen=True)
class Inversion:
    """The way of an image into noise: `latents[i]` (B, C, h, w), float32, is the image at `timesteps[i]`, ascending.

    `latents[0]`, at timestep 0, is the encoded image itself.
    """

    timesteps: tuple[int, ...]
    latents: tuple[torch.Tensor, ...]

    @property
    def noise(self) -> torch.Tensor:
        """The last latents (B, C, h, w): the noise from which deterministic sampling leads back to the image."""
        return self.latents[-1]


def _as_batch(images: torch.Tensor) -> torch.Tensor:
    return images[None] if images.ndim == 3 else images


def _timestep_grid(scheduler: SchedulerMixin, steps: int) -> tuple[int, ...]:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps < scheduler.config.num_train_timesteps:
        raise InputError(f"steps must be in 1..{scheduler.config.num_train_timesteps - 1}, found {steps!r}")
    return tuple(int(t) for t in np.linspace(0, scheduler.config.num_train_timesteps - 1, steps + 1).round())


def invert(
    pipeline: StableDiffusionPipeline,
    images: torch.Tensor,
    steps: int = 50,
    prompt: str = "",
    *,
    until: float = 1.0,
    refinements: int = 0,
    on_step: OnStep | None = None,
) -> Inversion:
    """Runs deterministic DDIM (eta 0) backwards from images (B, 3, H, W) or (3, H, W) in [-1, 1].

    The path is that of `prompt` alone, without guidance; "" is the unconditional path. `steps` divide the noise axis
    evenly; the path ends at the last one not beyond the fraction `until` of it.

    A plain step predicts at the less noisy end. Each refinement repeats it with the prediction at the end just
    reached (fixed-point iteration, arXiv 2309.04907): it costs one more pass and brings the way back closer to the
    image. on_step(index, latents) follows every step; what it raises ends the inversion.
    """
    scheduler, unet = pipeline.scheduler, pipeline.unet
    grid = _timestep_grid(scheduler, steps)
    last = until * (scheduler.config.num_train_timesteps - 1)
    grid = grid[: max(1, sum(t <= last + 1e-6 for t in grid))]
    latents = encode_image(pipeline, _as_batch(images)).to(unet.device)
    embeds = encode_prompts(pipeline, [prompt] * latents.shape[0])
    path = [latents]
    with torch.inference_mode():
        for index, (t_from, t_to) in enumerate(pairwise(grid)):
            start, t_known = path[-1], t_from
            reached = start
            for _ in range(1 + refinements):
                prediction = noise_pred(unet, reached, t_known, embeds, 1.0)
                noise = split_prediction(scheduler, prediction, reached, t_known).noise
                signal_from, level_from = signal_and_noise_level(scheduler, t_from)
                signal_to, level_to = signal_and_noise_level(scheduler, t_to)
                reached = signal_to * (start - level_from * noise) / signal_from + level_to * noise
                t_known = t_to
            path.append(reached)
            if on_step is not None:
                on_step(index, reached)
    return Inversion(timesteps=grid, latents=tuple(step.clone() for step in path))


def reconstruct(pipeline: StableDiffusionPipeline, inversion: Inversion, prompt: str = "") -> torch.Tensor:
    """Runs the same grid forwards from the noise: latents (B, C, h, w) that should equal `inversion.latents[0]`.

    The distance between the two tells how far an inversion can be trusted.
    """
    scheduler, latents = pipeline.scheduler, inversion.noise
    embeds = encode_prompts(pipeline, [prompt] * latents.shape[0])
    with torch.inference_mode():
        for t_from, t_to in zip(inversion.timesteps[:0:-1], inversion.timesteps[-2::-1], strict=True):
            prediction = noise_pred(pipeline.unet, latents, t_from, embeds, 1.0)
            denoised = split_prediction(scheduler, prediction, latents, t_from)
            signal, level = signal_and_noise_level(scheduler, t_to)
            latents = signal * denoised.x0 + level * denoised.noise
    return latents.clone()


def one_step_noise(scheduler: SchedulerMixin, latents: torch.Tensor, t: int, seeds: Sequence[int]) -> torch.Tensor:
    """Latents (B, C, h, w) noised to timestep t at once: sqrt(a) x0 + sqrt(1 - a) noise, row i's noise by seeds[i]."""
    if len(seeds) != latents.shape[0]:
        raise InputError(f"one seed for each of {latents.shape[0]} latents is needed, found {len(seeds)}")
    noise = torch.stack([torch.randn(latents.shape[1:], generator=each) for each in seeded_generators(seeds)])
    signal, level = signal_and_noise_level(scheduler, t)
    return signal * latents + level * noise.to(latents)


def attention_on_image(
    pipeline: StableDiffusionPipeline,
    images: torch.Tensor,
    prompts: str | Sequence[str],
    *,
    method: Method = "one_step",
    steps: int = 20,
    t_window: tuple[float, float] = T_WINDOW,
    seeds: Sequence[int] = (0, 1, 2, 3),
    time_bins: int = 1,
    on_step: OnStep | None = None,
) -> AttentionMaps:
    """Where a prompt looks in real images (B, 3, H, W) or (3, H, W) in [-1, 1]: one prompt, or one for each image.

    The images become noise without the prompt; then the prompt is read, once at each noise level in `t_window`
    (fractions of the noise axis), and its attention recorded. Sample i of the maps is image i.
    "one_step" reads one level, the window's middle, with fresh noise of each seed, the same for every image: on
    validation images it finds what phrases name a little better, five times as fast. "inversion" takes the noise of
    `invert` at every level of a grid of `steps` inside the window.

    Time bins run from little noise to much. Raises InputError for a window that holds no level, for an unknown
    method, and for images or prompts that do not fit.
    """
    images = _as_batch(images)
    texts = [prompts] * images.shape[0] if isinstance(prompts, str) else list(prompts)
    if len(texts) != images.shape[0]:
        raise InputError(f"one prompt or one for each of {images.shape[0]} images is needed, found {len(texts)}")
    low, high = t_window
    if not 0.0 <= low <= high <= 1.0:
        raise InputError(f"t_window must be two ascending fractions in [0, 1], found {t_window}")
    if method not in _NOISED:
        raise InputError(f"unknown method {method!r}; allowed: {', '.join(_NOISED)}")
    noised = _NOISED[method](pipeline, images, steps, (low, high), seeds, on_step)
    if not noised:
        raise InputError(f"no noise level lies in t_window {t_window}: widen it, or give more steps or seeds")
    embeds = encode_prompts(pipeline, texts)
    with capture(pipeline.unet, time_bins=time_bins) as maps, torch.inference_mode():
        for index, (t, latents) in enumerate(noised):
            maps.begin_step(index, len(noised), images.shape[0])
            noise_pred(pipeline.unet, latents, t, embeds, 1.0)
            if on_step is not None:
                on_step(index, latents)
    return maps


_Noised = list[tuple[int, torch.Tensor]]


def _by_inversion(
    pipeline: StableDiffusionPipeline,
    images: torch.Tensor,
    steps: int,
    window: tuple[float, float],
    seeds: Sequence[int],
    on_step: OnStep | None,
) -> _Noised:
    path = invert(pipeline, images, steps, until=window[1], on_step=on_step)
    first = window[0] * (pipeline.scheduler.config.num_train_timesteps - 1)
    return [(t, latents) for t, latents in zip(path.timesteps, path.latents, strict=True) if t >= first - 1e-6]


def _by_one_step(
    pipeline: StableDiffusionPipeline,
    images: torch.Tensor,
    steps: int,
    window: tuple[float, float],
    seeds: Sequence[int],
    on_step: OnStep | None,
) -> _Noised:
    t = round(sum(window) / 2 * (pipeline.scheduler.config.num_train_timesteps - 1))
    latents = encode_image(pipeline, images).to(pipeline.unet.device)
    return [(t, one_step_noise(pipeline.scheduler, latents, t, [seed] * len(latents))) for seed in seeds]


_NOISED: dict[str, Callable[..., _Noised]] = {"inversion": _by_inversion, "one_step": _by_one_step}
