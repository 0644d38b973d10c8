"""The tables of README and app show what the JSON reports hold, and say so where they hold nothing."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.limits import DEFAULT_GUIDANCE_SCALE
from medviz.models.card import CARD_NAME, write_card
from medviz.models.manifest import read_manifest, write_manifest
from train.evaluate.contact_sheet import contact_sheet, evenly_spaced, write_sheet
from train.evaluate.figures import Figure
from train.evaluate.generated import rests_on, told
from train.evaluate.report import (
    BEGIN,
    END,
    FORMAT_VERSION,
    TABLES_NAME,
    ReportConfig,
    estimate_text,
    read_reports,
    replaced,
    run,
    section,
    summary,
    tables,
)
from train.evaluate.statistics import Estimate

README = f"# Title\n\n{BEGIN}\nstale text\n{END}\n\nafter\n"


def report(**changes: Any) -> dict[str, Any]:
    figure = Figure(
        name="judge_accuracy_grid",
        label="Prompt accuracy by the judge",
        group="alignment",
        baseline=Estimate(0.5, 0.41, 0.59, 256),
        aligned={"attribute": Estimate(0.75, 0.69, 0.81, 256)},
        change={"attribute": Estimate(0.25, 0.2, 0.3, 256)},
        higher_is_better=True,
        headline=True,
    )
    hidden = Figure("head_hair", "Hair", "alignment", None, {"attribute": None}, {"attribute": None}, True)
    ratio = Figure(
        name="diversity",
        label="Distance | of <pictures>",
        group="diversity",
        baseline=Estimate(float("nan"), None, None, 0),
        aligned={"attribute": None},
        change={"attribute": Estimate(0.9, 0.8, 1.0, 32)},
        higher_is_better=True,
        change_kind="ratio",
        headline=True,
    )
    return {
        "format_version": FORMAT_VERSION,
        "title": "Dermatology",
        "domain": "dermatology",
        "command": "python -m train evaluate train/recipes/evaluate-dermatology-cpu.yaml",
        "default_adapter": "attribute",
        "settings": {"steps": 20},
        "models": {"sha256": "ab" * 32},
        "figures": [f.as_json() for f in (figure, hidden, ratio)],
        "file": "evaluation-dermatology.json",
        **changes,
    }


def test_section_shows_headline_figures_with_intervals_and_n() -> None:
    text = section(report())
    row = "| Prompt accuracy by the judge ↑ |  | 0.5 [0.41, 0.59] | 0.75 [0.69, 0.81] | 0.25 [0.2, 0.3] | 256 |"
    assert row in text.splitlines()
    assert "Hair" not in text
    assert "steps 20" in text
    assert "`abababababab`" in text


def test_what_was_not_computed_says_so_and_text_cannot_break_the_table() -> None:
    line = next(line for line in section(report()).splitlines() if line.startswith("| Distance"))
    assert line == (
        "| Distance \\| of &lt;pictures> ↑ |  | not computed | not computed | × 0.9 [0.8, 1] | not computed |"
    )
    assert estimate_text(None) == estimate_text({"value": None}) == "not computed"
    assert estimate_text({"value": 12.3456, "low": None, "high": None}) == "12.3"


def test_an_adapter_that_was_not_evaluated_is_not_computed() -> None:
    line = next(line for line in section(report(default_adapter="other")).splitlines() if "accuracy" in line)
    assert line.count("not computed") == 2


def test_every_adapter_that_was_measured_stands_beside_the_default_one() -> None:
    figure = Figure(
        name="judge_accuracy_grid",
        label="Accuracy",
        group="alignment",
        baseline=Estimate(0.5, 0.41, 0.59, 256),
        aligned={"bold": Estimate(0.8, 0.7, 0.9, 256), "attribute": Estimate(0.75, 0.69, 0.81, 256)},
        change={"bold": Estimate(0.3, 0.2, 0.4, 256), "attribute": Estimate(0.25, 0.2, 0.3, 256)},
        higher_is_better=True,
        headline=True,
    )
    heading, _, row = section(report(figures=[figure.as_json()])).splitlines()[-3:]
    assert heading.endswith("| baseline | aligned (`attribute`) | change | aligned (`bold`) | change | n |")
    assert row.endswith("| 0.75 [0.69, 0.81] | 0.25 [0.2, 0.3] | 0.8 [0.7, 0.9] | 0.3 [0.2, 0.4] | 256 |")


def test_no_report_at_all_is_said() -> None:
    assert "not computed" in tables([])
    assert summary([report(kind="grounding")]) == tables([])


def test_a_summary_sets_few_steps_beside_many_in_figures_that_decide() -> None:
    few = report(kind="evaluation", settings={"steps": 4, "split": "test"})
    many = report(kind="evaluation", settings={"steps": 20, "split": "test"}, figures=[*report()["figures"]])
    changed = [
        {**figure, "adapters": {"attribute": {"value": {"value": 0.7}, "change": None}}} for figure in few["figures"]
    ]
    other = report(kind="evaluation", domain="radiology", title="Radiology")
    text = summary([{**few, "figures": changed}, report(kind="methods"), many, other])
    first, second = text.split("\n\n### ")
    assert first.startswith("### Dermatology\n\nImages of the test split;")
    heading, _, *rows = [line for line in first.splitlines() if line.startswith("|")]
    assert heading == "| 20 steps | real images | baseline | aligned | change | aligned, 4 steps | n |"
    row = "| Prompt accuracy by the judge ↑ |  | 0.5 [0.41, 0.59] | 0.75 [0.69, 0.81] | 0.25 [0.2, 0.3] | 0.7 | 256 |"
    assert rows[0] == row
    assert second.startswith("Radiology\n")
    assert "4 steps" not in second


def test_reports_are_read_by_kind_and_damage_is_named(tmp_path: Path) -> None:
    (tmp_path / "evaluation-b.json").write_text(json.dumps(report()))
    (tmp_path / "other.json").write_text("[1, 2]")
    assert [r["file"] for r in read_reports(tmp_path)] == ["evaluation-b.json"]
    (tmp_path / "evaluation-c.json").write_text(json.dumps(report(format_version=99)))
    with pytest.raises(InputError, match=r"evaluation-c\.json has format 99"):
        read_reports(tmp_path)
    (tmp_path / "evaluation-c.json").write_text("{")
    with pytest.raises(InputError, match="no readable JSON"):
        read_reports(tmp_path)


@pytest.mark.parametrize("text", ["no markers", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}"])
def test_a_readme_without_its_markers_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="needs one"):
        replaced(text, "x")


def test_run_writes_once_and_check_notices_a_stale_table(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    (tmp_path / "evaluation-a.json").write_text(json.dumps(report(kind="evaluation")))
    config = ReportConfig(reports=str(tmp_path), readme=str(readme), models=str(tmp_path / "none"))
    with pytest.raises(InputError, match="python -m train report"):
        run(replace(config, check=True))
    assert readme.read_text() == README
    assert run(config) is False
    text = readme.read_text()
    assert text.startswith("# Title\n\n")
    assert text.endswith(f"{END}\n\nafter\n")
    assert "stale text" not in text
    assert (tmp_path / TABLES_NAME).read_text().strip() == tables(read_reports(tmp_path))
    assert summary(read_reports(tmp_path)) in text
    assert run(config) is True
    readme.write_text(text.replace("0.75", "0.99"))
    with pytest.raises(InputError):
        run(replace(config, check=True))


def test_a_card_shows_the_evaluation_of_its_own_files_alone(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "models/dermatology"
    readme.write_text(README)
    (folder / "unet").mkdir(parents=True)
    (folder / "unet/config.json").write_text("{}")
    digest = write_manifest(folder, {"domain": "dermatology"}).sha256
    config = ReportConfig(reports=str(tmp_path), readme=str(readme), models=str(tmp_path / "models"))
    (tmp_path / "evaluation-a.json").write_text(json.dumps(report()))
    run(config)
    assert "## Measured\n\nNot computed." in (folder / CARD_NAME).read_text()
    assert "`abababababab`, not those that ship;" in (tmp_path / TABLES_NAME).read_text()
    mine: dict[str, Any] = {"kind": "evaluation", "models": {"sha256": digest}}
    other = {"steps": 20, "guidance_scale": "9"}
    (tmp_path / "evaluation-a.json").write_text(json.dumps(report(**mine, settings=other)))
    run(config)
    assert "## Measured\n\nNot computed." in (folder / CARD_NAME).read_text()  # it draws otherwise now
    own = {"steps": 20, "guidance_scale": told(read_manifest(folder), 20, Guidance(DEFAULT_GUIDANCE_SCALE))}
    (tmp_path / "evaluation-a.json").write_text(json.dumps(report(**mine, settings=own)))
    run(config)
    assert "0.75" in (folder / CARD_NAME).read_text()
    assert "not those that ship" not in (tmp_path / TABLES_NAME).read_text()
    assert run(config) is True
    write_card(folder)
    with pytest.raises(InputError, match=r"dermatology/README\.md does not show the reports"):
        run(replace(config, check=True))


def test_an_evaluation_stays_true_of_a_folder_until_a_part_that_it_rests_on_changes(tmp_path: Path) -> None:
    readme, folder = tmp_path / "README.md", tmp_path / "models/dermatology"
    for name in ("unet", "judge", "rewards/attribute"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text("{}")
    readme.write_text(README)
    manifest = write_manifest(folder, {"domain": "dermatology"})
    config = ReportConfig(reports=str(tmp_path), readme=str(readme), models=str(tmp_path / "models"))
    measured = report(
        kind="evaluation",
        models={"sha256": manifest.sha256, **rests_on(manifest.files, manifest.files, {"baseline": None}, None)},
        settings={"steps": 20, "guidance_scale": told(manifest, 20, Guidance(DEFAULT_GUIDANCE_SCALE))},
    )
    (tmp_path / "evaluation-a.json").write_text(json.dumps(measured))
    for part, holds, said in (
        ("segmenter", True, "of which all that it rests on ships"),
        ("adapters/other", True, "of which all that it rests on ships"),
        ("judge", False, "not those that ship"),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "more.json").write_text("{}")
        if part.startswith("adapters"):
            (folder / part / "adapter.json").write_text('{"kind": "lora"}')
        write_manifest(folder, {"domain": "dermatology"})
        run(config)
        assert ("0.75" in (folder / CARD_NAME).read_text()) is holds, part
        assert said in (tmp_path / TABLES_NAME).read_text()


@pytest.mark.parametrize(("count", "chosen", "expected"), [(5, 8, [0, 1, 2, 3, 4]), (9, 3, [0, 4, 8]), (9, 1, [0])])
def test_evenly_spaced(count: int, chosen: int, expected: list[int]) -> None:
    assert evenly_spaced(count, chosen) == expected


def test_evenly_spaced_repeats_nothing() -> None:
    for count in range(1, 40):
        found = evenly_spaced(count, 8)
        assert len(set(found)) == len(found) == min(count, 8)
        assert found[0] == 0
        assert found[-1] == count - 1


def test_contact_sheet_shows_every_picture_where_it_belongs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    baseline = rng.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    aligned = rng.integers(0, 256, (2, 3, 16, 16, 3), dtype=np.uint8)
    sheet = contact_sheet(
        ["a prompt", "another " * 20], baseline, aligned, title="Synthetic", columns=["seed 0", "seed 1", "seed 2"]
    )
    pixels = np.asarray(sheet)
    places = {}
    for name, images in (("baseline", baseline), ("aligned", aligned)):
        for row in range(2):
            for seed in range(3):
                places[name, row, seed] = find(pixels, images[row, seed])
    for row in range(2):
        assert len({places[name, row, seed][0] for name in ("baseline", "aligned") for seed in range(3)}) == 1
        lefts = [places[name, row, seed][1] for name in ("baseline", "aligned") for seed in range(3)]
        assert lefts == sorted(set(lefts))
    assert places["baseline", 0, 0][0] < places["baseline", 1, 0][0]
    write_sheet(tmp_path / "deep" / "sheet.png", sheet, {"Description": "Synthetic images"})
    with Image.open(tmp_path / "deep" / "sheet.png") as stored:
        assert stored.text["Description"] == "Synthetic images"
        np.testing.assert_array_equal(np.asarray(stored.convert("RGB")), pixels)


def test_contact_sheet_refuses_what_does_not_belong_together() -> None:
    images = np.zeros((2, 3, 8, 8, 3), np.uint8)
    with pytest.raises(ValueError, match="seeds"):
        contact_sheet(["one"], images, images, title="", columns=["a", "b", "c"])


def find(pixels: np.ndarray, image: np.ndarray) -> tuple[int, int]:
    """Top left corner of an image in a picture; fails where it is not there."""
    corners = np.argwhere((pixels == image[0, 0]).all(axis=-1))
    for top, left in corners:
        if np.array_equal(pixels[top : top + 16, left : left + 16], image):
            return int(top), int(left)
    raise AssertionError("the image is not on the sheet")


def test_readme_cards_and_tables_that_ship_show_the_reports_that_ship(monkeypatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert run(ReportConfig(check=True))
