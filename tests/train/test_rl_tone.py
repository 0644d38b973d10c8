"""Rewards that do not speak of how light a picture is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from medviz.rewards.composite import Composite
from tests import tiny
from tests.train.test_rl_learner import DOMAIN, SMALL, brightness, copied, onlooker
from train.rl.learner import RlLearner
from train.rl.scoring import Scorer
from train.rl.tone import tones, without_tone

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
