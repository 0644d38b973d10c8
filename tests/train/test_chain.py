"""The chain of a domain: its order from the recipes, what is used again, and a run from images to a model folder."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from medviz import Studio
from medviz.errors import InputError
from medviz.models.manifest import read_manifest
from tests.train.grounding_scenes import PICTURE, skin_rows
from train import recipe_file, shipping
from train.__main__ import main
from train.assemble import read_parts
from train.chain import RunConfig, chain_of, plan, run
from train.restore import restore

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "train" / "recipes"
DIAGNOSES = ("nv", "mel", "bkl", "nv")
RL = {
    "size_px": 64, "steps": 1, "prompts_per_epoch": 2, "images_per_prompt": 2, "micro_batch": 4, "rollout_batch": 4,
    "rollout_steps": 2, "invented_prompts": 0, "updates": 2, "timesteps_per_image": 1, "rank": 2, "anchor_batch": 2,
    "evaluation_prompts": 4, "evaluation_images": 2, "evaluation_steps": 2, "evaluate_every": 1, "bf16": False,
}  # fmt: skip
CLASSIFIER = {
    "size_px": 32, "width": 0.1, "depth": 0.1, "batch": 8, "steps": 2, "warmup": 1, "min_auroc": 0.0,
    "min_auroc_within_sources": 0.0, "min_examples": 1,
}  # fmt: skip
DISTIL = {
    "size_px": 64, "trajectories": 4, "held_out": 2, "draw_batch": 4, "batch": 2, "steps": 2, "rank": 2,
    "teacher_steps": 4, "starts": [0, 2], "bf16": False, "device": "cpu", "orientations": 1,
}  # fmt: skip
TINY: dict[str, dict[str, Any]] = {
    "autoencoder": {
        "domains": ["dermatology"], "size_px": 64, "crop_px": 16, "latent_channels": 6, "width": 8,
        "decoder_blocks": [1, 1, 1, 0], "batch": 2, "steps": 2, "fit_images": 8,
    },
    "decoder": {"size_px": 64, "crop_px": 16, "latent_channels": 6, "batch": 2, "steps": 2},
    "contrastive": {
        "size_px": 64, "patch_px": 16, "corpus": 200, "text_width": 16, "text_layers": 1, "image_width": 64,
        "image_layers": 1, "projection": 8, "batch": 4, "steps": 2,
    },
    "diffusion-dermatology": {
        "size_px": 64, "channels": [16, 16, 16], "heads": 2, "orientations": 2, "batch": 4, "steps": 2,
        "compile": False, "bf16": False, "label_shares": ["melanoma=0.25"],
    },
    "reward": CLASSIFIER,
    "judge": CLASSIFIER,
    "segmenter": {"size_px": 32, "batch": 4, "steps": 2},
    "rl-dermatology": RL,
    "rl-mean-dermatology": {**RL, "mean_held": 4, "mean_redrawn": 2},
    "distil-start": DISTIL,
    "distil": DISTIL,
    "anatomy_prompts": {"steps": 2, "batch": 1, "levels": 1, "lora_rank": 2},
    "evaluate": {
        "grid_prompts": 2, "seeds_per_prompt": 2, "captions": 6, "per_class": 0, "batch": 4, "steps": 4, "bf16": False,
        "apr_heads": [],
    },
    "assemble-dermatology": {},
}  # fmt: skip


def write_images(folder: Path, name: str, count: int) -> None:
    """Invented lesions with a mask, structures, diagnoses and hair."""
    rows = skin_rows(0, count)
    for number, row in enumerate(rows):
        row["image_id"], row["lesion_id"] = f"{name}-{number}", f"{name}-lesion-{number // 2}"
        row["diagnosis"], row["artefact_source"] = DIAGNOSES[number % 4], "manual"
    columns = {
        key: pa.array([row[key] for row in rows], PICTURE if key == "image" or key.endswith("_mask") else pa.string())
        for key in rows[0]
    }
    columns["artefact_hair"] = pa.array(np.arange(count) % 2 * 1.0)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{name}-00000-of-00001.parquet")


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The recipes of the project at a tiny size, and a folder to run them in."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, options in TINY.items():
        content = {"extends": str(RECIPES / f"{name}.yaml"), "dermatology": options, "cpu": options}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(content if options else {"extends": content["extends"]}))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture(autouse=True)
def unshipped() -> None:
    shipping.take_option([])


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped chest X-ray models laid out as runs."""
    folder = tmp_path_factory.mktemp("restored")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        restore(read_parts(str(RECIPES / "assemble-radiology.yaml")), ROOT / "assets" / "models" / "radiology")
    return folder


