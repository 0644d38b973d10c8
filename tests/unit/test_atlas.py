"""Where places lie: a fitted atlas knows the centres it was made from, and left is never right."""

import numpy as np
import pytest

from medviz.domains.chest_places import PLACES, WORDINGS, mirrored_place, places_in, wordings_of
from medviz.errors import InputError, ModelError
from medviz.grounding.atlas import Atlas, Gaussian, place_boxes

SIDE = 120


def lungs(right_x: int = 30, left_x: int = 88, top: int = 20, half: int = 16, height: int = 70):
    """Two rectangles; the right lung at small x."""
    masks = []
    for x in (right_x, left_x):
        mask = np.zeros((SIDE, SIDE), bool)
        mask[top : top + height, x - half : x + half] = True
        masks.append(mask)
    return masks[0], masks[1]


def centre(heat: np.ndarray) -> tuple[float, float]:
    rows, columns = np.mgrid[: heat.shape[0], : heat.shape[1]]
    return float((heat * (columns + 0.5)).sum() / heat.sum()), float((heat * (rows + 0.5)).sum() / heat.sum())


def test_an_atlas_of_invented_lungs_has_the_mean_centre_and_a_sixth_of_the_mean_side() -> None:
    found = [place_boxes(*lungs(28, 86, 18)), place_boxes(*lungs(32, 90, 22))]
    atlas = Atlas.of_boxes(found)
    assert set(atlas.places) == set(PLACES)
    assert atlas.fitted_on["right lung"] == 2
    (right,), (left,) = atlas.places["right lung"], atlas.places["left lung"]
    assert (right.mu_x, right.mu_y) == pytest.approx((30 / SIDE, 55 / SIDE))
    assert (left.mu_x, left.mu_y) == pytest.approx((88 / SIDE, 55 / SIDE))
    assert (right.sigma_x, right.sigma_y) == pytest.approx((32 / SIDE / 6, 70 / SIDE / 6))
    (middle,) = atlas.places["mediastinum"]
    assert middle.mu_x == pytest.approx(59 / SIDE)
    heights = [
        atlas.places[f"left {part}"][0].mu_y for part in ("apex", "upper zone", "mid zone", "lower zone", "base")
    ]
    assert heights == sorted(heights)
    assert atlas.places["right hilum"][0].mu_x > right.mu_x
    assert atlas.places["right costophrenic angle"][0].mu_x < right.mu_x


def test_a_wider_spread_keeps_the_centre_and_doubles_the_mass_along_both_axes() -> None:
    atlas = Atlas.of_boxes([place_boxes(*lungs())])
    narrow, wide = (atlas.heat(["right lung"], (60, 60), spread=spread) for spread in (0.5, 1.0))
    assert centre(wide) == pytest.approx(centre(narrow), abs=0.1)
    assert wide.sum() == pytest.approx(4 * narrow.sum(), rel=0.02)


def test_sides_are_the_patients_and_a_mirrored_image_swaps_them() -> None:
    right, left = lungs()
    atlas = Atlas.of_boxes([place_boxes(right, left)])
    turned = Atlas.of_boxes([place_boxes(left[:, ::-1], right[:, ::-1])])
    for place in PLACES:
        heat = atlas.heat([place], (12, 12))
        assert np.allclose(atlas.mirrored().heat([mirrored_place(place)], (12, 12)), heat[:, ::-1], atol=1e-6)
        assert np.allclose(turned.heat([mirrored_place(place)], (12, 12)), heat[:, ::-1], atol=0.02)
        if place.startswith("left"):
            assert centre(heat)[0] > 6, "the patient's left lies on the image's right"
        if place.startswith("right"):
            assert centre(heat)[0] < 6
    assert place_boxes(left, right) == {}, "lungs on the wrong sides are no anatomy"


def test_rectangles_say_nothing_of_heart_and_angles() -> None:
    boxes = place_boxes(*lungs(), outlined=False)
    assert "left base" in boxes
    assert not {"cardiac silhouette", "mediastinum", "left costophrenic angle"} & set(boxes)
    assert place_boxes(lungs()[0], np.zeros((SIDE, SIDE), bool)) == {}


