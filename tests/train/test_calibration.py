import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import bootstrap

from train import calibration


def sample(count=600, seed=0, spread=1.0, shift=0.0):
    """Logits whose truth is drawn from sigmoid(logits)."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 2, count)
    truth = rng.random(count) < expit(logits)
    return (logits * spread + shift).astype(np.float32), truth


def test_temperature_and_bias_undo_what_was_done_to_calibrated_logits():
    logits, truth = sample(20000, spread=3.0, shift=4.0)
    temperature, bias = calibration.fit_platt(logits, truth.astype(float))
    assert temperature == pytest.approx(3.0, rel=0.1)
    assert bias == pytest.approx(-4.0, rel=0.1)
    assert calibration.fit_temperature(logits - 4.0, truth.astype(float)) == pytest.approx(3.0, rel=0.1)


def test_a_head_that_separates_perfectly_stays_finite():
    logits, truth = np.array([-1.0, -2.0, 1.0, 2.0]), np.array([False, False, True, True])
    temperature, bias = calibration.fit_platt(logits, truth.astype(float))
    assert 0.2 <= temperature <= 10
    assert np.isfinite(bias)


def test_the_threshold_is_the_best_of_all_that_could_be_chosen():
    logits, truth = sample(300, seed=3)
    probabilities = expit(logits)
    chosen = calibration.best_threshold(probabilities, truth)

    def balanced(cut):
        said = probabilities >= cut
        return (said[truth].mean() + (~said[~truth]).mean()) / 2

    assert balanced(chosen) == pytest.approx(max(balanced(cut) for cut in np.linspace(0, 1, 2001)), abs=1e-9)


def test_the_threshold_of_a_rare_head_is_not_one_half():
    probabilities = np.concatenate([np.full(95, 0.02), np.full(5, 0.2)])
    assert 0.02 < calibration.best_threshold(probabilities, np.arange(100) >= 95) < 0.2
    assert calibration.best_threshold(probabilities, np.zeros(100, bool)) == 0.5


def test_equal_probabilities_are_never_cut_in_two():
    probabilities = np.array([0.3, 0.3, 0.3, 0.7])
    assert calibration.best_threshold(probabilities, np.array([True, False, True, True])) != 0.3


def test_auroc_counts_ties_half_and_knows_when_it_cannot_be_computed():
    truth = np.array([False, True, False, True])
    assert calibration.auroc(np.array([-50.0, 3.0, 1.0, 900.0]), truth) == 1.0
    assert calibration.auroc(np.zeros(4), truth) == pytest.approx(0.5)
    assert calibration.auroc(np.array([1.0, 1.0, 0.0, 2.0]), truth) == pytest.approx(0.875)
    assert calibration.auroc(np.arange(4.0), np.ones(4, bool)) is None


def test_the_interval_holds_the_area_and_agrees_with_scipy_where_each_image_is_its_own_group():
    logits, truth = sample(200, seed=5)
    low, high = calibration.auroc_interval(logits, truth, [str(i) for i in range(200)], seed=0, resamples=2000)
    area = calibration.auroc(logits, truth)
    assert low < area < high

    def areas(scores, right, axis=-1):
        return np.array(calibration.auroc(scores, right))

    slow = bootstrap(
        (logits, truth), areas, paired=True, vectorized=False, method="percentile", n_resamples=150, rng=1
    ).confidence_interval
    assert low == pytest.approx(slow.low, abs=0.03)
    assert high == pytest.approx(slow.high, abs=0.03)


def test_images_of_one_lesion_count_as_one():
    logits, truth = sample(100, seed=7)
    alone = calibration.auroc_interval(logits, truth, [str(i) for i in range(100)], seed=0)
    repeated = calibration.auroc_interval(
        np.tile(logits, 10), np.tile(truth, 10), [str(i) for i in range(100)] * 10, seed=0
    )
    assert repeated == pytest.approx(alone, abs=1e-9)


def test_a_head_that_only_tells_sources_apart_is_found_out():
    rng = np.random.default_rng(0)
    sources = ["ISIC"] * 200 + ["HAM"] * 200
    truth = np.concatenate([rng.random(200) < 0.8, rng.random(200) < 0.1])
    scores = np.repeat([1.0, 0.0], 200) + rng.normal(0, 0.1, 400)
    assert calibration.auroc(scores, truth) > 0.8
    within, each = calibration.auroc_within_sources(scores, truth, sources, least=10)
    assert within == pytest.approx(0.5, abs=0.12)
    assert set(each) == {"ISIC", "HAM"}
    assert calibration.auroc_within_sources(scores, truth, sources, least=100) == (None, {})


def test_figures_are_cross_fitted_so_that_noise_is_not_praised():
    rng = np.random.default_rng(0)
    gained = []
    for seed in range(8):
        logits, truth = rng.normal(size=60), rng.random(60) < 0.5
        figures = calibration.head_figures(logits, truth.astype(float), [str(i) for i in range(60)], seed)
        gained.append(figures["balanced_accuracy"])
    assert np.mean(gained) < 0.56


def test_figures_of_a_calibrated_head():
    logits, truth = sample(1500, seed=9)
    figures = calibration.head_figures(logits, truth.astype(float), [str(i // 2) for i in range(1500)], 0)
    assert figures["ece"] < 0.05
    assert figures["accuracy"] > 0.7
    assert figures["n"] == 1500
    assert figures["positives"] == truth.sum()


def test_figures_of_a_head_without_positives_are_not_computed():
    figures = calibration.head_figures(np.zeros(12), np.zeros(12), [str(i) for i in range(12)], 0)
    assert figures["auroc"] is figures["ci"] is figures["balanced_accuracy"] is None
