"""Recipes are read strictly and overridden on the command line."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from medviz.errors import InputError
from train.autoencoder import AutoencoderConfig
from train.config import StageConfig, parse, read_recipe

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
    path = recipe(tmp_path, f"out: run\ndevice: {device}\nbf16: {str(wanted).lower()}\n")
    assert parse([str(path)], ShortConfig).bf16 is short
    assert ("computing in fp32" in caplog.text) is (wanted and not short)


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
