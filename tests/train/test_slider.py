"""The slider stage: what a caption names is drawn more, and all else as before."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.models.adapters import loaded_adapters
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train import checkpoint, slider
from train.assemble import read_parts
from train.config import read_recipe
from train.datasets.split import open_split
from train.loop import fit
from train.real_latents import RealLatents
from train.rl.policy import LoraPolicy
from train.rl.trainer import open_pipeline
from train.slider import HELD_OUT, SliderConfig, SliderLearner, finer, pair_of

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.make_pipeline("dermatology").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def started(base, tmp_path_factory) -> Path:
    """An adapter that changes what the generator draws."""
    policy = LoraPolicy(open_pipeline(str(base), "cpu").unet, "aligned", rank=4, alpha=4.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("aligned")
    policy.save(folder, {"title": "Aligned", "recipe": {"objective": "forward"}})
    return folder


@pytest.fixture
def split(tmp_path, monkeypatch):
    write_split(tmp_path / "images/dermatology", "train", 12, seed=4)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    opened = open_split("dermatology", "train")
    for number, record in enumerate(opened.records):  # noise has no hair that a line filter would see
        record["artefact_hair"] = float(number % 2)
    return opened


def learner(base: Path, out: Path, split, **options) -> SliderLearner:
    small = {"batch": 4, "rank": 4, "lora_alpha": 4.0, "measured": 6, "warmup": 1, "log_every": 1, "surroundings": 3}
    config = SliderConfig(out=str(out), base=str(base), **{**small, "steps": 4, **options})
    pipeline = open_pipeline(config.base, "cpu")
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    latents = torch.randn(2, len(split), channels, size, size, generator=torch.Generator().manual_seed(1)).half()
    return SliderLearner(config, pipeline, RealLatents(latents, np.ones(len(split)), split))


def test_a_pair_differs_in_the_attribute_alone() -> None:
    domain = get_domain("dermatology")
    pair = pair_of(domain, "a mole with hair and ink, on the back, 40 year old woman", "hair")
    assert pair is not None
    assert pair.caption.startswith("a mole")
    assert pair.present.replace("hair, ", "") == pair.absent
    assert domain.parse(pair.present).targets["hair"] == 1.0
    assert domain.parse(pair.absent).targets["hair"] == 0.0
    alone = pair_of(domain, "melanoma showing hair", "hair")
    assert alone is not None
    assert alone.absent == domain.build_prompt({"diagnosis": "melanoma"})
    assert pair_of(domain, "melanoma without hair", "hair") is None
    assert pair_of(domain, "melanoma", "hair") is None
    chest = get_domain("radiology")
    pair = pair_of(chest, "a frontal chest X-ray of a woman, cardiomegaly", "cardiomegaly")
    assert pair is not None
    assert "cardiomegaly" not in pair.absent


def test_what_is_as_broad_as_its_surroundings_is_left_out() -> None:
    line = torch.zeros(1, 1, 9, 9)
    line[..., 4] = 1
    assert finer(torch.full((1, 2, 9, 9), 0.7), 3).abs().max() < 1e-6
    torch.testing.assert_close(finer(line, 3)[0, 0, 4, 2:7], torch.tensor([0, -1 / 3, 2 / 3, -1 / 3, 0]))
    assert torch.equal(finer(line, 0), line)


def test_a_batch_names_the_attribute_in_its_first_samples_and_noises_as_the_schedule_does(base, tmp_path, split):
    made = learner(base, tmp_path / "run", split, named=0.5, interval=(100, 200), caption_dropout=1.0)
    batch = made.batch(3, 8)
    assert len(batch.pairs) == 4
    assert batch.captions[:4] == tuple(pair.caption for pair in batch.pairs)
    assert batch.captions[4:] == ("",) * 4
    assert ((batch.timesteps[:4] >= 100) & (batch.timesteps[:4] <= 200)).all()
    assert batch.timesteps[4:].max() > 700
    again, other, held_out = made.batch(3, 8), made.batch(4, 8), made.batch(HELD_OUT, 8)
    assert torch.equal(again.noisy, batch.noisy)
    assert again.captions == batch.captions
    assert not torch.equal(other.noisy, batch.noisy)
    assert not torch.equal(held_out.noisy, made.batch(0, 8).noisy)
    # variance of unit latents and unit noise is one at every timestep
    assert batch.noisy.var().item() == pytest.approx(1.0, abs=0.1)


def test_what_the_attribute_adds_is_its_difference_at_the_adapter_that_is_started_from(base, tmp_path, split, started):
    plain, more = (
        learner(base, tmp_path / str(weight), split, weight=weight, start=str(started), surroundings=0)
        for weight in (1.0, 3.0)
    )
    batch = plain.batch(0, 4)
    (before, once), (same, thrice) = plain.targets(batch), more.targets(batch)
    assert torch.equal(before, same)
    torch.testing.assert_close(3 * once, thrice)
    assert once.abs().max() > 0
    with torch.no_grad(), plain.policy.using(plain.policy.name):
        start = plain._predict(batch.noisy, batch.timesteps, batch.captions)
    torch.testing.assert_close(start, before)
    with torch.no_grad(), plain.policy.using(None):
        assert not torch.allclose(plain._predict(batch.noisy, batch.timesteps, batch.captions), before, atol=1e-3)
    # what is learnt leaves the target where it was
    plain.update(0)
    torch.testing.assert_close(plain.targets(batch)[0], before)


def test_the_adapter_learns_to_add_it(base, tmp_path, split, started) -> None:
    options = {"steps": 60, "batch": 4, "learning_rate": 1e-2, "average_decay": 0.9, "start": str(started)}
    made = learner(base, tmp_path / "run", split, weight=20.0, measured=32, caption_dropout=0.0, **options)
    before = made.measure()
    assert before["along"] == pytest.approx(0.0, abs=1e-3)
    assert before["others"] == pytest.approx(0.0, abs=1e-3)
    metrics = fit(made, made.config)
    assert metrics is not None
    assert metrics["along"] > 0.2
    assert metrics["others"] < 1.0
    described = json.loads((tmp_path / "run/model/adapter.json").read_text())
    assert described["objective"] == "forward, then concept slider (hair)"
    assert described["metrics"]["along"] == metrics["along"]
    other = open_pipeline(str(base), "cpu")
    slider.load_lora(other.unet, tmp_path / "run/model", "attribute")
    assert loaded_adapters(other.unet) == ("attribute",)


def test_a_resumed_run_is_the_uninterrupted_one(base, tmp_path, split) -> None:
    whole = learner(base, tmp_path / "whole", split)
    fit(whole, whole.config)
    half = learner(base, tmp_path / "stopped", split)
    for step in range(2):
        half.update(step)
    checkpoint.save(tmp_path / "stopped", 2, {**half.state(), "trained_s": 0.0})
    resumed = learner(base, tmp_path / "stopped", split, resume=True)
    fit(resumed, resumed.config)
    for which in (whole.policy.name, whole.policy.behaviour):
        mine, theirs = whole.policy.weights(which), resumed.policy.weights(which)
        assert all(torch.equal(weight, theirs[name]) for name, weight in mine.items())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"batch": 1}, "batch must be at least 2"),
        ({"named": 1.0}, "named must be between 0 and 1"),
        ({"interval": (900, 150)}, "interval must be two timesteps"),
        ({"surroundings": 4}, "surroundings must be 0 or an odd number"),
        ({"caption_dropout": 1.5}, "caption_dropout must be from 0 to 1"),
        ({"head": "beard"}, "beard"),
        ({"head": "ruler"}, "no image of the train split of dermatology has ruler"),
    ],
)
def test_what_cannot_be_learnt_is_refused(base, tmp_path, split, wrong, message) -> None:
    with pytest.raises(InputError, match=message):
        learner(base, tmp_path / "run", split, **wrong)


def test_the_recipe_goes_on_from_what_ships_without_it() -> None:
    config = read_recipe(RECIPES / "slider-dermatology-gpu.yaml", SliderConfig)
    parts = read_parts(str(RECIPES / "assemble-dermatology-gpu.yaml"))
    assert parts.adapters[parts.default_adapter] == f"{config.out}/model"
    assert config.base == parts.pipeline
    assert config.start == f"{parts.runs['settle']}/model"
    assert replace(config, out="x").domain == parts.domain
