"""Reinforcement learning at Stable Diffusion 1.5's real size, with random weights; needs a card with 24 GB."""

import math

import pytest
import torch

from tests import sd15

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CARD_BYTES = 24e9


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    torch.manual_seed(0)
    parts = (sd15.make_unet().half(), sd15.make_vae().half(), sd15.make_text_encoder().half())
    return sd15.write_models(tmp_path_factory.mktemp("sd15"), sd15.make_pipeline(*parts))


@pytest.mark.parametrize("objective", ["forward", "ddpo", "draft"])
def test_an_epoch_of_the_recipe_fits_one_card(models, tmp_path, objective):
    torch.cuda.reset_peak_memory_stats()
    metrics, figures = sd15.run_recipe(models, tmp_path, objective=objective)
    assert metrics["reward_failures"] == 0
    assert 0 < figures["grad_norm"] < math.inf
    assert torch.cuda.max_memory_allocated() < CARD_BYTES
