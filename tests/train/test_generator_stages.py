"""Contrastive, autoencoder and diffusion stages on invented pictures: each runs end to end and keeps its promises."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from medviz.errors import InputError, ModelError
from medviz.rewards.alignment import AlignmentNetwork
from tests.train.test_rl_processes import ended, started
from train import checkpoint, seeding
from train.autoencoder import AutoencoderConfig, AutoencoderLearner, principal_components, write_encoder
from train.contrastive import ContrastiveConfig, ContrastiveLearner, soft_contrastive_loss
from train.datasets.latents import cropped, split_latents, to_pixels
from train.datasets.split import Split
from train.datasets.weights import sample_weights
from train.diffusion import (
    DiffusionConfig,
    DiffusionLearner,
    denoising_loss,
    noise_schedule,
)
from train.loop import fit
from train.power_average import PowerAverage


def invented_split(name: str, count: int, size_px: int = 32) -> Split:
    rng = np.random.default_rng(count)
    rows = []
    for i in range(count):
        pixels = np.full((size_px, size_px, 3), (220, 170, 150), np.uint8)
        pixels[8:24, 8:24] = rng.integers(20, 120, 3)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, "PNG")
        rows.append(
            {
                "image_id": f"invented-{name}-{i}",
                "source": "HAM10000" if i % 4 else "ISIC2018-Task1-2",
                "lesion_id": f"lesion-{i // 2}",
                "diagnosis": "mel" if i % 3 == 0 else "nv",
                "artefact_hair": float(i % 2),
                "artefact_source": "manual",
                "image": {"bytes": stream.getvalue(), "path": None},
            }
        )
    return Split("dermatology", name, pa.Table.from_pylist(rows))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory):
    """Autoencoder, contrastive and diffusion trained for two steps each, in the order a recipe chain runs them."""
    root = tmp_path_factory.mktemp("stages")
    train, validation = invented_split("train", 12), invented_split("validation", 8)
    autoencoder = AutoencoderConfig(
        out=str(root / "autoencoder"),
        domains=("dermatology",),
        size_px=32,
        crop_px=16,
        width=8,
        steps=2,
        batch=2,
        decoder_blocks=(1, 1, 1, 0),
        latent_channels=6,
    )
    fit(AutoencoderLearner(autoencoder, [train.images(32)]), autoencoder)
    contrastive = ContrastiveConfig(
        out=str(root / "contrastive"),
        size_px=32,
        corpus=200,
        text_width=16,
        text_layers=1,
        image_width=64,
        image_layers=1,
        patch_px=16,
        projection=8,
        batch=4,
        steps=2,
    )
    fit(ContrastiveLearner(contrastive, train, validation), contrastive)
    diffusion = DiffusionConfig(
        out=str(root / "diffusion"),
        autoencoder=str(root / "autoencoder/model"),
        contrastive=str(root / "contrastive/model"),
        size_px=32,
        channels=(16, 32),
        cross_attention=(False, True),
        heads=2,
        orientations=2,
        batch=4,
        steps=2,
    )
    metrics = fit(DiffusionLearner(diffusion, train, validation), diffusion)
    return root, train, validation, diffusion, metrics


def test_exported_generator_is_a_stable_diffusion_pipeline(stages, caplog) -> None:
    root, *_ = stages
    caplog.set_level("WARNING", "diffusers")
    pipeline = StableDiffusionPipeline.from_pretrained(root / "diffusion/model")
    assert {each.dtype for each in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert "config attributes" not in caplog.text
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a dermoscopic image with melanoma", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 32, 32, 3)
    assert np.isfinite(image).all()


def test_metrics_name_their_n(stages) -> None:
    metrics = stages[-1]
    assert metrics["validation_n"] == 8
    assert metrics["images_seen"] == 8
    assert np.isfinite(metrics["validation_loss"])


def test_going_on_from_a_shipped_folder_leaves_its_text_encoder_alone(stages, tmp_path) -> None:
    """A pipeline folder stands in for the contrastive run, weights in bf16 and all; only the UNet learns."""
    root, train, validation, diffusion, _ = stages
    shipped = str(root / "diffusion/model")
    config = replace(
        diffusion, out=str(tmp_path / "more"), contrastive=shipped, init=shipped, train_text_encoder=False, steps=2
    )
    learner = DiffusionLearner(config, train, validation)
    assert learner.text_encoder.dtype == torch.float32
    started = {name: weight.clone() for name, weight in learner.text_encoder.state_dict().items()}
    unet = {name: weight.clone() for name, weight in learner.unet.state_dict().items()}
    fit(learner, config)
    assert all(torch.equal(weight, started[name]) for name, weight in learner.text_encoder.state_dict().items())
    assert not all(torch.equal(weight, unet[name]) for name, weight in learner.unet.state_dict().items())


def train_generator(config: DiffusionConfig) -> None:
    """What each of several processes does; it makes its pictures itself, always the same."""
    fit(DiffusionLearner(config, invented_split("train", 12), invented_split("validation", 8)), config)


def test_several_processes_train_what_one_trains(stages, tmp_path) -> None:
    """Among three, a batch of four does not divide evenly.

    Adam makes much of gradients that are next to nothing, whose rounding differs; so the runs are compared as a whole.
    """
    diffusion = replace(stages[3], steps=3, learning_rate=1e-3, warmup=1)
    for name, count in (("one", 1), ("three", 3)):
        config = replace(diffusion, out=str(tmp_path / name))
        assert ended(started(count, train_generator, config), 120) == [0] * count
    weights = DiffusionLearner(diffusion, *stages[1:3]).modules.state_dict()
    one, three = (checkpoint.load(tmp_path / name)[1]["modules"] for name in ("one", "three"))
    moved = sum((one[name] - weights[name]).square().sum() for name in weights)
    apart = sum((one[name] - three[name]).square().sum() for name in weights)
    assert moved > 0
    assert apart < (0.02**2) * moved
    lines = [json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "three")]
    assert lines[1] == pytest.approx(lines[0] | {"trained_s": lines[1]["trained_s"]}, rel=1e-4)


def test_a_generator_grown_from_a_shipped_folder_goes_on_where_that_was(stages, tmp_path) -> None:
    root, train, validation, diffusion, metrics = stages
    grows = {"init": str(root / "diffusion/model"), "grow": True, "channels": (32, 64)}
    config = replace(diffusion, out=str(tmp_path / "wide"), learning_rate=0.0, steps=1, **grows)
    learner = DiffusionLearner(config, train, validation)
    assert tuple(learner.unet.config.block_out_channels) == (32, 64)
    # the folder's weights are in bf16
    assert learner.validation_loss()[0] == pytest.approx(metrics["validation_loss"], rel=0.02)
    assert fit(learner, config)["unet_parameters"] > 3 * metrics["unet_parameters"]
    written = UNet2DConditionModel.from_pretrained(tmp_path / "wide/model/unet")
    assert tuple(written.config.block_out_channels) == (32, 64)
    with pytest.raises(InputError, match="grow needs init"):
        DiffusionLearner(replace(config, init=""), train, validation)
    with pytest.raises(InputError, match=r"init names .*nowhere, which holds no unet"):
        DiffusionLearner(replace(config, init=str(tmp_path / "nowhere")), train, validation)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_compiled_training_learns_what_plain_training_learns(stages, tmp_path) -> None:
    _, train, validation, diffusion, _ = stages
    losses = []
    for compiled in (False, True):
        config = replace(diffusion, out=str(tmp_path / str(compiled)), compile=compiled)
        losses.append(fit(DiffusionLearner(config, train, validation), config)["validation_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_contrastive_parts_reload_with_the_learnt_weights(stages) -> None:
    root, *_ = stages
    tokenizer = CLIPTokenizer.from_pretrained(root / "contrastive/model/tokenizer")
    text_encoder = CLIPTextModel.from_pretrained(root / "contrastive/model/text_encoder")
    features = CLIPVisionModelWithProjection.from_pretrained(root / "contrastive/model/features")
    assert text_encoder.config.vocab_size == len(tokenizer)
    assert features(torch.zeros(1, 3, 32, 32)).image_embeds.shape == (1, 8)


def test_the_alignment_reward_reads_what_a_contrastive_run_exports(stages) -> None:
    root, train, *_ = stages
    parts = root / "contrastive/model"
    network = AlignmentNetwork.load(parts / "alignment")
    images = to_pixels(train.images(32, [0, 1, 2]))
    features = CLIPVisionModelWithProjection.from_pretrained(parts / "features", dtype=torch.float32)
    with torch.no_grad():
        seen = torch.nn.functional.normalize(features(pixel_values=images).image_embeds, dim=-1)
    found = network.similarity(images, ["hair", "no hair", "hair"])
    torch.testing.assert_close(found, (seen * network._text(["hair", "no hair", "hair"])).sum(1))


def test_a_run_never_overwrites_another(stages) -> None:
    _, train, validation, diffusion, _ = stages
    with pytest.raises(ModelError, match="already holds a checkpoint"):
        fit(DiffusionLearner(diffusion, train, validation), diffusion)


def test_encoder_computes_principal_components_exactly() -> None:
    """Decoding its latents with the basis alone gives the best rank-K approximation of every 8x8 block."""
    images = np.random.default_rng(3).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    components = principal_components([images], 5)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(48,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0,) * 4,
        num_decoder_blocks=(1, 1, 1, 0),
        latent_channels=5,
    )
    write_encoder(vae, components, power=0.5, latent_std=0.6)
    pixels = to_pixels(images)
    with torch.inference_mode():
        latents = vae.encode(pixels).latents
    blocks = torch.nn.functional.unfold((pixels + 1) / 2, 8, stride=8).transpose(1, 2) - components.mean.flatten()
    gain = 0.6 * (components.std / components.std[0]) ** 0.5 / components.std
    expected = (blocks @ components.basis.flatten(1).T * gain).transpose(1, 2).reshape(latents.shape)
    assert torch.allclose(latents, expected, atol=1e-4)
    assert torch.allclose(latents[:, 0].std(), torch.tensor(0.6), atol=0.02)


def test_latent_cache_outlives_a_better_decoder_but_not_another_encoder(stages, tmp_path) -> None:
    root, train, *_ = stages
    vae = AutoencoderTiny.from_pretrained(root / "autoencoder/model")
    split_latents(vae, train, 32, 1, 0, tmp_path)
    with torch.no_grad():
        vae.decoder.layers[0].weight.add_(1)
    split_latents(vae, train, 32, 1, 0, tmp_path)
    split_latents(vae, train, 32, 1, 1, tmp_path)  # nothing was drawn with the seed
    assert len(list(tmp_path.iterdir())) == 1
    with torch.no_grad():
        vae.encoder.layers[-1].bias.add_(1)
    split_latents(vae, train, 32, 1, 0, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_crop_is_part_of_the_image_and_never_turned() -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(3)
    image = torch.stack([ramp.expand(64, 64), ramp.expand(64, 64).T, torch.full((64, 64), 9)], dim=-1).to(torch.uint8)
    assert torch.equal(cropped(image, 0.0, random.Random(0)), image)
    lowest = []
    for seed in range(20):
        crop = cropped(image, 0.25, random.Random(seed))
        assert crop.shape == image.shape
        assert crop.dtype == torch.uint8
        across, down = crop[32, :, 0].int(), crop[:, 32, 1].int()
        assert (across.diff() >= 0).all()
        assert (down.diff() >= 0).all()
        assert across[-1] - across[0] >= 0.7 * (image[0, -1, 0].int() - image[0, 0, 0].int())
        assert (crop[..., 2] == 9).all()
        lowest.append((across[0].item(), down[0].item()))
    assert len(set(lowest)) > 10  # anywhere in it


def test_crops_are_variants_of_their_own(stages, tmp_path) -> None:
    root, train, *_ = stages
    vae = AutoencoderTiny.from_pretrained(root / "autoencoder/model")
    turned = split_latents(vae, train, 32, 2, 0, tmp_path)
    crops = split_latents(vae, train, 32, 2, 0, tmp_path, crop=0.25)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(turned[0], crops[0])
    assert not torch.equal(turned[1], crops[1])
    assert torch.equal(crops, split_latents(vae, train, 32, 2, 0, tmp_path / "again", crop=0.25))
    assert not torch.equal(crops, split_latents(vae, train, 32, 2, 1, tmp_path, crop=0.25))
    with pytest.raises(InputError, match=r"crop is 1\.0; allowed"):
        split_latents(vae, train, 32, 2, 0, tmp_path, crop=1.0)


def test_dropout_is_on_while_training_and_off_in_what_is_exported(stages, tmp_path) -> None:
    _, train, validation, config, _ = stages
    learner = DiffusionLearner(replace(config, out=str(tmp_path / "run"), dropout=0.5), train, validation)
    shape = (1, learner.latents.shape[2], *learner.latents.shape[-2:])
    given = (torch.ones(shape), torch.tensor([500]), learner.embed(learner.tokens(["a dermoscopic image"])))
    with torch.no_grad():
        assert not torch.equal(learner.unet(*given).sample, learner.unet(*given).sample)
        learner.export(tmp_path / "model")
        unet = UNet2DConditionModel.from_pretrained(tmp_path / "model/unet")
        assert torch.equal(unet(*given).sample, unet(*given).sample)


def test_equal_captions_share_the_target() -> None:
    embeds = torch.nn.functional.normalize(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    same = soft_contrastive_loss(embeds, embeds, torch.tensor(0.0), ["a", "a"])
    assert same == pytest.approx(np.log(2), abs=1e-6)
    apart = soft_contrastive_loss(torch.eye(2), torch.eye(2), torch.tensor(50.0), ["a", "b"])
    assert apart == pytest.approx(0, abs=1e-6)


def test_coarse_schedule_ends_in_noise_and_spends_three_times_as_long_where_captions_decide() -> None:
    log_snr = {
        name: torch.logit(noise_schedule(name).alphas_cumprod.double()) for name in ("cosine", "coarse", "coarser")
    }
    assert log_snr["coarse"][-1] < -10
    assert log_snr["coarse"][0] > 9
    assert (log_snr["coarse"] < -3.7).sum() > 2.9 * (log_snr["cosine"] < -3.7).sum()
    # at twice the side the same shapes hide four times the noise power further down
    hidden = (log_snr["coarser"] < -3.7 - np.log(4)).sum() / (log_snr["coarse"] < -3.7).sum()
    assert hidden == pytest.approx(1, abs=0.06)
    with pytest.raises(
        InputError, match="schedule must be one of cosine, coarse, coarser, coarse_zero_snr, found 'linear'"
    ):
        noise_schedule("linear")
    with pytest.raises(InputError, match="prediction must be one of v_prediction, epsilon, found 'x0'"):
        noise_schedule("coarse", "x0")
    with pytest.raises(InputError, match="ends in noise alone"):
        noise_schedule("coarse_zero_snr", "epsilon")
    assert noise_schedule("coarse_zero_snr").alphas_cumprod[-1] == 0.0


@pytest.mark.parametrize(
    "options",
    [{"prediction": "epsilon"}, {"schedule": "coarse_zero_snr"}, {"fixed_captions": True}, {"ema_width": 0.1}],
    ids=str,
)
def test_other_schedules_and_captions_train_and_draw(stages, tmp_path, options) -> None:
    _, train, validation, diffusion, _ = stages
    config = replace(diffusion, out=str(tmp_path / "run"), **options)
    learner = DiffusionLearner(config, train, validation)
    fit(learner, config)
    pipeline = StableDiffusionPipeline.from_pretrained(
        tmp_path / "run/model", safety_checker=None, torch_dtype=torch.float32
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.scheduler.config.prediction_type == config.prediction
    image = pipeline("a dermoscopic image with melanoma", num_inference_steps=3, output_type="np").images
    assert np.isfinite(image).all()
    assert image.std() > 0


@pytest.mark.parametrize("width", [0.05, 0.1, 0.2])
def test_an_average_of_a_width_has_it_however_long_the_run_is(width) -> None:
    """Weights that are one at a single step give its share of the average: the whole profile, step by step."""
    for steps in (100, 400):
        weight = torch.nn.Parameter(torch.zeros(steps))
        average = PowerAverage([weight], width)
        for step in range(steps):
            with torch.no_grad():
                weight.zero_()[step] = 1.0
            average.step([weight])
        profile = average.shadow_params[0].double().numpy()
        places = (np.arange(steps) + 0.5) / steps
        assert profile.sum() == pytest.approx(1, abs=1e-5)
        assert profile.argmax() == steps - 1
        assert np.sqrt(profile @ places**2 - (profile @ places) ** 2) == pytest.approx(width, rel=0.05)


@pytest.mark.parametrize("width", [-0.1, 0.28, float("nan")])
def test_a_width_that_no_average_has_is_refused(width) -> None:
    with pytest.raises(InputError, match="ema_width must be above 0"):
        PowerAverage([torch.nn.Parameter(torch.zeros(1))], width)


def test_a_fixed_caption_is_one_an_image_and_a_new_one_is_not(stages, tmp_path) -> None:
    _, train, validation, diffusion, _ = stages
    wordings = {}
    for fixed in (False, True):
        config = replace(diffusion, out=str(tmp_path / f"{fixed}"), batch=12, caption_dropout=0.0, fixed_captions=fixed)
        learner = DiffusionLearner(config, train, validation)
        said: list[str] = []
        tokens = learner.tokens
        learner.tokens = lambda captions, said=said, tokens=tokens: said.extend(captions) or tokens(captions)
        for step in range(6):
            learner.batch(step)
        wordings[fixed] = set(said)
    assert len(wordings[True]) <= len(train) < len(wordings[False])


def test_denoising_loss_of_a_perfect_prediction_is_zero() -> None:
    schedule = noise_schedule("cosine")
    generator = torch.Generator().manual_seed(1)
    latents, noise = torch.randn(3, 4, 8, 8, generator=generator), torch.randn(3, 4, 8, 8, generator=generator)
    timesteps = torch.tensor([10, 500, 990])

    class Oracle(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states=None):
            return type("Output", (), {"sample": schedule.get_velocity(latents, noise, timestep)})

    oracle = Oracle(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    assert denoising_loss(oracle, latents, None, noise, timesteps, schedule, 5.0).abs().max() == 0


def test_min_snr_weight_of_v_prediction() -> None:
    schedule = noise_schedule("cosine")
    latents = torch.zeros(2, 4, 8, 8)
    noise = torch.ones(2, 4, 8, 8)
    timesteps = torch.tensor([1, 900])

    class Silent(UNet2DConditionModel):
        def forward(self, sample, timestep, encoder_hidden_states=None):
            return type("Output", (), {"sample": torch.zeros_like(sample)})

    silent = Silent(
        block_out_channels=(8,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4
    )
    loss = denoising_loss(silent, latents, None, noise, timesteps, schedule, 5.0)
    alpha = schedule.alphas_cumprod[timesteps]
    snr = alpha / (1 - alpha)
    # the target is sqrt(alpha) * noise, so the plain squared error is alpha
    assert torch.allclose(loss, snr.clamp(max=5) / (snr + 1) * alpha, rtol=1e-4)


def test_sample_weights_give_sources_their_shares_and_favour_rare_labels() -> None:
    split = invented_split("train", 12)
    plain = sample_weights(split, ("HAM10000=0.5", "ISIC2018-Task1-2=0.5"), 0.0)
    is_ham = np.array([r["source"] == "HAM10000" for r in split.records])
    assert plain[is_ham].sum() == pytest.approx(plain[~is_ham].sum())
    rare = sample_weights(split, (), 1.0)
    melanoma, nevus = (
        rare[[r["diagnosis"] == "mel" for r in split.records]],
        rare[[r["diagnosis"] == "nv" and not r["artefact_hair"] for r in split.records]],
    )
    assert melanoma.min() > nevus.max()


def test_sample_weights_give_labels_their_shares() -> None:
    split = invented_split("train", 12)
    weights = sample_weights(split, (), 0.5, ("hair=0.8", "melanoma=0.25"))
    drawn = weights / weights.sum()
    assert drawn[[r["artefact_hair"] > 0 for r in split.records]].sum() == pytest.approx(0.8, abs=1e-3)
    assert drawn[[r["diagnosis"] == "mel" for r in split.records]].sum() == pytest.approx(0.25, abs=1e-3)
    # images that differ in nothing that is named keep their proportion
    alike = [i for i, r in enumerate(split.records) if r["diagnosis"] == "nv" and r["artefact_hair"] > 0]
    plain = sample_weights(split, (), 0.5)
    assert weights[alike] / weights[alike[0]] == pytest.approx(plain[alike] / plain[alike[0]])
    for wrong in ("hair", "hair=1.0", "ruler=0.5"):
        with pytest.raises(InputError, match="label_shares"):
            sample_weights(split, (), 0.5, (wrong,))


def test_a_learning_rate_can_fall_over_more_steps_than_a_stage_has(stages, tmp_path) -> None:
    _, train, validation, diffusion, _ = stages
    config = replace(diffusion, out=str(tmp_path), steps=2, warmup=0, decay_steps=4)
    learner = DiffusionLearner(config, train, validation)
    fit(learner, config)
    assert learner.rates.get_last_lr() == pytest.approx([config.learning_rate / 2])


def test_batches_made_by_workers_train_the_same_weights_bit_for_bit(stages, tmp_path) -> None:
    _, train, validation, diffusion, _ = stages
    trained = []
    for workers in (0, 2):
        config = replace(diffusion, out=str(tmp_path / f"{workers}"), steps=3, workers=workers)
        learner = DiffusionLearner(config, train, validation)
        for step in range(config.steps):
            learner.update(step)
        trained.append(learner.modules.state_dict())
    assert all(torch.equal(alone, trained[1][name]) for name, alone in trained[0].items())


def test_noise_of_a_sample_does_not_depend_on_its_batch() -> None:
    together = seeding.normal((2, 3), 0, "x", 4, [0, 1, 2])
    alone = seeding.normal((2, 3), 0, "x", 4, [1])
    assert torch.equal(together[1:2], alone)
