"""Readers of known behaviour: a latent normal model with crossed reader and case effects (Roe and Metz 1997)."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm

from medviz.errors import InputError
from medviz.study.protocol import Protocol
from medviz.study.schedule import Slot, schedule
from medviz.study.session import Study
from medviz.study.store import reader_id

Values = NDArray[np.float64]
_CUTS = np.array([-1.0, -0.5, 0.0, 0.5, 1.0])  # of the confidence scale, around its middle
_RATING_CUTS = np.array([-1.6, -0.6, 0.6, 1.6])


@dataclass(frozen=True)
class Behaviour:
    """What simulated readers do, in units of the spread of single answers.

    preference: mean latent preference for the aligned image. tie: half width of the latent band that is answered with
    "no difference". reader_sd, case_sd: spread of readers and of cases. detectability: distance of an arm's images from
    real ones on the scale of confidence. quality: an arm's mean on the rating's latent scale.
    """

    preference: float = 0.4
    tie: float = 0.25
    reader_sd: float = 0.3
    case_sd: float = 0.5
    detectability: dict[str, float] = field(default_factory=lambda: {"baseline": 1.5, "aligned": 0.8, "real": 0.0})
    quality: dict[str, float] = field(default_factory=lambda: {"baseline": -0.4, "aligned": 0.0, "real": 0.1})

    @property
    def spread(self) -> float:
        """Standard deviation of a latent answer over readers, cases and occasions."""
        return math.sqrt(1 + self.reader_sd**2 + self.case_sd**2)

    @property
    def true_preference(self) -> float:
        """Expected score: share of answers for the aligned image, no difference counted half."""
        above = norm.cdf((self.preference - self.tie) / self.spread)
        below = norm.cdf((-self.preference - self.tie) / self.spread)
        return float(above + (1 - above - below) / 2)

    def true_auc(self, arm: str) -> float:
        """Expected AUC of the six levels of confidence, ties counted half."""
        positive, negative = (
            np.diff(norm.cdf(self.confidence_cuts / self.spread - mean / self.spread), prepend=0.0, append=1.0)
            for mean in (self.detectability[arm], self.detectability["real"])
        )
        lower = np.cumsum(negative) - negative
        return float((positive * (lower + negative / 2)).sum())

    def true_accuracy(self, arm: str) -> float:
        """Expected mean of sensitivity and specificity."""
        middle = self.confidence_cuts[2] / self.spread
        sensitivity = norm.sf(middle - self.detectability[arm] / self.spread)
        specificity = norm.cdf(middle - self.detectability["real"] / self.spread)
        return float((sensitivity + specificity) / 2)

    @property
    def confidence_cuts(self) -> Values:
        """(5,): latent values between the six levels of confidence."""
        return _CUTS + np.mean(list(self.detectability.values()))


def behaviour_for(preference: float, ties: float, reader_sd: float, case_sd: float) -> Behaviour:
    """The behaviour with a given expected score (0 to 1) and share of "no difference" (0 to 1)."""
    if not 0 < preference < 1 or not 0 <= ties < 1 or reader_sd < 0 or case_sd < 0:
        raise InputError(
            "preference must lie between 0 and 1, ties from 0 to below 1, and spreads at 0 or above; "
            f"got {preference:g}, {ties:g}, {reader_sd:g} and {case_sd:g}"
        )
    if not ties / 2 < preference < 1 - ties / 2:
        raise InputError(
            f"with a share of {ties:g} without difference the preference must lie between {ties / 2:g} and "
            f"{1 - ties / 2:g}, got {preference:g}"
        )
    # Shares above and below the band fix both the mean and the band.
    above, below = norm.ppf(preference - ties / 2), norm.ppf(1 - preference - ties / 2)
    spread = Behaviour(reader_sd=reader_sd, case_sd=case_sd).spread
    return Behaviour(
        preference=float(above - below) / 2 * spread,
        tie=float(-(above + below)) / 2 * spread,
        reader_sd=reader_sd,
        case_sd=case_sd,
    )


class Readers:
    """Simulated readers of `studies` independent studies at once; every call is one more occasion of reading.

    Effects of readers and cases stay the same between calls, the rest is drawn anew. Arrays are (studies, readers,
    cases), of real images (studies, readers, real).
    """

    def __init__(
        self, behaviour: Behaviour, readers: int, cases: int, real: int, rng: np.random.Generator, studies: int = 1
    ) -> None:
        self.behaviour, self._rng = behaviour, rng
        shape = {"baseline": cases, "aligned": cases, "real": real}
        self._preference = self._effects(studies, readers, cases)
        # Each arm has effects of its own, so that figures of arms differ by more than chance.
        self._detection = {arm: self._effects(studies, readers, count) for arm, count in shape.items()}
        self._rating = {arm: self._effects(studies, readers, count) for arm, count in shape.items()}

    def preference(self) -> Values:
        """Scores 1 for the aligned image, 0.5 for no difference, 0 for the baseline."""
        latent = self._occasion(self._preference) + self.behaviour.preference
        return np.where(np.abs(latent) <= self.behaviour.tie, 0.5, (latent > 0).astype(float))

    def confidence(self, arm: str) -> Values:
        """Confidence 1 to 6 that images of an arm are synthetic."""
        latent = self._occasion(self._detection[arm]) + self.behaviour.detectability[arm]
        return _levels(self.behaviour.confidence_cuts, latent)

    def rating(self, arm: str) -> Values:
        """Quality 1 to 5 of images of an arm."""
        latent = self._occasion(self._rating[arm]) + self.behaviour.quality[arm]
        return _levels(_RATING_CUTS, latent)

    def _effects(self, studies: int, readers: int, cases: int) -> Values:
        of_readers = self._rng.normal(0, self.behaviour.reader_sd, (studies, readers, 1))
        return of_readers + self._rng.normal(0, self.behaviour.case_sd, (studies, 1, cases))

    def _occasion(self, effects: Values) -> Values:
        return effects + self._rng.normal(size=effects.shape)


def _levels(cuts: Values, latent: Values) -> Values:
    """Levels from 1 of latent values, as floats."""
    return (np.searchsorted(cuts, latent) + 1).astype(np.float64)


def run_simulated(study: Study, readers: int, behaviour: Behaviour, seed: int) -> None:
    """Send simulated readers through a study by the calls that the page makes, practice and repeats included.

    They are stored as simulated. Raises InputError for fewer than one reader.
    """
    if readers < 1:
        raise InputError(f"a study needs at least one reader, got {readers}")
    protocol = study.protocol
    model = Readers(behaviour, readers, len(_synthetic(protocol)), len(_real(protocol)), np.random.default_rng(seed))
    occasions = [_occasion(model) for _ in range(2)]
    column = {key: number for keys in (_synthetic(protocol), _real(protocol)) for number, key in enumerate(keys)}
    rng = np.random.default_rng([seed, 1])
    for reader in range(readers):
        code = study.start(True, "simulated", 0, "simulated", simulated=True)
        slots = schedule(protocol, reader_id(code))
        while (item := study.next_item(code)) is not None:
            slot = slots[item.position]
            scores = occasions[int(slot.repeat)]
            kind = slot.phase if slot.phase == "preference" else f"{slot.phase}/{slot.arms[0]}"
            value = _value(slot, float(scores[kind][0, reader, column[slot.case]]))
            study.answer(code, item.position, value, response_ms=int(rng.lognormal(8.5, 0.5)), display="simulated")


def _occasion(model: Readers) -> dict[str, Values]:
    arms = ("baseline", "aligned", "real")
    return {
        "preference": model.preference(),
        **{f"detection/{arm}": model.confidence(arm) for arm in arms},
        **{f"rating/{arm}": model.rating(arm) for arm in arms},
    }


def _value(slot: Slot, score: float) -> str:
    if slot.phase != "preference":
        return str(int(score))
    if score == 0.5:
        return "tie"
    return ("left", "right")[slot.arms.index("aligned" if score == 1 else "baseline")]


def _synthetic(protocol: Protocol) -> list[str]:
    return [case.key for case in (*protocol.cases, *protocol.practice)]


def _real(protocol: Protocol) -> list[str]:
    return [image.key for image in (*protocol.real, *protocol.practice_real)]
