"""The frozen protocol of a reader study: what is shown, what is asked and which margins are tested.

It is one JSON file with its own sha256. The hash is fixed before the first reader starts: it goes into the store, into
every reader's order, and can be registered. A file that was edited afterwards is refused.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from medviz.domains import get_domain
from medviz.errors import InputError, StudyError

FORMAT_VERSION = 1
PROTOCOL_NAME = "protocol.json"
MIN_CASES, MAX_CASES = 4, 1000
MIN_SIZE_PX, MAX_SIZE_PX = 32, 2048
MAX_REPEAT_SHARE = 0.2  # repeats come from the first quarter of a phase
_SHA256 = re.compile(r"[0-9a-f]{64}")
_KEY = re.compile(r"[a-z0-9-]{1,32}")

Phase = Literal["rating", "detection", "preference"]
Arm = Literal["baseline", "aligned", "real"]
PHASES: tuple[Phase, ...] = ("rating", "detection", "preference")
SYNTHETIC_ARMS: tuple[Arm, ...] = ("baseline", "aligned")


@dataclass(frozen=True)
class Choice:
    """One answer that a reader may give: the value that is stored and the label that is shown."""

    value: str
    label: str


@dataclass(frozen=True)
class Task:
    """What is asked in one phase. instructions are shown once, at its start; question beside every image."""

    phase: Phase
    instructions: str
    question: str
    choices: tuple[Choice, ...]


@dataclass(frozen=True)
class Picture:
    """A synthetic image: a PNG without metadata, relative to the study folder, and its sha256."""

    file: str
    sha256: str


@dataclass(frozen=True)
class RealImage:
    """A real image of the user's own folder: its name there and its sha256. The image itself is never copied."""

    key: str
    name: str
    sha256: str


@dataclass(frozen=True)
class Case:
    """One prompt and seed, drawn by the baseline and by an aligned model from the same noise.

    stratum: what the prompts are balanced over, such as the finding asked for.
    """

    key: str
    stratum: str
    prompt: str
    seed: int
    adapter: str
    baseline: Picture
    aligned: Picture

    def picture(self, arm: str) -> Picture:
        """The image of "baseline" or "aligned"."""
        return {"baseline": self.baseline, "aligned": self.aligned}[arm]


@dataclass(frozen=True)
class Protocol:
    """Everything about a study that is decided before it starts. Raises InputError for contradictions.

    seed: of the cases, and through the hash of every reader's order. size_px: side of the square images shown.
    tasks: the phases, in the order rating, detection, preference; detection needs real images.
    practice, practice_real: shown first in each phase and left out of the analysis.
    repeat_share: share of a phase's items that are shown a second time, 0 to MAX_REPEAT_SHARE.
    rating_margin: points within which mean ratings count as equivalent.
    auc_margin: distance from 0.5 within which an AUC counts as chance.
    models: what drew the images (sha256 of the model folder, steps, guidance scale).
    """

    title: str
    domain: str
    seed: int
    size_px: int
    tasks: tuple[Task, ...]
    cases: tuple[Case, ...]
    practice: tuple[Case, ...]
    real: tuple[RealImage, ...]
    practice_real: tuple[RealImage, ...]
    models: Mapping[str, Any]
    consent: str
    closing: str
    repeat_share: float = 0.1
    rating_margin: float = 0.5
    auc_margin: float = 0.1
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        get_domain(self.domain)
        phases = tuple(task.phase for task in self.tasks)
        if not phases or phases != tuple(phase for phase in PHASES if phase in phases):
            raise InputError(f"the phases are {phases}; allowed: one or more of {', '.join(PHASES)}, in this order")
        if not MIN_CASES <= len(self.cases) <= MAX_CASES:
            raise InputError(f"the study has {len(self.cases)} cases; allowed: {MIN_CASES} to {MAX_CASES}")
        if "detection" in phases and len(self.real) < MIN_CASES:
            raise InputError(f"'real or synthetic' needs at least {MIN_CASES} real images, found {len(self.real)}")
        if not MIN_SIZE_PX <= self.size_px <= MAX_SIZE_PX:
            raise InputError(f"size_px is {self.size_px}; allowed: {MIN_SIZE_PX} to {MAX_SIZE_PX}")
        if not 0 <= self.repeat_share <= MAX_REPEAT_SHARE:
            raise InputError(f"repeat_share is {self.repeat_share}; allowed: 0 to {MAX_REPEAT_SHARE}")
        if self.rating_margin <= 0 or not 0 < self.auc_margin < 0.5:
            raise InputError("the margins must be above 0, and that of the AUC below 0.5")
        if not self.consent.strip():
            raise InputError("the protocol has no consent text")
        _check_unique([*self.cases, *self.practice, *self.real, *self.practice_real])
        for image in (*self.real, *self.practice_real):
            _check_path(image.name)
            _check_sha256(image.sha256)
        for case in (*self.cases, *self.practice):
            for picture in (case.baseline, case.aligned):
                _check_path(picture.file)
                _check_sha256(picture.sha256)

    @cached_property
    def sha256(self) -> str:
        """The hash of the whole protocol in canonical JSON."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def task(self, phase: str) -> Task:
        """The task of one of the protocol's phases."""
        return next(task for task in self.tasks if task.phase == phase)


