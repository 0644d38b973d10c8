"""The stochastic DDIM step and the log-probability of what it drew.

Denoising as a Markov decision process: Black et al., "Training Diffusion Models with Reinforcement Learning" (DDPO,
arXiv 2305.13301). The step is equation 12 of Song et al., "Denoising Diffusion Implicit Models" (arXiv 2010.02502).
Rollout and replay both call :func:`ddim_step`, so before the first update they agree on every log-probability.
A step outside the window of stochastic steps (MixGRPO, arXiv 2507.21802) draws nothing and goes through
:func:`deterministic_step`: it has no log-probability, and asking for one is an error.
Coefficients are worked out in float64 and log-probabilities are kept in float32: in half precision their rounding error
is as large as the clip range of 1e-4.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler

from medviz.errors import InputError
from medviz.generation.sampling import split_prediction

PREDICTION_TYPES = ("epsilon", "v_prediction")
Steps = int | np.ndarray
"""The step of a chain that all rows are at, or one a row (B,)."""


class ZeroVarianceError(InputError):
    """A step of the schedule draws nothing at random, so the log-probability of its outcome does not exist."""


@dataclass(frozen=True)
class DdimSchedule:
    """The steps of one DDIM chain of T steps, as Python floats (float64).

    timesteps: what the unet is told, descending. alphas_prev: cumulative product at the timestep stepped to; stds:
    standard deviation of the noise drawn, 0 where a step draws none. scheduler: says what a prediction at a timestep
    stands for.
    """

    timesteps: tuple[int, ...]
    alphas_prev: tuple[float, ...]
    stds: tuple[float, ...]
    scheduler: DDIMScheduler

    def __len__(self) -> int:
        return len(self.timesteps)

    def timestep(self, index: Steps) -> torch.Tensor:
        """What the unet is told at `index`: int64, () or (B,) for one step a row. A tensor, for a compiled unet is
        compiled again for every other number."""
        return torch.tensor(self.timesteps[index] if isinstance(index, int) else [self.timesteps[i] for i in index])

    @property
    def stochastic(self) -> tuple[int, ...]:
        """The steps that draw noise, ascending: those that have a log-probability."""
        return tuple(index for index, std in enumerate(self.stds) if std > 0)

    @property
    def noise_weights(self) -> torch.Tensor:
        """Weight (T,) fp32 of each step by the noise it draws, 1 on average over those that draw any.

        The gradient of a log-probability is that of its mean over the noise, so the steps that draw next to none have
        nearly all of a chain's: with trailing spacing the last has some hundred times the first's. Times its noise, a
        step weighs by how far it moves the latents.
        """
        stds = torch.tensor(self.stds)
        return stds / stds[list(self.stochastic)].mean()

    def windowed(self, start: int, length: int) -> "DdimSchedule":
        """The same chain with noise in the steps start .. start + length - 1 alone.

        Raises InputError for a window that is empty or does not lie in the chain.
        """
        if length < 1 or not 0 <= start <= len(self) - length:
            raise InputError(f"a window of {length} steps at step {start} does not lie in a chain of {len(self)}")
        inside = range(start, start + length)
        return replace(self, stds=tuple(std if i in inside else 0.0 for i, std in enumerate(self.stds)))


@dataclass(frozen=True)
class DdimStep:
    """One step of B chains.

    prev_latents (B, C, h, w) fp32: what was drawn (rollout) or given (replay); mean (B, C, h, w) fp32 and std, one
    number or (B, 1, 1, 1): the normal distribution it was drawn from; log_prob (B,) fp32: mean over the latent's
    elements, not their sum.
    """

    prev_latents: torch.Tensor
    mean: torch.Tensor
    std: float | torch.Tensor
    log_prob: torch.Tensor


def stochastic_schedule(scheduler_config: Mapping[str, Any], steps: int, eta: float = 1.0) -> DdimSchedule:
    """The DDIM chain of `steps` steps for a model trained with `scheduler_config` (any diffusers scheduler's config).

    `set_alpha_to_one` is off and clipping of the estimate is off: with either of them the last step has no variance or
    is not a normal distribution. Leading spacing gets `steps_offset` 1 where the config says nothing. A config that
    says 0 steps from timestep 0 to itself. eta in (0, 1] scales the noise (1: as much as DDPM).

    Raises ZeroVarianceError, naming the step, for eta 0 and for any step whose variance is 0; InputError for a
    prediction type or eta outside what is allowed.
    """
    if eta == 0:
        raise ZeroVarianceError("eta is 0: a deterministic chain has no log-probabilities; allowed are 0 < eta <= 1")
    if not 0 < eta <= 1:
        raise InputError(f"eta is {eta}; allowed are 0 < eta <= 1")
    schedule = _schedule(scheduler_config, steps, eta)
    for index, (t, std) in enumerate(zip(schedule.timesteps, schedule.stds, strict=True)):
        if std <= 0:
            config = schedule.scheduler.config
            raise ZeroVarianceError(
                f"step {index} (timestep {t}) of {steps} has variance 0 and therefore no log-probability; "
                f"steps_offset is {config.steps_offset}, timestep_spacing {config.timestep_spacing!r}: use "
                "steps_offset 1 with leading spacing, or trailing spacing"
            )
    return schedule


def deterministic_schedule(scheduler_config: Mapping[str, Any], steps: int) -> DdimSchedule:
    """The same chain without noise (eta 0): it can be differentiated, and has no log-probabilities."""
    return _schedule(scheduler_config, steps, 0.0)


def _schedule(scheduler_config: Mapping[str, Any], steps: int, eta: float) -> DdimSchedule:
    wanted = {
        "steps_offset": 1,
        **scheduler_config,
        "set_alpha_to_one": False,
        "clip_sample": False,
        "thresholding": False,
    }
    understood = inspect.signature(DDIMScheduler.__init__).parameters
    scheduler = DDIMScheduler(**{k: v for k, v in wanted.items() if k in understood})
    if scheduler.config.prediction_type not in PREDICTION_TYPES:
        raise InputError(f"prediction_type is {scheduler.config.prediction_type!r}; allowed are {PREDICTION_TYPES}")
    scheduler.set_timesteps(steps)
    cumulative = scheduler.alphas_cumprod.double().tolist()
    timesteps = [int(t) for t in scheduler.timesteps]
    stride = scheduler.config.num_train_timesteps // steps
    alphas = [cumulative[t] for t in timesteps]
    alphas_prev = [cumulative[t - stride] if t >= stride else cumulative[0] for t in timesteps]
    stds = [eta * _ddpm_std(a, p) for a, p in zip(alphas, alphas_prev, strict=True)]
    for t, a in zip(timesteps, alphas, strict=True):
        if a <= 0 and scheduler.config.prediction_type == "epsilon":
            raise InputError(f"timestep {t} holds no signal (alpha 0): an epsilon prediction cannot start there")
    return DdimSchedule(tuple(timesteps), tuple(alphas_prev), tuple(stds), scheduler)


def _ddpm_std(alpha: float, alpha_prev: float) -> float:
    """Equation 16 of DDIM at eta 1; 0 where the step goes nowhere."""
    variance = (1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)
    return math.sqrt(max(variance, 0.0))


def gaussian_log_prob(sample: torch.Tensor, mean: torch.Tensor, std: float | torch.Tensor) -> torch.Tensor:
    """Log-density of `sample` (B, ...) under N(mean, std^2 I), its mean over the elements of each sample: (B,).

    std: one number, or one a sample (B, 1, ...).

    In fp32, or in float64 where `mean` is.
    The mean, not the sum: a clip range on the ratio then means a different thing for another latent size.
    """
    working = torch.float64 if mean.dtype == torch.float64 else torch.float32
    squared = (sample.to(working) - mean.to(working)).square() / (2 * std**2)
    log_std = std.log() if isinstance(std, torch.Tensor) else math.log(std)
    return -(squared + log_std + 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)


def ddim_step(
    schedule: DdimSchedule,
    index: Steps,
    prediction: torch.Tensor,
    latents: torch.Tensor,
    *,
    noise: torch.Tensor | None = None,
    prev_latents: torch.Tensor | None = None,
) -> DdimStep:
    """Step `index` of the chain, for a rollout (give `noise`, standard normal) or a replay (give `prev_latents`).

    prediction, latents, noise, prev_latents: (B, C, h, w); worked in fp32 (or float64 when all are).
    Raises InputError unless exactly one of `noise` and `prev_latents` is given, ZeroVarianceError for a step that
    draws nothing.
    """
    for one in {index} if isinstance(index, int) else set(index.tolist()):
        if schedule.stds[one] <= 0:
            raise ZeroVarianceError(f"step {one} draws nothing: it is deterministic and has no log-probability")
    mean = deterministic_step(schedule, index, prediction, latents)
    std = _at(index, schedule.stds.__getitem__, mean)
    if noise is not None and prev_latents is None:
        drawn = (mean + std * noise.to(mean)).detach()
    elif prev_latents is not None and noise is None:
        drawn = prev_latents.to(mean).detach()
    else:
        raise InputError("give either noise (to draw) or prev_latents (to weigh what was drawn), not both or neither")
    return DdimStep(drawn, mean, std, gaussian_log_prob(drawn, mean, std))


def deterministic_step(
    schedule: DdimSchedule, index: Steps, prediction: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """Where step `index` leads before its noise is added, (B, C, h, w) fp32 (float64 where latents are); keeps the
    gradient. With a std of 0 that is the whole step."""
    working = torch.float64 if latents.dtype == torch.float64 else torch.float32
    latents, prediction = latents.to(working), prediction.to(working)
    read = split_prediction(schedule.scheduler, prediction, latents, schedule.timestep(index))
    signal = _at(index, lambda i: math.sqrt(schedule.alphas_prev[i]), latents)
    noise_level = _at(
        index, lambda i: math.sqrt(max(1 - schedule.alphas_prev[i] - schedule.stds[i] ** 2, 0.0)), latents
    )
    return signal * read.x0 + noise_level * read.noise


def _at(index: Steps, coefficient: Callable[[int], float], like: torch.Tensor) -> float | torch.Tensor:
    """The coefficient of a step; (B, 1, 1, 1) as `like` for one step a row."""
    if isinstance(index, int):
        return coefficient(index)
    return torch.tensor([coefficient(i) for i in index.tolist()], dtype=like.dtype, device=like.device)[
        :, None, None, None
    ]


def kl_same_std(mean: torch.Tensor, reference_mean: torch.Tensor, std: float | torch.Tensor) -> torch.Tensor:
    """KL divergence of two normals that share `std`, the mean over elements of each sample: (B,)."""
    return ((mean - reference_mean).square() / (2 * std**2)).flatten(1).mean(1)
