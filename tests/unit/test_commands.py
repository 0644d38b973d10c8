"""`python -m medviz`: the results and the limits of the studio, in words and as JSON."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medviz import Studio
from medviz.__main__ import COMMANDS, main
from medviz.errors import InputError

PROMPT = "a dermoscopic image with melanoma (MEL) showing hair"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "given.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def ask(model_root: Path, capsys: pytest.CaptureFixture[str]):
    """Run a command on tiny models; returns its exit status, standard output and standard error."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = main([*map(str, arguments), "--models", str(model_root), "--device", "cpu"])
        return (status, *capsys.readouterr())

    return run


def test_compare_writes_the_files_that_it_names(ask, tmp_path: Path) -> None:
    out = tmp_path / "pair"
    status, text, _ = ask(
        "compare", "dermatology", PROMPT, "--steps", 2, "--seed", 5, "--out", out, "--dicom", "--json"
    )
    assert status == 0
    report = json.loads(text)
    assert (report["seed"], report["steps"]) == (5, 2)
    assert {"baseline.png", "manifest.json", "maps/01-aligned.png", "dicom/scores.dcm"} <= {
        str(Path(name).relative_to(out)) for name in report["files"]
    }
    assert all(Path(name).is_file() for name in report["files"])


def test_results_are_lines_of_text_without_json(ask, image: Path) -> None:
    status, text, _ = ask("score", "dermatology", PROMPT, image, image)
    assert status == 0
    lines = text.splitlines()
    assert lines.count(str(image)) == 2
    assert any(line.split()[0] == "judge" for line in lines)


def test_score_gives_what_the_studio_gives(ask, model_root: Path, image: Path) -> None:
    _, text, _ = ask("score", "dermatology", PROMPT, image, "--json")
    (found,) = json.loads(text)["results"]
    scores = Studio(model_root, device="cpu").score("dermatology", image, PROMPT)
    assert [(row["name"], row["value"]) for row in found["scores"]] == [(row.name, row.baseline) for row in scores]


def test_ground_writes_a_folder_for_each_image(ask, image: Path, tmp_path: Path) -> None:
    status, text, _ = ask("ground", "dermatology", "melanoma", image, image, "--out", tmp_path / "found", "--json")
    assert status == 0
    assert [found["words"] for found in json.loads(text)["results"]] == [["melanoma"], ["melanoma"]]
    for number in ("01", "02"):
        with Image.open(tmp_path / "found" / number / "overlay.png") as overlay:
            assert overlay.size == (80, 60)
        assert (tmp_path / "found" / number / "map.png").is_file()


@pytest.mark.parametrize(
    "wrong",
    [
        {"domain": "cardiology"},
        {"prompt": "x" * 401},
        {"prompt": "two\x00words"},
        {"seed": "-1"},
        {"seed": "first"},
        {"steps": "51"},
        {"steps": "2.5"},
        {"guidance_scale": "nan"},
        {"guidance_scale": "16"},
        {"adapter": "../judge"},
    ],
)
def test_compare_refuses_in_the_words_of_the_limits(ask, model_root: Path, wrong: dict[str, str]) -> None:
    from medviz.commands.options import number

    asked = {"domain": "dermatology", "prompt": PROMPT, "seed": "1", "steps": "2", "guidance_scale": "3", "adapter": ""}
    asked |= wrong
    numbers = {name: number(asked[name]) for name in ("seed", "steps", "guidance_scale")}
    with pytest.raises(InputError) as refused:
        Studio(model_root, device="cpu").compare(**{**asked, **numbers})
    options = [f"--{name.replace('_', '-')}={asked[name]}" for name in ("seed", "steps", "guidance_scale", "adapter")]
    assert ask("compare", asked["domain"], asked["prompt"], *options) == (1, "", f"compare: {refused.value}\n")


def test_images_that_cannot_be_read_are_named(ask, image: Path, tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("no picture")
    status, _, error = ask("score", "dermatology", PROMPT, image, tmp_path / "text.png")
    assert (status, "text.png" in error) == (1, True)


def test_a_folder_with_files_is_never_written_to(ask, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    status, _, error = ask("compare", "dermatology", PROMPT, "--out", tmp_path)
    assert status == 1
    assert "no empty folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_usage_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in ((["--help"], 0), ([], 2), (["draw"], 2)):
        assert main(arguments) == status
        said = "".join(capsys.readouterr())
        assert all(name in said for name in COMMANDS)
