"""A whole study with simulated readers: analysis, report, exports and the commands that make them."""

import csv
import io
import json
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest

from medviz.__main__ import COMMANDS, main
from medviz.errors import InputError, StudyError
from medviz.study import Study
from medviz.study.answers import answer_table
from medviz.study.checklist import AUTHORS, claim_checklist
from medviz.study.exports import answers_csv, imrmc_input
from medviz.study.report import report_page
from medviz.study.simulation import Behaviour, run_simulated
from medviz.study.statistics import analyse
from tests.study.studies import make_study, real_folder_of


@pytest.fixture(scope="module")
def finished(study_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Three readers who finished and one who stopped in the second phase. Repeats are answered as at first."""
    study = Study(study_folder, real_folder_of(study_folder), tmp_path_factory.mktemp("answers") / "answers.sqlite")
    run_simulated(study, 3, Behaviour(preference=1.0, reader_sd=0.2), seed=5)
    code = study.start(True, "<b>radiology</b>", 3, "1280x800")
    for position in range(60):
        study.answer(code, position, "3", 2000)
    return study


@pytest.fixture(scope="module")
def result(finished: Study) -> dict:
    return analyse(finished.protocol, finished.store)


def test_every_phase_is_analysed_with_intervals(result: dict) -> None:
    preference, detection, rating = result["preference"], result["detection"], result["rating"]
    model = preference["mixed_model"]["estimate"]
    assert 0.5 < model["low"] < model["value"] < model["high"] <= 1
    assert sum(preference["answers"].values()) == 3 * 12
    for arm in detection["arms"].values():
        assert 0 <= arm["auc"]["low"] < arm["auc"]["value"] < arm["auc"]["high"] <= 1
    assert set(rating["differences"]) == {"aligned_less_baseline", "baseline_less_real", "aligned_less_real"}
    for phase in (preference, detection, rating):
        assert phase["intra_reader"]["all_readers"]["items"] >= 3
        assert -1 <= phase["inter_reader"]["krippendorff_alpha"]["value"] <= 1
    json.dumps(result, allow_nan=False)


def test_a_reader_who_stopped_is_named_and_left_out_of_what_needs_complete_readers(result: dict) -> None:
    assert result["readers"]["R4"]["answered"] == 60
    assert result["rating"]["readers"] == 4
    assert result["detection"]["readers"] == 3
    assert list(result["preference"]["per_reader"]) == ["R1", "R2", "R3"]


def test_repeats_and_practice_are_not_counted(finished: Study, result: dict) -> None:
    table = answer_table(finished.protocol, finished.store)
    shown = table[(table["phase"] == "preference")]
    assert len(shown) == 3 * (2 + 12 + 1)
    assert result["preference"]["obuchowski_rockette"]["cases"] == 12


def test_the_analysis_is_a_function_of_the_answers(finished: Study, result: dict) -> None:
    assert analyse(finished.protocol, finished.store) == result


def test_nothing_to_analyse_is_said(study: Study) -> None:
    with pytest.raises(StudyError, match="no answers besides practice"):
        analyse(study.protocol, study.store)


def test_one_reader_has_intervals_over_cases_and_no_mixed_model(tmp_path: Path) -> None:
    make_study(tmp_path / "s", cases=8)
    study = Study(tmp_path / "s")
    run_simulated(study, 1, Behaviour(), seed=0)
    preference = analyse(study.protocol, study.store)["preference"]
    assert preference["mixed_model"] is None
    assert preference["obuchowski_rockette"]["readers"] == 1
    assert preference["obuchowski_rockette"]["low"] is not None
    assert preference["inter_reader"]["fleiss_kappa"] is None


class Page(HTMLParser):
    """Tags, with the addresses they load."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_report_stands_alone_and_renders_no_typed_text_as_html(finished: Study, result: dict) -> None:
    text = report_page([(finished.protocol, finished.store, result)])
    page = Page(text)
    assert page.tags["img"] == 4
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not page.tags["script"]
    assert not page.tags["b"]
    assert "&lt;b&gt;radiology&lt;/b&gt;" in text
    assert "Simulated readers." in text
    assert finished.protocol.sha256 in text
    assert "nan" not in text.lower().replace("finan", "")


def test_the_checklist_has_the_44_items_and_says_what_is_open(result: dict) -> None:
    items = claim_checklist(result)
    assert [item.number for item in items] == list(range(1, 45))
    assert {item.answer == AUTHORS for item in items if not item.answered} == {True}
    assert result["study"]["protocol_sha256"] in items[41].answer


def test_the_csv_has_a_row_an_answer_and_no_code(finished: Study) -> None:
    rows = list(csv.DictReader(io.StringIO(answers_csv(answer_table(finished.protocol, finished.store)))))
    assert len(rows) == len(finished.store.answers())
    assert {row["reader"] for row in rows} == {"R1", "R2", "R3", "R4"}
    assert not [row for row in rows if any(answer.reader in row.values() for answer in finished.store.answers())]


def test_a_spreadsheet_runs_no_cell_as_a_formula(study: Study) -> None:
    code = study.start(True, "=HYPERLINK(A1)", 3, "@1280x800")
    study.answer(code, 0, "3", 2000, display="@1280x800")
    (row,) = csv.DictReader(io.StringIO(answers_csv(answer_table(study.protocol, study.store))))
    assert row["specialty"].startswith("'=")
    assert row["display"].startswith("'@")


def imrmc_rows(text: str) -> Iterator[tuple[int, int, int, float]]:
    for line in text.split("BEGIN DATA:\n")[1].splitlines():
        reader, case, modality, score = line.split(",")
        yield int(reader), int(case), int(modality), float(score)


def test_imrmc_input_is_complete_and_gives_the_same_areas(finished: Study, result: dict) -> None:
    text = imrmc_input(finished.protocol, answer_table(finished.protocol, finished.store))
    assert "NR: 3\nN0: 8\nN1: 12\nNM: 2\n" in text
    rows = list(imrmc_rows(text))
    truth = {case: score for reader, case, modality, score in rows if reader == -1 and modality == 0}
    assert Counter(truth.values()) == {0.0: 8, 1.0: 12}
    assert len(rows) == 20 + 3 * 2 * 20
    for modality, arm in ((1, "baseline"), (2, "aligned")):
        areas = []
        for reader in (1, 2, 3):
            scores = {case: score for who, case, kind, score in rows if (who, kind) == (reader, modality)}
            pairs = [(scores[a], scores[b]) for a in scores for b in scores if truth[a] == 1 and truth[b] == 0]
            areas.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
        assert sum(areas) / 3 == pytest.approx(result["detection"]["arms"][arm]["auc"]["value"])


def test_simulated_answers_do_not_go_into_the_studys_own_database(study_folder: Path) -> None:
    own = study_folder / "study.sqlite"
    assert main(["study", "simulate", str(study_folder), "--database", str(own)]) == 1
    assert not own.exists()


def test_commands_from_protocol_to_report(model_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, database, out = (str(tmp_path / name) for name in ("study", "answers.sqlite", "out"))
    drawing = ["--models", str(model_root), "--cases", "4", "--steps", "1"]
    assert main(["study", "protocol", "radiology", "--out", folder, *drawing]) == 0
    assert main(["study", "protocol", "radiology", "--out", folder, *drawing]) == 1
    assert "holds a protocol already" in capsys.readouterr().err
    assert main(["study", "simulate", folder, "--database", database, "--readers", "2"]) == 0
    assert main(["study", "analyse", folder, "--database", database, "--out", out]) == 0
    assert main(["study", "export", folder, "--database", database, "--out", out]) == 0
    analysis = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert analysis[0]["study"]["phases"] == ["rating", "preference"]
    assert analysis[0]["simulated"]
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".html", ".csv"}


def test_plan_prints_a_row_for_each_number_of_readers_and_cases(capsys: pytest.CaptureFixture) -> None:
    assert main(["study", "plan", "--readers", "3", "5", "--cases", "20", "40", "--simulations", "100"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4


def test_errors_have_a_sentence_and_a_status(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([]) == 2
    assert main(["no-such"]) == 2
    assert main(["--help"]) == 0
    assert main(["study", "analyse", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "holds no protocol.json" in capsys.readouterr().err
    assert "study" in COMMANDS


def test_a_study_needs_at_least_one_simulated_reader(study: Study) -> None:
    with pytest.raises(InputError, match="at least one reader"):
        run_simulated(study, 0, Behaviour(), seed=0)
