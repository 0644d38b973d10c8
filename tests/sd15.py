"""Stable Diffusion 1.5's pipeline with random weights, at its own size or tiny: the same classes and options."""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from tests import tiny
from train.rl.trainer import main

RECIPE = Path(__file__).parents[1] / "train" / "recipes" / "rl-sd15.yaml"
MAX_LENGTH = 77  # tokens of a prompt
WIDTH = 768  # of the text encoder
UNET = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT = {"hidden_size": WIDTH, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
SCHEDULE = {
    "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "skip_prk_steps": True,
    "set_alpha_to_one": False, "steps_offset": 1,
}  # fmt: skip


def make_unet(**smaller: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(**{**UNET, **smaller}).eval()


def make_vae(**smaller: object) -> AutoencoderKL:
    return AutoencoderKL(**{**VAE, **smaller}).eval()


def make_text_encoder(**smaller: object) -> CLIPTextModel:
    config = {**TEXT, "vocab_size": 49408, "max_position_embeddings": MAX_LENGTH, "hidden_act": "quick_gelu", **smaller}
    return CLIPTextModel(CLIPTextConfig(projection_dim=config["hidden_size"], **config)).eval()


def make_pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, text_encoder: CLIPTextModel
) -> StableDiffusionPipeline:
    """A pipeline of these parts, with the words of dermatology."""
    tokenizer = tiny.make_tokenizer("dermatology")
    tokenizer.model_max_length = MAX_LENGTH
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_tiny_pipeline() -> StableDiffusionPipeline:
    """A pipeline of 64 x 64 images with all blocks of the real one."""
    torch.manual_seed(0)
    return make_pipeline(
        make_unet(sample_size=8, block_out_channels=(8, 8, 16, 16), cross_attention_dim=16, norm_num_groups=4),
        make_vae(sample_size=64, block_out_channels=(4, 4, 8, 8), norm_num_groups=4),
        make_text_encoder(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2),
    )


def write_models(folder: Path, pipeline: StableDiffusionPipeline) -> Path:
    """Write what the recipe names, base/, reward/ and judge/, the classifiers tiny; returns the folder."""
    pipeline.save_pretrained(folder / "base", safe_serialization=True)
    # Of the judge's kind: an untrained EfficientNet gives every image the same reward.
    tiny.make_classifier_folder(folder / "reward", "dermatology", "judge", seed=1)
    tiny.make_classifier_folder(folder / "judge", "dermatology", "judge")
    return folder


def run_recipe(models: Path, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """One epoch of the recipe on `models` with `options` changed: the final metrics and the epoch's figures."""
    options = {
        "domain": "dermatology", "out": out, "base": models / "base", "reward": models / "reward",
        "judge": models / "judge", "steps": 1,
        "prompts_per_epoch": 2, "updates": 2, "evaluation_prompts": 2, "evaluation_images": 2, "fidelity_images": 0,
        "evaluate_every": 1, **options,
    }  # fmt: skip
    main([str(RECIPE), *(text for name, value in options.items() for text in (f"--{name}", str(value)))])
    figures = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return json.loads((out / "metrics.json").read_text()), figures
