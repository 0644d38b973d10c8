import copy
from types import SimpleNamespace

import pytest
import torch

from tests import tiny
from train.rl import learner
from train.rl.objectives import get_objective
from train.rl.policy import LoraPolicy
from train.rl.recipe import RlConfig


def trained(unet, folded, averaged=True):
    """A policy with weights away from their start, where the average differs from it."""
    policy = LoraPolicy(unet, "policy", rank=2, alpha=6.0, averaged=averaged, folded=folded)
    with torch.no_grad():
        for number, weight in enumerate(policy.parameters()):
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    policy.average(0.5)
    return policy


@pytest.fixture(scope="module")
def both():
    unet = tiny.make_unet().double()  # what is left between the two then is not rounding
    return trained(copy.deepcopy(unet), False), trained(copy.deepcopy(unet), True)


def predicted(policy, which):
    config = policy.unet.config
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(
        2, config.in_channels, config.sample_size, config.sample_size, generator=generator, dtype=torch.float64
    )
    text = torch.randn(2, 5, config.cross_attention_dim, generator=generator, dtype=torch.float64)
    with policy.using(which):
        return policy.unet(latents, torch.tensor([10, 700]), encoder_hidden_states=text, return_dict=False)[0]


@pytest.mark.parametrize("which", ["policy", "policy-average", None])
def test_folded_layers_compute_what_the_adapters_own_do(both, which):
    apart, folded = (predicted(policy, which) for policy in both)
    torch.testing.assert_close(folded, apart, rtol=1e-9, atol=1e-12)
    others = {"policy", "policy-average", None} - {which}
    assert all((predicted(both[1], other) - folded).abs().max() > 1e-3 for other in others)


@pytest.mark.parametrize("bf16", [False, True])
def test_a_policy_is_folded_where_its_passes_are_in_fp32(bf16, monkeypatch):
    """Rounded to bf16 together with W, a small change would be lost."""
    asked = []
    monkeypatch.setattr(learner, "LoraPolicy", lambda *_, folded, **__: asked.append(folded))
    made = SimpleNamespace(config=RlConfig(out="", bf16=bf16), pipeline=SimpleNamespace(unet=None))
    made.objective = get_objective("ddpo")
    learner.RlLearner._policy(made)
    assert asked == [not bf16]


def test_folded_layers_have_the_same_gradients(both):
    gradients = []
    for policy in both:
        policy.unet.zero_grad(set_to_none=True)
        predicted(policy, "policy").square().mean().backward()
        gradients.append(torch.cat([weight.grad.flatten() for weight in policy.parameters()]))
        frozen = [n for n, weight in policy.unet.named_parameters() if weight.grad is not None and ".policy." not in n]
        assert not frozen
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-6, atol=1e-12)
