"""The finish stage: a decoder learns texture from what its generator draws, and what is drawn keeps colour and form."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from medviz.errors import InputError
from medviz.generation.sampling import sample
from medviz.models.adapters import save_lora
from tests import tiny
from tests.train.test_generator_stages import invented_split
from train import checkpoint, finish
from train.datasets.latents import to_pixels
from train.finish import FinishConfig, FinishLearner, draw_latents, texture
from train.loop import fit
from train.rl.trainer import open_pipeline

SIZE = 32


def checked(count: int, seed: int = 0) -> np.ndarray:
    """uint8 (N, 32, 32, 3): flat colours under a fine chequerboard."""
    flat = np.random.default_rng(seed).integers(80, 170, (count, 1, 1, 3))
    board = np.indices((SIZE, SIZE)).sum(axis=0) // 2 % 2 * 80 - 40
    return (flat + board[None, ..., None]).astype(np.uint8)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("autoencoder")
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(1, 1, 1, 0),
        latent_channels=4,
        scaling_factor=2.0,
    ).save_pretrained(folder)
    return folder


def config_for(autoencoder: Path, out: Path, **options) -> FinishConfig:
    small = {"size_px": SIZE, "crop_px": 16, "latent_channels": 4, "batch": 8, "steps": 4, "warmup": 1, "log_every": 1}
    return FinishConfig(
        out=str(out), domains=("dermatology",), init=str(autoencoder), **{**small, "adversary_alone": 1, **options}
    )


def learner(config: FinishConfig) -> FinishLearner:
    """Of drawn latents that are unlike those of any real image."""
    drawn = 0.3 * torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    return FinishLearner(config, checked(20), drawn.half())


def test_texture_is_what_is_finer_than_the_blur() -> None:
    ramp = torch.linspace(-1, 1, 64).view(1, 1, 1, 64).expand(1, 3, 64, 64)
    assert texture(torch.full((2, 3, 64, 64), 0.3)).abs().max() < 1e-6
    assert texture(ramp)[..., 4:-4].abs().max() < 1e-5
    board = (torch.arange(64).view(-1, 1) + torch.arange(64)) % 2 * 2.0 - 1
    found = texture(board.expand(1, 3, 64, 64))
    assert found.shape == (1, 12, 32, 32)
    assert found.abs().min() > 0.7


def test_every_second_picture_is_drawn_with_the_adapter_and_once(tmp_path, monkeypatch) -> None:
    pipeline = tiny.make_pipeline("dermatology")
    pipeline.save_pretrained(tmp_path / "base")
    tiny.add_lora(pipeline.unet)
    save_lora(pipeline.unet, tmp_path / "lora", tiny.ADAPTER, details={"title": "Aligned"})
    config = FinishConfig(
        out=str(tmp_path / "run"), generator=str(tmp_path / "base"), adapter=str(tmp_path / "lora"),
        adapter_strength=0.5, drawn_images=5, drawn_steps=2, draw_batch=2, guidance_scale=2.0,
    )  # fmt: skip
    split = invented_split("train", 6)
    plain = replace(config, adapter="")
    opened = open_pipeline(config.generator, "cpu")
    unaligned = draw_latents(plain, opened, split, tmp_path / "cache")
    drawn = draw_latents(config, opened, split, tmp_path / "cache")
    apart = (drawn - unaligned).float().abs().amax(dim=(1, 2, 3))
    assert (apart[::2] < 1e-2).all()
    assert (apart[1::2] > apart[::2].max()).all()
    monkeypatch.setattr(finish, "sample", lambda *_, **__: pytest.fail("drawn again"))
    assert torch.equal(draw_latents(config, opened, split, tmp_path / "cache"), drawn)
    monkeypatch.setattr(finish, "sample", sample)
    more = draw_latents(replace(config, drawn_steps=3), open_pipeline(config.generator, "cpu"), split, tmp_path / "x")
    assert not torch.equal(more, drawn)


def test_the_decoder_goes_where_the_discriminator_sees_real_textures(autoencoder, tmp_path) -> None:
    """Once the discriminator stands still, what it says of drawn pictures is better if it is heeded."""
    said = {}
    for weight in (0.0, 30.0):
        made = learner(
            config_for(autoencoder, tmp_path, steps=80, learning_rate=3e-3, texture_weight=weight, square_weight=0.0)
        )
        for step in range(40):
            made.update(step)
        for group in made.adversary.optimizer.param_groups:
            group["lr"] = 0.0
        for step in range(40, 80):
            made.update(step)
        with torch.no_grad():
            pictured = texture(made.vae.decode(made.drawn_crops(99)).sample)
            said[weight] = made.adversary.loss(pictured, 99).item()
    assert said[30.0] < 0.9 * said[0.0], said


def test_a_resumed_run_is_the_uninterrupted_one(autoencoder, tmp_path) -> None:
    config = config_for(autoencoder, tmp_path / "whole")
    fit(learner(config), config)
    stopped = config_for(autoencoder, tmp_path / "stopped", checkpoint_every_s=0.0)
    half = learner(stopped)
    for step in range(2):
        half.update(step)
    checkpoint.save(tmp_path / "stopped", 2, {**half.state(), "trained_s": 0.0})
    resumed = replace(stopped, resume=True)
    fit(learner(resumed), resumed)
    (_, one), (_, other) = (checkpoint.load(tmp_path / name) for name in ("whole", "stopped"))
    for part, same in ((one["vae"], other["vae"]), (one["adversary"]["network"], other["adversary"]["network"])):
        assert part.keys() == same.keys()
        assert all(torch.equal(weight, same[name]) for name, weight in part.items())


def test_the_encoder_stays_bit_for_bit(autoencoder, tmp_path) -> None:
    config = config_for(autoencoder, tmp_path)
    fit(learner(config), config)
    before, after = (AutoencoderTiny.from_pretrained(folder) for folder in (autoencoder, tmp_path / "model"))
    for name, weight in before.encoder.state_dict().items():
        assert torch.equal(weight, after.encoder.state_dict()[name])
    pixels = to_pixels(checked(2))
    assert not torch.equal(before.decode(before.encode(pixels).latents).sample, after(pixels).sample)


def test_the_discriminator_is_heeded_once_it_has_learnt_alone(autoencoder, tmp_path) -> None:
    norms = {}
    for alone in (0, 5):
        made = learner(config_for(autoencoder, tmp_path, adversary_alone=alone, texture_weight=1e4))
        norms[alone] = made.update(0)["grad_norm"]
    assert norms[0] > 2 * norms[5]


def test_what_cannot_be_finished_is_refused(autoencoder, tmp_path) -> None:
    with pytest.raises(InputError, match="init must name"):
        learner(replace(config_for(autoencoder, tmp_path), init=""))
    with pytest.raises(InputError, match="crop_px is 64"):
        learner(config_for(autoencoder, tmp_path, crop_px=64))
    with pytest.raises(InputError, match="one domain"):
        finish.main([str(_recipe(tmp_path, autoencoder))])


def _recipe(folder: Path, autoencoder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"out: {folder}/run\ninit: {autoencoder}\ngenerator: {autoencoder}\n")
    return path
