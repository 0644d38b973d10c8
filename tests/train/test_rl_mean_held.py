"""The mean picture, held where the untrained model has it."""

from dataclasses import replace

import pytest
import torch

from medviz.errors import InputError
from tests import tiny
from tests.train.test_rl_self_play import GAME, latents, learner
from train import checkpoint
from train.rl.mean_held import CELLS, coarse

HELD = replace(GAME, self_play_images=0, mean_held=6, mean_redrawn=4, lora_convolutions=True, anchor_weight=0.0)


@pytest.fixture(scope="module")
def base():
    return tiny.make_pipeline("dermatology")


@pytest.fixture(scope="module")
def moved(base, tmp_path_factory):
    """An adapter that moved the mean picture: it learnt to draw what is all of one colour."""
    made, folder = learner(base, latents(base, 12, 1.0), replace(GAME, lora_convolutions=True)), tmp_path_factory
    for step in range(12):
        made.update(step)
    made.policy.save(folder.mktemp("moved") / "adapter", {"title": "moved"})
    return str(folder.getbasetemp() / "moved0" / "adapter")


def held(base, **options):
    return learner(base, latents(base, 12, 0.0), replace(HELD, **options))


def test_nothing_is_put_back_where_nothing_has_moved(base):
    game = held(base).games["mean held"].game(0)
    assert game.figures == {"mean_moved": 0.0}
    assert torch.equal(game.rollout.latents[:4], game.rollout.latents[4:])


def test_rivals_differ_in_what_the_mean_has_moved_and_in_nothing_else(base, moved):
    made = held(base, start=moved, advantage_clip=3.0, beta=0.5).games["mean held"]
    game = made.game(0)
    assert game.figures["mean_moved"] > 0.1
    apart = game.rollout.latents[:4] - game.rollout.latents[4:]
    assert torch.allclose(apart, apart[:1].expand_as(apart), atol=1e-6)
    shift = (made.state()["drawn"] - made.state()["untrained"]).mean(dim=0)
    torch.testing.assert_close(coarse(apart[:1])[0], -3.0 * shift, rtol=0.2, atol=0.2 * shift.abs().max().item())
    assert game.rollout.prompt_ids.tolist() == [0, 1, 2, 3] * 2
    assert game.rollout.indices == (0, 1, 2, 3) * 2


def test_what_had_moved_is_put_back_whatever_the_rewards_say(base, moved):
    made = held(base, start=moved)
    far = [made.update(step)["mean_moved"] for step in range(10)]
    assert far[-1] < 0.5 * far[0]
    left_alone = held(base, start=moved, mean_weight=1e-9)
    assert [left_alone.update(step)["mean_moved"] for step in range(10)][-1] > 0.9 * far[0]


def test_each_epoch_draws_those_whose_turn_it_is_and_the_others_move_along(base, moved):
    made = held(base, start=moved)
    games = made.games["mean held"]
    assert games.game(0).rollout.prompt_ids[:4].tolist() == [0, 1, 2, 3]
    before = games.state()["drawn"].clone()
    made.update(0)
    game = games.game(1)
    assert game.rollout.prompt_ids[:4].tolist() == [4, 5, 0, 1]
    after = games.state()["drawn"]
    assert torch.equal(after[[4, 5, 0, 1]], coarse(game.rollout.latents[4:]))
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
        ({"objective": "awm", "kl_weight": 0.1}, "mean_held goes with the forward objective"),
        ({"mean_held": 1}, "a mean two"),
        ({"mean_redrawn": 1}, "each of 2 updates"),
        ({"mean_held": -1}, "mean_held is -1"),
        ({"mean_weight": 0.0}, "allowed are those above 0"),
    ],
)
def test_what_cannot_be_is_refused(base, options, complaint):
    with pytest.raises(InputError, match=complaint):
        held(base, **options)
