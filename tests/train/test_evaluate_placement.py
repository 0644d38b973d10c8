"""Is the finding drawn where the prompt puts it: scores by hand, and the evaluation end to end on a tiny model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from medviz.domains.chest_findings import PlacedHead
from medviz.errors import InputError
from medviz.grounding.anatomy import Segmenter, regions_of
from medviz.rewards.placement import PLACES
from tests import tiny
from tests.train.grounding_scenes import LEFT_UP, RIGHT_LOW, chest, lungs, split_of
from train.__main__ import main
from train.config import read_recipe
from train.evaluate.generated import generate
from train.evaluate.placement import (
    PlacementConfig,
    boxed_on_one_side,
    placed_prompts,
    placement_figures,
    right_less_left,
    run,
    scores,
)
from train.evaluate.report import section

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
RIGHT_LOWER, LEFT_LOWER = (PlacedHead("opacity", (f"{side}_lower_zone",)) for side in ("right", "left"))


def evidence_in(*places: str) -> np.ndarray:
    """One logit in each of the places."""
    return np.array([float(place in places) for place in PLACES])


def test_side_and_zone_are_right_where_the_named_one_holds_the_most():
    values = np.stack([evidence_in("right_lung", "right_lower_zone"), evidence_in("right_lung", "right_mid_zone")] * 2)
    found = scores(values, [RIGHT_LOWER] * 2 + [LEFT_LOWER] * 2)
    assert found["side"].tolist() == [1, 1, 0, 0]
    assert found["zone"].tolist() == [1, 0, 0, 0]
    assert found["margin"] == pytest.approx([1, -0.2, -0.2, -0.2])


def test_a_lung_has_no_zone_and_lungs_not_found_have_nothing():
    values = np.stack([evidence_in("left_lung"), np.full(len(PLACES), np.nan)])
    found = scores(values, [PlacedHead("opacity", ("left_lung",)), RIGHT_LOWER])
    assert found["side"][0] == 1
    assert np.isnan([found["zone"][0], found["side"][1], found["zone"][1], found["margin"][1]]).all()


def test_right_less_left_is_what_the_word_changes_in_one_noise():
    right, left, none = (evidence_in(*places) for places in (["right_lung"], ["left_lung"], []))
    follows, ignores, against = [right, left], [right, right], [left, right]
    assert right_less_left(np.stack(follows + ignores + against), prompts=2) == pytest.approx([1, 0, -1])
    # pairs of prompts that differ in the side stand side by side; a pair without lungs leaves the others
    missing = np.full(len(PLACES), np.nan)
    assert right_less_left(np.stack([right, left, none, missing]), prompts=4) == pytest.approx([1])


def test_prompts_stand_in_pairs_that_differ_in_the_side_alone():
    prompts = placed_prompts(PlacementConfig(out=""))
    assert len(prompts) == 12 == len(set(prompts))
    for right, left in zip(prompts[::2], prompts[1::2], strict=True):
        assert right.replace("right", "left") == left != right


def test_figures_change_against_the_baseline_row():
    placed = [RIGHT_LOWER, LEFT_LOWER] * 2
    right, left = evidence_in("right_lung", "right_lower_zone"), evidence_in("left_lung", "left_lower_zone")
    rows = {"baseline": np.stack([right] * 4), "tuned": np.stack([right, left] * 2)}
    figures = {f.name: f for f in placement_figures("judge", placed, rows, 2, right[None], [RIGHT_LOWER])}
    side = figures["side_judge"]
    assert (side.baseline.value, side.aligned["tuned"].value, side.change["tuned"].value) == (0.5, 1.0, 0.5)
    assert side.real.value == 1.0
    assert figures["contrast_judge"].baseline.value == 0
    assert figures["contrast_judge"].aligned["tuned"].value == 1
    assert all(figure.role == "judge" for figure in figures.values())


def test_real_images_are_those_with_one_finding_on_one_side():
    twice = {**RIGHT_LOW, "y": 0.2}
    shown = [
        chest(0, [RIGHT_LOW]),
        chest(1, [RIGHT_LOW, LEFT_UP]),
        chest(2, [LEFT_UP, {**LEFT_UP, "label": "pneumonia"}]),
        chest(3, []),
        chest(4, [RIGHT_LOW, twice]),
        chest(5, [{"label": "left lung", "x": 0.5, "y": 0.1, "w": 0.3, "h": 0.7}, LEFT_UP]),
    ]
    found = boxed_on_one_side(split_of("radiology", "test", shown), 32)
    assert [placed.regions for _, placed in found] == [
        ("right_lower_zone",),
        ("right_lower_zone", "right_upper_zone"),
        ("left_upper_zone",),
    ]
    assert all(image.shape == (32, 32, 3) for image, _ in found)


@pytest.fixture
def config(model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlacementConfig:
    root = tmp_path / "images" / "radiology"
    root.mkdir(parents=True)
    for name, rows in {
        "test": [chest(0, [RIGHT_LOW]), chest(1, [LEFT_UP])],
        "validation": [chest(2, [LEFT_UP])],
    }.items():
        pq.write_table(split_of("radiology", name, rows).table, root / f"{name}-00000-of-00001.parquet")
    monkeypatch.setenv("MEDVIZ_DATA", str(root.parent))
    # An untrained segmenter finds no lungs: where they are is told.
    found = regions_of({f"{side}_lung": mask for side, mask in lungs().items()}).regions
    monkeypatch.setattr(Segmenter, "places", lambda self, images: [dict(found) for _ in images])
    return PlacementConfig(
        out=str(tmp_path / "run"),
        models=str(model_root),
        adapters=(tiny.ADAPTER,),
        also={"aside": str(model_root / "radiology" / "adapters" / tiny.ADAPTER)},
        findings=("lung opacity",),
        noises=2,
        steps=2,
        batch=4,
        reports=str(tmp_path / "reports"),
    )


def test_the_evaluation_end_to_end(config: PlacementConfig):
    report = run(config, command="python -m train evaluate placement recipe.yaml")
    assert report == json.loads((Path(config.reports) / "placement-radiology.json").read_text())
    figures = {figure["name"]: figure for figure in report["figures"]}
    assert set(figures) == {
        f"{key}_{role}" for key in ("side", "zone", "margin", "contrast") for role in ("judge", "reward")
    }
    side = figures["side_judge"]
    assert side["baseline"]["n"] == 12
    assert side["real"]["n"] == report["settings"]["real_images"] == 3
    # one adapter under two names draws the same pictures
    mine, aside = (figures["margin_judge"]["adapters"][name] for name in (tiny.ADAPTER, "aside"))
    assert mine == aside
    assert mine["change"]["value"] != 0
    table = section({**report, "file": "placement-radiology.json"})
    assert "real images" in table
    assert "Right less left" in table


def test_pictures_are_drawn_as_the_folder_draws_them(
    config: PlacementConfig, model_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the few-step adapter where it has a part in that many steps, and through the folder's gains by frequency."""
    folder = shutil.copytree(model_root / "radiology", tmp_path / "models" / "radiology")
    tiny.add_few_steps(folder, [999, 400])
    manifest = json.loads((folder / "manifest.json").read_text())
    gains = {"frequencies": [0.1], "gains": [[0.5]] * tiny.LATENT_CHANNELS, "offsets": [0.0] * tiny.LATENT_CHANNELS}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "spectra": {"few_steps": gains}}))
    asked = []

    def watched(*arguments, few_steps, spectrum, **named):
        asked.append((few_steps, spectrum))
        return generate(*arguments, few_steps=few_steps, spectrum=spectrum, **named)

    monkeypatch.setattr("train.evaluate.placement.generate", watched)
    report = run(replace(config, models=str(folder.parent), suffix="few"))
    assert [few_steps.timesteps for few_steps, _ in asked] == [(999, 400)] * 3
    assert [spectrum.as_json() for _, spectrum in asked] == [gains] * 3
    assert str(asked[0][1]) in report["settings"]["guidance_scale"]
    assert report == json.loads((Path(config.reports) / "placement-radiology-few.json").read_text())


