"""What a recipe of Stable Diffusion's size saves memory by leaves the training as it is."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from medviz.domains import get_domain
from medviz.rewards.composite import Composite
from tests import sd15
from tests.train import test_rl_learner as small
from train.config import read_recipe
from train.rl.learner import RlLearner
from train.rl.recipe import RlConfig
from train.rl.scoring import Scorer
from train.rl.trainer import spare_memory

DOMAIN = get_domain("dermatology")
OBJECTIVES = {
    "forward": {"kl_weight": 0.1},
    "ddpo": {"guidance_scale": 3.0},
    "draft": {"draft_steps": 2, "draft_random": False},
}
SPARED = {"bf16": False, "gradient_checkpointing": False, "vae_slicing": False}


@pytest.fixture(scope="module")
def base():
    return sd15.make_tiny_pipeline()


def learner(base, objective, **options):
    pipeline = copy.deepcopy(base)
    config = replace(small.SMALL, objective=objective, rollout_steps=4, **OBJECTIVES[objective], **options)
    spare_memory(config, pipeline)
    scorer = Scorer(Composite({"given": small.brightness}, {"given": 1.0}))
    return RlLearner(config, pipeline, DOMAIN, scorer, small.onlooker)


def gradient(made):
    """Of one update, from weights that are away from the start, and its figures."""
    with torch.no_grad():
        for number, weight in enumerate(made.policy.parameters()):
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    rollout = made.draw(0)
    figures = made.accumulate(0, rollout, np.linspace(-2, 2, 8, dtype=np.float32), np.arange(8))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in made.policy.parameters())
    return torch.cat([p.grad.flatten() for p in made.policy.parameters()]), figures, rollout


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_checkpointed_gradients_are_the_plain_ones(base, objective):
    plain, figures, _ = gradient(learner(base, objective))
    made = learner(base, objective, gradient_checkpointing=True, vae_slicing=True)
    assert made.pipeline.unet.is_gradient_checkpointing
    assert made.pipeline.vae.is_gradient_checkpointing
    assert made.pipeline.vae.use_slicing
    found, spared, _ = gradient(made)
    assert plain.abs().max() > 0
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-3 * plain.abs().max().item())
    assert spared["loss"] == pytest.approx(figures["loss"], rel=1e-4)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_half_precision_gives_nearly_the_same_gradients(base, objective):
    plain, _, _ = gradient(learner(base, objective))
    made = learner(base, objective, bf16=True, gradient_checkpointing=True)
    kinds = []
    made.pipeline.unet.conv_out.register_forward_hook(lambda *seen: kinds.append(seen[-1].dtype))
    found, figures, rollout = gradient(made)
    assert set(kinds) == {torch.bfloat16}
    assert bool(found.isfinite().all())
    assert torch.nn.functional.cosine_similarity(found, plain, dim=0) > 0.98
    assert found.norm() == pytest.approx(plain.norm().item(), rel=0.1)
    assert rollout.latents.dtype == torch.float32
    if objective == "ddpo":
        assert rollout.log_probs.dtype == torch.float32
        # Drawn and replayed in batches of one size, the ratio is 1 in half precision, too.
        assert figures["ratio_deviation"] < 1e-5


def test_an_epoch_with_everything_spared_runs_and_counts_each_forward_once(base):
    plain, spared = learner(base, "forward"), learner(base, "forward", **dict.fromkeys(SPARED, True))
    for made in (plain, spared):
        figures = made.update(0)
        assert np.isfinite(list(figures.values())).all()
    assert plain.forwards == spared.forwards
    assert spared.pipeline.unet.conv_in.weight.dtype == torch.float32


def test_the_real_sizes_are_stable_diffusion_s():
    with torch.device("meta"):
        parts = (sd15.make_unet(), sd15.make_vae(), sd15.make_text_encoder())
    assert [sum(p.numel() for p in part.parameters()) for part in parts] == [859_520_964, 83_653_863, 123_060_480]


@pytest.fixture(scope="module")
def models(base, tmp_path_factory):
    return sd15.write_models(tmp_path_factory.mktemp("sd15"), base)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_recipe_runs_on_a_pipeline_of_these_classes(models, tmp_path, objective):
    small_epoch = {"images_per_prompt": 2, "rollout_steps": 4, "evaluation_steps": 2, "invented_prompts": 2}
    metrics, figures = sd15.run_recipe(models, tmp_path, objective=objective, device="cpu", **small_epoch)
    assert metrics["reward_failures"] == 0
    assert 0 < figures["grad_norm"] < math.inf
    assert "ratio" not in figures or figures["ratio"] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_recipes_of_this_size_spare_memory(domain):
    config = read_recipe(sd15.RECIPE, RlConfig, ["--domain", domain])
    assert config.size_px == sd15.VAE["sample_size"]
    assert all(getattr(config, option) for option in SPARED)
    assert config.rollout_batch == config.micro_batch
