"""Grounding figures against cases worked out by hand."""

import math

import numpy as np
import pytest
import torch

from medviz.errors import InputError
from medviz.grounding import metrics

HEAT = np.array([[1.0, 0.6, 0.0], [0.2, 0.2, 0.0]])
REGION = np.array([[True, True, False], [False, False, False]])
NOWHERE, EVERYWHERE = np.zeros((2, 3), dtype=bool), np.ones((2, 3), dtype=bool)
FIGURES = [
    metrics.cnr,
    metrics.abs_cnr,
    metrics.mass_in_region,
    metrics.iou,
    metrics.miou,
    metrics.pointing_game,
    metrics.pixel_auroc,
]


def test_cnr_is_contrast_over_both_variances() -> None:
    # inside: mean 0.8, variance 0.04; outside: mean 0.1, variance 0.01
    assert metrics.cnr(HEAT, REGION) == pytest.approx(0.7 / math.sqrt(0.05))


def test_cnr_keeps_its_sign() -> None:
    assert metrics.cnr(HEAT, ~REGION) == pytest.approx(-0.7 / math.sqrt(0.05))
    assert metrics.abs_cnr(HEAT, ~REGION) == pytest.approx(0.7 / math.sqrt(0.05))


def test_cnr_does_not_depend_on_the_maps_scale() -> None:
    assert metrics.cnr(7 * HEAT + 3, REGION) == pytest.approx(metrics.cnr(HEAT, REGION))


def test_cnr_of_maps_without_noise() -> None:
    assert metrics.cnr(np.full((2, 3), 0.1), REGION) == 0.0
    assert metrics.cnr(REGION.astype(float), REGION) == math.inf
    assert metrics.cnr(REGION.astype(float), ~REGION) == -math.inf


def test_mass_is_the_share_inside() -> None:
    assert metrics.mass_in_region(HEAT, REGION) == pytest.approx(1.6 / 2.0)
    assert metrics.mass_in_region(np.ones((2, 3)), REGION) == pytest.approx(2 / 6)
    assert math.isnan(metrics.mass_in_region(np.zeros((2, 3)), REGION))
    with pytest.raises(InputError, match="negative"):
        metrics.mass_in_region(HEAT - 1, REGION)


def test_iou_counts_pixels_above_the_threshold() -> None:
    assert metrics.iou(HEAT, REGION, 0.5) == 1.0
    assert metrics.iou(HEAT, REGION, 0.1) == pytest.approx(2 / 4)
    assert metrics.iou(HEAT, REGION, 0.6) == pytest.approx(1 / 2)  # strictly above
    assert metrics.iou(HEAT, ~REGION, 0.5) == 0.0


def test_miou_averages_five_thresholds() -> None:
    # at 0.1 the two cells of 0.2 are hot as well; from 0.2 on only the region is
    assert metrics.miou(HEAT, REGION) == pytest.approx((0.5 + 4 * 1.0) / 5)


def test_thresholds_need_a_map_between_zero_and_one() -> None:
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        metrics.iou(2 * HEAT, REGION)


def test_pointing_game_asks_for_the_hottest_pixel() -> None:
    assert metrics.pointing_game(HEAT, REGION) == 1.0
    assert metrics.pointing_game(HEAT, ~REGION) == 0.0
    assert metrics.pointing_game(np.ones((2, 3)), REGION) == pytest.approx(2 / 6)


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    assert metrics.pixel_auroc(HEAT, REGION) == 1.0
    assert metrics.pixel_auroc(np.ones((2, 3)), REGION) == 0.5
    # 0.2 inside against {0, 0.2, 0.4} outside: one win, one tie, one loss; 0.3 inside: two wins, one loss
    heat = np.array([[0.2, 0.3, 0.0, 0.2, 0.4]])
    region = np.array([[1, 1, 0, 0, 0]])
    assert metrics.pixel_auroc(heat, region) == pytest.approx((1.5 + 2) / 6)


@pytest.mark.parametrize("figure", FIGURES)
def test_without_a_region_there_is_no_figure(figure) -> None:
    assert math.isnan(figure(HEAT, NOWHERE))


@pytest.mark.parametrize("figure", [metrics.cnr, metrics.abs_cnr, metrics.pixel_auroc])
def test_without_an_outside_there_is_no_contrast(figure) -> None:
    assert math.isnan(figure(HEAT, EVERYWHERE))


@pytest.mark.parametrize("figure", FIGURES)
def test_bad_input_is_refused(figure) -> None:
    with pytest.raises(InputError, match=r"\(2, 3\) and \(3, 2\)"):
        figure(HEAT, REGION.T)
    with pytest.raises(InputError, match="finite"):
        figure(np.where(REGION, np.nan, HEAT), REGION)
    with pytest.raises(InputError, match="boolean"):
        figure(HEAT, HEAT)


@pytest.mark.parametrize("figure", FIGURES)
def test_tensors_and_masks_of_integers_are_understood(figure) -> None:
    assert figure(torch.tensor(HEAT), torch.tensor(REGION).long()) == pytest.approx(figure(HEAT, REGION))
