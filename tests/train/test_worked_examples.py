"""What ARCHITECTURE.md says under "Where to add", done: a reward and a method, each one function and one entry.

Copy them. The reward asks that a picture be well exposed. The method is reward-weighted regression (Peters & Schaal
2007; Lee et al., arXiv 2302.12192): the denoising loss of the first stage, each image weighted by exp(advantage).
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medviz.domains import get_domain
from medviz.rewards.composite import composite
from medviz.rewards.registry import REWARDS, Drawn, safe_rewards
from tests import tiny
from tests.train import toy_density
from train.rl.learner import RlLearner
from train.rl.objectives import OBJECTIVES, Losses, Objective, ObjectiveOptions, Replay, get_objective
from train.rl.recipe import RlConfig, check
from train.rl.safeguards import Opinion
from train.rl.scoring import Scorer

EXPOSURE = 0.1


def exposure(drawn: Drawn) -> torch.Tensor:
    """How near the mean brightness is to EXPOSURE, 0 at best; images lie in [-1, 1]."""
    return -(drawn.images.mean(dim=(1, 2, 3)) - EXPOSURE).abs()


def weighted_regression(replay: Replay, options: ObjectiveOptions) -> Losses:
    """exp(A) |prediction - target|^2, the mean over elements: better images are imitated more, none is pushed away."""
    weight = replay.advantages.exp()
    error = (replay.prediction - replay.target).square().flatten(1).mean(1)
    return Losses(weight * error, {"imitation_weight": weight.detach()})


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two entries; in the project they stand in the two tables themselves."""
    monkeypatch.setitem(REWARDS, "exposure", exposure)
    monkeypatch.setitem(OBJECTIVES, "rwr", Objective(weighted_regression, "forward", "group"))


def onlooker(images, parsed):
    return Opinion(images[:, 0, 0, 0], torch.ones(len(images)), images.flatten(1))


def test_the_reward_is_as_computed_by_hand_and_leaves_its_images_alone(entered):
    images = torch.stack([torch.full((3, 2, 2), level) for level in (0.1, -0.4, 1.0)])
    before = images.clone()
    prompts = tuple(get_domain("dermatology").parse(p) for p in get_domain("dermatology").validation_prompts()[:3])
    found = safe_rewards(REWARDS["exposure"], Drawn(images, prompts))
    assert found.values.tolist() == pytest.approx([0.0, -0.5, -0.9], abs=1e-6)
    assert torch.equal(images, before)


def test_the_method_imitates_the_better_image(entered):
    prediction = torch.zeros(2, 2, 1, 1, requires_grad=True)
    replay = Replay(torch.tensor([1.0, -1.0]), prediction=prediction, target=torch.ones(2, 2, 1, 1))
    get_objective("rwr").loss(replay, ObjectiveOptions()).loss.sum().backward()
    # d/dp exp(A) mean((p - 1)^2) at p = 0, over two elements: -exp(A)
    assert prediction.grad[:, 0, 0, 0].tolist() == pytest.approx([-np.e, -1 / np.e])


def test_a_recipe_names_both_and_the_model_follows(entered):
    """On the toy density: brightness is the mean of the two coordinates and an empty third colour."""
    config = RlConfig(out="", steps=40, objective="rwr", reward_function="exposure", invented_prompts=0)
    config = replace(config, prompts_per_epoch=4, images_per_prompt=16, rollout_steps=6, rollout_batch=64)
    config = replace(config, guidance_scale=1.0, micro_batch=64, timesteps_per_image=4, updates=2, rank=1)
    config = replace(config, learning_rate=0.05, lora_alpha=1.0, anchor_weight=0.0, evaluate_every=999)
    config = replace(config, evaluation_prompts=2, evaluation_images=2, evaluation_steps=2)
    check(config)
    pipeline = toy_density.pipeline(tiny.make_pipeline("dermatology"))
    learner = RlLearner(config, pipeline, get_domain("dermatology"), Scorer(composite({"exposure": 1.0})), onlooker)
    rewards = [learner.update(step)["reward"] for step in range(config.steps)]
    assert np.mean(rewards[-5:]) > 0.7 * np.mean(rewards[:5])  # rewards are below 0
