"""Pictures say what they should: heat where it is, contours on their masks, nothing covered, nothing invented."""

import numpy as np
import pytest
from PIL import Image

from medviz.errors import InputError
from medviz.rendering import (
    DIFFERENCE_FULL_SCALE,
    colour_map,
    difference,
    draw_box,
    enlarge,
    figure,
    mean_difference,
    outline_colours,
    outlines,
    overlay,
    resized_map,
    resized_mask,
    with_footer,
)


@pytest.fixture
def grey() -> Image.Image:
    return Image.new("RGB", (64, 64), (128, 128, 128))


def heat_at(row: int, column: int, shape: tuple[int, int] = (64, 64)) -> np.ndarray:
    heat = np.zeros(shape, np.float32)
    heat[row - 4 : row + 4, column - 4 : column + 4] = 1.0
    return heat


def test_an_overlay_changes_the_hot_place_and_leaves_the_cold_one(grey: Image.Image) -> None:
    shown = np.asarray(overlay(grey, heat_at(16, 48), side_px=256)).astype(int)
    changed = np.abs(shown - 128).sum(-1)
    assert changed[64, 192] > 100
    assert changed[192:, :128].max() == 0


def test_an_overlay_without_opacity_is_the_image(grey: Image.Image) -> None:
    assert overlay(grey, heat_at(16, 48), opacity=0.0, side_px=128).tobytes() == enlarge(grey, 128).tobytes()


def test_an_overlay_refuses_a_map_of_another_shape(grey: Image.Image) -> None:
    with pytest.raises(InputError, match="does not fit"):
        overlay(grey, np.zeros((64, 32), np.float32))


def test_width_and_height_are_not_swapped() -> None:
    wide = Image.new("RGB", (96, 48), (128, 128, 128))
    shown = np.asarray(overlay(wide, heat_at(10, 80, (48, 96)), side_px=192)).astype(int)
    assert shown.shape == (96, 192, 3)
    row, column = np.unravel_index(np.abs(shown - 128).sum(-1).argmax(), shown.shape[:2])
    assert (abs(row - 20) < 10, abs(column - 160) < 10) == (True, True)


def test_the_scale_is_fixed_so_that_equal_heat_has_equal_colour() -> None:
    assert (colour_map(np.full((2, 2), 0.5))[0, 0] == colour_map(np.array([[0.0, 0.5], [1.0, 0.2]]))[0, 1]).all()


def test_outlines_follow_the_mask_and_spare_its_inside(grey: Image.Image) -> None:
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:48] = True
    drawn = np.abs(np.asarray(outlines(enlarge(grey, 256), {"lesion": mask})).astype(int) - 128).sum(-1)
    assert drawn[128, 128] == 0
    assert drawn[5, 5] == 0
    assert drawn[128, 60:70].max() > 50


def test_outlines_have_the_colours_of_their_key(grey: Image.Image) -> None:
    mask = np.zeros((64, 64), bool)
    mask[8:56, 8:56] = True
    colour = outline_colours(["lung"])["lung"]
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    pixels = set(map(tuple, np.asarray(outlines(enlarge(grey, 128), {"lung": mask}, width_px=3)).reshape(-1, 3)))
    assert wanted in pixels


def test_a_footer_covers_nothing(grey: Image.Image) -> None:
    footed = with_footer(grey, "SYNTHETIC")
    assert footed.crop((0, 0, 64, 64)).tobytes() == grey.tobytes()
    assert footed.height > 64
    strip = np.asarray(with_footer(enlarge(grey, 448), "SYNTHETIC"))[448:]
    assert strip.max() > 200, "the letters are white on black"


def test_a_difference_is_black_where_images_agree_and_bright_where_not(grey: Image.Image) -> None:
    other = grey.copy()
    other.paste((128 + 127,) * 3, (0, 0, 32, 32))
    shown = np.asarray(difference(grey, other, side_px=64)).astype(int).sum(-1)
    assert shown[48, 48] < 20
    assert shown[10, 10] > 400
    assert mean_difference(grey, other) == pytest.approx(127 / 4)
    assert DIFFERENCE_FULL_SCALE <= 255


def test_a_difference_needs_images_of_one_size(grey: Image.Image) -> None:
    with pytest.raises(InputError, match="pixel by pixel"):
        difference(grey, grey.resize((32, 32)))


def test_a_box_is_drawn_where_it_lies(grey: Image.Image) -> None:
    drawn = np.abs(np.asarray(draw_box(enlarge(grey, 128), (16, 24, 32, 40), (64, 64))).astype(int) - 128).sum(-1)
    rows, columns = np.nonzero(drawn)
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (32, 48, 63, 79)


def test_maps_and_masks_keep_their_place_when_resized() -> None:
    heat = resized_map(heat_at(16, 48), (32, 32))
    assert heat.shape == (32, 32)
    assert np.unravel_index(heat.argmax(), heat.shape)[0] == pytest.approx(8, abs=3)
    mask = resized_mask(heat_at(16, 48) > 0.5, (128, 128))
    assert mask[32, 96]
    assert mask.sum() == pytest.approx(4 * 64, rel=0.1)


def test_a_figure_holds_every_column_and_needs_equal_ones(grey: Image.Image) -> None:
    drawn = figure([("baseline", [grey, grey]), ("aligned", [grey, grey])], "title " * 20, "Synthetic")
    assert drawn.width > 128
    assert drawn.height > 128
    with pytest.raises(InputError, match="columns of one"):
        figure([("baseline", [grey]), ("aligned", [grey, grey])], "", "")