def test_a_gaussian_is_averaged_over_cells_and_keeps_its_peak() -> None:
    fine = Gaussian(0.5, 0.25, 0.1, 0.05).heat((400, 400))
    assert fine.max() == pytest.approx(1.0, abs=1e-3)
    assert fine.sum() / 400**2 == pytest.approx(2 * np.pi * 0.1 * 0.05, rel=1e-3)
    coarse = Gaussian(0.5, 0.25, 0.1, 0.05).heat((8, 8))
    assert np.allclose(coarse, fine.reshape(8, 50, 8, 50).mean(axis=(1, 3)), atol=1e-4)
    tiny = Gaussian(0.5, 0.5, 0.005, 0.005).heat((3, 3))
    assert tiny.argmax() == 4
    assert tiny[1, 1] > 0


def test_several_places_are_their_greatest_and_jitter_stays_in_its_bounds() -> None:
    atlas = Atlas.of_boxes([place_boxes(*lungs())])
    both = atlas.heat(["right base", "left base"], (16, 16))
    assert np.array_equal(both, np.maximum(atlas.heat(["right base"], (16, 16)), atlas.heat(["left base"], (16, 16))))
    first = atlas.places["left base"][0]
    for seed in range(20):
        moved = first.jittered(np.random.default_rng(seed), 0.05)
        assert abs(moved.mu_x - first.mu_x) <= 0.05
        assert abs(moved.sigma_x / first.sigma_x - 1) <= 0.05
    rng = np.random.default_rng(0)
    assert not np.array_equal(atlas.heat(["left base"], (16, 16), jitter=0.05, rng=rng), both)
    with pytest.raises(InputError, match="needs a generator"):
        atlas.heat(["left base"], (4, 4), jitter=0.05)
    with pytest.raises(InputError, match="no place 'spleen'"):
        atlas.heat(["spleen"], (4, 4))
    with pytest.raises(InputError, match="sigma > 0"):
        Gaussian(0.5, 0.5, 0.0, 0.1)


def test_what_is_written_is_read_and_damage_has_a_name(tmp_path) -> None:
    atlas = Atlas.of_boxes([place_boxes(*lungs())], {"split": "train"})
    atlas.write(tmp_path / "atlas.json")
    assert Atlas.read(tmp_path / "atlas.json") == atlas
    damaged = (tmp_path / "atlas.json").read_text().replace('"sigma_x": 0', '"sigma_x": -0')
    (tmp_path / "atlas.json").write_text(damaged)
    with pytest.raises(ModelError, match=r"atlas\.json is damaged"):
        Atlas.read(tmp_path / "atlas.json")


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("opacity in the right lower zone", ("right lower zone",)),
        ("Left Base atelectasis", ("left base",)),
        ("consolidation at both lung bases", ("right base", "left base")),
        ("bibasal opacities", ("right base", "left base")),
        ("perihilar haze", ("right hilum", "left hilum")),
        ("blunting of the left costophrenic angle", ("left costophrenic angle",)),
        ("bilateral patchy infiltrates", ("bilateral",)),
        ("diffuse opacities", ("diffuse",)),
        ("an enlarged cardiac silhouette", ("cardiac silhouette",)),
        ("opacity of the left lung, none in the right apex", ("left lung", "right apex")),
        ("no opacity in the right apex", ()),
        ("lung opacity", ()),
        ("bright longing", ()),
        ("", ()),
    ],
)
def test_phrases_name_places(text: str, places: tuple[str, ...]) -> None:
    assert places_in(text) == places


def test_running_text_is_read_with_care() -> None:
    assert places_in("left jugular line and opacity in the right apex", careful=True) == ("right apex",)
    assert places_in("right mid and lower zone consolidation", careful=True) == ("right mid zone",)
    assert places_in("lower zone consolidation", careful=True) == ("right lower zone", "left lower zone")
    assert places_in("right apex and both lower zones", careful=True) == (
        "right apex",
        "right lower zone",
        "left lower zone",
    )


def test_every_wording_reads_as_the_places_it_stands_for() -> None:
    for wording, places in WORDINGS.items():
        assert places_in(f"lung opacity, {wording}") == places, wording
        mirrored = tuple(sorted(map(mirrored_place, places)))
        turned = " ".join(mirrored_place(f"{word} x").split()[0] for word in wording.split())
        assert tuple(sorted(places_in(turned))) == mirrored
    assert all(wordings_of((place,)) for place in PLACES)
