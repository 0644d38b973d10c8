"""Distance against compute: what training cost, a power law where there is one, and what it says of what is missing."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from medviz.errors import InputError, ModelError
from medviz.models.manifest import write_manifest
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train.config import read_recipe
from train.evaluate.report import TABLES_NAME, ReportConfig
from train.evaluate.report import run as write_tables
from train.experiments.compute import pass_flops, spent
from train.experiments.curve import CurveConfig, main, run, trend

RECIPES = Path(__file__).parents[2] / "train" / "recipes"
MAKEFILE = Path(__file__).parents[2] / "Makefile"


def trained_for(folder: Path, metrics: dict[str, Any], place: Path) -> Path:
    """A copy of a model folder whose manifest says what trained it."""
    shutil.copytree(folder, place)
    fields = json.loads((place / "manifest.json").read_text())
    for computed in ("files", "format_version", "adapters"):
        del fields[computed]
    write_manifest(place, {**fields, "metrics": metrics})
    return place


@pytest.fixture
def config(model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CurveConfig:
    write_split(tmp_path / "images" / "dermatology", "validation", 24, 1)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    parameters = tiny.make_unet().num_parameters()
    folders = {}
    for name, images in (("longer", 8_000), ("short", 100), ("middle", 900)):
        metrics = {"diffusion": {"images_seen": images, "unet_parameters": parameters}, "kid": None}
        folders[name] = str(trained_for(model_root / "dermatology", metrics, tmp_path / name))
    return CurveConfig(
        out=str(tmp_path / "run"),
        models=folders,
        eyes=str(model_root / "dermatology"),
        steps=2,
        captions=6,
        picture=False,
        reports=str(tmp_path / "reports"),
    )


def test_training_costs_three_passes_an_image_of_every_stage(model_root: Path, tmp_path: Path) -> None:
    unet = tiny.make_unet()
    one, parameters = pass_flops(unet, 77), unet.num_parameters()
    folder = model_root / "dermatology"
    stage = {"images_seen": 10, "unet_parameters": parameters}
    assert pass_flops(unet, 154) > one > 0
    text = json.loads((folder / "text_encoder" / "config.json").read_text())
    one = pass_flops(unet, text["max_position_embeddings"])
    assert spent(trained_for(folder, {"diffusion": stage}, tmp_path / "a")) == (10, 3 * 10 * one)
    smaller = {"images_seen": 30, "unet_parameters": parameters / 2}
    both = {"diffusion": smaller, "wider": stage, "judge": {"images_seen": 500}, "kid": None}
    images, operations = spent(trained_for(folder, both, tmp_path / "b"))
    assert (images, operations) == (40, 3 * 25 * one)
    with pytest.raises(ModelError, match="does not say how many images"):
        spent(folder)


def test_a_power_law_is_found_where_distances_stand_clear_of_zero() -> None:
    compute = np.array([0.1, 1.0, 10.0, 100.0])
    distances = 0.8 * compute**-0.5
    rng = np.random.default_rng(0)
    halves = distances[:, None] * (1 + 0.05 * rng.standard_normal((4, 200)))
    law = trend(list(compute), list(distances), halves)
    assert law is not None
    assert law.exponent == pytest.approx(0.5)
    assert law.low is not None
    assert law.high is not None
    assert 0.45 < law.low < 0.5 < law.high < 0.55
    assert law.petaflops_for(0.02) == pytest.approx(1600.0)
    assert law.petaflops_for(0.0) is None
    assert law.petaflops_for(1e-9) is None  # beyond all counting
    # A point whose interval reaches zero is no part of it, whatever its value.
    noisy = np.vstack([halves, rng.normal(0.001, 0.1, 200)])
    again = trend([*compute, 1000.0], [*distances, 0.001], noisy)
    assert again is not None
    assert again.points == 4
    assert again.exponent == pytest.approx(0.5)
    assert trend(list(compute[:2]), list(distances[:2]), halves[:2]) is None
    assert trend([1.0] * 4, list(distances), halves) is None
    rising = trend(list(compute), list(distances[::-1]), halves[::-1])
    assert rising is not None
    assert rising.petaflops_for(0.02) is None


def test_models_are_measured_in_the_order_of_their_compute(config: CurveConfig, tmp_path: Path) -> None:
    found = run(config, "python -m train curve x")
    assert [arm["name"] for arm in found["arms"]] == ["short", "middle", "longer"]
    figures = {figure["name"]: figure for figure in found["figures"]}
    assert figures["images_seen"]["adapters"]["longer"]["value"]["value"] == 8_000
    assert figures["petaflops"]["adapters"]["longer"]["value"]["value"] == pytest.approx(
        80 * figures["petaflops"]["baseline"]["value"]
    )
    assert {name: one["folder"] for name, one in found["measured"].items()} == config.models
    assert len({one["weights"] for one in found["measured"].values()}) == 1
    # One generator three times: the same pictures, so no change and no slope.
    for space, law in found["trends"].items():
        measured = figures[f"kernel_distance_{space}"]
        assert measured["adapters"]["longer"]["change"]["value"] == 0.0
        assert law["law"] is None or law["law"]["exponent"] == pytest.approx(0.0, abs=1e-9)
        assert law["real"] == measured["real"]
        near = 3 * law["real"]["value"] if law["real"]["value"] > 0 else law["real"]["high"]
        assert law["near"] == near
        assert ("lies within" in law["told"]) == (measured["baseline"]["value"] <= near)
        assert law["told"] in found["intervals"]
    # What is drawn is found again, and the tables show it.
    assert run(config, "python -m train curve x") == found
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    write_tables(ReportConfig(reports=str(tmp_path / "reports"), readme=str(readme), models=str(tmp_path / "models")))
    assert "PFLOP | Images seen |" in (tmp_path / "reports" / TABLES_NAME).read_text()
    assert "| longer |" in (tmp_path / "reports" / TABLES_NAME).read_text()


def test_the_picture_has_a_panel_a_space(config: CurveConfig, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from train.experiments.picture import draw_curve

    found = run(config)
    for law in (None, {"exponent": 0.5, "intercept": 0.0, "low": None, "high": None, "points": 3}):
        trends = {
            space: {**one, "law": law, "petaflops_needed": law and 1e-3} for space, one in found["trends"].items()
        }
        draw_curve({**found, "trends": trends}, tmp_path / "x.png")
        with Image.open(tmp_path / "x.png") as picture:
            assert picture.width > 1000


def test_what_is_no_curve_is_refused(config: CurveConfig, model_root: Path, tmp_path: Path) -> None:
    for wrong in ({"models": {"a": "b"}}, {"eyes": ""}):
        with pytest.raises(InputError, match="at least two model folders, and the eyes"):
            run(CurveConfig(**{**vars(config), **wrong}))
    with pytest.raises(ModelError, match="does not say how many images"):
        run(CurveConfig(**{**vars(config), "models": {**config.models, "x": str(model_root / "dermatology")}}))
    recipe = tmp_path / "curve.yaml"
    wanted = {**vars(config), "guidance_interval": [0, 1000], "semantic_interval": [0, 1000], "semantic_heads": []}
    recipe.write_text(yaml.safe_dump(wanted))
    main([str(recipe), "--captions", "4"])
    assert json.loads((tmp_path / "reports" / "curve-dermatology.json").read_text())["settings"]["captions"] == 4


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_recipes_name_folders_that_make_lays_out(domain: str) -> None:
    config = read_recipe(RECIPES / f"curve-{domain}-gpu.yaml", CurveConfig)
    former = next(line for line in MAKEFILE.read_text().splitlines() if f"$(commit)-{domain})" in line)
    commits = former.split("commit,")[1].split(",")[0].split()
    assert list(config.models.values()) == [
        *(f"runs/former/{commit}-{domain}" for commit in commits),
        f"assets/models/{domain}",
    ]
