"""What a reader gets says nothing of where an image comes from; answers are durable, in order and never changed."""

import dataclasses
import io
import multiprocessing
import sqlite3
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from medviz.errors import InputError, StudyError
from medviz.study import Item, Study
from medviz.study.answers import answer_table
from medviz.study.schedule import schedule
from medviz.study.store import Store, reader_id
from tests.study.studies import ADAPTER, SIZE_PX, make_study, real_folder_of


def start(study: Study) -> str:
    return study.start(True, "dermatology", 8, "1920x1080@1")


def answer_all(study: Study, code: str, count: int | None = None) -> list[Item]:
    """Answer `count` items, or all, with the choice that the position picks."""
    shown = []
    while (count is None or len(shown) < count) and (item := study.next_item(code)) is not None:
        study.answer(code, item.position, item.choices[item.position % len(item.choices)].value, 1000 + item.position)
        shown.append(item)
    return shown


def png_chunks(content: bytes) -> list[bytes]:
    kinds, place = [], 8
    while place < len(content):
        (length,) = struct.unpack_from(">I", content, place)
        kinds.append(content[place + 4 : place + 8])
        place += 12 + length
    return kinds


def test_items_hold_no_label_no_model_and_no_metadata(study: Study) -> None:
    shown = answer_all(study, start(study))
    cases = [*study.protocol.cases, *study.protocol.practice]
    secrets = {ADAPTER, "baseline", "aligned", "patient", "secret", "SYNTHETIC"}
    secrets |= {str(case.seed) for case in cases} | {case.baseline.sha256 for case in cases}
    secrets |= {case.key for case in cases} | {image.key for image in study.protocol.real}
    for item in shown:
        told = repr(dataclasses.replace(item, instructions="", images=()))
        assert not [secret for secret in secrets if secret in told]
        assert bool(item.prompt) == (item.phase == "preference")
        assert len(item.images) == (2 if item.phase == "preference" else 1)
        for content in item.images:
            assert set(png_chunks(content)) == {b"IHDR", b"IDAT", b"IEND"}
            image = Image.open(io.BytesIO(content))
            assert (image.size, image.mode) == ((SIZE_PX, SIZE_PX), "RGB")


def test_the_quality_phase_does_not_tell_that_images_are_synthetic(study: Study) -> None:
    item = study.next_item(start(study))
    assert item is not None
    told = f"{study.consent} {item.instructions} {item.question}".lower()
    assert item.phase == "rating"
    assert not [word for word in ("synthetic", "generat", "artificial", "model", "real") if word in told]
    assert "synthetic" not in repr([choice.label for choice in item.choices]).lower()


def test_what_is_shown_is_what_is_stored(study: Study) -> None:
    code = start(study)
    shown = answer_all(study, code)
    assert study.next_item(code) is None
    assert study.progress(code).finished
    answers = study.store.answers()
    assert [answer.position for answer in answers] == [item.position for item in shown]
    pictures = {case.key: case for case in (*study.protocol.cases, *study.protocol.practice)}
    for item, answer in zip(shown, answers, strict=True):
        assert answer.response_ms == 1000 + item.position
        for content, arm in zip(item.images, answer.arms.split(","), strict=True):
            if arm != "real":
                file = pictures[answer.case_key].picture(arm).file
                assert content == (study.folder / file).read_bytes()


def test_score_follows_the_side_that_was_shown(study: Study) -> None:
    code = start(study)
    while (item := study.next_item(code)) is not None:
        study.answer(code, item.position, "left" if item.phase == "preference" else item.choices[0].value, 1)
    table = answer_table(study.protocol, study.store)
    pairs = table[table["phase"] == "preference"]
    assert ((pairs["left"] == "aligned") == (pairs["score"] == 1)).all()
    assert set(table["reader"]) == {"R1"}


def test_a_reader_resumes_by_code_in_a_new_process(study: Study, study_folder: Path) -> None:
    code = start(study)
    answer_all(study, code, 5)
    waiting = study.next_item(code)
    again = Study(study_folder, real_folder_of(study_folder), study.store.path)
    assert again.next_item(code.lower().replace("-", " ")) == waiting
    assert again.progress(code).answered == 5


def test_no_answer_is_changed_skipped_or_taken_back(study: Study) -> None:
    code = start(study)
    first = study.next_item(code)
    assert first is not None
    study.answer(code, 0, "2", 1000)
    assert study.answer(code, 0, "2", 5000).answered == 1  # the acknowledgement was lost and the page sent it again
    with pytest.raises(InputError, match="cannot be changed"):
        study.answer(code, 0, "3", 1000)
    with pytest.raises(InputError, match="the next item is 2"):
        study.answer(code, 2, "2", 1000)
    stored = study.store.answers()
    assert [(answer.position, answer.value, answer.response_ms) for answer in stored] == [(0, "2", 1000)]
    with sqlite3.connect(study.store.path) as connection:
        for statement in ("UPDATE answers SET value = '5'", "DELETE FROM answers", "DELETE FROM readers"):
            with pytest.raises(sqlite3.IntegrityError, match="append only"):
                connection.execute(statement)
    connection.close()


