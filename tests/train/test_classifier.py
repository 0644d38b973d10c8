import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medviz.errors import InputError
from medviz.rewards.classifier import AttributeClassifier
from train import augment
from train.architectures import ARCHITECTURES
from train.averaged import renormalise
from train.classifier import ClassifierConfig, ClassifierLearner, Examples, rarity, read_examples
from train.config import read_recipe
from train.loop import fit

HEADS = ("melanoma", "hair", "ink")
SIDE = 32
RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


def examples(count: int, seed: int) -> Examples:
    """Pictures in which melanoma is red, hair is a bright line across, and ink is noise."""
    rng = np.random.default_rng(seed)
    targets = (rng.random((count, 3)) < 0.5).astype(np.float32)
    images = rng.normal(110, 12, (count, SIDE, SIDE, 3))
    images[..., 0] += 70 * targets[:, 0, None, None]
    for image, hair in zip(images, targets[:, 1], strict=True):
        if hair:
            image[SIDE // 2 - 2 : SIDE // 2 + 2] += 90
    images = images.clip(0, 255).astype(np.uint8)
    weights = np.ones_like(targets)
    weights[::7, 1] = 0.0
    targets[::7, 1] = 0.0
    names = [f"lesion-{seed}-{i // 2}" for i in range(count)]
    return Examples(images, targets, weights, np.ones(count), names, ["ISIC", "HAM"] * (count // 2))


def config(out: Path, **options) -> ClassifierConfig:
    small = ClassifierConfig(
        out=str(out), architecture="resnet", width=0.125, depth=0.5, size_px=SIDE, batch=16, steps=40, warmup=4,
        learning_rate=5e-3, ema_decay=0.8, checkpoint_every_s=1e9,
    )  # fmt: skip
    return replace(small, **options)


def learner(out: Path, **options) -> ClassifierLearner:
    return ClassifierLearner(config(out, **options), HEADS, examples(120, 1), examples(160, 2))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("reward")
    return out, fit(learner(out), config(out))


def test_it_learns_what_the_pictures_show_and_drops_what_they_do_not(trained):
    out, metrics = trained
    card = json.loads((out / "model" / "heads.json").read_text())
    assert card["heads"] == ["melanoma", "hair"]
    assert metrics["heads"]["melanoma"]["auroc"] > 0.95
    assert metrics["dropped"]["ink"]["reason"].startswith("AUROC below")
    assert metrics["dropped"]["ink"]["auroc"] < 0.7
    assert card["trained_on"] == "half A of train by lesion"
    for head, figures in card["metrics"].items():
        low, high = figures["ci"]
        assert low <= figures["auroc"] <= high
        assert figures["n"] == (160 if head == "melanoma" else 160 - len(range(0, 160, 7)))


def test_what_was_written_gives_the_figures_that_were_measured(trained):
    out, metrics = trained
    classifier = AttributeClassifier.load(out / "model")
    validation = examples(160, 2)
    pixels = torch.from_numpy(validation.images.transpose(0, 3, 1, 2)).float() / 127.5 - 1
    probabilities = classifier.probabilities(pixels).numpy()
    column = classifier.heads.index("melanoma")
    said = probabilities[:, column] >= classifier.thresholds["melanoma"]
    # The reported accuracy is cross-fitted, so it may be a little lower than that of the final threshold.
    assert abs((said == (validation.targets[:, 0] >= 0.5)).mean() - metrics["heads"]["melanoma"]["accuracy"]) < 0.05
    assert abs(probabilities[:, column].mean() - validation.targets[:, 0].mean()) < 0.1
    weights = load_file(out / "model" / "model.safetensors")
    assert {t.dtype for t in weights.values() if t.is_floating_point()} == {torch.bfloat16}


def test_a_resumed_run_ends_with_the_same_weights_bit_for_bit(trained, tmp_path):
    short = config(tmp_path, max_minutes=1e-9)
    assert fit(learner(tmp_path), short) is None
    for _ in range(3):
        fit(learner(tmp_path), replace(short, resume=True))
    fit(learner(tmp_path), config(tmp_path, resume=True))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (trained[0], tmp_path))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert (trained[0] / "model" / "heads.json").read_text() == (tmp_path / "model" / "heads.json").read_text()


def test_a_batch_depends_on_its_step_alone(tmp_path):
    made = learner(tmp_path)
    pixels, rows = made.batch(3)
    made.update(0)
    again, rows_again = made.batch(3)
    assert torch.equal(pixels, again)
    assert np.array_equal(rows, rows_again)
    assert not torch.equal(pixels, made.batch(4)[0])


def test_unknown_labels_do_not_move_the_weights(tmp_path):
    changed = examples(120, 1)
    changed.targets[changed.weights == 0] = 1.0
    one = learner(tmp_path)
    other = ClassifierLearner(config(tmp_path), HEADS, changed, examples(160, 2))
    assert one.update(0) == other.update(0)


def test_no_head_worth_keeping_is_an_error(tmp_path):
    made = learner(tmp_path, min_auroc=1.1)
    with pytest.raises(InputError, match="no head"):
        made.export(tmp_path / "model")


@pytest.mark.parametrize("options", [{"role": "critic"}, {"architecture": "vgg"}])
def test_unknown_roles_and_architectures_are_refused(tmp_path, options):
    with pytest.raises(InputError, match=next(iter(options.values()))):
        learner(tmp_path, **options)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_starts_with_signals_that_neither_die_nor_explode(name):
    torch.manual_seed(0)
    model = ARCHITECTURES[name](3, 0.25, 0.25, 0.0, 64).train()
    images = torch.randn(8, 3, 64, 64)
    logits = model(pixel_values=images).logits
    logits.square().sum().backward()
    assert 1e-4 < logits.std().item() < 1e2
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    first = next(p for p in model.parameters() if p.ndim == 4)
    assert first.grad.abs().max() > 1e-8


def test_statistics_are_measured_anew_for_averaged_weights():
    layer = torch.nn.BatchNorm2d(1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, pixel_values):
            return self.layer(pixel_values)

    layer.running_mean.fill_(50.0)
    batches = [torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(i)) + 3 for i in range(4)]
    renormalise(Net(), batches)
    assert layer.running_mean.item() == pytest.approx(torch.stack(batches).mean().item(), abs=1e-5)
    assert layer.momentum == 0.1
    assert not layer.training


def test_rare_heads_are_drawn_more_often_up_to_the_bound():
    targets = np.zeros((100, 2), np.float32)
    targets[:50, 0], targets[0, 1] = 1.0, 1.0
    factors = rarity(targets, np.ones_like(targets), 0.5, 6.0)
    assert factors[0] == 6.0
    assert factors[1] == pytest.approx(2**0.5)
    assert factors[99] == 1.0
    assert rarity(targets, np.zeros_like(targets), 0.5, 6.0).max() == 1.0


class FakeSplit:
    """Records of the real columns; the pictures tell which record they are of."""

    def __init__(self, records):
        self.records, self.domain = records, "dermatology"
        self.groups = [record["lesion_id"] for record in records]
        self.halves = np.array([0, 1, 0, 0])

    def __len__(self):
        return len(self.records)

    def images(self, size_px, indices):
        return np.stack([np.full((size_px, size_px, 3), i, np.uint8) for i in indices])


def test_examples_come_from_one_half_with_weights_by_where_labels_come_from(tmp_path):
    empty = {f"artefact_{name}": None for name in ("hair", "ink")}
    records = [
        {"lesion_id": "a", "source": "ISIC", "diagnosis": "mel", "artefact_source": "manual", "artefact_hair": 1.0},
        {"lesion_id": "b", "source": "ISIC", "diagnosis": "mel", "artefact_source": "manual", "artefact_hair": 1.0},
        {"lesion_id": "c", "source": "HAM", "diagnosis": "nv", "artefact_source": "rl4med", "artefact_hair": 0.0},
        {"lesion_id": "d", "source": "HAM", "diagnosis": None, "artefact_source": "inferred_probability"},
    ]
    split = FakeSplit([empty | record for record in records])
    found = read_examples(split, config(tmp_path), HEADS, half=0)
    assert found.groups == ["a", "c"]
    assert found.images[:, 0, 0, 0].tolist() == [0, 2]
    assert found.targets.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    assert found.weights.tolist() == [[1.0, 1.0, 0.0], [1.0, pytest.approx(0.6), 0.0]]


def test_a_chest_is_never_mirrored_for_a_classifier():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[10:50, 4:24] = 255
    rng = np.random.default_rng(0)
    for _ in range(50):
        changed = augment.draw(augment.CLASSIFIER["radiology"], 64, rng).image(picture)
        assert changed[:, :32].mean() > changed[:, 32:].mean()
        assert changed.shape == picture.shape


def test_an_augmentation_leaves_the_original_alone_and_none_changes_nothing():
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    before = picture.copy()
    rng = np.random.default_rng(0)
    assert np.array_equal(augment.draw(augment.Augmentation(), 64, rng).image(picture), picture)
    augment.draw(augment.CLASSIFIER["dermatology"], 64, rng).image(picture)
    assert np.array_equal(picture, before)


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_recipes_give_reward_and_judge_different_networks(domain):
    reward, judge = (
        read_recipe(RECIPES / f"{role}.yaml", ClassifierConfig, ["--domain", domain]) for role in ("reward", "judge")
    )
    assert (reward.role, judge.role) == ("reward", "judge")
    assert reward.domain == judge.domain == domain
    assert reward.architecture != judge.architecture
    assert reward.out != judge.out
    for recipe in (reward, judge):
        network = ARCHITECTURES[recipe.architecture](18, recipe.width, recipe.depth, recipe.dropout, recipe.size_px)
        assert sum(p.numel() for p in network.parameters()) <= 8e6
