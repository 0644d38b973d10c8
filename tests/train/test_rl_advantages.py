import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medviz.errors import InputError
from train.rl.advantages import (
    ADVANTAGES,
    PromptStatistics,
    centred_advantages,
    group_advantages,
    leave_one_out_advantages,
    running_advantages,
)

METHODS = list(ADVANTAGES.values())
NORMALISED = [method for method in METHODS if method is not leave_one_out_advantages]


def all_valid(rewards):
    return np.ones(len(rewards), bool)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [0.1, 1 / 3, 7, -2.5])
@pytest.mark.parametrize("size", [3, 6, 7])
def test_equal_rewards_give_exactly_zero(method, value, size):
    rewards, ids = np.full(2 * size, value), np.repeat([4, 9], size)
    result = method(ids, rewards, all_valid(rewards), 5.0, PromptStatistics(32, 1))
    assert np.array_equal(result.values, np.zeros(2 * size, np.float32))
    assert result.zero_variance == 1.0


@pytest.mark.parametrize("method", NORMALISED)
def test_integer_rewards_are_not_truncated(method):
    rewards, ids = np.array([1, 2, 3, 5]), np.zeros(4, int)
    result = method(ids, rewards, all_valid(rewards), 5.0, PromptStatistics(32, 1))
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
    np.testing.assert_allclose(result.values, expected, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_of_one_gives_no_nan(method):
    for rewards in (np.array([0.7]), np.array([0.7, 0.1, 0.4])):
        ids = np.arange(len(rewards))
        result = method(ids, rewards, all_valid(rewards), 5.0, PromptStatistics(32, 1))
        assert np.array_equal(result.values, np.zeros(len(rewards), np.float32))


@pytest.mark.parametrize("method", NORMALISED)
def test_normalised_first_and_clamped_afterwards(method):
    rewards, ids = np.array([0.0] * 15 + [1000.0]), np.zeros(16, int)
    result = method(ids, rewards, all_valid(rewards), 2.0, PromptStatistics(32, 1))
    # Clamped first, the outlier would be 2 of a range of 2 and end at about 3.9 standard deviations.
    assert result.values.max() == 2.0
    np.testing.assert_allclose(result.values[:15], -(1000 / 16) / rewards.std(), rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_masked_rewards_count_for_nothing(method):
    rewards, valid = np.array([1.0, np.nan, 3.0, np.inf]), np.array([True, False, True, False])
    statistics = PromptStatistics(32, 1)
    result = method(np.zeros(4, int), rewards, valid, 5.0, statistics)
    # Left out itself, each of two rewards is as far from the other as they are apart: 2.
    size = 2 if method is leave_one_out_advantages else 1
    np.testing.assert_allclose(result.values, [-size, 0, size, 0], atol=1e-5)
    assert list(statistics.history[0]) == [1.0, 3.0]


def test_nothing_valid_gives_zeros():
    for method in METHODS:
        result = method(np.zeros(3, int), np.full(3, np.nan), np.zeros(3, bool), 5.0, PromptStatistics(32, 1))
        assert np.array_equal(result.values, np.zeros(3, np.float32))


def test_running_statistics_compare_with_the_prompts_own_past():
    statistics = PromptStatistics(size=4, minimum=2)
    running_advantages(np.array([7, 7]), np.array([0.0, 2.0]), np.ones(2, bool), 5.0, statistics)
    result = running_advantages(np.array([7, 7]), np.array([4.0, 6.0]), np.ones(2, bool), 5.0, statistics)
    past = np.array([0.0, 2.0, 4.0, 6.0])
    np.testing.assert_allclose(result.values, (past[2:] - 3) / (past.std() + 1e-6), rtol=1e-6)


def test_a_short_history_falls_back_to_the_batch():
    statistics = PromptStatistics(size=32, minimum=16)
    rewards = np.array([0.0, 1.0, 2.0, 5.0])
    result = running_advantages(np.array([0, 0, 1, 1]), rewards, np.ones(4, bool), 5.0, statistics)
    np.testing.assert_allclose(result.values, (rewards - 2) / (rewards.std() + 1e-6), rtol=1e-6)


def test_only_the_newest_rewards_are_kept():
    statistics = PromptStatistics(size=3, minimum=1)
    statistics.add(1, [1, 2, 3, 4, 5])
    assert list(statistics.history[1]) == [3.0, 4.0, 5.0]


def test_group_advantages_stay_inside_the_group():
    rewards, ids = np.array([1.0, 2.0, 101.0, 102.0]), np.array([0, 0, 1, 1])
    result = group_advantages(ids, rewards, np.ones(4, bool), 5.0, PromptStatistics())
    np.testing.assert_allclose(result.values, [-1, 1, -1, 1], atol=1e-5)


def test_leave_one_out_compares_with_the_mean_of_the_others():
    rewards, ids = np.array([1, 2, 3, 5, 9, 9]), np.array([0, 0, 0, 0, 1, 1])
    result = leave_one_out_advantages(ids, rewards, np.ones(6, bool), 5.0, PromptStatistics())
    others = [(2 + 3 + 5) / 3, (1 + 3 + 5) / 3, (1 + 2 + 5) / 3, (1 + 2 + 3) / 3]
    np.testing.assert_allclose(
        result.values, [1 - others[0], 2 - others[1], 3 - others[2], 5 - others[3], 0, 0], rtol=1e-6
    )
    assert result.zero_variance == 0.5
    assert leave_one_out_advantages(ids, 100 * rewards, np.ones(6, bool), 5.0, PromptStatistics()).values.max() == 5.0


def test_statistics_are_kept_by_prompt_id_whatever_the_prompts_say():
    statistics = PromptStatistics(size=8, minimum=2)
    running_advantages(np.array([3, 3, 8, 8]), np.array([0.0, 2.0, 100.0, 102.0]), np.ones(4, bool), 5.0, statistics)
    assert {prompt: list(kept) for prompt, kept in statistics.history.items()} == {3: [0.0, 2.0], 8: [100.0, 102.0]}


def test_a_nearly_flat_prompt_is_not_blown_up_beside_a_spread_one():
    rewards, ids = np.array([0.500, 0.501, -1.0, 1.0]), np.array([0, 0, 1, 1])
    centred = centred_advantages(ids, rewards, np.ones(4, bool), 5.0, PromptStatistics())
    grouped = group_advantages(ids, rewards, np.ones(4, bool), 5.0, PromptStatistics())
    assert abs(centred.values[0]) < 0.01
    assert abs(grouped.values[0]) > 0.9


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=24),
    st.sampled_from(METHODS),
)
def test_always_finite_within_the_clip_and_blind_to_a_constant(samples, method):
    ids, rewards = (np.array(column) for column in zip(*samples, strict=True))
    result = method(ids, rewards, all_valid(rewards), 5.0, PromptStatistics(32, 1))
    assert np.isfinite(result.values).all()
    assert (np.abs(result.values) <= 5).all()
    shifted = method(ids, rewards + 64, all_valid(rewards), 5.0, PromptStatistics(32, 1))
    np.testing.assert_allclose(shifted.values, result.values, atol=1e-2)


def test_statistics_survive_json_to_the_last_bit():
    statistics = PromptStatistics(size=4, minimum=2)
    statistics.add(3, [0.1, 1 / 3, 2 / 7])
    other = PromptStatistics(size=4, minimum=2)
    other.load_state(json.loads(json.dumps(statistics.state())))
    assert other.history == statistics.history
    assert other.history[3].maxlen == 4


def test_nonsense_is_refused():
    with pytest.raises(InputError, match="minimum"):
        PromptStatistics(size=4, minimum=5)
    with pytest.raises(InputError, match="clip"):
        group_advantages(np.zeros(2, int), np.zeros(2), np.ones(2, bool), 0.0, PromptStatistics())
