"""Guidance scale and share of an adapter on validation captions: the same pictures as a model assembled so draws."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from medviz.errors import InputError
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train.evaluate.choose import ChooseConfig, choose, finishing, main


@pytest.fixture
def config(model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ChooseConfig:
    write_split(tmp_path / "images" / "dermatology", "validation", 20, seed=2)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    models = model_root / "dermatology"
    aside = shutil.ignore_patterns("adapters", "rewards", "judge", "segmenter", "*.md", "manifest.json")
    shutil.copytree(models, tmp_path / "pipeline", ignore=aside)
    return ChooseConfig(
        out=str(tmp_path / "run"),
        pipeline=str(tmp_path / "pipeline"),
        adapter=str(models / "adapters" / tiny.ADAPTER),
        judge=str(models / "judge"),
        features=str(models),
        guidance_scales=(1.0, 2.0),
        strengths=(0.5, 1.0),
        captions=6,
        steps=2,
        batch=4,
        report=str(tmp_path / "choice.json"),
    )


def test_every_combination_stands_beside_the_baseline_at_its_own_scale(config: ChooseConfig) -> None:
    report = choose(config)
    assert json.loads(Path(config.report).read_text()) == json.loads((Path(config.out) / "choice.json").read_text())
    places = [(row["guidance_scale"], row["strength"]) for row in report["rows"]]
    assert places == [(scale, strength) for scale in (1.0, 2.0) for strength in (0.0, 0.5, 1.0)]
    figures = dict(zip(places, report["rows"], strict=True))
    for scale in (1.0, 2.0):
        assert figures[scale, 0.0]["accuracy_change"]["value"] == 0.0
        assert figures[scale, 0.0]["kernel_distance_change_judge"]["value"] == 0.0
        whole, half = (figures[scale, strength]["kernel_distance_judge"]["value"] for strength in (1.0, 0.5))
        assert len({whole, half, figures[scale, 0.0]["kernel_distance_judge"]["value"]}) == 3
        change = figures[scale, 1.0]["kernel_distance_change_judge"]["value"]
        assert change == pytest.approx(whole - figures[scale, 0.0]["kernel_distance_judge"]["value"])
    assert figures[1.0, 0.0]["kernel_distance_judge"] != figures[2.0, 0.0]["kernel_distance_judge"]
    assert report["real"]["accuracy"]["n"] == report["captions"] == 6
    assert report["reference"] == 14


def test_scales_along_a_word_are_rows_that_differ_in_what_asks_for_it(config: ChooseConfig) -> None:
    options = {"semantic_heads": ("hair",), "semantic_scales": (0.0, 8.0)}
    report = choose(replace(config, guidance_scales=(2.0,), strengths=(1.0,), **options))
    rows = {(row["semantic_scale"], row["strength"]): row for row in report["rows"]}
    assert list(rows) == [(0.0, 0.0), (0.0, 1.0), (8.0, 0.0), (8.0, 1.0)]
    assert rows[0.0, 1.0]["sensitivity_hair"]["n"] + rows[0.0, 1.0]["specificity_hair"]["n"] <= report["captions"]
    assert rows[0.0, 0.0]["kernel_distance_judge"] != rows[8.0, 0.0]["kernel_distance_judge"]
    plain = choose(replace(config, guidance_scales=(2.0,), strengths=(1.0,)))["rows"]
    assert [row["kernel_distance_judge"] for row in plain] == [
        rows[0.0, strength]["kernel_distance_judge"] for strength in (0.0, 1.0)
    ]


def test_steps_that_finish_are_rows_of_the_same_noises(config: ChooseConfig, tmp_path: Path) -> None:
    few_steps = tiny.add_few_steps(shutil.copytree(Path(config.features), tmp_path / "few"), [999, 700, 400])
    config = replace(config, guidance_scales=(2.0,), strengths=(1.0,), steps=6)
    plain = choose(config)["rows"]
    asked = replace(config, few_step_adapter=str(few_steps), few_step_finishes=(0, 2))
    report = choose(asked)
    assert report["settings"]["few_step_adapter"] == str(few_steps)
    rows = {(row["few_step_finish"], row["strength"]): row for row in report["rows"]}
    assert list(rows) == [(0, 0.0), (0, 1.0), (2, 0.0), (2, 1.0)]
    assert [rows[0, strength] for strength in (0.0, 1.0)] == plain
    distances = [row["kernel_distance_judge"]["value"] for row in report["rows"]]
    assert len(set(distances)) == 4
    for strength in (0.0, 1.0):
        assert rows[0, strength]["kernel_distance_change_judge_since_first"]["value"] == 0.0
        then, now = (rows[last, strength]["kernel_distance_judge"]["value"] for last in (0, 2))
        assert rows[2, strength]["kernel_distance_change_judge_since_first"]["value"] == pytest.approx(now - then)
    assert "kernel_distance_change_judge_since_first" not in report["real"]
    with pytest.raises(InputError, match="from 0 to 3, found 4"):
        choose(replace(asked, few_step_finishes=(4,)))
    with pytest.raises(InputError, match="needs a few_step_adapter"):
        choose(replace(asked, few_step_adapter=""))


def test_pictures_already_drawn_are_found_again(config: ChooseConfig) -> None:
    first = choose(config)
    drawn = {path: path.stat().st_mtime_ns for path in Path(config.out).glob("pictures/*/images-*.npz")}
    assert choose(config) == first
    assert drawn == {path: path.stat().st_mtime_ns for path in Path(config.out).glob("pictures/*/images-*.npz")}
    assert len(drawn) == 2 * 3 * 2  # scales, shares with the baseline, batches


def test_all_of_its_steps_are_a_picture_that_the_few_step_adapter_draws_alone(
    config: ChooseConfig, tmp_path: Path
) -> None:
    few_steps = tiny.add_few_steps(shutil.copytree(Path(config.features), tmp_path / "few"), [999, 700, 400])
    config = replace(config, few_step_adapter=str(few_steps), few_step_finishes=(2, 3), steps=6)
    found = finishing(config)
    assert [(each.timesteps, each.lead) for each in found.values()] == [((700, 400), 6), ((999, 700, 400), None)]


def test_the_decoder_that_is_named_draws_and_half_precision_is_another_picture(config: ChooseConfig) -> None:
    """None of them is taken for another's stored pictures."""
    places = [set(Path(config.out).glob("pictures/*/images-000000.npz"))]
    for options in ({}, {"bf16": True}, {"autoencoder": str(Path(config.pipeline, "vae"))}):
        choose(replace(config, guidance_scales=(1.0,), strengths=(1.0,), **options))
        places.append(set(Path(config.out).glob("pictures/*/images-000000.npz")))
    # the pipeline's own decoder, named, is the same weights: nothing is drawn again
    assert [len(found) for found in places] == [0, 2, 4, 4]
    decoder = Path(config.out, "decoder")
    shutil.copytree(Path(config.pipeline, "vae"), decoder)
    weights = load_file(decoder / "diffusion_pytorch_model.safetensors")
    last = max(name for name in weights if name.startswith("decoder") and name.endswith("weight"))
    save_file(weights | {last: weights[last] * 0.5}, decoder / "diffusion_pytorch_model.safetensors")
    choose(replace(config, guidance_scales=(1.0,), strengths=(1.0,), autoencoder=str(decoder)))
    drawn = {
        path.parent.name: np.load(path)["images"] for path in Path(config.out).glob("pictures/*/images-000000.npz")
    }
    assert len(drawn) == 6
    pictures = list(drawn.values())
    assert not any(np.array_equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_a_choice_of_nothing_and_a_share_of_too_much_are_refused(config: ChooseConfig, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(f"out: {config.out}\nadapter: ''\n")
    with pytest.raises(InputError, match="needs an adapter"):
        main([str(tmp_path / "recipe.yaml")])
    config.strengths = (1.5,)
    with pytest.raises(InputError, match="at most 1"):
        choose(config)
