"""Figures of an evaluation on arrays whose answer is known by hand or by construction."""

import numpy as np
import pytest
import torch
from torchmetrics.image.kid import poly_mmd

from train.evaluate.alignment import agreement, balanced, target_matrix
from train.evaluate.diversity import paired_distances, per_prompt_distance
from train.evaluate.fidelity import frechet_distance, kernel_distance, kernel_distance_change
from train.evaluate.statistics import (
    half_sample_interval,
    mean_interval,
    paired_difference,
    paired_ratio,
    student_interval,
    student_ratio,
)


def normal(n: int, width: int, shift: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, (n, width))


def test_kernel_distance_is_about_zero_for_one_distribution_and_grows_with_the_shift() -> None:
    reference = normal(200, 16, 0.0, 1)
    values = [kernel_distance(normal(200, 16, shift, 2), reference, half_samples=50) for shift in (0.0, 0.3, 0.6, 1.2)]
    assert values[0].low is not None
    assert values[0].high is not None
    assert values[0].low < 0.0 < values[0].high
    assert [v.value for v in values] == sorted(v.value for v in values)
    assert values[2].low is not None
    assert values[2].low > 0.0


def test_kernel_distance_equals_torchmetrics_at_unit_scale() -> None:
    x, y = normal(40, 8, 0.5, 3), normal(40, 8, 0.0, 4)
    y /= np.sqrt(np.mean(y**2))  # the scale that kernel_distance divides by is then 1
    expected = poly_mmd(torch.from_numpy(y), torch.from_numpy(x)).item()
    assert kernel_distance(x, y, half_samples=2).value == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_does_not_depend_on_the_features_unit() -> None:
    x, y = normal(30, 8, 0.5, 5), normal(50, 8, 0.0, 6)
    assert kernel_distance(x, y).value == pytest.approx(kernel_distance(1000.0 * x, 1000.0 * y).value)


def test_kernel_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    population = kernel_distance(normal(1500, 4, 0.7, 7), normal(1500, 4, 0.0, 8), half_samples=2).value
    covered = 0
    for trial in range(60):
        estimate = kernel_distance(
            normal(80, 4, 0.7, 100 + trial), normal(80, 4, 0.0, 900 + trial), half_samples=80, seed=trial
        )
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= population <= estimate.high
    assert covered >= 50


@pytest.mark.parametrize("shape", [(3, 8), (30,), (30, 7)])
def test_kernel_distance_refuses_too_few_images_and_other_widths(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="feature"):
        kernel_distance(np.ones(shape), normal(30, 8, 0.0, 1))


def test_kernel_distance_refuses_a_network_that_sees_nothing() -> None:
    with pytest.raises(ValueError, match="all zero"):
        kernel_distance(np.zeros((10, 4)), np.zeros((10, 4)))


def test_frechet_distance_of_shifted_equal_covariances_is_the_squared_shift() -> None:
    reference = normal(400, 3, 0.0, 9)
    assert frechet_distance(reference + 2.0, reference) == pytest.approx(3 * 4.0, rel=1e-3)
    assert frechet_distance(reference, reference) == pytest.approx(0.0, abs=1e-3)


def test_a_students_interval_of_five_covers_the_truth_where_a_bootstrap_does_not() -> None:
    samples = np.random.default_rng(0).normal(2.0, 1.0, (400, 5))

    def covered(interval) -> float:
        estimates = [interval(values) for values in samples]
        return float(np.mean([e.low <= 2.0 <= e.high for e in estimates]))

    assert 0.93 < covered(student_interval) < 0.97
    assert covered(lambda values: mean_interval(values, resamples=300)) < 0.88


def test_a_students_interval_by_hand_and_without_enough_units() -> None:
    found = student_interval(np.array([1.0, 2.0, np.nan, 3.0]))
    half = 4.302653 / np.sqrt(3)  # t of 2 degrees of freedom at 97.5 %, spread 1
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.0, 2.0 - half, 2.0 + half, 3))
    assert student_interval(np.array([4.0])).low is None
    assert np.isnan(student_interval(np.array([])).value)


def test_a_ratio_of_pairs_is_their_geometric_mean() -> None:
    found = student_ratio(np.array([2.0, 8.0, 1.0, np.nan]), np.array([1.0, 4.0, 0.0, 1.0]))
    assert (found.value, found.low, found.high, found.n) == pytest.approx((2.0, 2.0, 2.0, 2))
    wide = student_ratio(np.array([1.0, 4.0]), np.array([1.0, 1.0]))
    assert wide.value == pytest.approx(2.0)
    assert wide.low * wide.high == pytest.approx(4.0)


def test_mean_interval_leaves_nan_out_and_brackets_the_mean() -> None:
    estimate = mean_interval(np.array([0.0, 1.0, np.nan, 1.0, 0.0]))
    assert (estimate.value, estimate.n) == (0.5, 4)
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.0 <= estimate.low < 0.5 < estimate.high <= 1.0


def test_mean_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(150):
        values = np.random.default_rng(trial).random(100) < 0.7
        estimate = mean_interval(values.astype(float), seed=trial, resamples=300)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.7 <= estimate.high
    assert 135 <= covered <= 150