def write_protocol(protocol: Protocol, folder: Path) -> Path:
    """Write protocol.json with its hash, flushed to disk. Raises StudyError where one exists: a protocol is frozen."""
    path = folder / PROTOCOL_NAME
    text = json.dumps({"sha256": protocol.sha256, "protocol": asdict(protocol)}, indent=1, ensure_ascii=False)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise StudyError(f"{path} exists and a protocol is never overwritten; choose another folder") from None
    return path


def read_protocol(folder: Path) -> Protocol:
    """Read and check protocol.json. Raises StudyError when it is missing, damaged or changed since it was frozen."""
    path = folder / PROTOCOL_NAME
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(
            f"{folder} holds no {PROTOCOL_NAME}; make one with `python -m medviz study protocol`"
        ) from None
    except ValueError as error:
        raise StudyError(f"{path} is not JSON: {error}") from error
    try:
        protocol = _parse(content["protocol"])
        written = content["sha256"]
    except (KeyError, TypeError, AttributeError) as error:
        raise StudyError(f"{path} is not a study protocol of format {FORMAT_VERSION}: {error!r}") from error
    if protocol.format_version != FORMAT_VERSION:
        raise StudyError(f"{path} has format {protocol.format_version}; this version reads {FORMAT_VERSION}")
    if protocol.sha256 != written:
        raise StudyError(
            f"{path} was changed after it was frozen: its sha256 is {protocol.sha256}, the file says {written}"
        )
    return protocol


def _parse(content: Mapping[str, Any]) -> Protocol:
    unknown = set(content) - {field.name for field in fields(Protocol)}
    if unknown:
        raise TypeError(f"unknown fields {sorted(unknown)}")
    parts = {
        "tasks": tuple(
            Task(**{**task, "choices": tuple(Choice(**choice) for choice in task["choices"])})
            for task in content["tasks"]
        ),
        "cases": tuple(map(_case, content["cases"])),
        "practice": tuple(map(_case, content["practice"])),
        "real": tuple(RealImage(**image) for image in content["real"]),
        "practice_real": tuple(RealImage(**image) for image in content["practice_real"]),
    }
    return Protocol(**{**content, **parts})


def _case(content: Mapping[str, Any]) -> Case:
    return Case(**{**content, "baseline": Picture(**content["baseline"]), "aligned": Picture(**content["aligned"])})


def _check_unique(items: list[Case | RealImage]) -> None:
    keys = [item.key for item in items]
    for key in keys:
        if not _KEY.fullmatch(key):
            raise InputError(f"the key {key!r} must have 1 to 32 of a-z, 0-9 and -")
    if len(set(keys)) != len(keys):
        raise InputError("two cases or images have one key")


def _check_path(name: str) -> None:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise InputError(f"{name!r} must be a path inside the folder, with / between its parts")


def _check_sha256(value: str) -> None:
    if not _SHA256.fullmatch(value):
        raise InputError(f"{value[:80]!r} is no sha256 of 64 hexadecimal digits")
