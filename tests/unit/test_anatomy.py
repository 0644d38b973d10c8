import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from medviz.domains import get_domain
from medviz.errors import InputError, ModelError
from medviz.grounding.anatomy import Anatomy, Segmenter, lesion_regions, lung_regions, regions_of

SIDE = 96


def disc(x: float, y: float, radius: float, side: int = SIDE) -> np.ndarray:
    rows, columns = np.mgrid[:side, :side]
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def box(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[top:bottom, left:right] = True
    return mask


RIGHT, LEFT = box(10, 12, 40, 72), box(56, 12, 86, 72)


def test_lesion_regions_cover_the_image_and_the_border_lies_on_the_contour():
    lesion = disc(48, 48, 20)
    regions = lesion_regions(lesion).regions
    assert list(regions) == ["lesion", "border", "skin"]
    assert np.array_equal(regions["lesion"], lesion)
    assert (regions["lesion"] | regions["border"] | regions["skin"]).all()
    assert not (regions["skin"] & (regions["lesion"] | regions["border"])).any()
    rows, columns = np.nonzero(regions["border"])
    distance = np.hypot(columns - 48, rows - 48)
    assert 16 <= distance.min() < 20 < distance.max() <= 24
    assert not regions["border"][48, 48]


def test_a_lesion_cut_by_the_edge_has_no_border_along_it():
    regions = lesion_regions(disc(0, 48, 30)).regions
    assert not regions["border"][48, 0]
    assert regions["border"][48, 30]


def test_specks_and_holes_do_not_make_a_lesion():
    mask = disc(48, 48, 20) & ~disc(48, 48, 5)
    mask[2:4, 2:4] = True
    assert np.array_equal(lesion_regions(mask).regions["lesion"], disc(48, 48, 20))


@pytest.mark.parametrize("mask", [np.zeros((SIDE, SIDE), bool), np.ones((SIDE, SIDE), bool), disc(5, 5, 1)])
def test_an_implausible_lesion_is_missing_and_said_so(mask):
    found = lesion_regions(mask)
    assert not found.regions
    assert "No lesion" in found.warnings[0]


def test_zones_are_thirds_of_their_own_lung_and_add_up_to_it():
    right = box(10, 12, 40, 72)
    left = box(56, 30, 86, 90)
    regions = lung_regions(right, left).regions
    for side, lung, top in (("right", right, 12), ("left", left, 30)):
        zones = [regions[f"{side}_{level}_zone"] for level in ("upper", "mid", "lower")]
        assert np.array_equal(np.logical_or.reduce(zones), lung)
        assert sum(zone.sum() for zone in zones) == lung.sum()
        assert [np.nonzero(zone)[0].min() for zone in zones] == [top, top + 20, top + 40]


def test_the_right_lung_is_on_the_left_of_the_image_and_the_mediastinum_between():
    regions = lung_regions(RIGHT, LEFT).regions
    assert set(regions) == {region.name for region in get_domain("radiology").regions}
    assert np.nonzero(regions["right_lung"])[1].mean() < np.nonzero(regions["left_lung"])[1].mean()
    assert np.array_equal(regions["mediastinum"], box(40, 12, 56, 72))


def test_swapped_lungs_are_refused():
    found = lung_regions(LEFT, RIGHT)
    assert not found.regions
    assert "wrong sides" in found.warnings[0]


def test_a_lung_that_was_not_found_takes_its_regions_and_the_mediastinum_with_it():
    found = lung_regions(RIGHT, np.zeros_like(LEFT))
    assert set(found.regions) == {"right_lung", "right_upper_zone", "right_mid_zone", "right_lower_zone"}
    assert "left lung" in found.warnings[0]


def test_regions_of_other_structures_are_refused():
    with pytest.raises(InputError, match="heart"):
        regions_of({"heart": RIGHT})


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_masks_lie_on_the_image_s_own_grid(model_root, domain):
    segmenter = Segmenter.load(model_root / domain / "segmenter")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
    found = segmenter.segment(image)
    assert isinstance(found, Anatomy)
    assert all(mask.shape == (60, 100) and mask.dtype == bool and mask.any() for mask in found.regions.values())
    assert set(found.regions) <= {region.name for region in get_domain(domain).regions}
    assert found.regions or found.warnings
    assert set(segmenter.masks(image)) == set(found.regions)


def painter(segmenter: Segmenter, brightness_of: dict[int, float]):
    """A network that reads the class off the brightness: what it was shown decides where the masks lie."""

    class Painted(torch.nn.Module):
        config = segmenter.model.config

        def forward(self, pixel_values):
            grey = pixel_values.mean(dim=1, keepdim=True)
            levels = torch.tensor([brightness_of[k] for k in sorted(brightness_of)]).view(1, -1, 1, 1)
            return type("Out", (), {"logits": -100 * (grey - levels).abs()})

    return Painted()


def test_masks_of_a_wide_picture_are_where_its_lungs_are(model_root):
    segmenter = Segmenter.load(model_root / "radiology" / "segmenter")
    black, right, left = ((value / 255 - 0.5) / 0.25 for value in (0, 128, 255))
    segmenter.model = painter(segmenter, {0: black, 1: right, 2: left})
    picture = np.zeros((200, 1000, 3), np.uint8)
    picture[40:160, 100:400], picture[40:160, 600:900] = 128, 255
    masks = segmenter.masks(Image.fromarray(picture))
    rows, columns = np.nonzero(masks["right_lung"])
    # 64 px stand for 1000 px across and 200 px down; half of such a step either way is rounding.
    assert abs(columns.min() - 100) < 16
    assert abs(columns.max() - 400) < 16
    assert abs(rows.min() - 40) < 6
    assert masks["mediastinum"][100, 500]


def test_the_largest_images_are_segmented_on_a_smaller_grid(model_root):
    segmenter = Segmenter.load(model_root / "dermatology" / "segmenter")
    image = Image.new("RGB", (3000, 40), (90, 90, 90))
    assert all(mask.shape == (40, 3000) for mask in segmenter.masks(image).values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": ["background", "lesion", "hair"]}, "does not fit its network"),
        ({"classes": ["lesion", "background"]}, "reads"),
        ({"size_px": 0}, "size_px"),
        ({"std": [0.1, 0.0, 0.1]}, "std"),
    ],
)
def test_a_damaged_card_is_an_error_with_its_name(model_root, tmp_path, change, message):
    folder = shutil.copytree(model_root / "dermatology" / "segmenter", tmp_path / "segmenter")
    card = json.loads((folder / "classes.json").read_text())
    (folder / "classes.json").write_text(json.dumps(card | change))
    with pytest.raises(ModelError, match=message) as caught:
        Segmenter.load(folder)
    assert "classes.json" in str(caught.value)


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(ModelError, match="missing"):
        Segmenter.load(tmp_path / "nothing")
