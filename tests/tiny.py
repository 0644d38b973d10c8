"""Complete model folders at tiny size: the real classes with random weights, made in a second, never trained."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    EfficientNetConfig,
    EfficientNetForImageClassification,
    PreTrainedModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)

from medviz.domains import get_domain
from medviz.models.adapters import save_lora
from medviz.models.manifest import write_manifest
from train.pipeline_configs import drop_unknown_options
from train.tokenizer import build_tokenizer

MAX_LENGTH = 48  # tokens of a prompt, with start and end
LATENT_CHANNELS = 12
SAMPLE_SIZE = 8  # latents of 8 x 8, images of 64 x 64
IMAGE_SIZE_PX = 8 * SAMPLE_SIZE
CLASSIFIER_SIZE_PX = 32
ADAPTER = "attribute"
TRAINED_ON = {"rewards/attribute": "half A of train by group", "judge": "half B of train by group"}

CLASSES = {
    "dermatology": ("background", "lesion"),
    "radiology": ("background", "right_lung", "left_lung"),
}


def make_tokenizer(domain: str) -> CLIPTokenizer:
    return build_tokenizer(get_domain(domain).corpus(300, seed=0), MAX_LENGTH, vocabulary_size=900)


def make_unet(seed: int = 0) -> UNet2DConditionModel:
    """A UNet for latents (B, 12, 8, 8) and text (B, L, 16) with cross-attention at 8x8 and 4x4."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=SAMPLE_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=2,  # heads, as diffusers reads it
        cross_attention_dim=16,
    ).eval()


def add_lora(unet: UNet2DConditionModel, name: str = ADAPTER, seed: int = 0) -> None:
    """Add a rank-2 adapter with random weights on both sides, so that it changes what the UNet computes."""
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), name)


def make_pipeline(domain: str, seed: int = 0, *, loras: Sequence[str] = ()) -> StableDiffusionPipeline:
    """A text-to-image pipeline of 64 x 64 images, eval mode, fp32; the LoRA adapters it holds are off."""
    tokenizer = make_tokenizer(domain)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            projection_dim=16,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    with torch.no_grad():
        # CLIP starts its embeddings at 0.02: too faint for an untrained encoder to tell two prompts apart.
        text_encoder.get_input_embeddings().weight.normal_()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
        latent_channels=LATENT_CHANNELS,
    ).eval()
    with torch.no_grad():
        # Mid-grey with visible contrast, so that a change of the latents shows in 8-bit pixels.
        vae.decoder.layers[-1].weight.mul_(8)
        vae.decoder.layers[-1].bias.fill_(0.5)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=make_unet(seed),
        scheduler=DPMSolverMultistepScheduler(
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    for number, name in enumerate(loras):
        add_lora(pipeline.unet, name, number)
    if loras:
        pipeline.unet.disable_adapters()
    return pipeline


def make_classifier_folder(path: Path, domain: str, role: str, seed: int = 0) -> Path:
    """Write a classifier's folder. role: "rewards/attribute" (EfficientNet) or "judge" (ConvNeXt V2)."""
    heads = _heads(domain)
    torch.manual_seed(seed)
    model: PreTrainedModel
    if role == "judge":
        model = ConvNextV2ForImageClassification(
            ConvNextV2Config(hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_labels=len(heads))
        )
    else:
        model = EfficientNetForImageClassification(
            EfficientNetConfig(
                width_coefficient=0.25,
                depth_coefficient=1.0,
                in_channels=[32, 16, 24],
                out_channels=[16, 24, 40],
                kernel_sizes=[3, 3, 5],
                strides=[1, 2, 2],
                num_block_repeats=[1, 1, 1],
                expand_ratios=[1, 2, 2],
                hidden_dim=320,
                num_labels=len(heads),
            )
        )
    _save(model, path, heads)
    figures = {"auroc": 0.5, "ci": [0.4, 0.6], "accuracy": 0.5, "ece": 0.1, "n": 100}
    _write_json(
        path / "heads.json",
        {
            "architecture": type(model).__name__,
            "heads": heads,
            "size_px": CLASSIFIER_SIZE_PX,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.25, 0.25, 0.25],
            "temperature": dict.fromkeys(heads, 1.0),
            "threshold": dict.fromkeys(heads, 0.5),
            "trained_on": TRAINED_ON[role],
            "metrics": dict.fromkeys(heads, figures),
        },
    )
    return path


def make_segmenter_folder(path: Path, domain: str, seed: int = 0) -> Path:
    """Write a SegFormer's folder with the domain's classes."""
    classes = list(CLASSES[domain])
    torch.manual_seed(seed)
    model = SegformerForSemanticSegmentation(
        SegformerConfig(
            hidden_sizes=[8, 8, 16, 16],
            depths=[1, 1, 1, 1],
            num_attention_heads=[1, 1, 2, 2],
            mlp_ratios=[2, 2, 2, 2],
            decoder_hidden_size=16,
            num_labels=len(classes),
        )
    )
    _save(model, path, classes)
    sizes = {"size_px": IMAGE_SIZE_PX, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    _write_json(path / "classes.json", {"classes": classes, **sizes})
    return path


def make_domain_folder(path: Path, domain: str, seed: int = 0) -> Path:
    """Write a complete model folder: pipeline, one LoRA adapter, reward, judge, segmenter and manifest; return path.

    domain: "dermatology" or "radiology". The same arguments give the same files.
    """
    path = Path(path)
    # diffusers warns that the safety filter is off; these images are noise.
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    pipeline = make_pipeline(domain, seed)
    pipeline.save_pretrained(path, safe_serialization=True)
    drop_unknown_options(path / "vae")
    add_lora(pipeline.unet, seed=seed + 1)
    save_lora(pipeline.unet, path / "adapters" / ADAPTER, ADAPTER, details={"title": "Attribute reward"})
    make_classifier_folder(path / "rewards" / "attribute", domain, "rewards/attribute", seed + 2)
    make_classifier_folder(path / "judge", domain, "judge", seed + 3)
    make_segmenter_folder(path / "segmenter", domain, seed + 4)
    write_manifest(
        path,
        {
            "domain": domain,
            "preset": "tiny",
            "recipe": {"stage": "diffusion", "steps": 0},
            "data": [{"source": "none: random weights", "licence": "MIT", "citation": ""}],
            "training_cost": {"hours": 0.0, "device": "cpu"},
            "seeds": {"diffusion": seed},
            "metrics": {"fid": {"value": 300.0, "low": 280.0, "high": 320.0, "n": 100}, "kid": None},
            "default_adapter": ADAPTER,
        },
    )
    return path


def add_few_steps(folder: Path, timesteps: list[int], seed: int = 7, finish: int = 0) -> Path:
    """Give a model folder an adapter, of random weights, that draws at `timesteps` and ends with `finish` what the
    generator began; returns the adapter's folder."""
    unet, name = make_unet(), "few_steps"
    add_lora(unet, name, seed)
    save_lora(unet, folder / "adapters" / name, name, details={"timesteps": timesteps})
    fields = json.loads((folder / "manifest.json").read_text())
    for computed in ("files", "format_version", "adapters"):
        del fields[computed]
    recipe = {**fields["recipe"], **({"few_step_finish": finish} if finish else {})}
    write_manifest(folder, {**fields, "recipe": recipe, "few_step_adapter": name})
    return folder / "adapters" / name


def _heads(domain: str) -> list[str]:
    return [head.name for head in get_domain(domain).heads]


def _save(model: PreTrainedModel, path: Path, labels: list[str]) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}
    model.eval().save_pretrained(path, safe_serialization=True)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