def test_commits_wait_for_the_disk(study: Study) -> None:
    with study.store._connection() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": "7"}, "allowed: 1, 2, 3, 4, 5"),
        ({"value": "left"}, "allowed: 1, 2, 3, 4, 5"),
        ({"position": -1}, "position"),
        ({"position": 10_000}, "position"),
        ({"position": True}, "position"),
        ({"response_ms": -1}, "response time"),
        ({"response_ms": float("nan")}, "response time"),
        ({"zoom": 1e9}, "zoom"),
        ({"display": "a\nb"}, "display"),
        ({"code": "AAAA-AAAA-AAAA-AAAA"}, "not known"),
    ],
)
def test_bad_answers_are_refused_and_nothing_is_stored(study: Study, changes: dict, message: str) -> None:
    code = start(study)
    with pytest.raises(InputError, match=message):
        study.answer(**{"code": code, "position": 0, "value": "1", "response_ms": 10, **changes})
    assert study.progress(code).answered == 0


def test_nobody_starts_without_consent_specialty_and_years(study: Study) -> None:
    for arguments in ((False, "dermatology", 8), (True, " ", 8), (True, "dermatology", -1), (True, "x" * 81, 8)):
        with pytest.raises(InputError):
            study.start(*arguments, "1920x1080")
    assert study.store.readers() == []


def test_the_database_gives_no_reader_code_away(study: Study) -> None:
    codes = [start(study) for _ in range(20)]
    assert len(set(codes)) == 20
    assert all(len(code) == 19 for code in codes)
    content = study.store.path.read_bytes() + Path(f"{study.store.path}-wal").read_bytes()
    assert not [code for code in codes if code.encode() in content or code.replace("-", "").encode() in content]


def test_readers_at_the_same_time_do_not_mix(study: Study) -> None:
    codes = [start(study) for _ in range(4)]
    with ThreadPoolExecutor(4) as threads:
        shown = list(threads.map(lambda code: answer_all(study, code), codes))
    for code, items in zip(codes, shown, strict=True):
        mine = [answer for answer in study.store.answers() if answer.reader == reader_id(code)]
        slots = schedule(study.protocol, reader_id(code))
        assert [answer.item for answer in mine] == [slot.item for slot in slots]
        assert [answer.value for answer in mine] == [
            item.choices[item.position % len(item.choices)].value for item in items
        ]


def _race(folder: Path, code: str) -> None:
    """Answer everything beside another process with the same code; the loser of a race asks for the next item."""
    study = Study(folder)
    while (item := study.next_item(code)) is not None:
        try:
            study.answer(code, item.position, item.choices[0].value, 1)
        except InputError:
            continue


def test_two_pages_with_one_code_store_every_item_once(tmp_path: Path) -> None:
    make_study(tmp_path / "s", cases=6)
    study = Study(tmp_path / "s")
    code = start(study)
    context = multiprocessing.get_context("spawn")
    pages = [context.Process(target=_race, args=(tmp_path / "s", code)) for _ in range(2)]
    for page in pages:
        page.start()
    for page in pages:
        page.join(120)
    assert [page.exitcode for page in pages] == [0, 0]
    assert [answer.position for answer in study.store.answers()] == list(range(study.progress(code).total))


def test_answers_to_another_protocol_are_refused(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="holds the answers to the protocol"):
        Store(study.store.path, "f" * 64)
    (tmp_path / "text.sqlite").write_text("no database, but long enough to be read as one" * 100)
    with pytest.raises(StudyError, match="cannot be read or written"):
        Store(tmp_path / "text.sqlite", "f" * 64)


def test_changed_and_missing_images_are_refused(tmp_path: Path) -> None:
    protocol = make_study(tmp_path / "s", cases=4, real=6)
    real = real_folder_of(tmp_path / "s")
    with pytest.raises(StudyError, match="name the folder"):
        Study(tmp_path / "s")
    changed = real / protocol.real[0].name
    changed.write_bytes(changed.read_bytes() + b" ")
    with pytest.raises(StudyError, match="changed since"):
        Study(tmp_path / "s", real)
    (tmp_path / "s" / protocol.cases[0].aligned.file).unlink()
    with pytest.raises(StudyError, match="cannot be read"):
        Study(tmp_path / "s", real)
