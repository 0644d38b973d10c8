"""What the study page calls: consent, the next item, an answer. Nothing in an item says where its images come from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from medviz.errors import InputError
from medviz.study.pictures import load_pictures
from medviz.study.protocol import Choice, Phase, Protocol, Task, read_protocol
from medviz.study.schedule import Slot, schedule
from medviz.study.store import STORE_NAME, Answer, Store, reader_id

MAX_TEXT_CHARS = 80
MAX_YEARS = 70.0
MAX_RESPONSE_MS = 24 * 3600 * 1000
MIN_ZOOM, MAX_ZOOM = 0.1, 100.0


@dataclass(frozen=True)
class Item:
    """What a reader is shown next.

    position: sent back with the answer. number, total: of this phase's items, practice counted apart.
    starts_part: whether instructions are to be shown first. prompt: in the preference phase alone, else empty.
    images: PNG files from left to right, one, or two in the preference phase; square, of one size, without metadata.
    """

    position: int
    phase: Phase
    practice: bool
    number: int
    total: int
    starts_part: bool
    instructions: str
    question: str
    choices: tuple[Choice, ...]
    prompt: str
    images: tuple[bytes, ...] = field(repr=False)


@dataclass(frozen=True)
class Progress:
    """How many of a reader's items are answered, practice and repeats included."""

    answered: int
    total: int

    @property
    def finished(self) -> bool:
        """Whether no item is left."""
        return self.answered == self.total


class Study:
    """A running study: one protocol, its images and its answers. Safe for several readers, threads and processes.

    folder: holds protocol.json and the synthetic images. real_images: the user's own folder, where the protocol needs
    one. database: of the answers, study.sqlite in the folder unless named.
    Raises StudyError for a changed protocol or image, and for answers to another protocol.
    """

    def __init__(self, folder: Path | str, real_images: Path | str | None = None, database: Path | str | None = None):
        self.folder = Path(folder)
        self.protocol: Protocol = read_protocol(self.folder)
        self._pictures = load_pictures(self.protocol, self.folder, Path(real_images) if real_images else None)
        self.store = Store(Path(database) if database else self.folder / STORE_NAME, self.protocol.sha256)
        self._prompts: Mapping[str, str] = {
            case.key: case.prompt for case in (*self.protocol.cases, *self.protocol.practice)
        }
        self._slots = lru_cache(maxsize=256)(lambda reader: schedule(self.protocol, reader))

    @property
    def consent(self) -> str:
        """The text that a reader has to agree to."""
        return self.protocol.consent

    @property
    def closing(self) -> str:
        """The text shown at the end, which tells what was kept back."""
        return self.protocol.closing

    def start(self, consent: bool, specialty: str, years: float, display: str, simulated: bool = False) -> str:
        """Take a reader in and return the reader code, to be shown once: it is the only way to resume.

        years: of experience in the specialty, 0 to MAX_YEARS. display: such as "1920x1080@2". Raises InputError without
        consent and for values outside the limits.
        """
        if consent is not True:
            raise InputError("the study cannot start without consent")
        return self.store.add_reader(
            _text(specialty, "specialty"),
            _number(years, "years of experience", 0.0, MAX_YEARS),
            _text(display, "display"),
            simulated,
        )

    def progress(self, code: str) -> Progress:
        """How far a reader is. Raises InputError for an unknown code."""
        reader = self._reader(code)
        return Progress(self.store.count(reader), len(self._slots(reader)))

    def next_item(self, code: str) -> Item | None:
        """The first item without an answer, the same until it is answered; None at the end. InputError as progress."""
        reader = self._reader(code)
        slots, position = self._slots(reader), self.store.count(reader)
        if position == len(slots):
            return None
        slot, task = slots[position], self.protocol.task(slots[position].phase)
        part = [other.position for other in slots if other.phase == slot.phase and other.practice == slot.practice]
        first_of_phase = min(other.position for other in slots if other.phase == slot.phase)
        return Item(
            position=position,
            phase=slot.phase,
            practice=slot.practice,
            number=part.index(position) + 1,
            total=len(part),
            starts_part=position == first_of_phase,
            instructions=task.instructions,
            question=task.question,
            choices=task.choices,
            prompt=self._prompts[slot.case] if slot.phase == "preference" else "",
            images=tuple(self._pictures[slot.case, arm] for arm in slot.arms),
        )

    def answer(
        self, code: str, position: int, value: str, response_ms: int, zoom: float = 1.0, display: str = "unknown"
    ) -> Progress:
        """Store the answer to the item at `position`; it is on the disk when this returns.

        value: of one of the item's choices. response_ms: from display to answer. zoom: largest magnification used.
        Sending the same answer again changes nothing. Raises InputError for an unknown code or choice, another answer
        to an answered item, and an item that is not the next.
        """
        reader = self._reader(code)
        slot = self._slot(reader, position)
        self.store.append(
            Answer(
                reader=reader,
                position=slot.position,
                item=slot.item,
                phase=slot.phase,
                case_key=slot.case,
                arms=",".join(slot.arms),
                practice=slot.practice,
                is_repeat=slot.repeat,
                value=_choice(value, self.protocol.task(slot.phase)),
                response_ms=round(_number(response_ms, "response time in ms", 0, MAX_RESPONSE_MS)),
                zoom=_number(zoom, "zoom", MIN_ZOOM, MAX_ZOOM),
                display=_text(display, "display"),
            )
        )
        return self.progress(code)

    def _reader(self, code: str) -> str:
        reader = reader_id(code) if isinstance(code, str) else ""
        if not self.store.knows(reader):
            raise InputError("this reader code is not known here; check its letters, or start anew")
        return reader

    def _slot(self, reader: str, position: int) -> Slot:
        slots = self._slots(reader)
        if isinstance(position, bool) or not isinstance(position, int) or not 0 <= position < len(slots):
            raise InputError(f"the position must be a whole number from 0 to {len(slots) - 1}, got {position!r:.40}")
        return slots[position]


def _choice(value: str, task: Task) -> str:
    allowed = [choice.value for choice in task.choices]
    if value not in allowed:
        raise InputError(f"{value!r:.40} is no answer to this question; allowed: {', '.join(allowed)}")
    return value


def _text(value: str, what: str) -> str:
    text = value.strip() if isinstance(value, str) else ""
    if not 1 <= len(text) <= MAX_TEXT_CHARS or not text.isprintable():
        raise InputError(f"the {what} must be printable text of 1 to {MAX_TEXT_CHARS} characters")
    return text


def _number(value: float, what: str, low: float, high: float) -> float:
    allowed = f"the {what} must be a number from {low:g} to {high:g}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InputError(f"{allowed}, got {value!r:.40}")
    if not math.isfinite(value) or not low <= value <= high:
        raise InputError(f"{allowed}, got {value:g}")
    return float(value)