def states(recipes: Path) -> dict[str, str]:
    return {each.out.name: each.state for each in plan("dermatology", recipes, "cpu").steps}


def test_a_chain_runs_from_images_to_a_folder_that_is_served(
    recipes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, count in (("train", 24), ("validation", 16)):
        write_images(tmp_path / "images" / "dermatology", name, count)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    run(RunConfig("dermatology", device="cpu"), recipes)
    studio = Studio(tmp_path / "runs/unshipped/assets/models", "cpu")
    pair = studio.compare("dermatology", "a dermoscopic image with melanoma", 1, 2)
    assert pair.aligned.image.size == (64, 64)
    manifest = read_manifest(tmp_path / "runs/unshipped/assets/models" / "dermatology")
    assert set(manifest.adapters) == {"attribute", "few_steps", "structures"}
    assert manifest.few_steps == 2
    written = {path.name for path in (tmp_path / "runs/unshipped/assets/reports").glob("evaluation-*.json")}
    assert written == {"evaluation-dermatology-4-steps.json", "evaluation-dermatology-2-steps.json"}
    assert not (tmp_path / "assets").exists(), "nothing is shipped unasked"
    # Everything is used again; a run without its folder is not missed while what was made from it is there.
    assert set(states(recipes).values()) == {"done"}
    capsys.readouterr()
    run(RunConfig("dermatology", device="cpu", dry_run=True), recipes)
    assert "0 of 12 runs to make" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "runs" / "distil-start-dermatology")
    assert states(recipes)["distil-start-dermatology"] == "not needed"
    # Another recipe is another run, and so is all that was made from it, and nothing else.
    changed = yaml.safe_load((recipes / "rl-dermatology.yaml").read_text())
    changed["learning_rate"] = 1e-5
    (recipes / "rl-dermatology.yaml").write_text(yaml.safe_dump(changed))
    found = states(recipes)
    assert {name for name, state in found.items() if state == "changed"} == {"rl-dermatology", "rl-mean-dermatology"}
    run(RunConfig("dermatology", only="rl-dermatology", device="cpu"), recipes)
    assert states(recipes)["rl-dermatology"] == "done"
    assert states(recipes)["rl-mean-dermatology"] == "changed", "it was made from the run before"
    assert (tmp_path / "runs" / "rl-dermatology.before-1" / "metrics.json").is_file()
    # A stopped run goes on, and speed alone changes no recipe.
    (tmp_path / "runs" / "reward-dermatology" / "metrics.json").unlink()
    assert states(recipes)["reward-dermatology"] == "resume"
    judge = yaml.safe_load((recipes / "judge.yaml").read_text())
    (recipes / "judge.yaml").write_text(yaml.safe_dump({**judge, "log_every": 7}))
    assert states(recipes)["judge-dermatology"] == "done"


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_every_run_comes_after_its_inputs(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", domain, "--dry-run"]) == 0
    told = capsys.readouterr().out
    names = [each.out.name for each in chain_of(domain).steps]
    assert len(set(names)) == len(names) == 12
    for before, after in (
        ("autoencoder", f"diffusion-{domain}"),
        (f"contrastive-{domain}", f"diffusion-{domain}"),
        (f"diffusion-{domain}", f"rl-{domain}"),
        (f"decoder-{domain}", f"rl-{domain}"),
        (f"reward-{domain}", f"rl-{domain}"),
        (f"distil-start-{domain}", f"distil-{domain}"),
    ):
        assert names.index(before) < names.index(after)
    assert (
        told.index("classifier train/recipes/judge.yaml")
        < told.index("assemble train/recipes")
        < told.index("evaluate")
    )
    if domain == "radiology":
        assert names[-1] == "spectrum-radiology", "it draws with all the other parts"


@pytest.mark.parametrize("ships", [False, True])
def test_a_chain_writes_over_what_ships_only_when_told_to(ships: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "radiology", "--dry-run", *(["--ship"] if ships else [])]) == 0
    told = capsys.readouterr().out
    evaluations = [line for line in told.splitlines() if " evaluate " in line]
    assert len(evaluations) == 2
    models = "--models assets/models" if ships else "--models runs/unshipped/assets/models"
    assert all(models in line and ("--split test" in line) == ships for line in evaluations)
    assert ("train examples radiology" in told) == ("train report" in told) == ships


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_recipes_reproduce_the_adapters_that_ship(domain: str) -> None:
    elsewhere = {"out", "base", "autoencoder", "latents", "reward", "judge", "segmenter", "start", "beside", "resume"}
    runs = {str(each.out): each for each in chain_of(domain).steps}
    assembly = recipe_file.load(RECIPES / f"assemble-{domain}.yaml")
    manifest = read_manifest(ROOT / "assets" / "models" / domain)
    for name, source in assembly["adapters"].items():
        folder = ROOT / "assets" / "models" / domain / "adapters" / name
        made_by = json.loads((folder / "adapter.json").read_text())["recipe"]
        config = json.loads(json.dumps(asdict(runs[source.removesuffix("/model")].config)))
        assert {n: config[n] for n in config.keys() & made_by.keys() - elsewhere} == {
            n: made_by[n] for n in config.keys() & made_by.keys() - elsewhere
        }
    for label, source in assembly["runs"].items():
        if manifest.metrics[label].get("steps") is not None:
            assert runs[source].config.steps == manifest.metrics[label]["steps"]


