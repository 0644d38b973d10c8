"""Paired sampling: the same seed gives the same noise whatever the adapter and whoever shares the batch.

Shapes: B images, C latent channels, h x w latent grid, H x W pixels, L context tokens, D text width.
Guidance: classifier-free guidance, arXiv 2207.12598, equation 6, in the order [unconditional, conditional].
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from medviz.errors import InputError, ModelError
from medviz.generation.guidance import Guidance
from medviz.limits import DEFAULT_GUIDANCE_SCALE

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from medviz.grounding.capture import AttentionMaps
    from medviz.models.manifest import Manifest

OnStep = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class PromptEmbeds:
    """Text embeddings of a batch: `cond` (B, L, D) of the prompts, `uncond` (B, L, D) of the empty prompt."""

    cond: torch.Tensor
    uncond: torch.Tensor

    def __post_init__(self) -> None:
        if self.cond.shape != self.uncond.shape or self.cond.ndim != 3:
            raise InputError(
                "prompt embeddings must both be (B, L, D), "
                f"found cond {tuple(self.cond.shape)} and uncond {tuple(self.uncond.shape)}"
            )


@dataclass(frozen=True)
class Denoised:
    """One prediction read both ways: `x0` (B, C, h, w) the clean latents, `noise` (B, C, h, w) the unit noise."""

    x0: torch.Tensor
    noise: torch.Tensor


@dataclass(frozen=True)
class FewSteps:
    """How a few-step adapter draws: at these timesteps, falling, one unguided pass each; its guidance is folded in."""

    adapter: str
    timesteps: tuple[int, ...]

    @classmethod
    def of(cls, manifest: Manifest, steps: int, guidance_scale: float) -> FewSteps | None:
        """That of a model folder, where it has one for so many steps at its own guidance scale; else None."""
        own = float(manifest.recipe.get("guidance_scale", DEFAULT_GUIDANCE_SCALE))
        name = manifest.few_step_adapter
        if name is None or steps != manifest.few_steps or guidance_scale != own:
            return None
        return cls(name, tuple(manifest.adapters[name]["timesteps"]))


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


def _encode(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> torch.Tensor:
    """Last hidden state (B, L, D) of the text encoder, L the tokenizer's own maximum length."""
    tokenizer, text_encoder = pipeline.tokenizer, pipeline.text_encoder
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    mask = None
    if getattr(text_encoder.config, "use_attention_mask", False):
        mask = tokens.attention_mask.to(text_encoder.device)
    return text_encoder(tokens.input_ids.to(text_encoder.device), attention_mask=mask)[0]


def encode_prompts(pipeline: StableDiffusionPipeline, prompts: Sequence[str]) -> PromptEmbeds:
    """Encodes the prompts and the empty prompt, padded to `pipeline.tokenizer.model_max_length`.

    Tokens beyond that length are cut; `medviz.grounding.words.truncated_text` tells which.
    No gradient; the result is an ordinary tensor, so a training step may use it.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise InputError(f"prompts must be a list of at least one text, found {prompts!r}")
    # A reinforcement-learning batch repeats few prompts many times: each text is encoded once.
    rows = {text: row for row, text in enumerate(dict.fromkeys([*prompts, ""]))}
    with torch.no_grad():
        embeds = _encode(pipeline, list(rows))
    cond = embeds[[rows[text] for text in prompts]]
    return PromptEmbeds(cond=cond, uncond=embeds[rows[""]].expand_as(cond))


def noise_pred(
    unet: UNet2DConditionModel,
    latents: torch.Tensor,
    t: torch.Tensor | float,
    prompt_embeds: PromptEmbeds,
    guidance_scale: float | Guidance,
) -> torch.Tensor:
    """The UNet's guided prediction (B, C, h, w), in the latents' dtype: the one place where guidance is computed.

    `t` is one timestep or one a sample (B,). A scale of 1.0 is a single conditional pass, any other value one pass
    over 2B rows, [unconditional, conditional]; Guidance names its scale at `t`. What is predicted (noise, velocity) is
    the scheduler's business. Keeps the gradient if there is one.
    """
    dtype = next(unet.parameters()).dtype  # unet.dtype walks through all modules
    scale = guidance_scale.at(t) if isinstance(guidance_scale, Guidance) else guidance_scale
    if bool(torch.as_tensor(scale == 1.0).all()):
        prediction = unet(latents.to(dtype), t, encoder_hidden_states=prompt_embeds.cond.to(dtype), return_dict=False)[
            0
        ]
        return prediction.to(latents.dtype)
    if isinstance(t, torch.Tensor) and t.ndim == 1 and t.shape[0] > 1:
        t = torch.cat([t, t])
    embeds = torch.cat([prompt_embeds.uncond, prompt_embeds.cond])
    both = unet(torch.cat([latents, latents]).to(dtype), t, encoder_hidden_states=embeds.to(dtype), return_dict=False)[
        0
    ].to(latents.dtype)
    uncond, cond = both.chunk(2)
    return uncond + scale * (cond - uncond)


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


def fresh_scheduler(pipeline: StableDiffusionPipeline) -> SchedulerMixin:
    """A scheduler of the pipeline's kind with no state: schedulers count steps, so calls must not share one."""
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


