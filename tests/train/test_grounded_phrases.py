"""Which phrases are read in which images, and the maps that see no image: regions, sides, priors, oracles."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medviz.errors import InputError
from medviz.grounding.atlas import Box
from medviz.grounding.metrics import cnr, miou
from tests.train.grounding_scenes import (
    SIDE,
    chest,
    invented_set,
    lungs,
    pixels,
    shown_rows,
    skin_rows,
    split_of,
    structures_table,
    train_rows,
)
from train.datasets.grounded_phrases import (
    boxed_findings,
    dermatology_sets,
    drawn_structures,
    filled,
    outlined_lungs,
    radiology_sets,
)
from train.evaluate.grounding.priors import dermatology_priors, oracle, oracle_map, radiology_priors, uniform
from train.evaluate.grounding.scores import METRICS, score_maps


def share_of_box(threshold: float, sigmas: float) -> float:
    """IoU of a box and of where a Gaussian on it, sigma = side / `sigmas`, exceeds a threshold, by geometry alone.

    In units of the box's sides the second is a disc of radius sqrt(2 ln(1 / threshold)) / sigmas on a unit square.
    """
    radius = math.sqrt(2 * math.log(1 / threshold)) / sigmas
    x = np.linspace(-0.5, 0.5, 100_001)
    inside = float(np.mean(2 * np.minimum(0.5, np.sqrt(np.maximum(radius**2 - x**2, 0.0)))))
    return inside / (math.pi * radius**2 + 1 - inside)


def test_the_oracles_earn_what_geometry_and_the_paper_say() -> None:
    outlines = [
        Box(*corners)
        for corners in ((0.3, 0.3, 0.5, 0.5), (0.3, 0.3, 0.6, 0.7), (0.1, 0.2, 0.4, 0.8), (0.25, 0.25, 0.75, 0.75))
    ]
    found: dict[int, list[tuple[float, float]]] = {3: [], 6: []}
    for sigmas, scores in found.items():
        for box in outlines:
            heat, region = oracle_map([box], sigmas, (256, 256)), filled([box], 256)
            scores.append((cnr(heat, region), miou(heat, region)))
        wanted = np.mean([share_of_box(threshold, sigmas) for threshold in (0.1, 0.2, 0.3, 0.4, 0.5)])
        # An edge of the box falls between two pixels: at most half a pixel in 50 on each side.
        assert [share for _, share in scores] == pytest.approx([wanted] * len(outlines), abs=0.01)
    contrasts, shares = (np.mean(column) for column in zip(*found[3], strict=True))
    # arXiv 2506.10633 has 2.11 and 67.6 % on its own boxes; the contrast falls as the box fills more of the image.
    assert contrasts == pytest.approx(2.11, abs=0.1)
    assert shares == pytest.approx(0.676, abs=0.01)
    assert all(one[0] > other[0] and one[1] > other[1] for one, other in zip(found[3], found[6], strict=True))


def test_a_uniform_map_earns_the_regions_share_and_the_oracle_sees_every_part() -> None:
    region = filled([Box(0.0, 0.0, 0.25, 0.5), Box(0.5, 0.5, 0.75, 1.0)], SIDE)
    phrases = invented_set([region], ["lung"], ["ann"])
    flat = dict(zip(METRICS, score_maps(uniform(phrases), phrases)[0], strict=True))
    assert flat == {"cnr": 0, "abs_cnr": 0, "miou": 0.25, "auroc": 0.5, "pointing": 0.25, "mass": 0.25}
    (heat,) = oracle(phrases, 6)
    assert heat[SIDE // 4, SIDE // 8] == pytest.approx(1, abs=0.02)
    assert heat[3 * SIDE // 4, 5 * SIDE // 8] == pytest.approx(1, abs=0.02)
    assert heat[SIDE // 4, 5 * SIDE // 8] < 0.01


def test_structures_keep_their_side_and_several_masks_are_one_region(tmp_path: Path) -> None:
    table = structures_table(tmp_path / "x.parquet", ["chest-2", "elsewhere"])
    found = drawn_structures(split_of("radiology", "test", shown_rows()), table, SIDE)
    by_name = {each.kind: each for each in found.phrases}
    assert set(by_name) == {"right_lung", "left_lung", "ground_glass", "other_tubes"}
    assert [each.name for each in found.classes] == ["right_lung", "left_lung", "ground_glass", "other_tubes"]
    for side in ("right", "left"):
        assert by_name[f"{side}_lung"].phrase == f"{side} lung"
        np.testing.assert_array_equal(by_name[f"{side}_lung"].region, lungs()[side])
    assert len(by_name["ground_glass"].outlines) == 2
    assert by_name["other_tubes"].region[6, 20]
    assert by_name["other_tubes"].region[20, 31]
    assert found.groups == ("bob",)
    np.testing.assert_array_equal(found.images[0], pixels(2))
    with pytest.raises(InputError, match="no hand-drawn structures at"):
        drawn_structures(split_of("radiology", "test", shown_rows()), tmp_path / "none.parquet", SIDE)


def test_boxes_are_worded_by_side_and_zone_and_by_name_alone() -> None:
    split = split_of("radiology", "test", shown_rows())
    atlas = radiology_priors(split_of("radiology", "train", train_rows()), SIDE).atlas
    assert atlas is not None
    placed = boxed_findings(split, atlas, SIDE, placed=True)
    assert [(each.image, each.phrase, each.places, len(each.outlines)) for each in placed.phrases] == [
        (0, "right lower zone lung opacity", ("right lower zone",), 2),
        (1, "right lower zone lung opacity", ("right lower zone",), 1),
        (1, "left upper zone lung opacity", ("left upper zone",), 1),
        (2, "left upper zone pneumonia", ("left upper zone",), 1),
    ]
    named = boxed_findings(split, atlas, SIDE, placed=False)
    assert [(each.image, each.phrase, each.places, len(each.outlines)) for each in named.phrases] == [
        (0, "lung opacity", (), 2),
        (1, "lung opacity", (), 2),
        (2, "pneumonia", (), 1),
    ]
    np.testing.assert_array_equal(named.phrases[1].region, placed.phrases[1].region | placed.phrases[2].region)
    cut = boxed_findings(split, atlas, SIDE, placed=False, limit=1)
    assert [each.phrase for each in cut.phrases] == ["lung opacity", "pneumonia"]
    assert cut.groups == ("ann", "bob"), "images without a phrase are left out"
    assert [each.image for each in cut.phrases] == [0, 1]


def test_priors_are_fitted_on_training_images_alone_and_know_sides() -> None:
    train = split_of("radiology", "train", train_rows())
    priors = radiology_priors(train, SIDE)
    assert priors.fitted_on["lung opacity"] == 3
    np.testing.assert_array_equal(priors.regions["right lung"] > 0.5, lungs()["right"])
    # one of three training images has the second box
    assert priors.regions["lung opacity"][round(0.15 * SIDE), round(0.75 * SIDE)] == pytest.approx(1 / 3)
    for name in ("validation", "test"):
        with pytest.raises(InputError, match="train split alone"):
            radiology_priors(split_of("radiology", name, train_rows()), SIDE)
        with pytest.raises(InputError, match="train split alone"):
            dermatology_priors(split_of("dermatology", name, skin_rows(0, 1)), SIDE)
    assert priors.atlas is not None
    placed = boxed_findings(split_of("radiology", "test", shown_rows()), priors.atlas, SIDE, placed=True)
    for phrase, heat in zip(placed.phrases, priors.of_place(placed), strict=True):
        on_the_left = heat[:, : SIDE // 2].sum() > heat[:, SIDE // 2 :].sum()
        assert on_the_left == phrase.phrase.startswith("right"), "the patient's right is on the image's left"
    named = boxed_findings(split_of("radiology", "test", shown_rows()), priors.atlas, SIDE, placed=False)
    for one, other in zip(priors.of_place(named), priors.of_class(named), strict=True):
        np.testing.assert_array_equal(one, other)
    unseen = replace(priors, regions={"lung opacity": priors.regions["lung opacity"]}).of_class(named)
    assert [heat is None for heat in unseen] == [False, False, True], "pneumonia has no mean then"


def test_both_lungs_and_what_lies_between_follow_from_a_lung_mask_where_nobody_drew_more() -> None:
    found = outlined_lungs(split_of("radiology", "validation", [*shown_rows(), *train_rows()]), SIDE)
    kinds = [each.kind for each in found.phrases]
    assert kinds == ["right_lung"] * 3 + ["left_lung"] * 3 + ["cardiomediastinum"] * 3
    assert found.groups == tuple(f"patient-{i}" for i in (100, 101, 102)), "images without a mask are left out"
    for side, phrase in zip(("right", "left"), found.phrases[0:6:3], strict=True):
        assert np.array_equal(phrase.region, lungs()[side])
        assert (phrase.phrase, phrase.places) == (f"{side} lung", (f"{side} lung",))
    between = found.phrases[-1].region
    assert between.any()
    assert not (between & (lungs()["right"] | lungs()["left"])).any()


def test_hand_drawn_structures_are_of_test_images_and_empty_sets_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path))
    structures_table(tmp_path / "radiology" / "test-structures.parquet", ["chest-0"])
    priors = radiology_priors(split_of("radiology", "train", train_rows()), SIDE)
    assert priors.atlas is not None
    names = [
        [each.name for each in radiology_sets(split_of("radiology", name, rows), priors.atlas, SIDE)]
        for name, rows in {"test": shown_rows(), "validation": [*shown_rows(), *train_rows()]}.items()
    ]
    assert names == [["structures", "placed_boxes", "named_boxes"], ["lungs", "placed_boxes", "named_boxes"]]
    with pytest.raises(InputError, match="validation split of radiology has no region"):
        radiology_sets(split_of("radiology", "validation", [chest(0, [])]), priors.atlas, SIDE)
    (skin,) = dermatology_sets(split_of("dermatology", "test", skin_rows(0, 3)), None, SIDE)
    assert [each.kind for each in skin.phrases].count("lesion") == 3
    assert [each.kind for each in skin.phrases].count("streaks") == 2