@pytest.mark.parametrize("device", ["", "cpu", "cuda"])
def test_what_ships_is_used_again_once_it_is_restored(
    restored: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.chdir(restored)
    found = {each.out.name: each.state for each in plan("radiology", device=device).steps}
    assert found.pop("distil-start-radiology") == "not needed", "its weights ship in no folder"
    assert set(found.values()) == {"done"}


def test_what_cannot_be_run_is_refused(recipes: Path) -> None:
    with pytest.raises(InputError, match="no domain 'cardiology'"):
        plan("cardiology", recipes)
    with pytest.raises(InputError, match="no stage or run 'paint'"):
        run(RunConfig("dermatology", only="paint"), recipes)
    (recipes / "rl-dermatology.yaml").unlink()
    with pytest.raises(InputError, match="needs runs/rl-dermatology/model, which no recipe"):
        plan("dermatology", recipes)
    for name, needs in (("rl-dermatology", "distil"), ("distil", "rl")):
        path = recipes / f"{name}.yaml"
        content = {"extends": str(RECIPES / f"{name}.yaml"), "start": f"runs/{needs}-dermatology/model"}
        path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match="in a circle"):
        plan("dermatology", recipes)


def test_a_recipe_extends_another_and_has_blocks_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "steps: 1\nbatch: 2\nout: runs/x-${domain}\ncpu: {batch: 3}\nradiology: {steps: 5}\n"
    )
    (tmp_path / "more.yaml").write_text("extends: base.yaml\nwarmup: 9\ncpu: {heads: 4}\ndermatology: {steps: 7}\n")
    both = [recipe_file.load(tmp_path / "more.yaml", domain=domain) for domain in ("radiology", "dermatology")]
    assert [each["steps"] for each in both] == [5, 7]
    assert both[0] == {"steps": 5, "batch": 3, "out": "runs/x-radiology", "warmup": 9, "heads": 4}
    card = recipe_file.load(tmp_path / "more.yaml", domain="radiology", device="cuda:1")
    assert (card["batch"], card["device"]) == (2, "cuda:1")
    with pytest.raises(InputError, match="is for any domain: name one with --domain"):
        recipe_file.load(tmp_path / "more.yaml")
    (tmp_path / "base.yaml").write_text("extends: more.yaml\n")
    with pytest.raises(InputError, match="extends itself"):
        recipe_file.load(tmp_path / "more.yaml")
    (tmp_path / "base.yaml").write_text("cpu: 3\n")
    with pytest.raises(InputError, match="cpu must be a mapping"):
        recipe_file.load(tmp_path / "base.yaml")
