"""Guidance in an interval: where it holds, what remains outside, and what the sampler makes of it."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from medviz.errors import InputError
from medviz.generation.guidance import Guidance, SemanticGuidance
from medviz.generation.prompts import encode_prompts
from medviz.generation.sampling import initial_latents, noise_pred, sample
from medviz.grounding.capture import capture
from medviz.models.manifest import Manifest
from medviz.workbench import model_identity
from tests.tiny import make_pipeline

PROMPTS = ["a dermoscopic image with hair", "a dermoscopic image with nevus"]
ALONG_HAIR = SemanticGuidance("dermatology", ("hair",), 6.0, (150, 900))
CANONICAL = "a dermoscopic image with melanoma (MEL) showing hair, ruler"


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
    assert [Guidance.of_recipe({"guidance_scale": 2.0}, "dermatology", 3.0).at(t) for t in (0, 999)] == [2.0, 2.0]
    assert Guidance.of_recipe({}, "dermatology", 3.0).scale == 3.0
    named = Guidance.of_recipe(
        {"guidance_scale": 2.0, "guidance_interval": [0, 700], "guidance_outside": 0.5},
        "dermatology",
        default_scale=3.0,
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


def conditional(pipeline: StableDiffusionPipeline, latents: torch.Tensor, prompt: str) -> torch.Tensor:
    return noise_pred(pipeline.unet, latents, 500, encode_prompts(pipeline, [prompt] * len(latents)), 1.0)


def counted(pipeline: StableDiffusionPipeline, prompts: list[str], guidance: Guidance, t: object) -> int:
    """Rows of the UNet's pass."""
    rows: list[int] = []
    watched = pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        embeds = encode_prompts(pipeline, prompts, guidance.semantic)
        latents = initial_latents(pipeline.unet.config, list(range(len(prompts))))
        noise_pred(pipeline.unet, latents, t, embeds, guidance)  # type: ignore[arg-type]
    finally:
        watched.remove()
    (found,) = rows
    return found


def test_along_a_word_goes_the_difference_that_it_makes_and_nothing_coarse(pipeline: StableDiffusionPipeline) -> None:
    guidance, prompts = Guidance(3.0, semantic=ALONG_HAIR), ["melanoma, some hair and a ruler", PROMPTS[1]]
    latents = initial_latents(pipeline.unet.config, [1, 2])
    with torch.no_grad():
        plain = noise_pred(pipeline.unet, latents, 500, encode_prompts(pipeline, prompts), 3.0)
        along = noise_pred(pipeline.unet, latents, 500, encode_prompts(pipeline, prompts, ALONG_HAIR), guidance)
        without = CANONICAL.replace("hair, ", "")
        difference = conditional(pipeline, latents[:1], CANONICAL) - conditional(pipeline, latents[:1], without)
    assert torch.allclose(along[1], plain[1], atol=1e-5)
    added = along[:1] - plain[:1]
    assert added.abs().max() > 1e-4
    around = torch.nn.functional.avg_pool2d(difference, 9, 1, 4, count_include_pad=False)
    assert torch.allclose(added, 6.0 * (difference - around), atol=1e-4)


def test_only_prompts_with_the_word_cost_more_and_canonical_ones_less_of_it(pipeline: StableDiffusionPipeline) -> None:
    guidance = Guidance(3.0, (0, 800), semantic=ALONG_HAIR)
    assert counted(pipeline, [PROMPTS[1], PROMPTS[1]], guidance, 500) == 4
    assert counted(pipeline, [CANONICAL, PROMPTS[1]], guidance, 500) == 5
    assert counted(pipeline, ["hairy mole", PROMPTS[1]], guidance, 500) == 6
    assert counted(pipeline, ["hairy mole", PROMPTS[1]], guidance, 100) == 4
    assert counted(pipeline, ["hairy mole", PROMPTS[1]], guidance, 850) == 4
    assert counted(pipeline, ["hairy mole", PROMPTS[1]], guidance, 950) == 2


