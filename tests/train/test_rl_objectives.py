from dataclasses import replace

import pytest
import torch

from medviz.errors import InputError
from train.rl.log_prob import DdimStep, gaussian_log_prob
from train.rl.objectives import (
    OBJECTIVES,
    ObjectiveOptions,
    Replay,
    awm,
    clipped_policy_loss,
    ddpo_sf,
    draft,
    forward,
    get_objective,
)

SHAPE = (3, 2, 4, 4)


def clip_case(log_ratio, advantage, clip_range=0.1):
    log_prob = torch.tensor([float(log_ratio)], requires_grad=True)
    losses = clipped_policy_loss(log_prob, torch.zeros(1), torch.tensor([float(advantage)]), clip_range)
    losses.loss.sum().backward()
    return losses, log_prob.grad.item()


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "learns"),
    [
        (+0.5, +1.0, False),  # already likelier than the clip allows
        (-0.5, -1.0, False),  # already less likely than the clip allows
        (-0.5, +1.0, True),  # a good image grew less likely: pull it back
        (+0.5, -1.0, True),  # a bad image grew likelier: pull it back
        (+0.05, +1.0, True),  # inside the clip
        (-0.05, -1.0, True),
    ],
)
def test_the_four_quadrants_of_the_clip(log_ratio, advantage, learns):
    losses, gradient = clip_case(log_ratio, advantage)
    if learns:
        # Descent moves the log-probability in the direction of the advantage.
        assert gradient * advantage < 0
    else:
        assert gradient == 0.0
    ratio = torch.tensor(float(log_ratio)).exp()
    # d(-A ratio) / d log_prob = -A ratio where the clip does not act, and nothing where it does.
    assert gradient == pytest.approx(-advantage * ratio.item() if learns else 0.0, rel=1e-6)
    torch.testing.assert_close(losses.figures["ratio"], ratio[None])
    assert losses.figures["clip_fraction"].item() == float(abs(ratio - 1) > 0.1)
    assert losses.figures["approx_kl"].item() == pytest.approx(0.5 * log_ratio**2)


def test_a_weight_scales_gradient_and_clip_alike():
    advantages, old, weight = torch.tensor([1.0, 1.0]), torch.zeros(2), torch.tensor([0.1, 2.0])
    log_prob = torch.tensor([0.5, 0.06], requires_grad=True)
    losses = clipped_policy_loss(log_prob, old, advantages, 0.1, weight)
    losses.loss.sum().backward()
    # exp(0.05) lies within the clip, at a tenth of the gradient; exp(0.12) lies outside, where exp(0.06) would not.
    assert log_prob.grad.tolist() == pytest.approx([-0.1 * 2.718281828**0.05, 0.0], rel=1e-5)
    assert losses.figures["clip_fraction"].tolist() == [0.0, 1.0]


def test_zero_advantage_has_zero_gradient():
    assert clip_case(0.02, 0.0)[1] == 0.0


def normal(seed):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def chain_replay(mean, reference_mean):
    drawn = normal(5)
    step = DdimStep(drawn, mean, 0.5, gaussian_log_prob(drawn, mean, 0.5))
    return Replay(torch.zeros(3), step, step.log_prob.detach(), reference_mean)


def test_divergence_from_the_reference_pulls_back_to_it():
    mean = normal(0).requires_grad_()
    away = OBJECTIVES["grpo"].loss(chain_replay(mean, normal(1)), ObjectiveOptions(kl_weight=2.0))
    away.loss.sum().backward()
    assert (mean.grad * (mean.detach() - normal(1))).sum() > 0
    at = OBJECTIVES["grpo"].loss(chain_replay(mean.detach(), mean.detach()), ObjectiveOptions(kl_weight=2.0))
    assert at.figures["reference_kl"].abs().max() == 0


def noised_replay(advantages, prediction, old=None, reference=None):
    old = normal(0) if old is None else old
    return Replay(
        torch.tensor(advantages),
        prediction=prediction,
        target=normal(9),
        old_prediction=old,
        reference_prediction=reference,
    )


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_forward_moves_to_good_images_from_bad_ones_and_ignores_average_ones(beta):
    prediction = normal(0).requires_grad_()
    losses = forward(noised_replay([2.0, -2.0, 0.0], prediction), ObjectiveOptions(beta=beta, advantage_clip=5.0))
    losses.loss.sum().backward()
    towards = -(prediction.grad * (normal(9) - normal(0))).flatten(1).sum(1)
    assert towards[0] > 0
    assert towards[1] < 0
    assert prediction.grad[2].abs().max() < 1e-7


def test_neither_beta_nor_the_advantage_clip_changes_the_first_gradient():
    gradients = []
    for options in (ObjectiveOptions(beta=1.0, advantage_clip=5.0), ObjectiveOptions(beta=0.2, advantage_clip=3.0)):
        prediction = normal(0).requires_grad_()
        forward(noised_replay([1.0, -2.0, 0.5], prediction), options).loss.sum().backward()
        gradients.append(prediction.grad)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)


