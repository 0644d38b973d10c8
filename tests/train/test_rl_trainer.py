import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from medviz.errors import InputError, ModelError
from medviz.models.adapters import loaded_adapters
from tests import tiny
from train.classifier import HALVES
from train.config import read_recipe
from train.datasets.split import Split, open_split
from train.rl.recipe import RlConfig, check
from train.rl.trainer import main, open_pipeline, open_real

RECIPES = Path(__file__).parents[2] / "train" / "recipes"


def recipe_file(path, models, **options):
    content = {
        "out": str(path / "run"),
        "domain": "dermatology",
        "base": str(models),
        "reward": str(models / "rewards" / "attribute"),
        "judge": str(models / "judge"),
        "latents": str(path / "latents"),
        "size_px": tiny.IMAGE_SIZE_PX,
        "steps": 1,
        "log_every": 1,
        "objective": "forward",
        "invented_prompts": 0,
        "prompts_per_epoch": 2,
        "images_per_prompt": 2,
        "rollout_steps": 2,
        "updates": 2,
        "timesteps_per_image": 1,
        "rank": 2,
        "anchor_weight": 0.5,
        "anchor_batch": 2,
        "evaluation_prompts": 2,
        "evaluation_images": 2,
        "evaluation_steps": 2,
        **options,
    }
    (path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return str(path / "recipe.yaml")


def write_images(root, count=4):
    rows = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.linear_gradient("L").resize((48, 48)).rotate(90 * i).convert("RGB").save(buffer, "PNG")
        rows.append({"image": {"bytes": buffer.getvalue(), "path": None}, "image_id": f"i{i}", "lesion_id": f"l{i}"})
        rows[-1] |= {"source": "drawn", "diagnosis": "melanoma"}
    folder = root / "dermatology"
    folder.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "train-00000-of-00001.parquet")


def test_the_stage_runs_from_a_recipe_to_an_adapter(model_root, tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    main([recipe_file(tmp_path, model_root / "dermatology")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    card = json.loads((tmp_path / "run" / "model" / "adapter.json").read_text())
    assert card["kind"] == "lora"
    assert card["recipe"]["objective"] == "forward"
    assert metrics["baseline"]["judge"] != metrics["aligned"]["judge"]
    assert metrics["unet_forwards"]["anchor"] == 2 * 2
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["anchor"] > 0
    assert list((tmp_path / "latents").glob("latents-dermatology-train-*.safetensors"))


def test_evaluations_are_held_against_training_images_of_the_judge_s_half(model_root, tmp_path, monkeypatch):
    write_images(tmp_path / "images", 24)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    path = recipe_file(tmp_path, model_root / "dermatology", anchor_weight=0.0, fidelity_images=5, fidelity_captions=4)
    main([path])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"distance"} <= metrics["baseline"].keys() & metrics["aligned"].keys()
    config = read_recipe(path, RlConfig)
    read = []
    monkeypatch.setattr(
        Split, "image", lambda self, i, size_px: read.append(i) or np.full((size_px, size_px, 3), i, np.uint8)
    )
    first = open_real(config)
    assert len(first.features) == len(read) == len(set(read)) == 5
    assert len(first.captions) == 4
    halves = open_split("dermatology", "train").halves
    assert all(halves[i] == HALVES["judge"] for i in read)
    again, other = open_real(config), open_real(replace(config, seed=1))
    assert torch.equal(first.features, again.features)
    assert first.captions == again.captions
    assert not torch.equal(first.features, other.features)
    assert first.captions != other.captions
    with pytest.raises(InputError, match="the judge's half of dermatology has"):
        open_real(replace(config, fidelity_images=24))


def test_a_recipe_may_weigh_several_rewards(model_root, tmp_path):
    models = model_root / "radiology"
    options = {"domain": "radiology", "reward_function": "composite", "segmenter": str(models / "segmenter")}
    weights = {"report_consistency": 1.0, "anatomy": 0.5}
    path = recipe_file(tmp_path, models, **options, reward_weights=weights, anchor_weight=0.0, objective="draft")
    main([path])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["objective"] == "draft"
    assert metrics["unet_forwards"]["with gradient"] > 0
    assert metrics["reward_failures"] == 0


def test_the_reward_cannot_be_its_own_judge(model_root, tmp_path):
    models = model_root / "dermatology"
    path = recipe_file(tmp_path, models, judge=str(models / "rewards" / "attribute"), anchor_weight=0.0)
    with pytest.raises(InputError, match="reward network itself"):
        main([path])


def test_the_baseline_is_opened_frozen_and_without_adapters(model_root):
    pipeline = open_pipeline(str(model_root / "dermatology"), "cpu")
    assert loaded_adapters(pipeline.unet) == ()
    assert not any(p.requires_grad for p in pipeline.unet.parameters())
    assert not pipeline.unet.training


def test_pictures_are_drawn_by_the_decoder_that_is_named(model_root, tmp_path):
    folder = model_root / "dermatology"
    other = open_pipeline(str(folder), "cpu").vae
    torch.nn.init.zeros_(next(iter(other.decoder.parameters())))
    other.save_pretrained(tmp_path)
    drawn_by = open_pipeline(str(folder), "cpu", str(tmp_path)).vae
    assert not next(iter(drawn_by.decoder.parameters())).any()
    assert not any(p.requires_grad for p in drawn_by.parameters())
    torch.nn.init.ones_(next(iter(other.encoder.parameters())))
    other.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="not the one that the generator was trained on"):
        open_pipeline(str(folder), "cpu", str(tmp_path))


def test_a_missing_pipeline_names_the_folder(tmp_path):
    with pytest.raises(ModelError, match=r"model_index\.json"):
        open_pipeline(str(tmp_path), "cpu")


@pytest.mark.parametrize("name", ["rl-dermatology", "rl-mean-dermatology", "rl-radiology", "rl-sd15"])
def test_recipes_are_read_and_hold_together(name):
    domains = ("dermatology", "radiology") if name == "rl-sd15" else (name.split("-")[-1],)
    for domain in domains:
        config = read_recipe(RECIPES / f"{name}.yaml", RlConfig, ["--domain", domain])
        check(config)
        assert config.domain == domain
        assert Path(config.out).name in (name, f"{name}-{domain}")
        assert config.judge != config.reward
