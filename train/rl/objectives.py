"""What makes an image that was better than its prompt's others more likely: one function a method over one replay.

``ddpo``: importance sampling with PPO's clip, Black et al. (arXiv 2305.13301) after Schulman et al. (arXiv 1707.06347).
``grpo``: the same with group-normalised advantages, and a KL term to the adapter-free model (Flow-GRPO, arXiv
2505.05470). ``forward``: matching on the forward process with implicit positive and negative policies (DiffusionNFT,
arXiv 2509.16117), here on the unet's own target, the noise or the velocity: it needs clean latents only, so any solver
may draw them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from medviz.errors import InputError
from train.rl.advantages import Advantages, centred_advantages, group_advantages, running_advantages
from train.rl.log_prob import DdimStep, kl_same_std


@dataclass(frozen=True)
class Replay:
    """B (image, timestep) pairs seen again.

    advantages (B,) in [-advantage_clip, advantage_clip]. Gradients flow from `step` and `prediction`, the policy's.
    Reverse process: step, the DDIM step at the stored outcome; old_log_prob (B,) of the rollout; reference_mean
    (B, C, h, w) of the adapter-free step, or None. Forward process: prediction (B, C, h, w); target (B, C, h, w), the
    noise or velocity that was mixed in; old_prediction and reference_prediction (B, C, h, w), of the policy that drew
    the images and of the adapter-free model, the latter None where it is not wanted.
    """

    advantages: torch.Tensor
    step: DdimStep | None = None
    old_log_prob: torch.Tensor | None = None
    reference_mean: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    target: torch.Tensor | None = None
    old_prediction: torch.Tensor | None = None
    reference_prediction: torch.Tensor | None = None


@dataclass(frozen=True)
class ObjectiveOptions:
    """clip_range: of the ratio, about 1; beta: strength of the implicit policies, in (0, 1]; advantage_clip: bound of
    the advantages; kl_weight: weight of the divergence from the adapter-free model."""

    clip_range: float = 1e-4
    beta: float = 1.0
    advantage_clip: float = 5.0
    kl_weight: float = 0.0


@dataclass(frozen=True)
class Losses:
    """loss (B,): what the mean of is minimised; figures: (B,) each, without gradient, to be averaged and logged."""

    loss: torch.Tensor
    figures: dict[str, torch.Tensor]


def clipped_policy_loss(
    log_prob: torch.Tensor, old_log_prob: torch.Tensor, advantages: torch.Tensor, clip_range: float
) -> Losses:
    """PPO's clipped surrogate, max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), each image for itself; arguments (B,)."""
    difference = log_prob - old_log_prob
    ratio = difference.exp()
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    with torch.no_grad():
        figures = {
            "ratio": ratio.clone(),
            "approx_kl": 0.5 * difference.square(),
            "clip_fraction": ((ratio - 1).abs() > clip_range).float(),
        }
    return Losses(torch.maximum(-advantages * ratio, -advantages * clipped), figures)


def ddpo(replay: Replay, options: ObjectiveOptions) -> Losses:
    """Clipped importance sampling; with a kl_weight also the divergence of the step from the adapter-free model's."""
    if replay.step is None or replay.old_log_prob is None:
        raise InputError("ddpo and grpo replay DDIM steps with stored log-probabilities; this replay has none")
    losses = clipped_policy_loss(replay.step.log_prob, replay.old_log_prob, replay.advantages, options.clip_range)
    if replay.reference_mean is None:
        return losses
    kl = kl_same_std(replay.step.mean, replay.reference_mean, replay.step.std)
    return Losses(losses.loss + options.kl_weight * kl, {**losses.figures, "reference_kl": kl.detach()})


def forward(replay: Replay, options: ObjectiveOptions) -> Losses:
    """r |v+ - v|^2 + (1 - r) |v- - v|^2 with v+ = (1 - b) v_old + b v_theta and v- = (1 + b) v_old - b v_theta.

    r = (1 + A / advantage_clip) / 2 is how likely the image is one to imitate. Each square is divided by its own mean
    size, held constant, so that steep and flat timesteps weigh alike; the whole is multiplied by advantage_clip / b, so
    that neither knob changes the size of the gradient at the start. kl_weight times the squared distance from the
    adapter-free prediction is added.
    """
    if replay.prediction is None or replay.target is None or replay.old_prediction is None:
        raise InputError(
            "the forward objective replays noised latents with a target and an old prediction; this replay has none"
        )
    b, policy, old, reference = options.beta, replay.prediction, replay.old_prediction, replay.reference_prediction
    r = 0.5 + 0.5 * (replay.advantages / options.advantage_clip).clamp(-1, 1)
    positive = _relative_error((1 - b) * old + b * policy, replay.target)
    negative = _relative_error((1 + b) * old - b * policy, replay.target)
    loss = options.advantage_clip / b * (r * positive + (1 - r) * negative)
    moved = (policy - old).square().flatten(1).mean(1)
    figures = {"positive": positive.detach(), "negative": negative.detach(), "moved": moved.detach()}
    if reference is None:
        return Losses(loss, figures)
    distance = (policy - reference).square().flatten(1).mean(1)
    return Losses(loss + options.kl_weight * distance, {**figures, "reference_kl": distance.detach()})


def _relative_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square error of each image over its mean absolute error, the divisor without gradient: (B,)."""
    error = prediction - target
    size = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return error.square().flatten(1).mean(1) / size


@dataclass(frozen=True)
class Objective:
    """A method: its loss, the process it replays, how rewards become advantages, its least number of updates an epoch.

    With one update an epoch every ratio is 1 when it is made and the clip never acts, hence 2 for the reverse process.
    """

    loss: Callable[[Replay, ObjectiveOptions], Losses]
    process: Literal["reverse", "forward"]
    advantages: Callable[..., Advantages]
    minimum_updates: int


OBJECTIVES: dict[str, Objective] = {
    "ddpo": Objective(ddpo, "reverse", running_advantages, 2),
    "grpo": Objective(ddpo, "reverse", group_advantages, 2),
    "forward": Objective(forward, "forward", centred_advantages, 1),
}


def get_objective(name: str) -> Objective:
    """The method called `name`; InputError names the known ones."""
    if name not in OBJECTIVES:
        raise InputError(f"no objective {name!r}; allowed are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
