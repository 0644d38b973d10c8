"""Rewards that do not speak of how light a picture is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medviz.errors import InputError
from medviz.rewards.composite import Composite
from tests import tiny
from tests.train.test_rl_learner import DOMAIN, SMALL, brightness, copied, onlooker
from train import checkpoint
from train.rl.learner import RlLearner
from train.rl.scoring import Scorer
from train.rl.tone import tones, toward, without_tone

PROMPTS = np.repeat(np.arange(6), 8)


def centred(values: np.ndarray) -> np.ndarray:
    """Each value less the mean of its prompt's."""
    return values - np.stack([values[prompt == PROMPTS].mean(axis=0) for prompt in range(6)])[PROMPTS]


def test_tones_are_the_mean_colours_of_the_middle_and_around_it():
    images = torch.zeros(2, 3, 8, 8)
    images[0, 0, 2:6, 2:6] = 1.0
    images[1, 2] = 0.5
    images[1, 2, 2:6, 2:6] = -0.5
    assert tones(images).tolist() == [[1.0, 0, 0, 0, 0, 0], [0, 0, -0.5, 0, 0, 0.5]]


def test_what_tone_explains_is_gone_and_the_rest_stays():
    rng = np.random.default_rng(0)
    tone, other, level = rng.normal(size=(48, 2)), rng.normal(size=48), rng.normal(size=6)[PROMPTS]
    valid, rewards = np.ones(48, bool), other + level - 3.0 * tone[:, 0] + 2.0 * tone[:, 1]
    found, plain = (without_tone(each, tone, PROMPTS, valid) for each in (rewards, other + level))
    np.testing.assert_allclose(centred(found), centred(plain), atol=0.05)
    np.testing.assert_allclose(found - centred(found), rewards - centred(rewards), atol=1e-12)
    assert abs(centred(tone).T @ found).max() < 0.1 * abs(centred(tone).T @ rewards).max()
    assert np.corrcoef(centred(found), centred(other))[0, 1] > 0.9


def test_what_one_prompt_asks_of_tone_stays():
    """Half of the prompts want it light and half dark: there is no line for all of them."""
    rng = np.random.default_rng(1)
    tone = rng.normal(size=(48, 1))
    rewards = np.where(PROMPTS % 2 == 0, 1.0, -1.0) * tone[:, 0]
    found = without_tone(rewards, tone, PROMPTS, np.ones(48, bool))
    assert np.corrcoef(found, rewards)[0, 1] > 0.9


@pytest.mark.parametrize("tone", [np.zeros((48, 3)), np.repeat(np.linspace(0, 1, 6), 8)[:, None]])
def test_pictures_of_one_tone_keep_their_rewards(tone):
    rewards = np.random.default_rng(2).normal(size=48)
    np.testing.assert_allclose(without_tone(rewards, tone, PROMPTS, np.ones(48, bool)), rewards)


def test_a_failed_reward_has_no_say():
    rng = np.random.default_rng(3)
    tone, rewards, valid = rng.normal(size=(48, 2)), rng.normal(size=48), np.ones(48, bool)
    valid[::5] = False
    wild = np.where(valid, rewards, 1e6)
    np.testing.assert_array_equal(
        without_tone(wild, tone, PROMPTS, valid)[valid], without_tone(rewards, tone, PROMPTS, valid)[valid]
    )
    assert (without_tone(wild, tone, PROMPTS, valid)[~valid] == 1e6).all()
    np.testing.assert_array_equal(without_tone(rewards, tone, PROMPTS, np.zeros(48, bool)), rewards)


def test_a_reward_of_lightness_alone_teaches_nothing_to_who_is_blind_to_it():
    base, spreads = tiny.make_pipeline("dermatology"), []
    for blind in (False, True):
        config = replace(SMALL, objective="forward", tone_blind=blind, prompts_per_epoch=4, images_per_prompt=8)
        made = RlLearner(config, copied(base), DOMAIN, Scorer(Composite({"g": brightness}, {"g": 1.0})), onlooker)
        rewards = made.rewarded(made.draw(0)).values.reshape(4, 8)
        spreads.append(rewards.std(axis=1).mean())
    assert spreads[1] < 0.1 * spreads[0]


def test_a_direction_rewards_those_that_lie_that_way_among_their_prompts():
    rng = np.random.default_rng(4)
    tone, rewards, valid = 0.1 * rng.normal(size=(48, 2)) + PROMPTS[:, None], 5 * rng.normal(size=48), np.ones(48, bool)
    valid[:4] = False
    found = toward(np.array([0.1, 0.0]), rewards, tone, PROMPTS, valid)
    assert (found[:4] == 0).all()
    others = np.where(valid, PROMPTS, 9)
    assert all(abs(found[others == prompt].mean()) < 1e-9 for prompt in range(6))
    assert np.corrcoef(found[8:], centred(tone)[8:, 0])[0, 1] > 0.999
    assert found[8:].std() / rewards.std() == pytest.approx(0.1 / 0.1, rel=0.2)
    np.testing.assert_allclose(found, -toward(np.array([-0.1, 0.0]), rewards, tone, PROMPTS, valid))
    assert (toward(np.zeros(2), rewards, tone, PROMPTS, valid) == 0).all()


def lightened(base, **options) -> RlLearner:
    config = {"objective": "forward", "prompts_per_epoch": 4, "images_per_prompt": 8, "learning_rate": 2e-2}
    made = replace(SMALL, **{**config, "anchor_weight": 0.0, "evaluate_every": 99, "steps": 99, **options})
    return RlLearner(made, copied(base), DOMAIN, Scorer(Composite({"g": brightness}, {"g": 1.0})), onlooker)


def test_what_the_untrained_model_draws_has_not_moved():
    made = lightened(tiny.make_pipeline("dermatology"), tone_held=8)
    assert made.tone.watch(0, made.draw(0)) == {"tone_moved": 0.0, "tone_moved_middle": 0.0}
    rewards = made.rewarded(made.draw(0)).values
    plain = lightened(tiny.make_pipeline("dermatology"))
    np.testing.assert_allclose(rewards, plain.rewarded(plain.draw(0)).values)


def test_once_pictures_got_lighter_darker_ones_are_rewarded_whatever_the_reward_likes():
    made = lightened(tiny.make_pipeline("dermatology"), tone_held=8)
    rollout = made.draw(0)
    liked = made.rewarded(rollout).values.reshape(4, 8)
    made.tone.moved = np.array([0.5, 0.5, 0.5, 0.5, 0.5, 0.5])
    found = made.rewarded(rollout).values.reshape(4, 8)
    for before, after in zip(liked, found, strict=True):
        assert np.corrcoef(before, after)[0, 1] < -0.5


def test_a_resumed_run_knows_how_far_the_tones_had_moved(tmp_path):
    base = tiny.make_pipeline("dermatology")
    whole, first, second = (lightened(base, tone_held=8) for _ in range(3))
    figures = [whole.update(step) for step in range(3)]
    for step in range(2):
        first.update(step)
    checkpoint.save(tmp_path, 2, first.state())
    second.load_state(checkpoint.load(tmp_path)[1])
    assert second.update(2) == figures[2]
    assert figures[2]["forwards_tone"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tone_held": 33}, "allowed are 0 to the 32 images"),
        ({"tone_rate": -1.0}, "tone_rate is -1.0"),
        ({"tone_held": 4, "objective": "ddpo"}, "tone_held goes with the forward objectives"),
    ],
)
def test_what_cannot_be_held_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        lightened(tiny.make_pipeline("dermatology"), **options)
