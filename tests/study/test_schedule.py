"""Order and sides are a pure function of the protocol and the reader, balanced, with hidden repeats far apart."""

import hashlib
from collections import Counter

import pytest

from medviz.study.protocol import Case, Choice, Picture, Protocol, RealImage, Task
from medviz.study.schedule import Slot, schedule

READERS = [f"reader-{number}" for number in range(12)]


def plain_protocol(cases: int = 40, real: int = 20, repeat_share: float = 0.1) -> Protocol:
    """A protocol without files, whose texts never change."""

    def case(key: str) -> Case:
        pictures = Picture("a.png", "0" * 64), Picture("b.png", "1" * 64)
        return Case(key, "hair", f"prompt {key}", 1, "attribute", *pictures)

    def images(prefix: str, count: int) -> tuple[RealImage, ...]:
        return tuple(RealImage(f"{prefix}{number:03d}", f"{number}.png", "2" * 64) for number in range(count))

    return Protocol(
        title="Plain",
        domain="dermatology",
        seed=0,
        size_px=64,
        tasks=tuple(Task(phase, "", "", (Choice("1", ""),)) for phase in ("rating", "detection", "preference")),
        cases=tuple(case(f"c{number:03d}") for number in range(cases)),
        practice=(case("p000"), case("p001")),
        real=images("r", real),
        practice_real=images("q", 2),
        models={},
        consent="Yes.",
        closing="Thanks.",
        repeat_share=repeat_share,
    )


def phase_of(slots: tuple[Slot, ...], phase: str) -> list[Slot]:
    return [slot for slot in slots if slot.phase == phase and not slot.practice]


def test_order_is_the_same_in_every_version() -> None:
    """A change here would give readers of a running study another order."""
    slots = schedule(plain_protocol(), "reader-0")
    text = "\n".join(f"{slot.position} {slot.item} {slot.arms}" for slot in slots)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "763a1822fc27612f"


def test_order_depends_on_reader_and_protocol() -> None:
    orders = {tuple(slot.item for slot in schedule(plain_protocol(), reader)) for reader in READERS}
    orders.add(tuple(slot.item for slot in schedule(plain_protocol(repeat_share=0.11), READERS[0])))
    assert len(orders) == len(READERS) + 1


@pytest.mark.parametrize("reader", READERS[:4])
@pytest.mark.parametrize(("cases", "real"), [(40, 20), (7, 4), (4, 4)])
def test_every_item_is_shown_once_and_a_tenth_twice(cases: int, real: int, reader: str) -> None:
    slots = schedule(plain_protocol(cases, real), reader)
    assert [slot.position for slot in slots] == list(range(len(slots)))
    assert len({slot.item for slot in slots}) == len(slots)
    for phase, items in (("rating", 2 * cases + real), ("detection", 2 * cases + real), ("preference", cases)):
        shown = phase_of(slots, phase)
        repeats = [slot for slot in shown if slot.repeat]
        assert len(shown) - len(repeats) == items
        assert len(repeats) == max(1, round(items / 10))


@pytest.mark.parametrize("reader", READERS)
def test_repeats_come_half_a_phase_later_and_with_sides_exchanged(reader: str) -> None:
    for phase in ("rating", "detection", "preference"):
        shown = phase_of(schedule(plain_protocol(), reader), phase)
        places = {slot.item: place for place, slot in enumerate(shown)}
        for slot in (slot for slot in shown if slot.repeat):
            first = places[slot.item.replace("/repeat", "/first")]
            assert places[slot.item] - first >= len(shown) // 2 - 6
            assert slot.arms == shown[first].arms[::-1]


@pytest.mark.parametrize("reader", READERS)
def test_the_two_images_of_a_case_lie_a_quarter_of_the_phase_apart(reader: str) -> None:
    """They come from one noise and look alike; side by side they would say what the study is of."""
    for phase in ("rating", "detection"):
        shown = [slot for slot in phase_of(schedule(plain_protocol(), reader), phase) if not slot.repeat]
        places: dict[str, list[int]] = {}
        for place, slot in enumerate(shown):
            places.setdefault(slot.case, []).append(place)
        gaps = [max(found) - min(found) for case, found in places.items() if case.startswith("c")]
        assert min(gaps) > len(shown) // 5


def test_half_of_the_pairs_have_the_aligned_image_on_the_left() -> None:
    left = Counter()
    for reader in READERS:
        shown = [slot for slot in phase_of(schedule(plain_protocol(), reader), "preference") if not slot.repeat]
        assert sum(slot.arms[0] == "aligned" for slot in shown) == 20
        left.update(slot.case for slot in shown if slot.arms[0] == "aligned")
    assert len(left) == 40
    assert max(left.values()) < len(READERS)


def test_practice_opens_each_phase() -> None:
    slots = schedule(plain_protocol(), READERS[0])
    for phase, practice in (("rating", 4), ("detection", 4), ("preference", 2)):
        shown = [slot for slot in slots if slot.phase == phase]
        assert [slot.practice for slot in shown] == [True] * practice + [False] * (len(shown) - practice)


def test_no_repeats_where_none_are_asked_for() -> None:
    assert not [slot for slot in schedule(plain_protocol(repeat_share=0.0), READERS[0]) if slot.repeat]
