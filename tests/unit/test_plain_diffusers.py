"""The model folders are plain diffusers folders: they load and draw without this program."""

import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

MODELS = Path(__file__).resolve().parents[2] / "assets" / "models"
OF_ANY_TINY_AUTOENCODER = "Expected types for vae: "
"""StableDiffusionPipeline names AutoencoderKL as its autoencoder's class and says so of every AutoencoderTiny."""


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_a_shipped_folder_draws_without_a_dtype_and_without_a_warning(
    domain: str, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("diffusers", "transformers"):
        caplog.set_level(logging.WARNING, name)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        pipeline = StableDiffusionPipeline.from_pretrained(MODELS / domain)
        pipeline.set_progress_bar_config(disable=True)
        drawn = pipeline(
            "hair", num_inference_steps=1, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)
        ).images[0]
    assert {m.dtype for m in pipeline.components.values() if isinstance(m, torch.nn.Module)} == {torch.float32}
    assert drawn.size == (256, 256)
    assert np.asarray(drawn).std() > 1
    assert [line for line in caplog.messages if not line.startswith(OF_ANY_TINY_AUTOENCODER)] == []
    # Those that Python shows to whoever runs a program; what is deprecated, it shows to authors of libraries.
    assert [str(w.message) for w in told if not issubclass(w.category, DeprecationWarning)] == []
