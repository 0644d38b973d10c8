"""Real images against the policy's own, and an adapter that training goes on from."""

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
from train.assemble import weaken
from train.rl.learner import RlLearner
from train.rl.recipe import RlConfig
from train.rl.safeguards import Anchor
from train.rl.scoring import Scorer

GAME = replace(
    SMALL, objective="forward", steps=3, evaluate_every=99, learning_rate=1e-2, self_play_images=4, micro_batch=4
)


@pytest.fixture(scope="module")
def base():
    return tiny.make_pipeline("dermatology")


def nothing(drawn):
    return 0.0 * drawn.images.mean(dim=(1, 2, 3))


REWARD = Scorer(Composite({"nothing": nothing}, {"nothing": 1.0}))


def caption(index: int, rng: random.Random) -> str:
    return f"a dermoscopic image with {('melanoma', 'hair', 'ruler')[index % 3]}"


def learner(base, real: torch.Tensor, config: RlConfig) -> RlLearner:
    pipeline = copied(base)
    schedule = DDPMScheduler.from_config(pipeline.scheduler.config)
    anchor = Anchor(real, caption, lambda captions: torch.empty(0), schedule)
    return RlLearner(config, pipeline, DOMAIN, REWARD, onlooker, anchor)


def latents(base, count: int, mean: float) -> torch.Tensor:
    unet = base.unet.config
    shape = (1, count, unet.in_channels, unet.sample_size, unet.sample_size)
    return mean + 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_what_is_drawn_moves_to_what_was_photographed_and_rewards_have_no_say(base):
    """Toward either of two sets of photographs that differ in nothing but their colour."""
    found = {}
    for mean in (1.0, -1.0):
        made = learner(base, latents(base, 12, mean), replace(GAME, lora_convolutions=True))
        before = made.games["self play"].game(50).rollout.latents[4:]
        for step in range(6):
            made.update(step)
        found[mean] = (made.games["self play"].game(50).rollout.latents[4:] - before).mean(dim=(1, 2, 3))
    assert (found[1.0] > 0.01).all()
    assert (found[-1.0] < -0.01).all()


def test_rivals_have_one_noise_and_equal_ones_leave_no_gradient(base):
    made = learner(base, latents(base, 12, 0.0), GAME)
    game = made.games["self play"].game(0)
    assert game.rows(1, 2).tolist() == [2, 3, 6, 7]
    options = {"replayer": game.replayer}
    made.accumulate(0, game.rollout, game.advantages, game.rows(0, 2), **options)
    told_apart = [weight.grad.clone() for weight in made.policy.parameters()]
    assert max(gradient.abs().max() for gradient in told_apart) > 1e-4
    made.optimizer.zero_grad()
    same = replace(game.rollout, latents=game.rollout.latents[4:].repeat(2, 1, 1, 1))
    made.accumulate(0, same, game.advantages, game.rows(0, 2), **options)
    scale = max(gradient.abs().max() for gradient in told_apart)
    assert max(weight.grad.abs().max() for weight in made.policy.parameters()) < 1e-4 * scale


def test_the_gradient_is_as_long_as_its_weight_and_blind_to_micro_batches(base):
    made = learner(base, latents(base, 12, 0.5), GAME)
    game, rows, gradients = made.games["self play"].game(0), np.arange(8), []
    for weight, micro_batch in ((1.0, 4), (2.0, 3)):
        made.config = replace(made.config, micro_batch=micro_batch)
        made.optimizer.zero_grad()
        made.accumulate(0, game.rollout, game.advantages, rows, replayer=game.replayer, weight=weight)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in made.policy.parameters()]))
    torch.testing.assert_close(2 * gradients[0], gradients[1], rtol=1e-3, atol=1e-6)


def test_each_epoch_has_other_images_drawn_by_the_policy_of_their_captions(base):
    made = learner(base, latents(base, 12, 0.5), GAME)
    first, second = made.games["self play"].game(0), made.games["self play"].game(1)
    assert not torch.equal(first.rollout.latents[:4], second.rollout.latents[:4])
    assert torch.equal(first.rollout.latents, made.games["self play"].game(0).rollout.latents)
    made.update(0)
    again = made.games["self play"].game(0).rollout.latents
    assert torch.equal(again[:4], first.rollout.latents[:4])
    assert not torch.equal(again[4:], first.rollout.latents[4:])
    assert made.forwards["self play"] == 4 * GAME.rollout_steps * 2  # both halves of guidance


def test_resumed_and_uninterrupted_runs_agree_to_the_last_bit(base, tmp_path):
    real = latents(base, 12, 0.5)
    whole, first = learner(base, real, GAME), learner(base, real, GAME)
    figures = [whole.update(step) for step in range(3)]
    for step in range(2):
        first.update(step)
    checkpoint.save(tmp_path, 2, first.state())
    torch.manual_seed(1234)
    second = learner(base, real, GAME)
    second.load_state(checkpoint.load(tmp_path)[1])
    assert second.update(2) == figures[2]
    ours, theirs = second.state()["policy"], whole.state()["policy"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("alpha", [2.0, 4.0])
def test_training_goes_on_from_a_share_of_an_adapter(base, tmp_path, alpha):
    real = latents(base, 12, 1.0)
    made = learner(base, real, GAME)
    made.update(0)
    made.policy.save(tmp_path / "first", {"title": "first"})
    on = learner(base, real, replace(GAME, start=str(tmp_path / "first"), start_strength=0.5, lora_alpha=alpha))
    on.policy.save(tmp_path / "half", {"title": "half"})
    weaken(tmp_path / "first", 0.5)
    shares = [learner(base, real, replace(GAME, start=str(tmp_path / name))) for name in ("first", "half")]
    weights = [share.policy.weights(share.policy.behaviour) for share in shares]
    assert all(torch.allclose(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(weight.abs().max() > 0 for name, weight in weights[0].items() if "lora_B" in name)
    before = shares[0].policy.weights("bright")
    shares[0].update(1)
    after = shares[0].policy.weights("bright")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_of_another_shape_or_none_is_no_start(base, tmp_path):
    real = latents(base, 12, 1.0)
    learner(base, real, GAME).policy.save(tmp_path / "narrow", {"title": "narrow"})
    with pytest.raises(InputError, match="another rank"):
        learner(base, real, replace(GAME, rank=4, start=str(tmp_path / "narrow")))
    with pytest.raises(ModelError, match=r"absent"):
        learner(base, real, replace(GAME, start=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"objective": "ddpo"}, "goes with the forward objective"),
        ({"self_play_images": 1}, "each of 2 updates needs one"),
        ({"self_play_images": -1}, "allowed are 0 and more"),
        ({"start_strength": 0.0}, "0 < strength"),
        ({"start": "somewhere", "train_what": "full"}, "goes with train_what lora"),
    ],
)
def test_what_cannot_be_is_refused(base, options, complaint):
    with pytest.raises(InputError, match=complaint):
        learner(base, latents(base, 12, 0.0), replace(GAME, **options))


def test_without_real_images_there_is_no_game(base):
    with pytest.raises(InputError, match="no anchor"):
        RlLearner(GAME, copied(base), DOMAIN, REWARD, onlooker)
