"""Paired sampling: the same seed gives the same noise whatever the adapter and whoever shares the batch.

Shapes: B images, C latent channels, h x w latent grid, H x W pixels, L context tokens, D text width.
Guidance: classifier-free guidance, arXiv 2207.12598, equation 6, in the order [unconditional, conditional], and along
single words as `medviz.generation.guidance` says.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import avg_pool2d

from medviz.errors import InputError, ModelError
from medviz.generation.guidance import Guidance, SemanticGuidance
from medviz.generation.plan import FewSteps, parts_of, semantic_of
from medviz.generation.prompts import Contrasts, PromptEmbeds, encode_prompts, in_turn
from medviz.generation.spectrum import Spectrum
from medviz.models.adapters import also_using, folded_adapters

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from medviz.grounding.capture import AttentionMaps

OnStep = Callable[[int, torch.Tensor], None]

SURROUNDINGS = 9
"""Side, in latents, of the square whose mean is left out of what semantic guidance adds: a word for something thin also
moves the colour of all that lies around it, and many times that would be another skin."""


@dataclass(frozen=True)
class Denoised:
    """One prediction read both ways: `x0` (B, C, h, w) the clean latents, `noise` (B, C, h, w) the unit noise."""

    x0: torch.Tensor
    noise: torch.Tensor


def latent_hw(unet_config: Mapping[str, Any]) -> tuple[int, int]:
    """The latent grid (h, w) a UNet was made for, from its `sample_size` (one number or a pair)."""
    size = unet_config["sample_size"]
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def seeded_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a seed, so that a sample's noise depends on neither the batch nor the device.

    Raises InputError for a seed that is not a whole number >= 0.
    """
    for seed in seeds:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise InputError(f"a seed must be a whole number of at least 0, found {seed!r}")
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def _draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([torch.randn(shape, generator=generator, dtype=torch.float32) for generator in generators])


def initial_latents(
    unet_config: Mapping[str, Any], seeds: Sequence[int], grid_hw: tuple[int, int] | None = None
) -> torch.Tensor:
    """Unit Gaussian noise (B, C, h, w), float32 on the CPU, row i a function of seeds[i] alone.

    `grid_hw` is the latent grid, by default the one the UNet was made for.
    """
    if len(seeds) == 0:
        raise InputError("at least one seed is needed, found none")
    height, width = grid_hw or latent_hw(unet_config)
    return _draw_noise(seeded_generators(seeds), (int(unet_config["in_channels"]), height, width))


def noise_pred(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    t: torch.Tensor | float,
    prompt_embeds: PromptEmbeds,
    guidance_scale: float | Guidance,
) -> torch.Tensor:
    """The UNet's guided prediction (B, C, h, w), in the latents' dtype: the one place where guidance is computed.

    `t` is one timestep or one a sample (B,). All is one pass: of B rows at a scale of 1.0, else of 2B,
    [unconditional, conditional]; Guidance names its scale at `t`. Where it also names semantic guidance, the rows for
    that lie between the two, for the samples that it concerns alone. What is predicted (noise, velocity) is the
    scheduler's business. Keeps the gradient if there is one.

    Raises InputError for semantic guidance of prompts that were encoded without.
    """
    guidance = guidance_scale if isinstance(guidance_scale, Guidance) else Guidance(guidance_scale)
    scale, cond, count = guidance.at(t), prompt_embeds.cond, len(latents)
    texts, rows = [cond], [torch.arange(count, device=latents.device)]
    along = _semantic(prompt_embeds, guidance, t)
    if along is not None:
        contrasts, weight = along
        other = ~contrasts.own.to(latents.device)
        texts = [contrasts.named[other], contrasts.unnamed, *texts]
        rows = [contrasts.rows[other], contrasts.rows, *rows]
    guided = not bool(torch.as_tensor(scale == 1.0).all())
    if guided:
        texts, rows = [prompt_embeds.uncond, *texts], [rows[-1], *rows]
    passes = torch.cat(rows) if len(rows) > 1 else slice(None)
    told = t[passes] if isinstance(t, torch.Tensor) and t.ndim == 1 and t.shape[0] > 1 else t
    dtype = next(unet.parameters()).dtype  # unet.dtype walks through all modules
    embeds = torch.cat(texts).to(dtype)
    everything = unet(latents[passes].to(dtype), told, encoder_hidden_states=embeds, return_dict=False)[0]
    parts = everything.to(latents.dtype).split([len(each) for each in rows])
    prediction = parts[-1]
    if guided:
        prediction = parts[0] + scale * (prediction - parts[0])
    if along is None:
        return prediction
    named = parts[-1][contrasts.rows].index_copy(0, other.nonzero()[:, 0], parts[-3])
    return prediction.index_add(0, contrasts.rows, weight * _finer(named - parts[-2]))


