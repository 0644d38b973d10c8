"""A model folder laid out as runs again, and assembled anew from them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from medviz.errors import InputError, ModelError
from medviz.generation.guidance import Guidance
from medviz.models.manifest import hash_file, read_manifest
from train.assemble import Parts, assemble, read_parts
from train.restore import restore

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("autoencoder", "coarse", "rl")


ALONG_HAIR = {"semantic_heads": ["hair"], "semantic_scale": 4.0}


@pytest.fixture
def parts(tmp_path):
    runs = tmp_path / "runs"
    return Parts(
        domain="dermatology",
        preset="cpu",
        pipeline=str(runs / "coarse" / "model"),
        autoencoder=str(runs / "decoder" / "model"),
        features="",
        reward=str(runs / "reward" / "model"),
        judge=str(runs / "judge" / "model"),
        segmenter=str(runs / "segmenter" / "model"),
        guidance_scale=2.0,
        guidance_interval=(0, 700),
        guidance_outside=0.2,
        adapters={"weak": str(runs / "rl" / "model"), "whole": str(runs / "rl" / "model")},
        default_adapter="weak",
        runs={stage: str(runs / stage) for stage in STAGES},
        adapter_strengths={"weak": 0.5},
    )


@pytest.fixture
def folder(model_root, parts, tmp_path):
    """A model folder assembled from runs that are gone."""
    tiny, runs = model_root / "dermatology", tmp_path / "runs"
    adapter = next(path.parent for path in tiny.glob("adapters/*/pytorch_lora_weights.safetensors"))
    for source, run in (
        (tiny / "vae", "decoder"),
        (tiny / "rewards" / "attribute", "reward"),
        (tiny / "judge", "judge"),
        (tiny / "segmenter", "segmenter"),
        (adapter, "rl"),
    ):
        shutil.copytree(source, runs / run / "model")
    aside = shutil.ignore_patterns("adapters", "rewards", "judge", "segmenter", "manifest.json", "README.md")
    shutil.copytree(tiny, runs / "coarse" / "model", ignore=aside)
    for stage in STAGES:
        (runs / stage).mkdir(exist_ok=True)
        (runs / stage / "metrics.json").write_text(json.dumps({"steps": 3, "seed": 0, "trained_s": 1.5}))
    assemble(parts, tmp_path / "assets")
    shutil.rmtree(runs)
    return tmp_path / "assets"


def test_assembled_from_what_was_restored_it_is_the_same_folder(folder, parts):
    before = read_manifest(folder)
    written = restore(parts, folder)
    assert parts.pipeline in written
    assemble(parts, folder)
    after = read_manifest(folder)
    assert after.sha256 == before.sha256
    assert after.metrics == before.metrics
    assert after.recipe == before.recipe


def test_runs_that_are_there_are_left_alone(folder, parts, tmp_path):
    restore(parts, folder)
    mine = tmp_path / "runs" / "coarse" / "metrics.json"
    mine.write_text('{"steps": 4}')
    weights = tmp_path / "runs" / "judge" / "model" / "model.safetensors"
    weights.write_bytes(b"mine")
    assert restore(parts, folder) == []
    assert mine.read_text() == '{"steps": 4}'
    assert weights.read_bytes() == b"mine"


def test_the_whole_adapter_comes_back_and_not_a_share_of_it(folder, parts, tmp_path):
    restore(parts, folder)
    name = "pytorch_lora_weights.safetensors"
    restored = hash_file(tmp_path / "runs" / "rl" / "model" / name)
    assert restored == hash_file(folder / "adapters" / "whole" / name)
    assert restored != hash_file(folder / "adapters" / "weak" / name)


def test_a_damaged_model_folder_is_not_restored(folder, parts, tmp_path):
    path = folder / "judge" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ModelError, match="judge"):
        restore(parts, folder)
    assert not (tmp_path / "runs").exists()


def test_a_few_step_adapter_must_have_learnt_the_folders_guidance(folder, parts):
    restore(parts, folder)
    card = Path(parts.adapters["whole"]) / "adapter.json"
    details = json.loads(card.read_text())
    learnt = {"guidance_scale": 2.0, "guidance_interval": [0, 700], "guidance_outside": 0.2}
    fast = replace(parts, few_step_adapter="whole")
    card.write_text(json.dumps({**details, "timesteps": [999, 400], "recipe": learnt}))
    assemble(fast, folder)
    assert read_manifest(folder).few_step_adapter == "whole"
    card.write_text(json.dumps({**details, "timesteps": [999, 400], "recipe": {**learnt, "guidance_scale": 3.0}}))
    with pytest.raises(InputError, match=r"'whole' learnt the guidance 3.*; the folder is to have 2"):
        assemble(fast, folder)
    card.write_text(json.dumps({**details, "timesteps": [999, 400], "recipe": {**learnt, **ALONG_HAIR}}))
    with pytest.raises(InputError, match=r"'whole' learnt the guidance 2.*hair by 4"):
        assemble(fast, folder)
    assemble(replace(fast, **ALONG_HAIR), folder)
    named = Guidance.of_recipe(read_manifest(folder).recipe, "dermatology", 3.0)
    assemble(replace(fast, **ALONG_HAIR, few_step_semantic_interval=[600, 750]), folder)
    assert read_manifest(folder).recipe["few_step_semantic_interval"] == [600, 750]
    with pytest.raises(InputError, match="needs a few-step adapter and semantic_heads"):
        assemble(replace(parts, few_step_semantic_interval=[600, 750]), folder)
    assemble(replace(fast, **ALONG_HAIR, few_step_finish=1), folder)
    assert read_manifest(folder).recipe["few_step_finish"] == 1
    with pytest.raises(InputError, match="few_step_finish needs a few-step adapter"):
        assemble(replace(parts, few_step_finish=1), folder)
    assert (named.semantic.heads, named.semantic.scale) == (("hair",), 4.0)
    with pytest.raises(InputError, match="'other' is not among weak, whole"):
        assemble(replace(parts, few_step_adapter="other"), folder)


def test_what_another_preset_made_is_not_taken_for_its_runs(folder, parts, tmp_path):
    with pytest.raises(InputError, match="made by the preset 'cpu', the recipe is of 'gpu'"):
        restore(replace(parts, preset="gpu"), folder)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_the_shipped_folder_is_restored_by_its_recipe(domain):
    shipped = read_manifest(ROOT / "assets" / "models" / domain)
    parts = read_parts(str(ROOT / "train" / "recipes" / f"assemble-{domain}.yaml"))
    assert (parts.domain, parts.preset) == (domain, shipped.preset)
    assert set(parts.adapters) == set(shipped.adapters)
    assert set(parts.runs) == set(shipped.metrics)