def few_step_scheduler(pipeline: StableDiffusionPipeline, few_steps: FewSteps) -> SchedulerMixin:
    """A scheduler at the timesteps of `few_steps`, in deterministic first-order steps (DDIM)."""
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=1, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(timesteps=list(few_steps.timesteps), device=pipeline.unet.device)
    return scheduler


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
    trail: list[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Draws latents (B, C, h, w), float32, one for each prompt and seed; `decode` makes images of them.

    A function of (weights, prompt, seed, steps, guidance scale, scheduler configuration): a scheduler that draws
    noise as it goes draws it from the sample's own seed. Nothing of the pipeline is changed.

    on_step(index, x0) is called after each step with its index, from 0, and the current estimate of the clean
    latents (B, C, h, w); what it raises (Cancelled) ends the sampling. `maps`, from an enclosing `capture`, is told
    each step. `prompt_embeds`, where given, stands in for the encoded prompts. `few_steps`, where given, stands in for
    steps, guidance scale and scheduler; its adapter has to be on. `trail` gets the latents (B, C, h, w) before each
    step. No gradient is kept.

    Raises InputError when the lists differ in length or a number is out of range.
    """
    _check_request(prompts, seeds, steps, guidance_scale)
    embeds = prompt_embeds if prompt_embeds is not None else encode_prompts(pipeline, prompts)
    unet = pipeline.unet
    scheduler = few_step_scheduler(pipeline, few_steps) if few_steps else fresh_scheduler(pipeline)
    guidance_scale = 1.0 if few_steps else guidance_scale
    generators = seeded_generators(seeds)
    shape = (int(unet.config.in_channels), *(grid_hw or latent_hw(unet.config)))
    with torch.inference_mode():
        if not few_steps:
            scheduler.set_timesteps(steps, device=unet.device)
        takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        draw = {"generator": generators} if takes_generator else {}
        latents = _draw_noise(generators, shape).to(unet.device) * scheduler.init_noise_sigma
        for index, t in enumerate(scheduler.timesteps):
            scaled = scheduler.scale_model_input(latents, t)
            if trail is not None:
                trail.append(latents.cpu())
            if maps is not None:
                maps.begin_step(index, len(scheduler.timesteps), len(prompts))
            prediction = noise_pred(unet, scaled, t, embeds, guidance_scale)
            latents = scheduler.step(prediction, t, latents, return_dict=False, **draw)[0]
            if on_step is not None:
                on_step(index, split_prediction(scheduler, prediction, scaled, t).x0)
    # A copy made outside inference mode is an ordinary tensor, which a training step may save for its backward pass.
    return latents.clone()


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
