"""Nothing that ships is written over unless a command line says so."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from train import shipping
from train.__main__ import main
from train.assemble import read_parts
from train.config import parse
from train.evaluate.stage import EvaluateConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_it_was():
    yield
    shipping.take_option([])


@pytest.mark.parametrize("name", ["assets/reports", "assets/models/dermatology", "README.md"])
def test_what_ships_is_written_beside_unless_told_to(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert shipping.take_option(["recipe.yaml"]) == ["recipe.yaml"]
    assert shipping.place(name) == shipping.place(ROOT / name) == Path("runs/unshipped") / name
    assert shipping.take_option(["recipe.yaml", "--ship"]) == ["recipe.yaml"]
    assert shipping.place(name) == Path(name)


def test_other_places_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("assets/reports", "runs/models", str(tmp_path)):
        assert shipping.place(name) == Path(name)


def test_an_evaluation_reports_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = ["train/recipes/evaluate-dermatology-cpu.yaml"]
    shipping.take_option([])
    assert parse(recipe, EvaluateConfig).reports == "runs/unshipped/assets/reports"
    assert parse([*recipe, "--reports", ""], EvaluateConfig).reports == ""
    shipping.take_option(["--ship"])
    assert parse(recipe, EvaluateConfig).reports == "assets/reports"


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what a report is written to, which stands in for what ships."""
    (tmp_path / "assets/reports").mkdir(parents=True)
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.setattr(shipping, "ROOT", tmp_path)
    monkeypatch.setattr(shipping, "SHIPPED", (tmp_path / "assets", tmp_path / "README.md"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_tables_are_written_beside_the_readme_and_into_it_when_told_to(copy: Path) -> None:
    before = (copy / "README.md").read_text()
    assert main(["report"]) == 0
    assert (copy / "README.md").read_text() == before
    assert not any((copy / "assets/reports").iterdir())
    tables = [copy / "runs/unshipped/README.md", copy / "runs/unshipped/assets/reports/tables.md"]
    assert all(path.is_file() for path in tables)
    assert main(["report", "--ship"]) == 0
    assert (copy / "README.md").read_text() == tables[0].read_text() != before
    assert (copy / "assets/reports/tables.md").is_file()


def commands(*arguments: str) -> list[str]:
    """What make would run."""
    shown = subprocess.run(["make", "-n", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [line for line in shown.splitlines() if " -m train " in line]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_make_trains_what_ships_and_puts_it_there_only_when_told_to(domain: str) -> None:
    trained, shipped = commands(f"train-{domain}"), commands(f"train-{domain}", "SHIP=1")
    (recipe,) = (word for line in trained for word in line.split() if word.startswith("train/recipes/assemble-"))
    (preset,) = re.findall(r"^SHIPPED := (\w+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert read_parts(str(ROOT / recipe)).preset == preset
    assert not any("--ship" in line or "train examples" in line for line in trained)
    assert all("--models runs/unshipped/assets/models" in line for line in trained if "train evaluate" in line)
    assert all(line.endswith("--ship") for line in shipped)
    assert [line for line in shipped if "train examples" in line]
