"""Ways of tuning words side by side: what is planned, trained once, and read in one evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medviz.errors import InputError
from train import anatomy_prompts
from train.anatomy_prompts import AnatomyPromptsConfig
from train.config import read_recipe
from train.evaluate.grounding import stage
from train.evaluate.grounding.stage import GroundingConfig
from train.experiments.anatomy_variants import AnatomyVariantsConfig, main, plan, run

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


@pytest.fixture
def config(tmp_path: Path) -> AnatomyVariantsConfig:
    (tmp_path / "prompts.yaml").write_text("out: elsewhere\nsteps: 7\nlearning_rate: 0.01\n")
    (tmp_path / "grounding.yaml").write_text("out: elsewhere\nsplit: test\nbatch: 3\nreports: ''\n")
    return AnatomyVariantsConfig(
        out=str(tmp_path / "run"),
        prompts=str(tmp_path / "prompts.yaml"),
        grounding=str(tmp_path / "grounding.yaml"),
        variants={"plain": "", "low_rank": "--title 'Low rank' --lora-rank 4"},
        inversion=("low_rank",),
    )


def test_variants_share_a_recipe_and_differ_in_their_overrides(config: AnatomyVariantsConfig) -> None:
    plans = plan(config)
    assert {name: [one.seed for one in by_seed] for name, by_seed in plans.items()} == {
        "plain": [0, 1, 2],
        "low_rank": [0, 1, 2],
    }
    plain, low_rank = plans["plain"][1], plans["low_rank"][1]
    assert plain.out == f"{config.out}/plain-seed1"
    assert replace(plain, lora_rank=4, title="Low rank", out=low_rank.out) == low_rank
    assert (plain.steps, plain.learning_rate, plain.title, low_rank.title) == (7, 0.01, "plain", "Low rank")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seeds": (0, 1)}, "at least 3 different"),
        ({"seeds": (0, 1, 1, 2)}, "at least 3 different"),
        ({"variants": {}}, "at least one variant"),
        ({"variants": {"../up": ""}}, "cannot be a variant's name"),
        ({"variants": {"plain": "--target guess"}}, "target must be one of"),
    ],
)
def test_what_compares_nothing_is_refused(config: AnatomyVariantsConfig, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(replace(config, **changed))


def test_each_is_trained_once_and_all_are_read_together(
    config: AnatomyVariantsConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[AnatomyPromptsConfig] = []
    readings: list[GroundingConfig] = []

    def train(one: AnatomyPromptsConfig) -> dict[str, Any]:
        trained.append(one)
        Path(one.out).mkdir(parents=True, exist_ok=True)
        (Path(one.out) / "metrics.json").write_text(json.dumps({}))
        return {}

    def read(reading: GroundingConfig, command: str) -> dict[str, Any]:
        readings.append(reading)
        return {"command": command}

    monkeypatch.setattr(anatomy_prompts, "run", train)
    monkeypatch.setattr(stage, "run", read)
    half_way = tmp_path / "run" / "plain-seed1" / "checkpoint-00000003"
    half_way.mkdir(parents=True)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"out: {config.out}\nprompts: {config.prompts}\ngrounding: {config.grounding}\n"
        "variants: {plain: '', low_rank: --lora-rank 4}\ninversion: [low_rank]\n"
    )
    main([str(recipe)])
    assert [(Path(one.out).name, one.resume) for one in trained] == [
        (f"{name}-seed{seed}", (name, seed) == ("plain", 1)) for name in ("plain", "low_rank") for seed in (0, 1, 2)
    ]
    reading = readings[0].checked()
    assert reading.tuned == {
        name: tuple(f"{config.out}/{name}-seed{seed}/model" for seed in (0, 1, 2)) for name in ("plain", "low_rank")
    }
    assert (reading.split, reading.inversion, reading.batch, reading.out) == (
        "validation",
        ("low_rank",),
        3,
        config.out,
    )
    assert run(replace(config, split="test"), "again") == {"command": "again"}
    assert len(trained) == 6, "what is there is not trained again"
    assert readings[1].split == "test"


def test_the_recipe_that_is_there_can_be_planned() -> None:
    plans = plan(read_recipe(RECIPES / "anatomy-variants-radiology-cpu.yaml", AnatomyVariantsConfig))
    assert set(plans) == {"paper", "own", "lora", "own_lora", "denoising", "image_text"}
    shipped = read_recipe(RECIPES / "anatomy-own-radiology-cpu.yaml", AnatomyPromptsConfig)
    named = replace(plans["own_lora"][0], title=shipped.title, out=shipped.out, device=shipped.device)
    assert named == shipped, "what ships is one of the variants"