def test_forward_loss_is_the_sum_of_both_implicit_policies():
    prediction, old, target, b = normal(1), normal(0), normal(9), 0.4
    losses = forward(noised_replay([5.0, -5.0, 2.5], prediction), ObjectiveOptions(beta=b, advantage_clip=5.0))

    def error(mixed):
        off = mixed - target
        return off.square().mean(dim=(1, 2, 3)) / off.abs().mean(dim=(1, 2, 3))

    positive, negative = error((1 - b) * old + b * prediction), error((1 + b) * old - b * prediction)
    r = torch.tensor([1.0, 0.0, 0.75])
    torch.testing.assert_close(losses.loss, 5.0 / b * (r * positive + (1 - r) * negative))


def test_distance_from_the_adapter_free_prediction_is_weighted_in():
    prediction, reference = normal(1), normal(2)
    plain = forward(noised_replay([1.0, 1.0, 1.0], prediction), ObjectiveOptions(kl_weight=0.5))
    held = forward(noised_replay([1.0, 1.0, 1.0], prediction, reference=reference), ObjectiveOptions(kl_weight=0.5))
    torch.testing.assert_close(held.loss - plain.loss, 0.5 * (prediction - reference).square().mean(dim=(1, 2, 3)))


def test_the_score_function_weighs_the_log_prob_and_clips_nothing():
    log_prob = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    drawn = normal(5)
    advantages, old = torch.tensor([1.0, -2.0, 0.0]), torch.tensor([-5.0, -2.0, -3.0])
    losses = ddpo_sf(Replay(advantages, DdimStep(drawn, drawn, 0.5, log_prob), old), ObjectiveOptions())
    losses.loss.sum().backward()
    assert torch.equal(log_prob.grad, -advantages)
    torch.testing.assert_close(losses.figures["ratio"], (log_prob.detach() - old).exp())
    assert losses.figures["clip_fraction"].tolist() == [1.0, 0.0, 0.0]


def test_a_weight_of_steps_weighs_the_divergence_as_it_weighs_the_ratio():
    weight = torch.linspace(0.5, 1.5, len(chain_replay(normal(0), normal(1)).advantages))
    plain, weighed = (replace(chain_replay(normal(0), normal(1)), weight=given) for given in (None, weight))
    pulls = []
    for replay in (plain, weighed):
        held, free = (OBJECTIVES["ddpo"].loss(replay, ObjectiveOptions(kl_weight=kl)).loss for kl in (2.0, 0.0))
        pulls.append(held - free)
    torch.testing.assert_close(pulls[1], weight * pulls[0])
    assert pulls[0].abs().min() > 0


def test_awm_is_the_denoising_loss_weighted_by_the_advantage():
    prediction, reference, advantages = normal(1).requires_grad_(), normal(2), torch.tensor([2.0, -2.0, 0.0])
    held = noised_replay([2.0, -2.0, 0.0], prediction, reference=reference)
    losses = awm(held, ObjectiveOptions(kl_weight=0.5))
    losses.loss.sum().backward()
    error, away = prediction.detach() - normal(9), prediction.detach() - reference
    weighted = advantages * error.square().mean(dim=(1, 2, 3)) + 0.5 * away.square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.loss, weighted)
    slope = (2 * advantages.view(-1, 1, 1, 1) * error + away) / error[0].numel()
    torch.testing.assert_close(prediction.grad, slope)


def test_draft_goes_uphill_and_is_held_by_its_distance():
    rewards, prediction = torch.tensor([1.0, -2.0, 0.0], requires_grad=True), normal(1)
    replay = Replay(torch.zeros(3), rewards=rewards, prediction=prediction, reference_prediction=normal(2))
    losses = draft(replay, ObjectiveOptions(kl_weight=0.5))
    losses.loss.sum().backward()
    assert rewards.grad.tolist() == [-1.0, -1.0, -1.0]
    distance = (prediction - normal(2)).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses.loss, 0.5 * distance - rewards)


def test_an_objective_refuses_the_other_process():
    with pytest.raises(InputError, match="stored log-probabilities"):
        OBJECTIVES["ddpo"].loss(noised_replay([0.0, 0.0, 0.0], normal(1)), ObjectiveOptions())
    with pytest.raises(InputError, match="noised latents"):
        OBJECTIVES["forward"].loss(chain_replay(normal(0), None), ObjectiveOptions())
    with pytest.raises(InputError, match="noised latents"):
        OBJECTIVES["awm"].loss(chain_replay(normal(0), None), ObjectiveOptions())
    with pytest.raises(InputError, match="stored log-probabilities"):
        OBJECTIVES["ddpo_sf"].loss(noised_replay([0.0, 0.0, 0.0], normal(1)), ObjectiveOptions())
    with pytest.raises(InputError, match="differentiable rewards"):
        OBJECTIVES["draft"].loss(chain_replay(normal(0), None), ObjectiveOptions())


def test_an_unknown_objective_names_the_known_ones():
    with pytest.raises(InputError, match="ddpo, ddpo_sf, grpo, forward, awm, draft"):
        get_objective("reinforce")
