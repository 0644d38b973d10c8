"""The audit on instruments that are known to look at the wrong thing, or at the right one."""

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from medviz.errors import InputError
from tests.train.test_evidence_stage import COLOURS, SIDE, Bars, skin_split
from tests.unit.test_evidence import write
from train.config import read_recipe
from train.datasets.counterfactuals import Counterfactual
from train.datasets.evidence.dermatology import ATTRIBUTES
from train.datasets.evidence.labels import Labelled
from train.datasets.split import Split
from train.evaluate.audit.instruments import Instrument, Row, gate
from train.evaluate.audit.pairs import drawn_pairs, erase, pair_rows
from train.evaluate.audit.real import auc_rows, other_means, read, real_rows, thumbnail, to_other_colour
from train.evaluate.audit.stage import AuditConfig, run
from train.evaluate.statistics import Estimate, median_interval, share_interval

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


def instrument(score, name: str = "made up") -> Instrument:
    """Answers for rulers alone, with `score`: uint8 (S, S, 3) -> a number in [0, 1]."""
    return Instrument(
        name, ("ruler",), {"ruler": 0.5}, 0, lambda images: np.array([[score(image)] for image in images]), Path("none")
    )


def sees_bars(image: np.ndarray) -> float:
    """Whether pixels have the colour of a ruler's bar, in whatever light."""
    red, green = image[..., 0].astype(int), image[..., 1].astype(int)
    return float(np.clip((red - green > 100).mean() * 50, 0, 1))


def sees_colour(image: np.ndarray) -> float:
    """Whether the image is reddish as a whole."""
    return float(np.clip(0.5 + (image[..., 0].mean() - image[..., 2].mean()) / 40, 0, 1))


HONEST, CHEAT = instrument(sees_bars, "honest"), instrument(sees_colour, "cheat")


def skin_with_bars() -> tuple[Split, Labelled]:
    """Every second image has a bar, and a warmer light, as if it came from another camera."""
    plain, pictures, truth = skin_split(40), [], []
    for index in range(40):
        image, present = np.full((SIDE, SIDE, 3), 160, np.int16), bool(index % 2)
        image[..., 0] += 12 if present else -12
        image += np.random.default_rng(index).integers(-15, 16, (SIDE, SIDE, 3)).astype(np.int16)
        if present:
            image[20:26, 10:30] = COLOURS["ruler"]
        pictures.append({"bytes": cv2.imencode(".png", image[..., ::-1].astype(np.uint8))[1].tobytes(), "path": None})
        truth.append(present)
    column = plain.table.column_names.index("image")
    table = plain.table.set_column(column, "image", [pictures])
    known = Labelled(np.arange(40), np.array(truth), ["HAM"] * 40, [f"lesion-{i}" for i in range(40)])
    return Split("dermatology", "validation", table), known


def by_trial(rows: list[Row], where: str) -> dict[str, Row]:
    return {row.trial: row for row in rows if row.where == where}


def test_who_sees_the_bar_is_blind_on_a_thumbnail_and_who_sees_the_light_is_not() -> None:
    skin, known = skin_with_bars()
    found = {}
    for each in (HONEST, CHEAT):
        readings = read(each, skin, known.indices.tolist(), SIDE, seed=0).of(known)
        rows = real_rows(each, "ruler", readings, known, 10, 0, "ruler")
        found[each.name] = by_trial(rows, "within sources") | by_trial(rows, "all sources")
    assert found["honest"]["auc"].estimate.value == 1.0
    assert found["cheat"]["auc"].estimate.value == 1.0
    assert found["honest"]["auc_thumbnail"].estimate.value == 0.5
    assert found["cheat"]["auc_thumbnail"].estimate.value == 1.0
    assert found["honest"]["auc_thumbnail"].as_json()["passed"] is True
    assert found["cheat"]["auc_thumbnail"].as_json()["passed"] is False
    assert found["cheat"]["recolour"].estimate.value > 0.1


def test_a_source_with_few_images_is_left_out_and_sources_are_not_compared_with_each_other() -> None:
    truth = np.array([True] * 20 + [False] * 20 + [False] * 30)
    strata = ["one"] * 40 + ["other"] * 30
    known = Labelled(np.arange(70), truth, strata, [str(i) for i in range(70)])
    scores = np.where(truth, 0.9, 0.9)
    scores[40:] = 0.1  # the other source, which has no positive image, scores low
    rows = auc_rows("any", "ruler", "auc", scores, known, 10, 0, "ruler")
    assert [(row.where, row.estimate.value, row.estimate.n) for row in rows] == [
        ("one", 0.5, 40),
        ("within sources", 0.5, 40),
    ]