def test_each_sample_goes_along_its_word_at_its_own_timestep(pipeline: StableDiffusionPipeline) -> None:
    prompts, guidance = ["hairy mole", PROMPTS[1], "hair, ink"], Guidance(3.0, semantic=ALONG_HAIR)
    embeds = encode_prompts(pipeline, prompts, ALONG_HAIR)
    latents, times = initial_latents(pipeline.unet.config, [1, 2, 3]), torch.tensor([950, 500, 500])
    with torch.no_grad():
        all_three = noise_pred(pipeline.unet, latents, times, embeds, guidance)
        chosen = torch.tensor([2, 2, 0])
        taken = noise_pred(pipeline.unet, latents[chosen], times[chosen], embeds.take(chosen), guidance)
        plain = noise_pred(pipeline.unet, latents, times, embeds, 3.0)
    assert torch.allclose(all_three[:2], plain[:2], atol=1e-5)
    assert not torch.allclose(all_three[2], plain[2], atol=1e-4)
    assert torch.allclose(taken, all_three[chosen], atol=1e-5)


def test_pictures_without_the_word_stay_and_those_with_it_are_captured(pipeline: StableDiffusionPipeline) -> None:
    guidance, prompts = Guidance(3.0, (0, 500), semantic=ALONG_HAIR), [PROMPTS[1], CANONICAL]
    plain = sample(pipeline, prompts, [1, 2], steps=4, guidance_scale=Guidance(3.0, (0, 500)))
    with capture(pipeline.unet) as maps:
        drawn = sample(pipeline, prompts, [1, 2], steps=4, guidance_scale=guidance, maps=maps)
    assert maps.samples == 2
    assert torch.allclose(drawn[0], plain[0], atol=1e-4)
    assert not torch.allclose(drawn[1], plain[1], atol=1e-3)
    assert torch.equal(sample(pipeline, prompts, [1, 2], steps=4, guidance_scale=guidance), drawn)


def test_no_guidance_goes_along_no_word(pipeline: StableDiffusionPipeline) -> None:
    assert Guidance(3.0, semantic=ALONG_HAIR).with_scale(1.0) == Guidance(1.0)
    assert Guidance(3.0, semantic=ALONG_HAIR).with_scale(2.0).semantic == ALONG_HAIR


def test_prompts_encoded_without_the_word_are_not_silently_drawn_without_it(pipeline: StableDiffusionPipeline) -> None:
    latents, embeds = initial_latents(pipeline.unet.config, [1, 2]), encode_prompts(pipeline, PROMPTS)
    with pytest.raises(InputError, match="encoded without"):
        noise_pred(pipeline.unet, latents, 500, embeds, Guidance(3.0, semantic=ALONG_HAIR))


def test_the_gradient_goes_through_what_is_added(pipeline: StableDiffusionPipeline) -> None:
    embeds = encode_prompts(pipeline, [CANONICAL], ALONG_HAIR)
    latents = initial_latents(pipeline.unet.config, [1]).requires_grad_()
    guided, plain = Guidance(3.0, semantic=ALONG_HAIR), Guidance(3.0)
    steep, flat = (
        torch.autograd.grad(noise_pred(pipeline.unet, latents, 500, embeds, how).square().sum(), latents)[0]
        for how in (guided, plain)
    )
    assert not torch.allclose(steep, flat)


def test_a_recipe_names_the_word_and_reads_it_back() -> None:
    guidance = Guidance(2.5, (150, 550), 0.25, ALONG_HAIR)
    assert Guidance.of_recipe(guidance.as_recipe(), "dermatology", 3.0) == guidance
    assert "semantic_heads" not in Guidance(2.5).as_recipe()
    with pytest.raises(InputError, match="above 0, found 0"):
        Guidance.of_recipe({"semantic_heads": ["hair"]}, "dermatology", 3.0)
    assert "hair by 6 (timesteps 150 to 900)" in str(guidance)
    assert str(Guidance(2.5, (150, 550), 0.25)) in str(guidance)


@pytest.mark.parametrize(
    "wrong",
    [
        {"domain": "dentistry"},
        {"heads": ()},
        {"heads": ("fur",)},
        {"scale": 0.0},
        {"scale": float("inf")},
        {"interval": (9, 3)},
    ],
)
def test_a_word_out_of_range_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(InputError):
        SemanticGuidance(**{"domain": "dermatology", "heads": ("hair",), "scale": 4.0, **wrong})  # type: ignore[arg-type]
