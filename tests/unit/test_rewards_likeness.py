"""The witness of real against drawn images: its value by hand, its direction, and what it refuses."""

import math

import pytest
import torch

from medviz.errors import InputError
from medviz.rewards.likeness import SCALES, Likeness
from medviz.rewards.registry import Drawn, get_reward


def embed(images: torch.Tensor) -> torch.Tensor:
    """Mean of the first two channels: features (B, 2) of images (B, 3, H, W)."""
    return images[:, :2].mean(dim=(2, 3))


def images_at(points: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, 4, 4) whose features are `points` (B, 2)."""
    channels = torch.cat([points, torch.zeros(len(points), 1)], dim=1)
    return channels[:, :, None, None].expand(-1, -1, 4, 4).clone()


def kernel(distance: float, width: float) -> float:
    return sum(math.exp(-(distance**2) / (2 * (scale * width) ** 2)) for scale in SCALES) / len(SCALES)


def test_the_witness_of_three_points_by_hand() -> None:
    likeness = Likeness(embed, torch.tensor([[0.0, 0.0], [0.5, 0.0]]))
    likeness.drawn = torch.tensor([[0.0, 0.5], [0.0, 1.0]])
    found = likeness.witness(images_at(torch.tensor([[0.0, 0.0]])))
    real = (kernel(0.0, 0.5) + kernel(0.5, 0.5)) / 2
    drawn = (kernel(0.5, 0.5) + kernel(1.0, 0.5)) / 2
    assert found.item() == pytest.approx(real - drawn, abs=1e-6)


def squared_mmd(x: torch.Tensor, y: torch.Tensor, likeness: Likeness) -> float:
    within_x, within_y, between = (likeness._kernel(a, b).mean().item() for a, b in ((x, x), (y, y), (x, y)))
    return within_x + within_y - 2 * between


def test_its_means_differ_by_the_squared_discrepancy_and_climbing_it_brings_pictures_nearer() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(64, 2, generator=generator) * 0.2
    drawn = torch.randn(64, 2, generator=generator) * 0.2 + torch.tensor([0.4, 0.0])
    likeness = Likeness(embed, real)
    likeness.drawn = drawn
    before = squared_mmd(drawn, real, likeness)
    gap = likeness.witness(images_at(real)).mean() - likeness.witness(images_at(drawn)).mean()
    assert gap.item() == pytest.approx(before, abs=1e-6)
    points = images_at(drawn).requires_grad_()
    (gradient,) = torch.autograd.grad(likeness.witness(points).sum(), points)
    moved = embed(points.detach() + 0.05 * gradient / gradient.abs().max())
    assert squared_mmd(moved, real, likeness) < before


def test_an_extreme_image_earns_nothing() -> None:
    likeness = Likeness(embed, torch.rand(8, 2, generator=torch.Generator().manual_seed(1)))
    likeness.drawn = torch.zeros(4, 2)
    assert abs(likeness.witness(images_at(torch.tensor([[1e3, -1e3]]))).item()) < 1e-6


def test_alike_in_real_and_drawn_is_worth_nothing() -> None:
    points = torch.rand(8, 2, generator=torch.Generator().manual_seed(2))
    likeness = Likeness(embed, points)
    likeness.drawn = points
    assert torch.allclose(likeness.witness(images_at(torch.rand(5, 2))), torch.zeros(5), atol=1e-6)


def test_what_it_refuses() -> None:
    with pytest.raises(InputError, match="2 or more"):
        Likeness(embed, torch.zeros(1, 2))
    with pytest.raises(InputError, match="same features"):
        Likeness(embed, torch.ones(4, 2))
    likeness = Likeness(embed, torch.rand(4, 2))
    with pytest.raises(InputError, match="no drawn images"):
        likeness.witness(torch.zeros(1, 3, 4, 4))
    with pytest.raises(InputError, match=r"\(2 or more, 2\)"):
        likeness.drawn = torch.zeros(4, 3)


def test_as_a_reward_it_needs_its_network_and_leaves_images_alone() -> None:
    images = images_at(torch.rand(2, 2))
    before = images.clone()
    with pytest.raises(InputError, match="likeness reward needs"):
        get_reward("likeness")(Drawn(images, ()))
    likeness = Likeness(embed, torch.rand(4, 2))
    likeness.drawn = torch.rand(4, 2)
    assert get_reward("likeness")(Drawn(images, (), likeness=likeness)).shape == (2,)
    assert torch.equal(images, before)