def test_pasting_erasing_and_blurring_turn_the_answer_of_who_sees_the_bar() -> None:
    pairs = drawn_pairs(Bars(), [skin_split()], "ruler", 8, SIDE, seed=0)
    assert len(pairs) == 8
    honest = {row.trial: row.estimate.value for row in pair_rows(HONEST, "ruler", "a", pairs)}
    assert honest["paste"] == honest["erase"] == 1.0
    assert honest["blur"] >= 0.8
    blind = instrument(lambda image: 0.1)
    rows = {row.trial: row for row in pair_rows(blind, "ruler", "a", pairs)}
    assert rows["paste"].estimate.value == 0.0
    assert rows["paste"].as_json()["passed"] is False
    assert rows["erase"].as_json()["value"] is None
    assert rows["erase"].as_json()["passed"] is None
    assert pair_rows(HONEST, "ink", "a", pairs) == []


def test_erasing_leaves_what_lies_outside_the_addition() -> None:
    pair = Bars().add(skin_split(), 0, "ruler", np.random.default_rng(0), SIDE)
    erased = erase(pair)
    far = cv2.dilate(pair.mask, np.ones((9, 9))) == 0
    assert np.array_equal(erased[far], pair.without[far])
    assert np.abs(erased.astype(int) - pair.without)[pair.mask > 0].mean() < 20


def test_colours_of_the_other_answer_come_from_the_same_source() -> None:
    known = Labelled(np.arange(3), np.array([True, False, False]), ["one", "one", "other"], ["a", "b", "c"])
    means = np.array([[200.0, 100, 100], [100, 100, 100], [50, 50, 50]])
    targets = other_means(means, known)
    assert targets.tolist() == [[100, 100, 100], [200, 100, 100], [50, 50, 50]]
    image = np.full((4, 4, 3), (200, 100, 100), np.uint8)
    assert to_other_colour(image, means[0], targets[0]).mean(axis=(0, 1)).tolist() == [100, 100, 100]


def test_a_thumbnail_has_sixteen_colours_at_most_and_no_bar() -> None:
    image = np.full((SIDE, SIDE, 3), 120, np.uint8)
    image[::8] = 0
    assert np.ptp(thumbnail(image)) <= 1


def test_a_gate_is_the_attribute_s_own_or_that_of_all() -> None:
    assert gate("auc", "ruler") == (">=", 0.95)
    assert gate("paste", "nodule") == (">=", 0.9)
    assert gate("auc", "nodule") is None
    assert gate("paste", "") is None
    assert Row("x", "ruler", "paste", "", Estimate(0.9, 0.8, 1.0, 20), (">=", 0.9)).as_json()["passed"] is True


def test_a_share_has_a_width_where_all_answers_are_alike() -> None:
    found = share_interval(np.ones(20, bool))
    assert found.value == 1.0
    assert 0.8 < found.low < 0.9
    assert np.isnan(share_interval(np.zeros(0, bool)).value)
    assert median_interval(np.array([1.0, 2.0, 9.0, np.nan])).value == 2.0


class OnesOwn(Bars):
    def add(self, split, index, attribute, rng, size_px=256, place=None) -> Counterfactual | None:
        return super().add(split, index, attribute, rng, size_px, place) if index % 4 else None


def test_the_audit_writes_a_row_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skin = skin_split(60)
    splits = {name: Split("dermatology", name, skin.table) for name in ("train", "validation")}
    monkeypatch.setattr("train.evaluate.audit.stage.open_split", lambda domain, name, extra_folders: splits[name])
    monkeypatch.setattr("train.evaluate.audit.stage.family", lambda domain, name: OnesOwn())
    folder = write(tmp_path / "detector", ATTRIBUTES, trained_on="half A of train by lesion")
    config = AuditConfig(
        out=str(tmp_path / "out"), classifiers=False, detectors={"tiny": str(folder)}, families=("a",), pairs=4,
        least=5, size_px=SIDE, reports=str(tmp_path / "reports"), suffix="tiny",
    )  # fmt: skip
    report = run(config, "python -m train evaluate audit recipe.yaml")
    assert report == json.loads((tmp_path / "reports" / "audit-dermatology-tiny.json").read_text())
    trials = {(row["head"], row["trial"]) for row in report["rows"]}
    for name in ATTRIBUTES:
        assert {(name, "paste"), (name, "erase"), (name, "blur"), (name, "auc_published")} <= trials
    published = next(r for r in report["rows"] if r["trial"] == "auc_published" and r["where"] == "HAM")
    unseen = int((splits["train"].halves != 0).sum())
    assert published["n"] == 60 + unseen

    with pytest.raises(InputError, match="nothing to audit"):
        run(replace(config, detectors={}, models=str(tmp_path)))


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_the_recipe_serves_both_domains(domain: str) -> None:
    assert read_recipe(RECIPES / "audit.yaml", AuditConfig, ["--domain", domain]).out == f"runs/audit-{domain}"
