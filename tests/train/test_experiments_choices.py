"""Ways of training side by side: equal compute, one reading for all, and runs that go on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medviz.errors import InputError
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train import diffusion
from train.config import read_recipe
from train.diffusion import DiffusionConfig
from train.evaluate.report import TABLES_NAME, ReportConfig
from train.evaluate.report import run as write_tables
from train.experiments.choices import ChoicesConfig, main, plan, run, unet_flops

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


@pytest.fixture
def models(model_root: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    images = tmp_path_factory.mktemp("images")
    for seed, name in enumerate(("train", "validation")):
        write_split(images / "dermatology", name, 20, seed)
    monkeypatch.setenv("MEDVIZ_DATA", str(images))
    return model_root / "dermatology"


def config_for(folder: Path, models: Path, **options: Any) -> ChoicesConfig:
    content = {
        "out": "unused",
        "autoencoder": str(models / "vae"),
        "contrastive": str(models),
        "size_px": tiny.IMAGE_SIZE_PX,
        "channels": [16, 32],
        "cross_attention": [False, True],
        "heads": 2,
        "train_text_encoder": False,
        "batch": 4,
        "steps": 12,
    }
    (folder / "diffusion.yaml").write_text(yaml.safe_dump(content))
    return ChoicesConfig(
        **{
            "out": str(folder / "run"),
            "diffusion": str(folder / "diffusion.yaml"),
            "choices": {"first": "", "seed": "--seed 1", "wider": "--channels 32 64"},
            "judge": str(models / "judge"),
            "features": str(models),
            "steps": 2,
            "captions": 4,
            "reports": str(folder / "reports"),
            **options,
        }
    )


def test_what_costs_more_a_step_takes_fewer(tmp_path: Path, models: Path) -> None:
    plans = plan(config_for(tmp_path, models, choices={"first": "", "wider": "--channels 32 64", "b": "--batch 2"}))
    first, wider, smaller = plans.values()
    assert first.recipe.steps == 12
    assert smaller.recipe.steps == 24
    assert 1 < wider.recipe.steps < 12
    spent = wider.flops * wider.recipe.steps
    assert abs(spent - first.flops * 12) <= wider.flops / 2
    assert wider.recipe.out == str(tmp_path / "run" / "wider")


def test_a_share_of_the_compute_is_a_share_of_the_steps(tmp_path: Path, models: Path) -> None:
    choices = {"first": "", "half": "", "wider": "--channels 32 64"}
    once = plan(config_for(tmp_path, models, choices=choices))
    found = plan(config_for(tmp_path, models, choices=choices, compute={"half": 0.5, "wider": 3}))
    assert [one.recipe.steps for one in found.values()][:2] == [12, 6]
    assert abs(found["wider"].recipe.steps - 3 * once["wider"].recipe.steps) <= 2


def test_operations_are_counted_as_in_a_convolution_by_hand(tmp_path: Path, models: Path) -> None:
    """Two networks that differ in the width of the latents alone differ in their first and last convolution alone."""
    recipe = read_recipe(config_for(tmp_path, models).diffusion, DiffusionConfig)
    more_channels = tmp_path / "vae"
    shutil.copytree(models / "vae", more_channels)
    described = json.loads((more_channels / "config.json").read_text())
    more = described["latent_channels"] + 3
    (more_channels / "config.json").write_text(json.dumps({**described, "latent_channels": more}))
    size = tiny.IMAGE_SIZE_PX // 2 ** (len(described["encoder_block_out_channels"]) - 1)
    with_more = read_recipe(
        config_for(tmp_path, models).diffusion, DiffusionConfig, ["--autoencoder", str(more_channels)]
    )
    assert unet_flops(with_more) - unet_flops(recipe) == 2 * (2 * 3 * 16 * 9 * size * size)
    with pytest.raises(InputError, match="train that stage first"):
        unet_flops(read_recipe(config_for(tmp_path, models).diffusion, DiffusionConfig, ["--autoencoder", "nowhere"]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": {"alone": ""}}, "at least two"),
        ({"choices": {"a": "", "../b": ""}}, "cannot be a choice's name"),
        ({"choices": {"a": "", "b": "--steps 5"}}, "share domain and steps"),
        ({"choices": {"a": "", "b": "--domain radiology"}}, "share domain and steps"),
        ({"captions": 3}, "captions must be at least 4"),
        ({"compute": {"first": 2}}, "compute gives 'first' 2; allowed are numbers above 0 for seed, wider"),
        ({"compute": {"another": 2}}, "compute gives 'another' 2"),
        ({"compute": {"seed": 0}}, "compute gives 'seed' 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, models: Path, options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(config_for(tmp_path, models, **options))


def test_choices_are_trained_measured_and_found_again(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, models)
    assert run(config_for(tmp_path, models, max_minutes=1e-9)) is None
    found = run(config, "python -m train choices x")
    assert found is not None
    assert [arm["name"] for arm in found["arms"]] == ["first", "seed", "wider"]
    assert found["runs"]["seed"]["training_flops"] == found["runs"]["first"]["training_flops"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    for name in ("kernel_distance_segmenter", "kernel_distance_judge"):
        mine = figures[name]["adapters"]["seed"]
        assert mine["change"]["value"] == pytest.approx(mine["value"]["value"] - figures[name]["baseline"]["value"])
        assert mine["change"]["value"] != 0.0
        assert figures[name]["real"]["n"] == 4
    assert figures["images_seen"]["baseline"]["value"] == 48
    # One is made again, and the report is the same; what another recipe made is not overwritten.
    shutil.rmtree(tmp_path / "run" / "seed")
    trained: list[str] = []
    stage = diffusion.main
    monkeypatch.setattr(diffusion, "main", lambda arguments: trained.append(arguments[0]) or stage(arguments))
    again = run(config, "python -m train choices x")
    assert again is not None
    assert trained == [str(tmp_path / "run" / "seed" / "recipe.yaml")]
    assert again["figures"] == found["figures"]
    with pytest.raises(InputError, match="another recipe"):
        run(config_for(tmp_path, models, shared="--learning-rate 0.1"))
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    write_tables(ReportConfig(reports=str(tmp_path / "reports"), readme=str(readme), models=str(tmp_path / "models")))
    assert "| wider (`--channels 32 64`) |" in (tmp_path / "reports" / TABLES_NAME).read_text()


def test_the_command_line_takes_a_recipe(tmp_path: Path, models: Path) -> None:
    choices = {"a": "", "b": "--prediction epsilon"}
    wanted = config_for(tmp_path, models, choices=choices, compute={"b": 0.5}, steps=1)
    recipe = tmp_path / "choices.yaml"
    recipe.write_text(yaml.safe_dump({**vars(wanted), "guidance_interval": [0, 1000]}))
    main([str(recipe)])
    found = json.loads((tmp_path / "reports" / "choices-dermatology.json").read_text())
    assert [arm["label"] for arm in found["arms"]] == ["a", "b (`--prediction epsilon`, 0.5 times the compute)"]
    assert [found["runs"][name]["steps"] for name in "ab"] == [12, 6]


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_the_recipe_names_choices_that_the_stage_takes(domain: str) -> None:
    config = read_recipe(RECIPES / f"choices-{domain}-cpu.yaml", ChoicesConfig)
    assert set(config.compute) <= set(list(config.choices)[1:])
    shared = config.shared.split()
    for overrides in config.choices.values():
        flags = [flag if flag != "''" else "" for flag in [*shared, *overrides.split()]]
        recipe = read_recipe(RECIPES / Path(config.diffusion).name, DiffusionConfig, flags)
        schedule = diffusion.noise_schedule(recipe.schedule, recipe.prediction)
        assert torch.isfinite(schedule.alphas_cumprod).all()
