"""Studies with readers of known behaviour: the truth lies within the intervals as often as they promise."""

import numpy as np
import pandas as pd
import pytest

from medviz.errors import InputError
from medviz.study import mrmc
from medviz.study.detection import SAYS_SYNTHETIC
from medviz.study.mixed import fit_mean
from medviz.study.planner import plan
from medviz.study.simulation import Behaviour, Readers, behaviour_for

CASES, REAL = 40, 40
BEHAVIOURS = [Behaviour(), Behaviour(preference=0.0), Behaviour(reader_sd=0.1, case_sd=0.2), Behaviour(reader_sd=0.5)]


def share_within(found: list[mrmc.Estimate], truth: float) -> float:
    return float(np.mean([estimate.low <= truth <= estimate.high for estimate in found]))


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("readers", [3, 8])
def test_true_preference_lies_within_the_interval(readers: int, behaviour: Behaviour) -> None:
    scores = Readers(behaviour, readers, CASES, 0, np.random.default_rng(readers), studies=2000).preference()
    value, low, high = mrmc.crossed_means(scores)
    truth = behaviour.true_preference
    assert value.mean() == pytest.approx(truth, abs=0.01)
    assert 0.92 <= ((low <= truth) & (truth <= high)).mean() < 1


@pytest.mark.parametrize("arm", ["baseline", "aligned"])
@pytest.mark.parametrize("readers", [3, 8])
def test_true_auc_and_accuracy_lie_within_the_intervals_of_90_in_100_studies(readers: int, arm: str) -> None:
    behaviour, studies = Behaviour(), 100
    simulated = Readers(behaviour, readers, CASES, REAL, np.random.default_rng([11, readers]), studies)
    positive, negative = simulated.confidence(arm), simulated.confidence("real")
    areas = [mrmc.auc(*scores).estimate() for scores in zip(positive, negative, strict=True)]
    said = [(scores > SAYS_SYNTHETIC).astype(float) for scores in (positive, negative)]
    accuracies = [mrmc.auc(*scores).estimate() for scores in zip(*said, strict=True)]
    assert share_within(areas, behaviour.true_auc(arm)) >= 0.9
    assert share_within(accuracies, behaviour.true_accuracy(arm)) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("readers", [3, 8])
def test_true_preference_lies_within_the_mixed_models_interval_of_90_in_100_studies(readers: int) -> None:
    behaviour, studies = Behaviour(), 100
    scores = Readers(behaviour, readers, CASES, 0, np.random.default_rng(readers), studies).preference()
    rows = {"reader": np.repeat(np.arange(readers), CASES), "case": np.tile(np.arange(CASES), readers)}
    models = [fit_mean(pd.DataFrame({**rows, "score": study.ravel()})) for study in scores]
    assert share_within([model.estimate for model in models if model], behaviour.true_preference) >= 0.9


def test_expected_figures_are_those_of_many_answers() -> None:
    behaviour = Behaviour()
    readers = Readers(behaviour, 60, 300, 300, np.random.default_rng(0), studies=4)
    positive, negative = readers.confidence("baseline"), readers.confidence("real")
    area = np.mean([mrmc.auc(*scores).values.mean() for scores in zip(positive, negative, strict=True)])
    accuracy = ((positive > SAYS_SYNTHETIC).mean() + (negative < SAYS_SYNTHETIC).mean()) / 2
    assert area == pytest.approx(behaviour.true_auc("baseline"), abs=0.015)
    assert accuracy == pytest.approx(behaviour.true_accuracy("baseline"), abs=0.015)


def test_readers_keep_their_ways_between_occasions() -> None:
    """A repeat is answered by the same reader on the same case, with new chance."""
    readers = Readers(Behaviour(reader_sd=1.0, case_sd=1.0), 5, 400, 0, np.random.default_rng(0))
    first, second = readers.preference()[0], readers.preference()[0]
    assert 0.5 < (first == second).mean() < 0.95


@pytest.mark.parametrize(("preference", "ties"), [(0.5, 0.0), (0.63, 0.2), (0.3, 0.5)])
def test_a_behaviour_has_the_preference_and_ties_asked_for(preference: float, ties: float) -> None:
    behaviour = behaviour_for(preference, ties, 0.3, 0.5)
    scores = Readers(behaviour, 50, 400, 0, np.random.default_rng(0), studies=20).preference()
    assert behaviour.true_preference == pytest.approx(preference)
    assert (scores == 0.5).mean() == pytest.approx(ties, abs=0.01)


@pytest.mark.parametrize("preference", [0.0, 1.0, 0.05])
def test_an_impossible_preference_is_refused(preference: float) -> None:
    with pytest.raises(InputError):
        behaviour_for(preference, 0.2, 0.3, 0.5)


def test_power_grows_with_readers_and_cases_and_is_small_without_a_preference() -> None:
    plans = {(row.readers, row.cases): row for row in plan(0.65, (3, 8), (20, 80), simulations=1000)}
    assert plans[3, 20].power < plans[3, 80].power < plans[8, 80].power
    assert plans[3, 20].power < plans[8, 20].power
    assert all(row.low <= row.power <= row.high for row in plans.values())
    (none,) = plan(0.5, (5,), (40,), simulations=2000)
    assert none.power < 0.05  # one side of a 95 % interval: 0.025
    assert plan(0.65, (3,), (20,), simulations=100) == plan(0.65, (3,), (20,), simulations=100)


@pytest.mark.parametrize(("readers", "cases", "simulations"), [((1,), (20,), 100), ((3,), (1,), 100), ((3,), (20,), 5)])
def test_plans_that_make_no_sense_are_refused(readers: tuple, cases: tuple, simulations: int) -> None:
    with pytest.raises(InputError):
        plan(0.6, readers, cases, simulations=simulations)
