"""Guidance in an interval: where it holds, what remains outside, and what the sampler makes of it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from medviz.errors import InputError
from medviz.generation.guidance import Guidance
from medviz.generation.sampling import encode_prompts, initial_latents, noise_pred, sample
from medviz.grounding.capture import capture
from medviz.models.manifest import Manifest
from medviz.workbench import model_identity
from tests.tiny import make_pipeline

PROMPTS = ["a dermoscopic image with hair", "a dermoscopic image with nevus"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return make_pipeline("dermatology")


def test_the_scale_holds_inside_the_interval_and_a_share_of_it_outside() -> None:
    guidance = Guidance(3.0, (100, 700), 0.25)
    assert [guidance.at(t) for t in (99, 100, 700, 701)] == [1.5, 3.0, 3.0, 1.5]
    assert Guidance(3.0, (100, 700)).at(900) == 1.0
    assert torch.equal(guidance.at(torch.tensor([700, 701])).flatten(), torch.tensor([3.0, 1.5]))


def test_no_guidance_is_none_everywhere_and_another_scale_keeps_the_interval() -> None:
    guidance = Guidance(3.0, (100, 700), 0.25).with_scale(1.0)
    assert [guidance.at(t) for t in (0, 400, 999)] == [1.0, 1.0, 1.0]
    assert guidance.interval == (100, 700)


def test_a_recipe_without_an_interval_guides_throughout() -> None:
    assert [Guidance.of_recipe({"guidance_scale": 2.0}, 3.0).at(t) for t in (0, 999)] == [2.0, 2.0]
    assert Guidance.of_recipe({}, 3.0).scale == 3.0
    named = Guidance.of_recipe(
        {"guidance_scale": 2.0, "guidance_interval": [0, 700], "guidance_outside": 0.5}, default_scale=3.0
    )
    assert (named.at(700), named.at(701)) == (2.0, 1.5)


def test_an_interval_read_from_a_recipe_is_the_same_guidance() -> None:
    assert Guidance(3.0, [0, 700]) == Guidance(3.0, (0, 700))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "wrong",
    [{"scale": float("nan")}, {"interval": (700, 100)}, {"interval": (-1, 3)}, {"outside": 1.5}, {"outside": -0.1}],
)
def test_values_out_of_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        Guidance(**{"scale": 3.0, **wrong})  # type: ignore[arg-type]


def test_each_sample_of_a_batch_is_guided_by_its_own_timestep(pipeline: StableDiffusionPipeline) -> None:
    guidance, embeds = Guidance(3.0, (0, 500), 0.25), encode_prompts(pipeline, PROMPTS)
    latents = initial_latents(pipeline.unet.config, [1, 2])
    with torch.no_grad():
        both = noise_pred(pipeline.unet, latents, torch.tensor([900, 100]), embeds, guidance)
        expected = [
            noise_pred(pipeline.unet, latents, torch.tensor([900, 100]), embeds, scale)[row]
            for row, scale in enumerate((1.5, 3.0))
        ]
    assert torch.allclose(both, torch.stack(expected), atol=1e-5)


def test_an_interval_over_everything_is_constant_guidance(pipeline: StableDiffusionPipeline) -> None:
    constant = sample(pipeline, PROMPTS, [1, 2], steps=4, guidance_scale=3.0)
    assert torch.equal(sample(pipeline, PROMPTS, [1, 2], steps=4, guidance_scale=Guidance(3.0)), constant)
    limited = sample(pipeline, PROMPTS, [1, 2], steps=4, guidance_scale=Guidance(3.0, (0, 500)))
    assert not torch.equal(limited, constant)


def test_steps_outside_the_interval_cost_one_pass_and_their_attention_is_captured_all_the_same(
    pipeline: StableDiffusionPipeline,
) -> None:
    rows: list[int] = []
    watched = pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    guidance = Guidance(3.0, (0, 500))
    try:
        plain = sample(pipeline, PROMPTS, [1, 2], steps=4, guidance_scale=guidance)
    finally:
        watched.remove()
    assert sorted(set(rows)) == [2, 4]
    with capture(pipeline.unet) as maps:
        assert torch.equal(sample(pipeline, PROMPTS, [1, 2], steps=4, guidance_scale=guidance, maps=maps), plain)


def test_a_report_names_where_guidance_holds() -> None:
    recipe = {"guidance_scale": 2.0, "guidance_interval": [0, 700], "guidance_outside": 0.2}
    told = model_identity(Manifest("dermatology", recipe=recipe), None)
    assert (told["guidance_interval"], told["guidance_outside"]) == ([0, 700], 0.2)
    assert "guidance_scale" not in told  # the request's own stands in the report
