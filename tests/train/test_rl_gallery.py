"""The pictures that the likeness reward tells real images from: drawn by the policy, a few anew each epoch."""

import itertools
import json

import numpy as np
import pytest
import torch

from medviz.errors import InputError
from medviz.rewards.composite import composite
from medviz.rewards.likeness import Likeness
from tests import tiny
from tests.train.test_rl_learner import DOMAIN, SMALL, brightness, copied, onlooker
from tests.train.test_rl_trainer import recipe_file, write_images
from train import checkpoint
from train.config import read_recipe
from train.datasets.split import Split, open_split
from train.rl.learner import RlLearner
from train.rl.recipe import RlConfig
from train.rl.scoring import Scorer
from train.rl.trainer import HALVES, main, open_real

CAPTIONS = tuple(DOMAIN.validation_prompts()[:5])
LIKENESS = {
    "reward_function": "likeness",
    "likeness_images": 8,
    "likeness_captions": len(CAPTIONS),
    "likeness_redrawn": 2,
}


@pytest.fixture(scope="module")
def base():
    return tiny.make_pipeline("dermatology")


def learner(base, **options):
    likeness = Likeness(
        lambda images: images.mean(dim=(2, 3)), torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    )
    scorer = Scorer(composite({"likeness": 1.0}), likeness=likeness)
    config = RlConfig(**{**vars(SMALL), **LIKENESS, "objective": "forward", "timesteps_per_image": 1, **options})
    return RlLearner(config, copied(base), DOMAIN, scorer, onlooker, gallery=CAPTIONS)


def test_all_are_drawn_at_first_then_a_few_in_turn(base):
    gallery = learner(base).gallery
    seen = []
    for epoch in range(4):
        gallery.redraw(epoch)
        seen.append(gallery.likeness.drawn)
    assert seen[0].shape == (5, 3)
    changed = [(a != b).any(dim=1).nonzero().flatten().tolist() for a, b in itertools.pairwise(seen)]
    assert changed == [[2, 3], [0, 4], [1, 2]]


def test_the_policy_draws_them_and_not_the_baseline(base):
    made = learner(base, learning_rate=2e-2)
    made.update(0)
    trained, before = learner(base), made.gallery.likeness.drawn
    trained.gallery.redraw(0)
    assert torch.equal(trained.gallery.likeness.drawn, before)  # nothing had been learnt when they were drawn
    made.gallery.redraw(1)
    trained.gallery.redraw(1)
    assert not torch.equal(trained.gallery.likeness.drawn[2:4], made.gallery.likeness.drawn[2:4])


def test_resumed_and_uninterrupted_runs_agree_to_the_last_bit(base, tmp_path):
    options = {"steps": 3, "evaluate_every": 3, "learning_rate": 1e-2}
    whole = learner(base, **options)
    figures = [whole.update(step) for step in range(3)]
    first = learner(base, **options)
    first.update(0)
    first.update(1)
    checkpoint.save(tmp_path, 2, first.state())
    second = learner(base, **options)
    second.load_state(checkpoint.load(tmp_path)[1])
    assert second.update(2) == figures[2]
    assert torch.equal(second.gallery.likeness.drawn, whole.gallery.likeness.drawn)
    ours, theirs = second.state()["policy"], whole.state()["policy"]
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_run_without_it_keeps_no_gallery(base):
    scorer = Scorer(composite({"likeness": 1.0}))
    scorer.composite.functions = {"likeness": brightness}
    made = RlLearner(RlConfig(**{**vars(SMALL), **LIKENESS}), copied(base), DOMAIN, scorer, onlooker)
    assert made.gallery is None
    assert made.state()["gallery"] == {}


def test_the_stage_tells_pictures_from_the_reward_s_half(model_root, tmp_path, monkeypatch):
    write_images(tmp_path / "images", 32)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    options = {**LIKENESS, "likeness_captions": 4}
    options |= {"reward_function": "composite", "reward_weights": {"attribute": 1.0, "likeness": 0.5}}
    # an architecture whose random weights still tell images apart, which the tiny reward's do not
    options["reward"] = str(tiny.make_classifier_folder(tmp_path / "reward", "dermatology", "judge", seed=9))
    path = recipe_file(tmp_path, model_root / "dermatology", anchor_weight=0.0, **options)
    main([path])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["reward_failures"] == 0
    assert metrics["unet_forwards"]["likeness"] == 4 * 2 * 2  # four captions, two steps, with and without the prompt
    read = []
    monkeypatch.setattr(
        Split, "image", lambda self, i, size_px: read.append(i) or np.full((size_px, size_px, 3), i, np.uint8)
    )
    real = open_real(read_recipe(path, RlConfig), "reward")
    halves = open_split("dermatology", "train").halves
    assert (len(real.features), len(read), len(real.captions)) == (8, 8, 4)
    assert all(halves[i] == HALVES["reward"] for i in read)
    monkeypatch.undo()
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    with pytest.raises(InputError, match="the reward's half of dermatology has"):
        open_real(read_recipe(path, RlConfig, ["--likeness-images", "40"]), "reward")


def test_likeness_without_images_is_refused(base):
    with pytest.raises(InputError, match="likeness_images is 0"):
        learner(base, likeness_images=0)