def test_a_run_that_was_stopped_finds_its_pictures_again(config: PlacementConfig, monkeypatch: pytest.MonkeyPatch):
    first = run(config)
    monkeypatch.setattr("train.evaluate.generated.sample", lambda *_, **__: pytest.fail("drawn twice"))
    assert run(config)["figures"] == first["figures"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"noises": 0}, "noises must be at least 1"),
        ({"adapters": (), "also": {}}, "needs an adapter"),
        ({"findings": ()}, "at least one finding"),
        ({"findings": ("no finding",)}, "places no finding"),
        ({"findings": ("gibberish",)}, "places no finding"),
        ({"also": {tiny.ADAPTER: "somewhere"}}, "two rows are called"),
        ({"also": {"aside": "nowhere"}}, "no folder nowhere"),
    ],
)
def test_what_makes_no_comparison_is_refused(config: PlacementConfig, changed: dict, message: str):
    for name, value in changed.items():
        setattr(config, name, value)
    with pytest.raises(InputError, match=message):
        run(config)


def test_the_command_needs_a_recipe_and_the_one_that_is_there_can_be_read(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate", "placement"]) == 1
    assert "name the recipe" in capsys.readouterr().err
    recipe = read_recipe(RECIPES / "placement-radiology.yaml", PlacementConfig).checked()
    assert set(recipe.adapters) == {"anatomy", "attribute"}
