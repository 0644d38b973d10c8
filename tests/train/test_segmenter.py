import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from medviz.errors import InputError
from medviz.grounding.anatomy import Segmenter
from train import augment
from train.config import read_recipe
from train.loop import fit
from train.segmenter import (
    UNKNOWN,
    Masks,
    SegmenterConfig,
    SegmenterLearner,
    dice,
    dice_figure,
    lung_labels,
    segmentation_loss,
    split_lungs,
)

SIDE = 64
RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


def masks(count: int, seed: int) -> Masks:
    """Dark discs on bright skin."""
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    images, labels = [], []
    for _ in range(count):
        x, y, radius = *rng.uniform(20, 44, 2), rng.uniform(8, 18)
        label = ((columns - x) ** 2 + (rows - y) ** 2 <= radius**2).astype(np.uint8)
        image = 190 - 110 * label[..., None] + rng.normal(0, 10, (SIDE, SIDE, 3))
        images.append(image.clip(0, 255).astype(np.uint8))
        labels.append(label)
    return Masks(np.stack(images), np.stack(labels), ["HAM"] * count)


def config(out: Path, **options) -> SegmenterConfig:
    small = SegmenterConfig(
        out=str(out), size_px=SIDE, hidden_sizes=(16, 16, 16, 16), depths=(1, 1, 1, 1), decoder_size=16, batch=6,
        steps=40, warmup=4, learning_rate=8e-3, ema_decay=0.8, checkpoint_every_s=1e9,
    )  # fmt: skip
    return replace(small, **options)


