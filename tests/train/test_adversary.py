"""The adversary: it learns what drawn latents lack, and its opinion pulls them there."""

import copy

import numpy as np
import pytest
import torch

from train.adversary import Adversary, Discriminator, shown_latents

SIDE = 8


def lined(count: int, seed: int = 0) -> torch.Tensor:
    """Latents (N, 4, 8, 8) of noise with one bright row each, in the faintest channel."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(count, 4, SIDE, SIDE, generator=generator) * torch.tensor([1.0, 0.5, 0.2, 0.05]).view(1, 4, 1, 1)
    rows = torch.randint(SIDE, (count,), generator=generator)
    made[torch.arange(count), 3, rows] += 0.5
    return made


def plain(count: int, seed: int = 1) -> torch.Tensor:
    """The same without the row."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, SIDE, SIDE, generator=generator) * torch.tensor([1.0, 0.5, 0.2, 0.05]).view(1, 4, 1, 1)


def adversary(real: torch.Tensor, **options) -> Adversary:
    return Adversary(
        shown_latents(real[None].half(), np.ones(len(real)), 0),
        **{"seed": 0, "device": "cpu", "learning_rate": 2e-3, "penalty": 0.1, **options},
    )


def test_a_discriminator_judges_each_cell_by_its_surroundings() -> None:
    torch.manual_seed(0)
    network = Discriminator(torch.ones(4), width=8, blocks=2)
    latents = torch.randn(1, 4, 12, 12)
    changed = latents.clone()
    changed[..., 0, 0] += 1
    moved = (network(changed) - network(latents)).abs()[0, 0] > 0
    assert moved[:4, :4].any()
    assert not moved[4:].any()
    assert not moved[:, 4:].any()


def test_faint_channels_count_like_strong_ones() -> None:
    latents = torch.randn(64, 2, 8, 8) * torch.tensor([10.0, 0.01]).view(1, 2, 1, 1)
    network = Discriminator(latents.std(dim=(0, 2, 3)))
    seen: list[torch.Tensor] = []
    network.first.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    network(latents)
    torch.testing.assert_close(seen[0].std(dim=(0, 2, 3)), torch.ones(2), atol=0.05, rtol=0)


def test_it_learns_what_is_missing_and_pulls_latents_there() -> None:
    made = adversary(lined(200))
    for step in range(100):
        figures = made.update(plain(16, seed=100 + step), step)
    assert figures["told_apart"] > 0.9
    with torch.no_grad():
        real, drawn = made.network(lined(64, seed=5)), made.network(plain(64, seed=6))
    assert real.mean() > drawn.mean()
    latents = plain(32, seed=7).requires_grad_(True)
    before = made.loss(latents, 0)
    (slope,) = torch.autograd.grad(before, latents)
    assert all(weight.grad is None or not weight.requires_grad for weight in made.network.parameters())
    strength = slope.abs().mean(dim=(0, 2, 3))
    assert strength[3] > 3 * strength[:3].max()  # what is missing is in the last channel
    with torch.no_grad():
        assert made.loss(latents - 20 * slope.sign() * made.network.scale * 0.05, 0) < before


def test_the_penalty_keeps_it_from_being_steep() -> None:
    def steepness(penalty: float) -> float:
        made = adversary(lined(200), penalty=penalty)
        for step in range(60):
            made.update(plain(16, seed=100 + step), step)
        latents = lined(32, seed=5).requires_grad_(True)
        (slope,) = torch.autograd.grad(made.network(latents).sum(), latents)
        return slope.square().sum().item()

    assert steepness(10.0) < 0.3 * steepness(0.01)


def test_a_resumed_adversary_goes_on_as_the_uninterrupted_one() -> None:
    whole, other = adversary(lined(40)), adversary(lined(40))
    for step in range(3):
        whole.update(plain(8, seed=step), step)
    kept = copy.deepcopy(whole.state())
    other.load_state(kept)
    for made in (whole, other):
        made.update(plain(8, seed=3), 3)
    for name, weight in whole.network.state_dict().items():
        assert torch.equal(weight, other.network.state_dict()[name])


@pytest.mark.parametrize("step", [0, 1])
def test_real_latents_are_drawn_by_weight_and_turned(step) -> None:
    real = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 4, 2, 2)
    show = shown_latents(real.half(), np.array([0.0, 1.0, 0.0]), 0)
    shown = show(step, 32)
    assert set(shown.unique().tolist()) == {1.0, 4.0}
    assert torch.equal(shown, show(step, 32))
