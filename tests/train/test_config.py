"""Recipes are read strictly and overridden on the command line."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medviz.errors import InputError
from train.autoencoder import AutoencoderConfig
from train.config import CHANGEABLE, StageConfig, check_resumable, options, parse, read_recipe
from train.diffusion import DiffusionConfig
from train.distil import DistilConfig
from train.rl.recipe import RlConfig

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


@dataclass
class ExampleConfig(StageConfig):
    learning_rate: float = 1e-3
    sizes: tuple[int, ...] = (1, 2)


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def test_a_recipe_fills_its_options_and_leaves_the_others(tmp_path: Path) -> None:
    config = read_recipe(recipe(tmp_path, "out: run\nsteps: 7\nsizes: [3, 4]\n"), ExampleConfig)
    assert (config.out, config.steps, config.sizes) == ("run", 7, (3, 4))
    assert (config.learning_rate, config.seed, config.resume) == (1e-3, 0, False)


@dataclass
class ShortConfig(StageConfig):
    bf16: bool = False


@pytest.mark.parametrize(
    ("found", "device", "wanted", "short"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, "cpu", True, False),
        ({"avx2": True, "avx512_bf16": True}, "cpu", True, True),
        ({"neon": True, "bf16": True}, "cpu", True, True),
        ({"avx2": True}, "cuda", True, True),
        ({"avx2": True}, "cpu", False, False),
    ],
)
def test_bf16_is_left_where_the_processor_cannot(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog,
    found: dict[str, bool],
    device: str,
    wanted: bool,
    short: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    path = recipe(tmp_path, f"out: run\ndevice: {device}\nbf16: {str(wanted).lower()}\n")
    assert parse([str(path)], ShortConfig).bf16 is short
    assert ("computing in fp32" in caplog.text) is (wanted and not short)


def test_a_card_that_is_not_there_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = recipe(tmp_path, "out: run\ndevice: cuda\n")
    with pytest.raises(InputError, match=r"no CUDA card\. Pass --device cpu"):
        parse([str(path)], ShortConfig)
    assert parse([str(path), "--device", "cpu"], ShortConfig).device == "cpu"


def as_stored(config: StageConfig) -> dict[str, object]:
    return json.loads(json.dumps(options(config)))


def test_a_run_is_resumed_with_the_options_that_it_had(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = ExampleConfig(out="run")
    check_resumable(replace(first, resume=True), as_stored(first))
    assert not caplog.messages


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3}, "seed was 0 and is 3"),
        ({"learning_rate": 2e-3}, "learning_rate was 0.001 and is 0.002"),
        ({"sizes": (1, 3)}, r"sizes was \[1, 2\] and is \[1, 3\]"),
        ({"steps": 999}, "steps was 1000 and is 999"),
    ],
)
def test_an_option_that_changes_the_run_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    first = ExampleConfig(out="run")
    with pytest.raises(InputError, match=f"{named}.*fresh --out"):
        check_resumable(replace(first, **change, log_every=3), as_stored(first))


@pytest.mark.parametrize(
    "change",
    [{"log_every": 3}, {"checkpoint_every_s": 1.0}, {"max_minutes": 2.0}, {"workers": 2}, {"out": "moved"}],
)
def test_an_option_that_leaves_the_run_as_it_is_may_change_and_is_named(
    change: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    first = ExampleConfig(out="run")
    check_resumable(replace(first, **change), as_stored(first))
    (warning,) = caplog.messages
    assert f"{next(iter(change))} was " in warning


def test_steps_may_change_where_nothing_before_the_last_depends_on_them() -> None:
    check_resumable(RlConfig(out="run", steps=9), as_stored(RlConfig(out="run", steps=5)))


def test_an_option_newer_than_the_checkpoint_had_its_default() -> None:
    stored = as_stored(ExampleConfig(out="run"))
    del stored["sizes"]
    check_resumable(ExampleConfig(out="run"), stored)
    with pytest.raises(InputError, match=r"sizes was \[1, 2\] and is \[9\]"):
        check_resumable(ExampleConfig(out="run", sizes=(9,)), stored)


def test_a_checkpoint_without_options_is_resumed_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    check_resumable(ExampleConfig(out="run"), None)
    assert "not checked" in caplog.text


def test_options_that_no_longer_exist_are_named(caplog: pytest.LogCaptureFixture) -> None:
    check_resumable(ExampleConfig(out="run"), {**as_stored(ExampleConfig(out="run")), "former": 3})
    assert "former=3" in caplog.text


def test_each_option_that_may_change_is_one_of_a_stage() -> None:
    stages = (AutoencoderConfig, DiffusionConfig, RlConfig, DistilConfig)
    assert {f.name for stage in stages for f in fields(stage)} >= CHANGEABLE


def test_the_command_line_wins_over_the_recipe(tmp_path: Path) -> None:
    path = recipe(tmp_path, "out: run\nsteps: 7\nlearning_rate: 0.5\n")
    arguments = ["--steps", "9", "--out", "other", "--resume", "--sizes", "5", "6", "7", "--max-minutes", "0.5"]
    config = read_recipe(path, ExampleConfig, arguments)
    assert (config.out, config.steps, config.resume, config.sizes, config.max_minutes) == (
        "other",
        9,
        True,
        (5, 6, 7),
        0.5,
    )
    assert config.learning_rate == 0.5


def test_an_unknown_option_is_named_with_those_allowed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"unknown options \['stepz'\].*learning_rate.*steps"):
        read_recipe(recipe(tmp_path, "out: run\nstepz: 7\n"), ExampleConfig)


def test_an_option_of_another_stage_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="latent_channels"):
        read_recipe(recipe(tmp_path, "out: run\nlatent_channels: 4\n"), ExampleConfig)


@pytest.mark.parametrize("text", ["", "- out\n", "run\n", "out: [unclosed\n"])
def test_a_file_that_is_no_mapping_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"recipe.yaml"):
        read_recipe(recipe(tmp_path, text), ExampleConfig)


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent.yaml"):
        read_recipe(tmp_path / "absent.yaml", ExampleConfig)


def test_a_recipe_cannot_make_objects(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot read the recipe"):
        read_recipe(recipe(tmp_path, "out: !!python/object/apply:os.getcwd []\n"), ExampleConfig)


@pytest.mark.parametrize("arguments", [["--stepz", "3"], ["--steps", "many"]])
def test_a_wrong_override_ends_with_a_usage_error(tmp_path: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        read_recipe(recipe(tmp_path, "out: run\n"), ExampleConfig, arguments)
    assert stopped.value.code == 2


def test_the_shipped_autoencoder_recipe_is_read_with_numbers_as_numbers() -> None:
    config = read_recipe(RECIPES / "autoencoder.yaml", AutoencoderConfig)
    assert isinstance(config.learning_rate, float)
    assert config.domains == ("dermatology", "radiology")


def test_the_command_line_may_give_what_the_recipe_lacks(tmp_path: Path) -> None:
    assert read_recipe(recipe(tmp_path, "steps: 3\n"), ExampleConfig, ["--out", "run"]).out == "run"


@pytest.mark.parametrize("text", ["steps: many", "steps: 5.5", "learning_rate:", "sizes: 3", "resume: 7"])
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=text.split(":")[0]):
        read_recipe(recipe(tmp_path, f"out: run\n{text}\n"), ExampleConfig)


def test_a_number_without_a_dot_is_a_number(tmp_path: Path) -> None:
    assert read_recipe(recipe(tmp_path, "out: run\nlearning_rate: 1e-3\n"), ExampleConfig).learning_rate == 1e-3
