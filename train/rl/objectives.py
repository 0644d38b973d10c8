"""What makes an image that was better than its prompt's others more likely: one function a method over one replay.

``ddpo``: importance sampling with PPO's clip, Black et al. (arXiv 2305.13301) after Schulman et al. (arXiv 1707.06347).
``ddpo_sf``: the score-function estimate of the same paper, one update an epoch. ``grpo``: ddpo with advantages inside
the group, and a KL term to the adapter-free model (Flow-GRPO, arXiv 2505.05470). Either may weigh a step by its noise
(TempFlow-GRPO, arXiv 2508.04324).
``forward``: matching on the forward process with implicit positive and negative policies (DiffusionNFT,
arXiv 2509.16117), here on the unet's own target, the noise or the velocity: it needs clean latents only, so any solver
may draw them. ``awm``: the denoising loss of the first stage weighted by the advantage (Advantage Weighted Matching,
arXiv 2509.25050), likewise. ``draft``: the reward's own gradient through the last steps (DRaFT, arXiv 2309.17400;
AlignProp, arXiv 2310.03739).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from medviz.errors import InputError
from train.rl.log_prob import DdimStep, kl_same_std


@dataclass(frozen=True)
class Replay:
    """B (image, timestep) pairs seen again.

    advantages (B,) in [-advantage_clip, advantage_clip]. Gradients flow from `step` and `prediction`, the policy's.
    Reverse process: step, the DDIM step at the stored outcome; old_log_prob (B,) of the rollout; reference_mean
    (B, C, h, w) of the adapter-free step, or None; weight (B,) of the steps, about 1, or None. Forward process:
    prediction (B, C, h, w); target (B, C, h, w), the noise or velocity that was mixed in; old_prediction and
    reference_prediction (B, C, h, w), of the policy that drew the images and of the adapter-free model, None where they
    are not wanted. Direct: rewards (B,), differentiable in the trained weights; prediction and reference_prediction
    (B, K, C, h, w) of the K steps that gradients go through.
    """

    advantages: torch.Tensor
    step: DdimStep | None = None
    old_log_prob: torch.Tensor | None = None
    reference_mean: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    target: torch.Tensor | None = None
    old_prediction: torch.Tensor | None = None
    reference_prediction: torch.Tensor | None = None
    rewards: torch.Tensor | None = None


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
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    clip_range: float,
    weight: torch.Tensor | None = None,
) -> Losses:
    """PPO's clipped surrogate, max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), each image for itself; arguments (B,).

    With a `weight` the ratio is that to its power, so that gradient and clip weigh the step alike.
    """
    difference = log_prob - old_log_prob
    if weight is not None:
        difference = difference * weight
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
    losses = clipped_policy_loss(
        replay.step.log_prob, replay.old_log_prob, replay.advantages, options.clip_range, replay.weight
    )
    return _held_step(losses, replay.step, replay.reference_mean, options.kl_weight, replay.weight)


def ddpo_sf(replay: Replay, options: ObjectiveOptions) -> Losses:
    """-A log p: REINFORCE. Right only while the policy is the one that drew the images, hence one update an epoch.

    Its gradient is that of :func:`ddpo` at a ratio of 1; the ratio is a figure here, and nothing is clipped.
    """
    if replay.step is None or replay.old_log_prob is None:
        raise InputError("ddpo_sf replays DDIM steps with stored log-probabilities; this replay has none")
    figures = clipped_policy_loss(
        replay.step.log_prob.detach(), replay.old_log_prob, replay.advantages, options.clip_range
    ).figures
    losses = Losses(-replay.advantages * replay.step.log_prob, figures)
    return _held_step(losses, replay.step, replay.reference_mean, options.kl_weight)


def _held_step(
    losses: Losses,
    step: DdimStep,
    reference_mean: torch.Tensor | None,
    kl_weight: float,
    weight: torch.Tensor | None = None,
) -> Losses:
    """The same with kl_weight times the divergence of the step from the adapter-free model's, where that is given.

    With a `weight` (B,) the divergence of a step counts as much as its ratio does, so that what holds the policy does
    not lead at the last, nearly noiseless steps.
    """
    if reference_mean is None:
        return losses
    kl = kl_same_std(step.mean, reference_mean, step.std)
    weighted = kl if weight is None else weight * kl
    return Losses(losses.loss + kl_weight * weighted, {**losses.figures, "reference_kl": kl.detach()})


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
    return _held_prediction(Losses(loss, figures), policy, reference, options.kl_weight)


def awm(replay: Replay, options: ObjectiveOptions) -> Losses:
    """A |prediction - target|^2 + kl_weight |prediction - reference|^2, both the mean over elements.

    The squared error stands for the image's negative log-likelihood, so this is the policy gradient without a ratio:
    right only while the policy is the one that drew the images, hence one update an epoch.
    An image below average pushes the prediction away from itself without end: the divergence is what holds it.
    """
    if replay.prediction is None or replay.target is None:
        raise InputError("awm replays noised latents with a target; this replay has none")
    error = (replay.prediction - replay.target).square().flatten(1).mean(1)
    losses = Losses(replay.advantages * error, {"denoising": error.detach()})
    return _held_prediction(losses, replay.prediction, replay.reference_prediction, options.kl_weight)


def draft(replay: Replay, options: ObjectiveOptions) -> Losses:
    """-reward + kl_weight |prediction - reference|^2, the latter the mean over the steps that gradients go through."""
    if replay.rewards is None or replay.prediction is None:
        raise InputError("draft replays the last steps with differentiable rewards; this replay has none")
    losses = Losses(-replay.rewards, {"tail_reward": replay.rewards.detach()})
    return _held_prediction(losses, replay.prediction, replay.reference_prediction, options.kl_weight)


def _held_prediction(
    losses: Losses, prediction: torch.Tensor, reference: torch.Tensor | None, kl_weight: float
) -> Losses:
    """The same with kl_weight times the squared distance from the adapter-free prediction, where that is given."""
    if reference is None:
        return losses
    distance = (prediction - reference).square().flatten(1).mean(1)
    return Losses(losses.loss + kl_weight * distance, {**losses.figures, "reference_kl": distance.detach()})


def _relative_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square error of each image over its mean absolute error, the divisor without gradient: (B,)."""
    error = prediction - target
    size = error.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
    return error.square().flatten(1).mean(1) / size


