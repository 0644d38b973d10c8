"""Intervals with readers and cases random, against published figures and independent computations."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from medviz.errors import InputError
from medviz.study import mrmc
from medviz.study.equivalence import two_one_sided_tests
from medviz.study.mixed import fit_mean
from medviz.study.simulation import Behaviour, Readers

# Van Dyke et al. 1993: spin echo and cine MRI, 5 readers, 45 positive and 69 negative cases. Trapezoidal AUCs,
# jackknife covariances and results as printed by OR-DBM MRMC 2.51 (Schartz, Hillis, Pesce, Berbaum, University of
# Iowa), in the file inst/IowaResults/VanDyke.txt of RJafroc.
AUCS = np.array(
    [
        [0.91964573, 0.85877617, 0.90386473, 0.97310789, 0.82979066],
        [0.94782609, 0.90531401, 0.92173913, 0.99935588, 0.92995169],
    ]
)
VARIANCES, COV2S, COV1, COV3 = (0.00101410, 0.00059047), (0.00048396, 0.00020419), 0.00034661, 0.00023903


def published_covariance() -> np.ndarray:
    """(10, 10) over treatment and reader, with the published averages in every place."""
    same_treatment = [
        np.full((5, 5), cov2) + (var - cov2) * np.eye(5) for var, cov2 in zip(VARIANCES, COV2S, strict=True)
    ]
    other = np.full((5, 5), COV3) + (COV1 - COV3) * np.eye(5)
    return np.block([[same_treatment[0], other], [other, same_treatment[1]]])


@pytest.mark.parametrize(
    ("treatment", "error", "df", "low", "high"),
    [(0, 0.03317360, 12.74, 0.82522360, 0.96885048), (1, 0.02156637, 12.71, 0.89413783, 0.98753689)],
)
def test_single_treatment_interval_is_the_published_one(
    treatment: int, error: float, df: float, low: float, high: float
) -> None:
    block = slice(5 * treatment, 5 * treatment + 5)
    found = mrmc.random_readers(AUCS[treatment], published_covariance()[block, block], 114)
    assert found.value == pytest.approx((0.89703704, 0.94083736)[treatment], abs=1e-8)
    assert found.standard_error == pytest.approx(error, rel=2e-5)
    assert found.df == pytest.approx(df, abs=0.006)
    assert (found.low, found.high) == pytest.approx((low, high), abs=2e-6)


def test_interval_of_the_difference_is_the_published_one() -> None:
    contrast = np.hstack([np.eye(5), -np.eye(5)])
    found = mrmc.random_readers(AUCS[0] - AUCS[1], contrast @ published_covariance() @ contrast.T, 114)
    assert found.value == pytest.approx(-0.04380032, abs=1e-8)
    assert found.standard_error == pytest.approx(0.02075, abs=5e-6)
    assert found.df == pytest.approx(15.26, abs=0.006)
    assert (found.low, found.high) == pytest.approx((-0.08796, 0.00036), abs=6e-6)
    assert found.p_value(0.0) == pytest.approx(0.0517, abs=6e-5)


def test_interval_of_one_reader_is_the_published_one() -> None:
    """Reader 1: Var(Error) 0.00069890, Cov1 0.00037347."""
    found = mrmc.random_readers(np.array([-0.02818]), np.array([[2 * (0.00069890 - 0.00037347)]]), 114)
    assert found.standard_error == pytest.approx(0.02551, abs=5e-6)
    assert (found.low, found.high) == pytest.approx((-0.07818, 0.02182), abs=1e-5)


@pytest.fixture(scope="module")
def confidences() -> dict[str, np.ndarray]:
    readers = Readers(Behaviour(), 4, 40, 60, np.random.default_rng(3))
    return {arm: readers.confidence(arm)[0] for arm in ("baseline", "aligned", "real")}


def test_auc_is_that_of_the_rank_sum_test(confidences: dict[str, np.ndarray]) -> None:
    figure = mrmc.auc(confidences["baseline"], confidences["real"])
    ranks = [
        stats.mannwhitneyu(positive, negative).statistic / (40 * 60)
        for positive, negative in zip(confidences["baseline"], confidences["real"], strict=True)
    ]
    assert figure.values == pytest.approx(ranks)


def test_covariance_of_auc_differences_is_that_of_a_bootstrap_over_cases(confidences: dict[str, np.ndarray]) -> None:
    def figure(pairs: np.ndarray, real: np.ndarray) -> mrmc.Figure:
        aligned, baseline = (
            mrmc.auc(confidences[arm][:, pairs], confidences["real"][:, real]) for arm in ("aligned", "baseline")
        )
        return aligned - baseline

    rng = np.random.default_rng(0)
    drawn = [figure(rng.integers(40, size=40), rng.integers(60, size=60)).values for _ in range(3000)]
    expected = figure(np.arange(40), np.arange(60)).covariance
    assert np.cov(np.array(drawn).T) == pytest.approx(expected, abs=0.08 * expected.max())


def test_many_studies_at_once_have_the_interval_of_each() -> None:
    scores = Readers(Behaviour(), 3, 12, 0, np.random.default_rng(0), studies=20).preference()
    value, low, high = mrmc.crossed_means(scores)
    for number, study in enumerate(scores):
        found = mrmc.mean(study, (-math.inf, math.inf)).estimate()
        assert (found.value, found.low, found.high) == pytest.approx((value[number], low[number], high[number]))


def test_mixed_model_of_a_complete_study_has_the_same_interval() -> None:
    """Restricted maximum likelihood and analysis of variance agree where no component lies at zero."""
    scores = Readers(Behaviour(reader_sd=0.6), 6, 20, 0, np.random.default_rng(1)).preference()[0]
    table = pd.DataFrame(
        {"reader": np.repeat(np.arange(6), 20), "case": np.tile(np.arange(20), 6), "score": scores.ravel()}
    )
    expected, found = mrmc.mean(scores).estimate(), fit_mean(table)
    assert found is not None
    assert found.estimate.value == pytest.approx(expected.value)
    assert (found.estimate.low, found.estimate.high) == pytest.approx((expected.low, expected.high), abs=2e-4)
    assert found.estimate.df == pytest.approx(expected.df, rel=0.01)


def test_mixed_model_takes_readers_with_gaps() -> None:
    scores = Readers(Behaviour(), 4, 20, 0, np.random.default_rng(2)).preference()[0]
    table = pd.DataFrame(
        {"reader": np.repeat(np.arange(4), 20), "case": np.tile(np.arange(20), 4), "score": scores.ravel()}
    )[:-15]
    found = fit_mean(table)
    assert found is not None
    assert found.answers == 65
    assert 0 < found.estimate.low < found.estimate.value < found.estimate.high < 1


def test_answers_that_all_agree_have_no_interval() -> None:
    everything = np.ones((3, 10))
    found = mrmc.mean(everything).estimate()
    assert found.value == 1
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert math.isnan(found.p_value(0.5))
    assert not two_one_sided_tests(found, 1.0, 0.1).equivalent
    assert fit_mean(pd.DataFrame({"reader": [0, 0, 1, 1], "case": [0, 1, 0, 1], "score": 1.0})) is None


def test_intervals_of_shares_end_at_0_and_1() -> None:
    scores = np.array([[1.0] * 9 + [0.0], [1.0] * 10, [1.0] * 8 + [0.0] * 2])
    found = mrmc.mean(scores).estimate()
    assert found.high == 1
    assert found.low < found.value


def test_one_case_is_refused() -> None:
    with pytest.raises(InputError, match="at least two cases"):
        mrmc.mean(np.ones((3, 1))).estimate()


def test_equivalence_is_that_of_statsmodels_for_one_sample() -> None:
    from statsmodels.stats.weightstats import DescrStatsW

    sample = np.random.default_rng(0).normal(0.1, 1, 30)
    error = sample.std(ddof=1) / math.sqrt(30)
    estimate = mrmc.Estimate(sample.mean(), error, 29, 0, 0, 1, 30)
    found = two_one_sided_tests(estimate, 0.0, 0.5)
    assert found.p == pytest.approx(DescrStatsW(sample).ttost_mean(-0.5, 0.5)[0])
    assert found.equivalent == (max(-found.low, found.high) < 0.5)