def test_two_kinds_count_the_same_and_their_interval_stays_within_what_is_possible() -> None:
    values = np.array([1.0, 1.0, 0.0, np.nan, *np.ones(60)])
    kinds = np.arange(len(values)) < 4
    estimate = mean_interval(values, kinds=kinds)
    assert (estimate.value, estimate.n) == (pytest.approx((2 / 3 + 1) / 2), 63)
    assert estimate.low is not None
    assert estimate.high is not None
    assert 0.5 <= estimate.low < estimate.value < estimate.high <= 1.0
    assert mean_interval(values[4:], kinds=kinds[4:]) == mean_interval(values[4:])
    lonely = mean_interval(np.array([1.0, 0.0, 1.0]), kinds=np.array([True, False, False]))
    assert (lonely.value, lonely.low, lonely.n) == (0.75, None, 3)


def test_a_balanced_accuracy_covers_the_truth_about_as_often_as_it_says() -> None:
    covered, kinds = 0, np.arange(120) < 20
    for trial in range(150):
        values = (np.random.default_rng(trial).random(120) < np.where(kinds, 0.6, 0.9)).astype(float)
        estimate = mean_interval(values, kinds=kinds, seed=trial, resamples=300)
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 0.75 <= estimate.high
    assert 132 <= covered <= 150


def test_mean_of_nothing_is_not_computed_rather_than_zero() -> None:
    assert mean_interval(np.array([np.nan])).as_json() == {"value": None, "low": None, "high": None, "n": 0}
    assert mean_interval(np.array([3.0])).as_json() == {"value": 3.0, "low": None, "high": None, "n": 1}


def test_pairing_removes_the_variance_that_both_share() -> None:
    rng = np.random.default_rng(0)
    seeds = rng.normal(0.0, 10.0, 200)
    baseline, aligned = seeds + rng.normal(0.0, 0.1, 200), seeds + 1.0 + rng.normal(0.0, 0.1, 200)
    difference = paired_difference(aligned, baseline)
    assert difference.low is not None
    assert difference.high is not None
    assert difference.high - difference.low < 0.1
    assert difference.value == pytest.approx(1.0, abs=0.05)
    with pytest.raises(ValueError, match="shape"):
        paired_difference(aligned[:-1], baseline)


def test_ratio_of_halved_values_is_a_half() -> None:
    baseline = np.random.default_rng(1).random(50) + 0.5
    ratio = paired_ratio(0.5 * baseline, baseline)
    assert ratio.value == pytest.approx(0.5)
    assert ratio.low == pytest.approx(0.5)
    assert paired_ratio(np.ones(3), np.zeros(3)).as_json()["value"] is None


def test_half_sample_interval_of_one_half_has_no_ends() -> None:
    assert half_sample_interval(1.0, np.array([1.1]), n=5).low is None


def test_agreement_by_hand() -> None:
    # heads: hair, ruler, melanoma; the second prompt says nothing of artefacts, the third nothing at all.
    targets = [{"hair": 1.0, "ruler": 0.0, "melanoma": 1.0}, {"melanoma": 0.0}, {}]
    probabilities = np.array([[0.9, 0.6, 0.7], [0.1, 0.1, 0.35], [0.5, 0.5, 0.5]])
    found = agreement(probabilities, targets, ("hair", "ruler", "melanoma"), {"melanoma": 0.3, "ruler": 0.5})
    np.testing.assert_allclose(found.mean, [2 / 3, 0.0, np.nan])
    np.testing.assert_allclose(found.complete, [0.0, 0.0, np.nan])
    np.testing.assert_allclose(found.of_head("hair"), [1.0, np.nan, np.nan])
    np.testing.assert_allclose(found.of_head("melanoma"), [1.0, 0.0, np.nan])
    with pytest.raises(ValueError, match="prompts"):
        agreement(probabilities[:2], targets, ("hair", "ruler", "melanoma"), {})


def test_balanced_accuracy_of_a_model_that_never_draws_the_thing_is_a_half() -> None:
    targets: list[dict[str, float]] = [{"ink": 1.0}] + [{"ink": 0.0}] * 9 + [{}]
    found = agreement(np.zeros((11, 1)), targets, ("ink",), {}).of_head("ink")
    wanted = target_matrix(targets, ("ink",))[:, 0]
    assert np.nanmean(found) == pytest.approx(0.9)
    assert np.nanmean(balanced(found, wanted)) == pytest.approx(0.5)
    np.testing.assert_allclose(balanced(np.ones(9), np.zeros(9)), np.ones(9))


def test_diversity_by_hand() -> None:
    features = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [1.0, 1.0], [2.0, 2.0], [5.0, 5.0]])
    distances = per_prompt_distance(features, ["a", "a", "a", "b", "b", "alone"])
    assert distances == {"a": pytest.approx(2 / 3), "b": pytest.approx(0.0)}
    aligned, baseline = paired_distances({"b": 1.0, "a": 2.0}, distances)
    np.testing.assert_allclose(aligned, [2.0, 1.0])
    np.testing.assert_allclose(baseline, [2 / 3, 0.0], atol=1e-12)
    with pytest.raises(ValueError, match="rows"):
        per_prompt_distance(features, ["a"])


def test_change_of_kernel_distance_is_the_difference_and_pairing_narrows_it() -> None:
    reference, baseline = normal(100, 8, 0.0, 10), normal(100, 8, 0.6, 11)
    aligned = baseline - 0.1
    change = kernel_distance_change(aligned, baseline, reference)
    apart = kernel_distance(aligned, reference), kernel_distance(baseline, reference)
    assert change.value == pytest.approx(apart[0].value - apart[1].value)
    assert change.high is not None
    assert change.low is not None
    assert change.high < 0.0
    assert apart[0].high is not None
    assert apart[0].low is not None
    assert change.high - change.low < apart[0].high - apart[0].low
    with pytest.raises(ValueError, match="pairs"):
        kernel_distance_change(aligned[:-1], baseline, reference)