def _semantic(
    prompt_embeds: PromptEmbeds, guidance: Guidance, t: torch.Tensor | float
) -> tuple[Contrasts, float | torch.Tensor] | None:
    """What semantic guidance goes along at `t` and how far, one number or (K, 1, 1, 1); None where there is nothing.

    Raises as `noise_pred`.
    """
    weight = guidance.semantic.at(t) if guidance.semantic else 0.0
    if not bool(torch.as_tensor(weight).any()):
        return None
    contrasts = prompt_embeds.contrasts
    if contrasts is None:
        raise InputError("these prompts were encoded without the semantic guidance that they are to be drawn with")
    if not len(contrasts.rows):
        return None
    return contrasts, weight[contrasts.rows] if isinstance(weight, torch.Tensor) else weight


def _finer(difference: torch.Tensor) -> torch.Tensor:
    """A difference (B, C, h, w) less its mean over SURROUNDINGS, so that it draws lines and leaves colour alone."""
    around = avg_pool2d(difference, SURROUNDINGS, stride=1, padding=SURROUNDINGS // 2, count_include_pad=False)
    return difference - around


def split_prediction(
    scheduler: SchedulerMixin, prediction: torch.Tensor, latents: torch.Tensor, t: torch.Tensor | float
) -> Denoised:
    """Clean latents and noise from a prediction at one timestep, or one a sample (B,), for variance-preserving latents.

    With a = alphas_cumprod[t] and x = sqrt(a) x0 + sqrt(1 - a) noise: epsilon prediction by arXiv 2010.02502
    (equation 9), velocity v = sqrt(a) noise - sqrt(1 - a) x0 by arXiv 2202.00512 (appendix D).
    Raises ModelError for another prediction type, or for epsilon prediction where no signal is left (a = 0).
    """
    signal, noise_level = signal_and_noise_level(scheduler, t)
    if isinstance(signal, torch.Tensor) and isinstance(noise_level, torch.Tensor):
        signal, noise_level = (level.to(latents)[:, None, None, None] for level in (signal, noise_level))
    kind = scheduler.config.prediction_type
    if kind == "v_prediction":
        return Denoised(
            x0=signal * latents - noise_level * prediction, noise=signal * prediction + noise_level * latents
        )
    if kind == "epsilon":
        if not bool(torch.as_tensor(signal).all()):
            raise ModelError(f"noise prediction cannot be read at timestep {t}, where the signal is 0")
        return Denoised(x0=(latents - noise_level * prediction) / signal, noise=prediction)
    if kind == "sample":
        return Denoised(x0=prediction, noise=(latents - signal * prediction) / (noise_level + 1e-8))
    raise ModelError(f"the scheduler predicts {kind!r}; allowed: epsilon, v_prediction, sample")


def signal_and_noise_level(
    scheduler: SchedulerMixin, t: torch.Tensor | float
) -> tuple[float, float] | tuple[torch.Tensor, torch.Tensor]:
    """(sqrt(a), sqrt(1 - a)), a = alphas_cumprod[t], at a timestep, or float64 (B,) at one a sample."""
    if isinstance(t, torch.Tensor) and t.numel() > 1:
        alphas = scheduler.alphas_cumprod.to(t.device)[t].double()
        return alphas.sqrt(), (1.0 - alphas).sqrt()
    alpha = float(scheduler.alphas_cumprod[round(float(t))])
    return math.sqrt(alpha), math.sqrt(1.0 - alpha)


def _check_request(prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance_scale: float | Guidance) -> None:
    if isinstance(prompts, str) or len(prompts) == 0 or len(prompts) != len(seeds):
        count = "one text" if isinstance(prompts, str) else len(prompts)
        raise InputError(f"prompts and seeds must be lists of one length >= 1, found {count} and {len(seeds)}")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InputError(f"steps must be a whole number of at least 1, found {steps!r}")
    if not isinstance(guidance_scale, Guidance) and not math.isfinite(guidance_scale):
        raise InputError(f"guidance scale must be a finite number, found {guidance_scale!r}")


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float | Guidance = 3.0,
    on_step: OnStep | None = None,
    maps: AttentionMaps | None = None,
    grid_hw: tuple[int, int] | None = None,
    prompt_embeds: PromptEmbeds | None = None,
    few_steps: FewSteps | None = None,
    adapters: Sequence[str | None] = (None,),
    spectrum: Spectrum | None = None,
    trail: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draws latents (B, C, h, w), float32, one for each prompt and seed; `decode` makes images of them.

    adapters: each prompt and seed is drawn, in the same passes, once with each of these beside those that are on: B is
    then as many times larger, what belongs to one prompt side by side.

    A function of (weights, prompt, seed, steps, guidance scale, scheduler configuration): a scheduler that draws
    noise as it goes draws it from the sample's own seed. Nothing of the pipeline is changed.

    on_step(index, x0) is called after each step with its index, from 0, and the current estimate of the clean
    latents (B, C, h, w); what it raises (Cancelled) ends the sampling. `maps`, from an enclosing `capture`, is told
    each step, and of how many of the solver's it stands in the place. `prompt_embeds`, where given, stands in for the
    encoded prompts. `few_steps`, where given, draws the picture or the end of it in place of solver and guidance; its
    adapter is switched on for that as well. `spectrum`, where given, is what finished latents go through. `trail` gets
    the latents (B, C, h, w) before each step. No gradient is kept.

    Raises InputError when the lists differ in length, a number is out of range or an adapter is not loaded, ModelError
    for a scheduler that a few-step adapter cannot take over from.
    """
    _check_request(prompts, seeds, steps, guidance_scale)
    if len(adapters) == 0:
        raise InputError("at least one adapter, or None for none, is needed to draw with; found no entry")
    prompts = [prompt for prompt in prompts for _ in adapters]
    seeds = [seed for seed in seeds for _ in adapters]
    unet, parts = pipeline.unet, parts_of(pipeline, steps, guidance_scale, few_steps)
    if prompt_embeds is None:
        embeds = _encode_in_turn(pipeline, prompts, adapters, semantic_of(parts))
    else:
        embeds = prompt_embeds.take(torch.arange(len(prompt_embeds.cond)).repeat_interleave(len(adapters)))
    generators = seeded_generators(seeds)
    shape = (int(unet.config.in_channels), *(grid_hw or latent_hw(unet.config)))
    count, index = sum(len(part.timesteps) for part in parts), 0
    latents = _draw_noise(generators, shape).to(unet.device) * parts[0].scheduler.init_noise_sigma
    for part in parts:
        scheduler = part.scheduler
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        draw = {"generator": generators} if takes_generator else {}
        with also_using(unet, part.adapter), folded_adapters(unet, adapters), torch.inference_mode():
            for number, t in enumerate(part.timesteps):
                scaled = scheduler.scale_model_input(latents, t)
                if trail is not None:
                    trail.append(latents.cpu())
                if maps is not None:
                    weight = part.weights[number] if part.weights else 1
                    maps.begin_step(index, count, len(prompts), weight)
                prediction = noise_pred(unet, scaled, t, embeds, part.guidance)
                latents = scheduler.step(prediction, t, latents, return_dict=False, **draw)[0]
                if on_step is not None:
                    on_step(index, split_prediction(scheduler, prediction, scaled, t).x0)
                index += 1
    # A copy made outside inference mode is an ordinary tensor, which a training step may save for its backward pass.
    return spectrum(latents.clone()) if spectrum else latents.clone()


def _encode_in_turn(
    pipeline: StableDiffusionPipeline,
    prompts: Sequence[str],
    adapters: Sequence[str | None],
    semantic: SemanticGuidance | None,
) -> PromptEmbeds:
    """Row i is encoded with the i-th adapter, over and over: an adapter may hold learned embeddings."""
    encoded = []
    for name in adapters:
        with also_using(pipeline.unet, name):
            encoded.append(encode_prompts(pipeline, prompts, semantic))
    return in_turn(encoded)


def _scale_and_shift(vae: AutoencoderKL | AutoencoderTiny) -> tuple[float, float]:
    return vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0


def decode_latents(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), float32 clamped to [-1, 1], of latents (B, C, h, w); keeps the gradient if there is one."""
    scale, shift = _scale_and_shift(vae)
    images = vae.decode((latents / scale + shift).to(vae.device, vae.dtype), return_dict=False)[0]
    return images.float().clamp(-1.0, 1.0)


def decode(pipeline: StableDiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W), float32 in [-1, 1], of latents (B, C, h, w); for AutoencoderKL and AutoencoderTiny.

    Raises ModelError when the autoencoder returns a value that is not finite.
    """
    vae = pipeline.vae
    with torch.inference_mode():
        images = decode_latents(vae, latents)
        if not bool(torch.isfinite(images).all()):
            raise ModelError(f"the autoencoder returned values that are not finite (it runs in {vae.dtype})")
    return images.clone()


def encode_image(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """Latents (B, C, h, w), float32, of images (B, 3, H, W) in [-1, 1]: the inverse of `decode`.

    AutoencoderKL gives its distribution's mode, so nothing is drawn. Raises InputError for another shape, for values
    outside [-1, 1] and for sides that the autoencoder cannot divide.
    """
    vae, factor = pipeline.vae, int(pipeline.vae_scale_factor)
    if images.ndim != 4 or images.shape[1] != 3:
        raise InputError(f"images must be (B, 3, H, W), found {tuple(images.shape)}")
    if images.shape[2] % factor or images.shape[3] % factor:
        raise InputError(f"image sides must be multiples of {factor} px, found {tuple(images.shape[2:])}")
    if not bool((images.abs() <= 1.0 + 1e-4).all()):
        raise InputError("image values must lie in [-1, 1]")
    scale, shift = _scale_and_shift(vae)
    with torch.inference_mode():
        encoded = vae.encode(images.to(vae.device, vae.dtype))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        latents = (latents.float() - shift) * scale
    return latents.clone()