def learner(out: Path, **options) -> SegmenterLearner:
    return SegmenterLearner(config(out, **options), masks(24, 1), masks(10, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("segmenter")
    return out, fit(learner(out), config(out))


def test_it_finds_the_lesion_and_says_how_well(trained):
    out, metrics = trained
    assert metrics["dice"]["lesion"]["value"] > 0.8
    assert metrics["dice"]["lesion"]["n"] == 10
    assert metrics["dice"]["lesion"]["low"] <= metrics["dice"]["lesion"]["value"] <= metrics["dice"]["lesion"]["high"]
    assert metrics["regions_found"]["HAM"] == {"value": 1.0, "n": 10}
    assert json.loads((out / "model" / "classes.json").read_text())["classes"] == ["background", "lesion"]


def test_what_was_written_marks_the_lesion_on_a_new_picture(trained):
    segmenter = Segmenter.load(trained[0] / "model")
    new = masks(1, 7)
    found = segmenter.masks(Image.fromarray(new.images[0]))
    assert dice(found["lesion"], new.labels[0] == 1) > 0.75
    assert found["skin"].any()
    weights = load_file(trained[0] / "model" / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.bfloat16}


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(trained, tmp_path):
    assert fit(learner(tmp_path), config(tmp_path, max_minutes=1e-9)) is None
    fit(learner(tmp_path), config(tmp_path, resume=True))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (trained[0], tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def two_lungs() -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[10:50, 6:26] = mask[10:50, 36:58] = True
    return mask


def test_the_lung_on_the_left_of_the_image_is_the_patient_s_right_one():
    labels = split_lungs(two_lungs())
    assert set(np.unique(labels[:, :26])) == {0, 1}
    assert set(np.unique(labels[:, 36:])) == {0, 2}
    assert np.array_equal(labels > 0, two_lungs())


def test_lungs_that_touch_are_parted_where_they_are_thinnest():
    mask = two_lungs()
    mask[20:23, 26:36] = True
    labels = split_lungs(mask)
    assert np.array_equal(labels > 0, mask)
    assert (labels[10:50, 6:26] == 1).all()
    assert (labels[10:50, 36:58] == 2).all()


def test_small_parts_go_with_their_side():
    mask = two_lungs()
    mask[54:57, 10:13] = True
    assert (split_lungs(mask)[54:57, 10:13] == 1).all()


def test_boxes_alone_tell_only_where_no_lung_is():
    boxes = [
        {"label": "right lung", "x": 0.1, "y": 0.1, "w": 0.3, "h": 0.6},
        {"label": "left lung", "x": 0.6, "y": 0.1, "w": 0.5, "h": 0.6},
        {"label": "lung opacity", "x": 0.0, "y": 0.0, "w": 1.0, "h": 1.0},
    ]
    labels = lung_labels(None, boxes, SIDE)
    assert set(np.unique(labels)) == {0, UNKNOWN}
    assert labels[20, 10] == labels[20, 63] == UNKNOWN
    assert labels[20, 32] == labels[60, 10] == 0
    assert lung_labels(None, boxes[:1], SIDE) is None
    assert lung_labels(two_lungs(), boxes, SIDE).max() == 2


def test_a_mirrored_chest_keeps_the_right_lung_on_the_left_of_the_image():
    labels = split_lungs(two_lungs())
    rng, seen = np.random.default_rng(0), set()
    for _ in range(40):
        change = augment.draw(augment.SEGMENTER["radiology"], SIDE, rng)
        changed = change.labels(labels, ((1, 2),))
        seen.add(change.mirrored)
        assert np.nonzero(changed == 1)[1].mean() < np.nonzero(changed == 2)[1].mean()
    assert seen == {True, False}


def test_image_and_labels_are_changed_alike():
    labels = split_lungs(two_lungs())
    image = np.repeat((labels * 100)[..., None], 3, axis=2)
    still = replace(augment.SEGMENTER["radiology"], brightness=0, contrast=0, blur_px=0, noise=0)
    rng = np.random.default_rng(3)
    for _ in range(10):
        change = augment.draw(still, SIDE, rng)
        one, other = change.image(image)[..., 0] > 50, change.labels(labels) > 0
        assert dice(one, other) > 0.95


def test_unknown_pixels_do_not_count_in_the_loss():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 3, (2, SIDE, SIDE), generator=generator).to(torch.uint8)
    labels[:, :20] = UNKNOWN
    loss = segmentation_loss(logits, labels, 1.0)
    moved = logits.clone()
    moved[:, :, :4] += 10 * torch.randn(2, 3, 4, 16, generator=generator)
    torch.testing.assert_close(segmentation_loss(moved, labels, 1.0), loss)
    everything_unknown = segmentation_loss(logits, torch.full_like(labels, UNKNOWN), 1.0)
    assert torch.isfinite(everything_unknown)


def test_the_loss_is_lowest_for_the_truth():
    labels = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    labels[:, :, 32:] = 1
    right = torch.zeros(1, 2, 16, 16)
    right[:, 1, :, 8:] = right[:, 0, :, :8] = 20.0
    assert segmentation_loss(right, labels, 1.0) < 0.1 < segmentation_loss(-right, labels, 1.0)


def test_dice_of_equal_disjoint_and_empty_masks():
    one = two_lungs()
    assert dice(one, one) == 1.0
    assert dice(one, ~one) == 0.0
    assert dice(~one & one, ~one & one) == 1.0
    assert dice_figure([], 0) == {"value": None, "low": None, "high": None, "n": 0}
    assert dice_figure([0.5, 0.5], 0)["low"] is None


def test_without_masks_there_is_nothing_to_learn(tmp_path):
    empty = Masks(np.zeros((0, SIDE, SIDE, 3), np.uint8), np.zeros((0, SIDE, SIDE), np.uint8), [])
    with pytest.raises(InputError, match="no masks"):
        SegmenterLearner(config(tmp_path), empty, empty)


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_recipes_are_read_and_their_networks_are_small(tmp_path, domain):
    recipe = read_recipe(RECIPES / "segmenter.yaml", SegmenterConfig, ["--domain", domain])
    assert recipe.domain == domain
    made = SegmenterLearner(replace(recipe, device="cpu"), masks(1, 0), masks(1, 0))
    assert len(made.classes) == (2 if domain == "dermatology" else 3)
    assert sum(p.numel() for p in made.model.parameters()) <= 5e6