@dataclass(frozen=True)
class Objective:
    """A method: its loss, what of the images it replays, and what it asks of a recipe.

    replays: "reverse", steps of the stochastic chain; "forward", their clean latents noised again; "direct", the last
    steps with gradients through decoder and reward. advantages: key of ADVANTAGES, where the recipe names no other.
    minimum_updates: optimiser steps an epoch; with one update every ratio is 1 when it is made and a clip never acts,
    hence 2 where there is one. maximum_updates: 0 for no bound. needs_old: replays the policy that drew the images,
    too. needs_kl: has no minimum without a divergence from the adapter-free model.
    """

    loss: Callable[[Replay, ObjectiveOptions], Losses]
    replays: Literal["reverse", "forward", "direct"]
    advantages: str
    minimum_updates: int = 1
    maximum_updates: int = 0
    needs_old: bool = False
    needs_kl: bool = False


OBJECTIVES: dict[str, Objective] = {
    "ddpo": Objective(ddpo, "reverse", "running", minimum_updates=2),
    "ddpo_sf": Objective(ddpo_sf, "reverse", "running", maximum_updates=1),
    "grpo": Objective(ddpo, "reverse", "group", minimum_updates=2),
    "forward": Objective(forward, "forward", "centred", needs_old=True),
    "awm": Objective(awm, "forward", "centred", maximum_updates=1, needs_kl=True),
    "draft": Objective(draft, "direct", "group"),
}


def get_objective(name: str) -> Objective:
    """The method called `name`; InputError names the known ones."""
    if name not in OBJECTIVES:
        raise InputError(f"no objective {name!r}; allowed are {', '.join(OBJECTIVES)}")
    return OBJECTIVES[name]
