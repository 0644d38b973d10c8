"""A server that is killed between any two answers, or while it writes one, loses none that it acknowledged."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from medviz.study import Study
from tests.study.studies import make_study

ROOT = Path(__file__).resolve().parents[2]
# Says each position once its answer is acknowledged; with "wait" it then does nothing until it is killed.
SERVER = """
import sys
from medviz.study import Study
study, code = Study(sys.argv[1]), sys.argv[2]
while (item := study.next_item(code)) is not None:
    study.answer(code, item.position, item.choices[item.position % len(item.choices)].value, item.position)
    print(item.position, flush=True)
    if sys.argv[3] == "wait":
        sys.stdin.read()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_study(tmp_path / "study", cases=4, phases=("rating", "preference"))
    return tmp_path / "study"


def killed_server(folder: Path, code: str, mode: str) -> list[int]:
    """Positions acknowledged by a server that is killed after its first."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVER, str(folder), code, mode],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdout is not None
        first = server.stdout.readline()
        os.kill(server.pid, signal.SIGKILL)
        return [int(line) for line in [first, *server.stdout] if line.endswith("\n")]


def test_kill_between_any_two_answers_loses_none(folder: Path) -> None:
    code = Study(folder).start(True, "dermatology", 8, "1920x1080")
    total = Study(folder).progress(code).total
    for position in range(total):
        assert killed_server(folder, code, "wait") == [position]
        assert [answer.position for answer in Study(folder).store.answers()] == list(range(position + 1))
    answers = Study(folder).store.answers()
    assert [answer.response_ms for answer in answers] == list(range(total))
    assert Study(folder).progress(code).finished


def test_kill_while_answers_are_written_loses_none(folder: Path) -> None:
    for _ in range(4):
        code = Study(folder).start(True, "dermatology", 8, "1920x1080")
        acknowledged = killed_server(folder, code, "go on")
        study = Study(folder)
        stored = study.progress(code).answered
        assert acknowledged == list(range(len(acknowledged)))
        assert stored in (len(acknowledged), len(acknowledged) + 1)  # stored, and killed before it was acknowledged
        item = study.next_item(code)
        assert (item.position if item else study.progress(code).total) == stored
