"""The mean picture, held where the untrained model has it."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from medviz.errors import InputError, ModelError
from medviz.rewards.composite import Composite
from tests import tiny
from tests.train.test_rl_learner import DOMAIN, SMALL, copied, onlooker
from train import checkpoint
from train.rl.learner import RlLearner
from train.rl.mean_held import CELLS, coarse
from train.rl.recipe import RlConfig
from train.rl.safeguards import Anchor
from train.rl.scoring import Scorer

HELD = replace(
    SMALL, objective="forward", steps=3, evaluate_every=99, learning_rate=1e-2, micro_batch=4,
    mean_held=6, mean_redrawn=4,
)  # fmt: skip


def nothing(drawn):
    return 0.0 * drawn.images.mean(dim=(1, 2, 3))


REWARD = Scorer(Composite({"nothing": nothing}, {"nothing": 1.0}))


def caption(index: int, rng: random.Random) -> str:
    return f"a dermoscopic image with {('melanoma', 'hair', 'ruler')[index % 3]}"


def learner(base, config: RlConfig) -> RlLearner:
    pipeline = copied(base)
    unet = pipeline.unet.config
    real = torch.zeros(1, 12, unet.in_channels, unet.sample_size, unet.sample_size)
    anchor = Anchor(real, caption, lambda _: torch.empty(0), DDPMScheduler.from_config(pipeline.scheduler.config))
    return RlLearner(config, pipeline, DOMAIN, REWARD, onlooker, anchor)


@pytest.fixture(scope="module")
def base():
    return tiny.make_pipeline("dermatology")


@pytest.fixture(scope="module")
def moved(base, tmp_path_factory):
    """An adapter that moved the mean picture: every change of the cross-attention has one sign."""
    made, folder = learner(base, HELD), tmp_path_factory.mktemp("moved") / "adapter"
    weights = made.policy.weights("bright")
    made.policy.set_weights("bright", {n: w.abs() if "lora_A" in n else w + 1.0 for n, w in weights.items()})
    made.policy.save(folder, {"title": "moved"})
    return str(folder)


def held(base, **options):
    return learner(base, replace(HELD, **options))


def test_nothing_is_put_back_where_nothing_has_moved(base):
    pairs = held(base).mean_held.pairs(0)
    assert pairs.moved == 0.0
    assert torch.equal(pairs.rollout.latents[:4], pairs.rollout.latents[4:])


def test_rivals_differ_in_what_the_mean_has_moved_and_in_nothing_else(base, moved):
    made = held(base, start=moved, advantage_clip=3.0, beta=0.5).mean_held
    pairs = made.pairs(0)
    assert pairs.moved > 0.1
    apart = pairs.rollout.latents[:4] - pairs.rollout.latents[4:]
    assert torch.allclose(apart, apart[:1].expand_as(apart), atol=1e-6)
    shift = (made.state()["drawn"] - made.state()["untrained"]).mean(dim=0)
    torch.testing.assert_close(coarse(apart[:1])[0], -3.0 * shift, rtol=0.2, atol=0.2 * shift.abs().max().item())
    assert pairs.rollout.prompt_ids.tolist() == [0, 1, 2, 3] * 2
    assert pairs.rollout.indices == (0, 1, 2, 3) * 2


def test_what_had_moved_is_put_back_whatever_the_rewards_say(base, moved):
    made = held(base, start=moved)
    far = [made.update(step)["mean_moved"] for step in range(10)]
    assert min(far) < 0.75 * far[0]
    left_alone = held(base, start=moved, mean_weight=1e-9)
    assert [left_alone.update(step)["mean_moved"] for step in range(10)][-1] > 0.9 * far[0]


def test_each_epoch_draws_those_whose_turn_it_is_and_the_others_move_along(base, moved):
    made = held(base, start=moved)
    mean_held = made.mean_held
    assert mean_held.pairs(0).rollout.prompt_ids[:4].tolist() == [0, 1, 2, 3]
    before = mean_held.state()["drawn"].clone()
    made.update(0)
    pairs = mean_held.pairs(1)
    assert pairs.rollout.prompt_ids[:4].tolist() == [4, 5, 0, 1]
    after = mean_held.state()["drawn"]
    assert torch.equal(after[[4, 5, 0, 1]], coarse(pairs.rollout.latents[4:]))
    learnt = (after - before)[[4, 5, 0, 1]].mean(dim=0)
    assert learnt.abs().max() > 0.01
    torch.testing.assert_close(after[2:4] - before[2:4], learnt.expand(2, *learnt.shape), rtol=0, atol=1e-5)
    # At first all captions are drawn by both; then only those whose turn it is, by the policy. Guidance has two halves.
    assert made.forwards["mean held"] == 4 * HELD.rollout_steps * 2


def test_resumed_and_uninterrupted_runs_agree_to_the_last_bit(base, moved, tmp_path):
    whole, first, second = (held(base, start=moved) for _ in range(3))
    figures = [whole.update(step) for step in range(3)]
    for step in range(2):
        first.update(step)
    checkpoint.save(tmp_path, 2, first.state())
    torch.manual_seed(1234)
    second.load_state(checkpoint.load(tmp_path)[1])
    assert second.update(2) == figures[2]
    ours, theirs = second.state()["policy"], whole.state()["policy"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_mean_picture_has_at_most_so_many_parts():
    picture = torch.arange(2 * 32 * 16.0).reshape(1, 2, 32, 16)
    assert coarse(picture).shape == (1, 2, CELLS, CELLS)
    assert coarse(picture)[0, 1, 0, 0] == picture[0, 1, :4, :2].mean()
    assert torch.equal(coarse(picture[..., :4, :4]), picture[..., :4, :4])


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"objective": "awm", "kl_weight": 0.1, "updates": 1}, "mean_held goes with the forward objective"),
        ({"mean_held": 1}, "a mean two"),
        ({"mean_redrawn": 1}, "each of 2 updates"),
        ({"mean_held": -1}, "mean_held is -1"),
        ({"mean_weight": 0.0}, "allowed are those above 0"),
    ],
)
def test_what_cannot_be_is_refused(base, options, complaint):
    with pytest.raises(InputError, match=complaint):
        held(base, **options)


def test_rivals_have_one_noise_and_equal_ones_leave_no_gradient(base, moved):
    made = held(base, start=moved)
    pairs = made.mean_held.pairs(0)
    assert pairs.rows(1, 2).tolist() == [2, 3, 6, 7]
    sizes = []
    for latents in (pairs.rollout.latents, pairs.rollout.latents[4:].repeat(2, 1, 1, 1)):
        made.optimizer.zero_grad()
        rollout = replace(pairs.rollout, latents=latents)
        made.accumulate(0, rollout, pairs.advantages, np.arange(8), replayer=made.mean_held.replayer)
        sizes.append(max(weight.grad.abs().max() for weight in made.policy.parameters()))
    assert sizes[0] > 1e-4
    assert sizes[1] < 1e-4 * sizes[0]


def test_the_gradient_is_as_long_as_its_weight_and_blind_to_micro_batches(base, moved):
    made = held(base, start=moved)
    pairs, gradients = made.mean_held.pairs(0), []
    for weight, micro_batch in ((1.0, 4), (2.0, 3)):
        made.config = replace(made.config, micro_batch=micro_batch)
        made.optimizer.zero_grad()
        options = {"replayer": made.mean_held.replayer, "weight": weight}
        made.accumulate(0, pairs.rollout, pairs.advantages, np.arange(8), **options)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in made.policy.parameters()]))
    torch.testing.assert_close(2 * gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_training_goes_on_from_an_adapter(base, moved, alpha):
    made = held(base, start=moved, lora_alpha=alpha)
    scale = {"lora_A": 1.0, "lora_B": 2.0 / alpha}
    saved = learner(base, replace(HELD, start=moved)).policy.weights("bright")
    for which in ("bright", "bright-average"):
        for name, weight in made.policy.weights(which).items():
            torch.testing.assert_close(weight, saved[name] * scale["lora_A" if "lora_A" in name else "lora_B"])
    before = made.policy.weights("bright")
    made.update(0)
    assert any(not torch.equal(before[name], weight) for name, weight in made.policy.weights("bright").items())


def test_an_adapter_of_another_shape_or_none_is_no_start(base, moved, tmp_path):
    with pytest.raises(InputError, match="another rank"):
        held(base, rank=4, start=moved)
    with pytest.raises(ModelError, match=r"absent"):
        held(base, start=str(tmp_path / "absent"))


def test_without_real_images_no_mean_is_held(base):
    with pytest.raises(InputError, match="need an anchor with real images"):
        RlLearner(HELD, copied(base), DOMAIN, REWARD, onlooker)
