"""The order in which one reader sees the items: a pure function of the protocol's hash and the reader.

Items are sorted by sha256, not shuffled by a random generator, so that the order is the same in every version of
Python and NumPy.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

from medviz.study.protocol import SYNTHETIC_ARMS, Arm, Case, Phase, Protocol, RealImage

T = TypeVar("T")


@dataclass(frozen=True)
class Slot:
    """One item of a reader's list.

    position: from 0 over the whole study. case: the key of a case or of a real image.
    arms: what is shown, from left to right; one in the rating and detection phases, two in the preference phase.
    repeat: the second showing of an item.
    """

    position: int
    phase: Phase
    case: str
    arms: tuple[Arm, ...]
    practice: bool = False
    repeat: bool = False

    @property
    def item(self) -> str:
        """The item's name in the store; the same for every reader, whatever the side."""
        kind = "practice" if self.practice else "repeat" if self.repeat else "first"
        return f"{self.phase}/{self.case}/{'-'.join(sorted(self.arms))}/{kind}"


def schedule(protocol: Protocol, reader: str) -> tuple[Slot, ...]:
    """Return everything that `reader` (an identifier, see `medviz.study.store.reader_id`) sees, in order.

    A phase begins with its practice items. The rest is shown in four quarters, each in random order. The two images of
    one case, alike because they come from one noise, lie two quarters apart; a repeat comes from the first quarter and
    lies in the last. In the preference phase half of the cases have the aligned image on the left, and a repeat is
    shown with its sides exchanged.
    """
    slots: list[Slot] = []
    for task in protocol.tasks:
        label = f"{protocol.sha256}/{reader}/{task.phase}"
        if task.phase == "preference":
            practice = _pairs(protocol.practice, f"{label}/practice")
            quarters = _split(_pairs(protocol.cases, label))
        else:
            practice = _practice_singles(protocol, task.phase, label)
            quarters = _single_quarters(protocol, task.phase, label)
        quarters = [_shuffled(quarter, f"{label}/quarter/{n}", _item) for n, quarter in enumerate(quarters)]
        count = max(round(protocol.repeat_share * sum(map(len, quarters))), bool(protocol.repeat_share))
        repeats = [
            replace(slot, repeat=True, arms=slot.arms[::-1])
            for slot in _shuffled(quarters[0], f"{label}/repeats", _item)[:count]
        ]
        quarters[3] = _shuffled([*quarters[3], *repeats], f"{label}/last", _item)
        slots += [replace(slot, practice=True) for slot in practice]
        slots += [slot for quarter in quarters for slot in quarter]
    return tuple(replace(slot, position=position) for position, slot in enumerate(slots))


def _pairs(cases: Sequence[Case], label: str) -> list[Slot]:
    order = _shuffled(cases, f"{label}/sides", _key)
    left = {case.key for case in order[: (len(order) + 1) // 2]}
    return [
        Slot(0, "preference", case.key, ("aligned", "baseline") if case.key in left else ("baseline", "aligned"))
        for case in _shuffled(cases, label, _key)
    ]


def _practice_singles(protocol: Protocol, phase: Phase, label: str) -> list[Slot]:
    cases = _shuffled(protocol.practice, f"{label}/practice", _key)
    slots = [Slot(0, phase, case.key, (SYNTHETIC_ARMS[n % 2],)) for n, case in enumerate(cases)]
    slots += [Slot(0, phase, image.key, ("real",)) for image in protocol.practice_real]
    return _shuffled(slots, f"{label}/practice", _item)


def _single_quarters(protocol: Protocol, phase: Phase, label: str) -> list[list[Slot]]:
    cases = _shuffled(protocol.cases, f"{label}/cases", _key)
    leading = {
        case.key: SYNTHETIC_ARMS[n % 2] for n, case in enumerate(_shuffled(protocol.cases, f"{label}/arms", _key))
    }
    following = {key: SYNTHETIC_ARMS[1 - SYNTHETIC_ARMS.index(arm)] for key, arm in leading.items()}
    halves = cases[: len(cases) // 2], cases[len(cases) // 2 :]
    real = _split(_shuffled(protocol.real, f"{label}/real", _key))
    return [
        [Slot(0, phase, case.key, (arms[case.key],)) for case in half]
        + [Slot(0, phase, image.key, ("real",)) for image in images]
        for (arms, half), images in zip(
            [(arms, half) for arms in (leading, following) for half in halves], real, strict=True
        )
    ]


def _split(items: Sequence[T]) -> list[list[T]]:
    """Four parts that differ in length by one at most, the order kept."""
    bounds = [len(items) * n // 4 for n in range(5)]
    return [list(items[first:last]) for first, last in pairwise(bounds)]


def _shuffled(items: Sequence[T], label: str, name: Callable[[T], str]) -> list[T]:
    return sorted(items, key=lambda item: hashlib.sha256(f"{label}/{name(item)}".encode()).digest())


def _key(item: Case | RealImage) -> str:
    return item.key


def _item(slot: Slot) -> str:
    return slot.item
