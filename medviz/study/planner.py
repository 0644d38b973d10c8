"""How many readers and cases detect a given preference: power by simulation with readers and cases crossed."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest

from medviz.errors import InputError
from medviz.study.mrmc import crossed_means
from medviz.study.simulation import Readers, behaviour_for

MAX_SIMULATIONS = 20_000
_ANSWERS_AT_ONCE = 2_000_000  # simulated answers in memory


@dataclass(frozen=True)
class Power:
    """Share of simulated studies whose 95 % interval lies above one half, with its own 95 % interval (Wilson).

    coverage: share of studies whose interval holds the true preference.
    """

    readers: int
    cases: int
    power: float
    low: float
    high: float
    coverage: float
    simulations: int


def plan(
    preference: float,
    readers: Sequence[int],
    cases: Sequence[int],
    *,
    ties: float = 0.2,
    reader_sd: float = 0.3,
    case_sd: float = 0.5,
    simulations: int = 2000,
    seed: int = 0,
) -> list[Power]:
    """Power of every number of readers with every number of cases.

    preference: expected score, no difference counted half. ties: share of answers without difference. reader_sd,
    case_sd: as of `Behaviour`. Raises InputError for values outside their range.
    """
    if min(readers, default=0) < 2 or min(cases, default=0) < 2:
        raise InputError("power needs at least two readers and two cases: both are random samples")
    if not 100 <= simulations <= MAX_SIMULATIONS:
        raise InputError(f"simulations must be from 100 to {MAX_SIMULATIONS}, got {simulations}")
    behaviour = behaviour_for(preference, ties, reader_sd, case_sd)
    plans = []
    for count in readers:
        for number in cases:
            rng = np.random.default_rng([seed, count, number])
            batch = max(1, min(simulations, _ANSWERS_AT_ONCE // (count * number)))
            detected = covered = 0
            for first in range(0, simulations, batch):
                size = min(batch, simulations - first)
                scores = Readers(behaviour, count, number, 0, rng, size).preference()
                _, low, high = crossed_means(scores)
                detected += int((low > 0.5).sum())
                covered += int(((low <= behaviour.true_preference) & (behaviour.true_preference <= high)).sum())
            interval = binomtest(detected, simulations).proportion_ci(method="wilson")
            plans.append(
                Power(
                    count,
                    number,
                    detected / simulations,
                    float(interval.low),
                    float(interval.high),
                    covered / simulations,
                    simulations,
                )
            )
    return plans
