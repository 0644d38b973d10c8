"""Paired sampling: noise by seed alone, guidance in one place, the pipeline's own result, nothing left behind."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionPipeline

from medviz.errors import Cancelled, InputError, ModelError
from medviz.generation.prompts import PromptEmbeds, encode_prompts
from medviz.generation.sampling import decode, encode_image, initial_latents, noise_pred, sample, split_prediction
from tests import tiny

PROMPTS = ["a dermoscopic image with melanoma (MEL) showing hair", "a dermoscopic image with no visible artifacts"]


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return tiny.make_pipeline("dermatology")


def with_scheduler(pipeline: StableDiffusionPipeline, scheduler: object) -> StableDiffusionPipeline:
    parts = {**pipeline.components, "scheduler": scheduler}
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def test_noise_depends_on_its_own_seed_alone(pipeline: StableDiffusionPipeline) -> None:
    config = pipeline.unet.config
    together = initial_latents(config, [3, 8, 3])
    assert torch.equal(together[1], initial_latents(config, [8])[0])
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])
    assert together.shape == (3, 12, 8, 8)
    assert together.dtype == torch.float32


def test_an_image_does_not_depend_on_its_batch_mates(pipeline: StableDiffusionPipeline) -> None:
    together = sample(pipeline, PROMPTS, [1, 2], steps=3)
    alone = sample(pipeline, PROMPTS[1:], [2], steps=3)
    torch.testing.assert_close(together[1:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_latents_equal_those_of_the_diffusers_pipeline(
    pipeline: StableDiffusionPipeline, guidance_scale: float
) -> None:
    ours = sample(pipeline, PROMPTS, [1, 2], steps=4, guidance_scale=guidance_scale)
    theirs = pipeline(
        PROMPTS,
        latents=initial_latents(pipeline.unet.config, [1, 2]),
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_two_runs_are_bit_identical(pipeline: StableDiffusionPipeline) -> None:
    first, second = (sample(pipeline, PROMPTS, [1, 2], steps=3) for _ in range(2))
    assert torch.equal(first, second)


def test_threads_sharing_a_pipeline_do_not_disturb_each_other(pipeline: StableDiffusionPipeline) -> None:
    def draw(seed: int) -> torch.Tensor:
        return sample(pipeline, PROMPTS[:1], [seed], steps=2 + seed)

    expected = [draw(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(draw, range(4)), expected, strict=True):
            assert torch.equal(found, wanted)


def test_context_is_as_long_as_the_tokenizer_says(pipeline: StableDiffusionPipeline) -> None:
    embeds = encode_prompts(pipeline, [*PROMPTS, PROMPTS[0]])
    assert embeds.cond.shape == embeds.uncond.shape == (3, 48, 16)
    assert torch.equal(embeds.cond[0], embeds.cond[2])
    assert not torch.equal(embeds.cond[0], embeds.cond[1])
    torch.testing.assert_close(embeds.uncond[1:2], encode_prompts(pipeline, [""]).cond)


def test_guidance_one_is_a_single_conditional_pass(pipeline: StableDiffusionPipeline) -> None:
    embeds, latents = encode_prompts(pipeline, PROMPTS), initial_latents(pipeline.unet.config, [1, 2])
    rows: list[int] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    try:
        with torch.no_grad():
            guided = noise_pred(pipeline.unet, latents, 500, embeds, 1.0)
            noise_pred(pipeline.unet, latents, 500, embeds, 3.0)
            cond = pipeline.unet(latents, 500, encoder_hidden_states=embeds.cond).sample
    finally:
        handle.remove()
    assert rows == [2, 4, 2]
    assert torch.equal(guided, cond)


def test_guidance_pushes_away_from_the_unconditional_prediction(pipeline: StableDiffusionPipeline) -> None:
    embeds, latents = encode_prompts(pipeline, PROMPTS), initial_latents(pipeline.unet.config, [1, 2])
    with torch.no_grad():
        cond = pipeline.unet(latents, 500, encoder_hidden_states=embeds.cond).sample
        uncond = pipeline.unet(latents, 500, encoder_hidden_states=embeds.uncond).sample
        guided = noise_pred(pipeline.unet, latents, 500, embeds, 4.0)
    assert (cond - uncond).abs().max() > 1e-3
    torch.testing.assert_close(guided, uncond + 4.0 * (cond - uncond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_each_sample_may_have_its_own_timestep(pipeline: StableDiffusionPipeline, guidance_scale: float) -> None:
    embeds, latents = encode_prompts(pipeline, PROMPTS), initial_latents(pipeline.unet.config, [1, 2])
    with torch.no_grad():
        both = noise_pred(pipeline.unet, latents, torch.tensor([900, 100]), embeds, guidance_scale)
        for row, t in enumerate((900, 100)):
            own = PromptEmbeds(embeds.cond[row : row + 1], embeds.uncond[row : row + 1])
            alone = noise_pred(pipeline.unet, latents[row : row + 1], t, own, guidance_scale)
            torch.testing.assert_close(both[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_gradients_pass_through_prediction_and_sampled_latents(pipeline: StableDiffusionPipeline) -> None:
    unet = tiny.make_unet()
    latents = sample(pipeline, PROMPTS, [1, 2], steps=1)
    noise_pred(unet, latents, 10, encode_prompts(pipeline, PROMPTS), 1.0).square().mean().backward()
    assert unet.conv_in.weight.grad.abs().sum() > 0


def test_half_precision_unet_keeps_latents_in_float32(pipeline: StableDiffusionPipeline) -> None:
    embeds, latents = encode_prompts(pipeline, PROMPTS[:1]), initial_latents(pipeline.unet.config, [1])
    with torch.no_grad():
        prediction = noise_pred(tiny.make_unet().bfloat16(), latents, 10, embeds, 3.0)
    assert prediction.dtype == torch.float32


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("t", [0, 400, 950])
def test_a_perfect_prediction_gives_back_image_and_noise(prediction_type: str, t: int) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    x0, noise = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    a = scheduler.alphas_cumprod[t]
    latents = scheduler.add_noise(x0, noise, torch.tensor([t]))
    truth = {"epsilon": noise, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * x0, "sample": x0}
    found = split_prediction(scheduler, truth[prediction_type], latents, t)
    torch.testing.assert_close(found.x0, x0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.noise, noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_samples_at_timesteps_of_their_own_are_read_one_by_one(prediction_type: str) -> None:
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    prediction, latents = torch.randn(2, 3, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([10, 400, 950])
    together = split_prediction(scheduler, prediction, latents, t)
    for row in range(3):
        one = slice(row, row + 1)
        alone = split_prediction(scheduler, prediction[one], latents[one], int(t[row]))
        torch.testing.assert_close(together.x0[one], alone.x0)
        torch.testing.assert_close(together.noise[one], alone.noise)


def test_unknown_prediction_type_is_named() -> None:
    scheduler = DDIMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="flow_prediction")
    with pytest.raises(ModelError, match="flow_prediction"):
        split_prediction(scheduler, torch.zeros(1), torch.zeros(1), 5)


def test_previews_end_in_the_image_itself(pipeline: StableDiffusionPipeline) -> None:
    seen: list[tuple[int, torch.Tensor]] = []
    latents = sample(pipeline, PROMPTS, [1, 2], steps=4, on_step=lambda i, x0: seen.append((i, x0)))
    assert [index for index, _ in seen] == [0, 1, 2, 3]
    torch.testing.assert_close(seen[-1][1], latents, rtol=1e-4, atol=1e-4)
    assert (seen[0][1] - latents).abs().max() > 1e-2


def test_cancelling_stops_at_the_step_and_leaves_the_pipeline_usable(pipeline: StableDiffusionPipeline) -> None:
    before = sample(pipeline, PROMPTS[:1], [1], steps=3)
    steps: list[int] = []

    def stop(index: int, x0: torch.Tensor) -> None:
        steps.append(index)
        if index == 1:
            raise Cancelled("stop")

    with pytest.raises(Cancelled):
        sample(pipeline, PROMPTS[:1], [1], steps=10, on_step=stop)
    assert steps == [0, 1]
    assert torch.equal(sample(pipeline, PROMPTS[:1], [1], steps=3), before)


def test_a_scheduler_that_draws_noise_draws_it_from_the_seed(pipeline: StableDiffusionPipeline) -> None:
    ancestral = with_scheduler(pipeline, EulerAncestralDiscreteScheduler(prediction_type="v_prediction"))
    together = sample(ancestral, PROMPTS, [1, 2], steps=4)
    alone = sample(ancestral, PROMPTS[1:], [2], steps=4)
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)


def test_decoded_images_are_float32_and_clamped(pipeline: StableDiffusionPipeline) -> None:
    images = decode(pipeline, 50 * initial_latents(pipeline.unet.config, [1, 2]))
    assert images.shape == (2, 3, 64, 64)
    assert images.dtype == torch.float32
    assert images.abs().max() == 1


def test_values_that_are_not_finite_are_refused(pipeline: StableDiffusionPipeline) -> None:
    with pytest.raises(ModelError, match="not finite"):
        decode(pipeline, torch.full((1, 12, 8, 8), torch.nan))


def test_autoencoder_kl_latents_are_shifted_scaled_and_undone(pipeline: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        scaling_factor=0.25,
        shift_factor=0.5,
    ).eval()
    other = StableDiffusionPipeline(**{**pipeline.components, "vae": vae}, requires_safety_checker=False)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mode = vae.encode(images).latent_dist.mode()
        expected = vae.decode(mode).sample.clamp(-1, 1)
    latents = encode_image(other, images)
    torch.testing.assert_close(latents, (mode - 0.5) * 0.25)
    torch.testing.assert_close(decode(other, latents), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 64, 64), r"\(B, 3, H, W\)"),
        (torch.zeros(1, 3, 60, 64), "multiples of 8"),
        (torch.full((1, 3, 64, 64), 255.0), r"\[-1, 1\]"),
        (torch.full((1, 3, 64, 64), torch.nan), r"\[-1, 1\]"),
    ],
)
def test_images_of_another_shape_or_range_are_refused(
    pipeline: StableDiffusionPipeline, images: torch.Tensor, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        encode_image(pipeline, images)


@pytest.mark.parametrize(
    "change",
    [
        {"prompts": "one text"},
        {"prompts": []},
        {"seeds": [1]},
        {"seeds": [1, -1]},
        {"seeds": [1, True]},
        {"steps": 0},
        {"steps": 2.5},
        {"guidance_scale": float("nan")},
    ],
)
def test_bad_requests_are_refused_before_anything_runs(
    pipeline: StableDiffusionPipeline, change: dict[str, object]
) -> None:
    request = {"prompts": PROMPTS, "seeds": [1, 2], "steps": 1, "guidance_scale": 3.0, **change}
    with pytest.raises(InputError):
        sample(pipeline, request.pop("prompts"), request.pop("seeds"), **request)
