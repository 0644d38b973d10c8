"""Agreement coefficients on published examples: that rows are readers, and categories are what they are."""

import math

import numpy as np
import pytest

from medviz.study.agreement import (
    inter_reader_kappa,
    intra_reader_kappa,
    intraclass_correlation,
    krippendorff_alpha,
)


def test_kappa_of_a_two_by_two_table() -> None:
    """20 and 15 of 50 agree, 5 and 10 do not: (0.7 - 0.5) / (1 - 0.5)."""
    first = np.array([0.0] * 25 + [1.0] * 25)
    second = np.array([0.0] * 20 + [1.0] * 5 + [0.0] * 10 + [1.0] * 15)
    found = intra_reader_kappa(first, second, (0.0, 1.0), 1, seed=0)
    assert found.value == pytest.approx(0.4)
    assert found.low < 0.4 < found.high


def test_weighted_kappa_knows_the_categories_that_nobody_chose() -> None:
    """Mean squared difference 1/3, by chance twice the variance 25 / 7.2. By rank kappa were 0.79."""
    first, second = np.array([1.0, 1.0, 2.0, 5.0, 5.0, 5.0]), np.array([1.0, 2.0, 1.0, 5.0, 5.0, 5.0])
    found = intra_reader_kappa(first, second, (1.0, 2.0, 3.0, 4.0, 5.0), 1, seed=0)
    assert found.value == pytest.approx(1 - (1 / 3) / (2 * 25 / 7.2))


def test_krippendorff_alpha_of_his_own_example() -> None:
    """Krippendorff 2011, Computing Krippendorff's Alpha-Reliability: 4 observers, 12 units, gaps."""
    gap = math.nan
    scores = np.array(
        [
            [1, 2, 3, 3, 2, 1, 4, 1, 2, gap, gap, gap],
            [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, gap, 3],
            [gap, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, gap],
            [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, gap],
        ]
    )
    assert krippendorff_alpha(scores, 0, "nominal").value == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(scores, 0, "ordinal").value == pytest.approx(0.815, abs=5e-4)
    assert krippendorff_alpha(scores, 0, "interval").value == pytest.approx(0.849, abs=5e-4)


def test_intraclass_correlation_of_shrout_and_fleiss() -> None:
    """Shrout and Fleiss 1979, Psychological Bulletin 86, 420: 6 targets, 4 judges, ICC(2,1) = 0.29."""
    scores = np.array([[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]], float).T
    found = intraclass_correlation(scores)
    assert found.value == pytest.approx(0.29, abs=0.005)
    assert (found.items, found.readers) == (6, 4)


def test_readers_who_agree_have_a_kappa_of_one() -> None:
    answers = np.tile([0.0, 0.5, 1.0, 1.0, 0.0], (3, 1))
    assert inter_reader_kappa(answers, 0).value == pytest.approx(1)


def test_one_answer_throughout_defines_no_agreement() -> None:
    same = np.ones((3, 8))
    assert math.isnan(krippendorff_alpha(same, 0).value)
    assert math.isnan(intra_reader_kappa(same[0], same[1], (0.0, 1.0), 1, 0).value)
    assert math.isnan(intra_reader_kappa(same[0][:0], same[1][:0], (0.0, 1.0), 1, 0).value)
