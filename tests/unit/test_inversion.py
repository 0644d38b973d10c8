"""Inversion: a real image becomes noise and comes back; a phrase's attention is read on the way."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from medviz.errors import Cancelled, InputError
from medviz.generation.inversion import Inversion, attention_on_image, invert, one_step_noise, reconstruct
from medviz.generation.prompts import encode_prompts
from medviz.generation.sampling import encode_image, noise_pred
from medviz.grounding.capture import capture
from tests import tiny

PROMPT = "a dermoscopic image with melanoma (MEL) showing hair"


def make(prediction_type: str) -> StableDiffusionPipeline:
    """A pipeline with latents of about unit variance and a prediction that is smooth, as a trained one's is."""
    pipeline = tiny.make_pipeline("dermatology")
    pipeline.vae.register_to_config(scaling_factor=14.0)
    with torch.no_grad():
        for parameter in pipeline.unet.conv_out.parameters():
            parameter.mul_(0.1 if prediction_type == "v_prediction" else 0.02)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction_type,
        steps_offset=1,
        clip_sample=False,
    )
    return StableDiffusionPipeline(**{**pipeline.components, "scheduler": scheduler}, requires_safety_checker=False)


@pytest.fixture(scope="module", params=["v_prediction", "epsilon"])
def pipeline(request: pytest.FixtureRequest) -> StableDiffusionPipeline:
    return make(request.param)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def distance(pipeline: StableDiffusionPipeline, inversion: Inversion) -> float:
    difference = reconstruct(pipeline, inversion) - inversion.latents[0]
    return float(difference.norm() / inversion.latents[0].norm())


def test_an_inverted_image_comes_back(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    inversion = invert(pipeline, images, 6, refinements=3)
    assert torch.equal(inversion.latents[0], encode_image(pipeline, images))
    assert inversion.timesteps == (0, 166, 333, 500, 666, 832, 999)
    assert len(inversion.latents) == 7
    assert distance(pipeline, inversion) < 0.03


def test_more_steps_or_refinements_bring_it_back_closer(
    pipeline: StableDiffusionPipeline, images: torch.Tensor
) -> None:
    coarse, fine = (distance(pipeline, invert(pipeline, images[:1], steps)) for steps in (5, 10))
    refined = distance(pipeline, invert(pipeline, images[:1], 5, refinements=3))
    assert fine < 0.7 * coarse
    assert refined < 0.2 * coarse


def test_inversion_is_deterministic_and_by_image(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    both = invert(pipeline, images, 3).noise
    assert torch.equal(both, invert(pipeline, images, 3).noise)
    torch.testing.assert_close(both[1:], invert(pipeline, images[1], 3).noise, rtol=1e-4, atol=1e-5)


def test_the_path_is_the_unconditional_one_unless_told(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    plain, prompted = invert(pipeline, images[:1], 3), invert(pipeline, images[:1], 3, PROMPT)
    assert (plain.noise - prompted.noise).abs().max() > 1e-3


def test_the_path_may_end_early(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    short = invert(pipeline, images[:1], 10, until=0.5)
    assert short.timesteps == (0, 100, 200, 300, 400)
    assert torch.equal(short.noise, invert(pipeline, images[:1], 10).latents[4])


def test_one_step_noise_is_the_forward_process(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    latents = encode_image(pipeline, images)
    noised = one_step_noise(pipeline.scheduler, latents, 400, [5, 6])
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(6))
    expected = pipeline.scheduler.add_noise(latents[1], noise, torch.tensor([400]))
    torch.testing.assert_close(noised[1], expected)
    assert torch.equal(noised[1:], one_step_noise(pipeline.scheduler, latents[1:], 400, [6]))
    with pytest.raises(InputError, match="one seed for each"):
        one_step_noise(pipeline.scheduler, latents, 400, [5])


@pytest.mark.parametrize("method", ["inversion", "one_step"])
def test_attention_of_each_image_is_its_own(
    pipeline: StableDiffusionPipeline, images: torch.Tensor, method: str
) -> None:
    both = attention_on_image(pipeline, images, [PROMPT, "nevus"], method=method, steps=10)
    alone = attention_on_image(pipeline, images[1], "nevus", method=method, steps=10)
    assert (both.samples, alone.samples) == (2, 1)
    np.testing.assert_allclose(both.heat([1], (64, 64), sample=1), alone.heat([1], (64, 64)), rtol=1e-3, atol=1e-6)
    assert np.abs(both.heat([1], (64, 64)) - both.heat([1], (64, 64), sample=1)).max() > 1e-5


def test_attention_is_read_at_the_inverted_latents(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    found = attention_on_image(pipeline, images, PROMPT, method="inversion", steps=10, t_window=(0.3, 0.5))
    path, embeds = invert(pipeline, images, 10), encode_prompts(pipeline, [PROMPT, PROMPT])
    with capture(pipeline.unet, batch_size=2) as maps, torch.no_grad():
        for index in (3, 4):
            noise_pred(pipeline.unet, path.latents[index], path.timesteps[index], embeds, 1.0)
    assert path.timesteps[3:5] == (300, 400)
    np.testing.assert_allclose(found.heat([2], (8, 8), sample=1), maps.heat([2], (8, 8), sample=1), rtol=1e-4)


def test_seeds_of_the_one_step_variant_are_averaged(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    heats = [
        attention_on_image(pipeline, images[0], PROMPT, method="one_step", seeds=seeds).heat([2], (8, 8))
        for seeds in ((1,), (2,), (1, 2))
    ]
    assert np.abs(heats[0] - heats[1]).max() > 1e-7
    np.testing.assert_allclose((heats[0] + heats[1]) / 2, heats[2], rtol=1e-4)


def test_cancelling_leaves_no_hook(pipeline: StableDiffusionPipeline, images: torch.Tensor) -> None:
    calls: list[int] = []

    def stop(index: int, latents: torch.Tensor) -> None:
        calls.append(index)
        if len(calls) == 8:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        attention_on_image(pipeline, images, PROMPT, method="inversion", steps=10, on_step=stop)
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "guess"}, "allowed: inversion, one_step"),
        ({"prompts": [PROMPT]}, "2 images"),
        ({"t_window": (0.7, 0.3)}, "t_window"),
        ({"method": "inversion", "t_window": (0.41, 0.42), "steps": 3}, "no noise level"),
        ({"method": "inversion", "steps": 0}, "steps"),
        ({"method": "one_step", "seeds": ()}, "no noise level"),
    ],
)
def test_bad_requests_are_refused(
    pipeline: StableDiffusionPipeline, images: torch.Tensor, change: dict[str, object], message: str
) -> None:
    request = {"prompts": PROMPT, **change}
    with pytest.raises(InputError, match=message):
        attention_on_image(pipeline, images, request.pop("prompts"), **request)
