"""The pipeline that every side starts from: a small Stable Diffusion of noise prediction, shortly trained.

The peer assumes noise prediction, so this one has it. Its latents are drawn, not encoded: each prompt has a smooth
pattern of its own, varied by smooth fields; the decoder's weights are random. So the generator knows a distribution
that guidance sharpens and rewards can move, and no image is needed to make it.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from medviz.domains.base import Domain
from medviz.generation.prompts import encode_prompts
from train import seeding
from train.tokenizer import build_tokenizer

LATENT = (4, 8, 8)  # channels, height, width; images have four times the side
WIDTH = 24
MAX_LENGTH = 32
_STAGE = "bench-rl"
_CORPUS, _VOCABULARY = 300, 900
_DROPOUT = 0.1  # share of prompts left empty, so that there is an unconditional half to guide away from
_LEARNING_RATE, _BATCH = 2e-3, 32
_STRENGTHS = (0.7, 0.6, 0.4)  # of the prompt's pattern, of the smooth variation, of the grain: unit variance


def untrained(domain: Domain, seed: int, width: int = WIDTH) -> StableDiffusionPipeline:
    """The pipeline with random weights; its scheduler is DDIM with a leading spacing, whose last step is random."""
    tokenizer = build_tokenizer(domain.corpus(_CORPUS, seed=seed), MAX_LENGTH, vocabulary_size=_VOCABULARY)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.key(seed, _STAGE, "weights"))
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=1,
                num_attention_heads=2,
                projection_dim=width,
                max_position_embeddings=MAX_LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        ).eval()
        with torch.no_grad():
            # CLIP starts its embeddings at 0.02: too faint for an untrained encoder to tell two prompts apart.
            text_encoder.get_input_embeddings().weight.normal_()
        vae, unet = _autoencoder(), _unet(width)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
            timestep_spacing="leading",
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _autoencoder() -> AutoencoderTiny:
    widths = (8, 8, 8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=widths,
        decoder_block_out_channels=widths,
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=LATENT[0],
    ).eval()
    with torch.no_grad():
        # Mid-grey with visible contrast.
        vae.decoder.layers[-1].weight.mul_(8)
        vae.decoder.layers[-1].bias.fill_(0.5)
    return vae


def _unet(width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=LATENT[1],  # one number: the peer multiplies it
        in_channels=LATENT[0],
        out_channels=LATENT[0],
        block_out_channels=(width, 2 * width),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=4,  # heads, as diffusers reads it
        cross_attention_dim=width,
    ).eval()


def drawn_latents(prompt_ids: torch.Tensor, patterns: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Clean latents (B, *LATENT) of prompts (B,), patterns (P, *LATENT) being those of all prompts."""
    pattern, smooth, grain = _STRENGTHS
    varied = smooth_fields(len(prompt_ids), generator)
    return pattern * patterns[prompt_ids] + smooth * varied + grain * torch.randn(varied.shape, generator=generator)


def smooth_fields(count: int, generator: torch.Generator) -> torch.Tensor:
    """Fields (count, *LATENT) of about unit variance that change over half the picture."""
    coarse = torch.randn((count, LATENT[0], 2, 2), generator=generator)
    return torch.nn.functional.interpolate(coarse, size=LATENT[1:], mode="nearest")


def write_base(folder: Path, domain: Domain, prompts: tuple[str, ...], *, steps: int, seed: int) -> int:
    """Train the pipeline on `prompts` for `steps` steps of 32 latents and save it; returns the UNet's parameters."""
    pipeline = untrained(domain, seed)
    unet, noising = pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config)
    embeds = encode_prompts(pipeline, [*prompts, ""]).cond
    patterns = smooth_fields(len(prompts), seeding.torch_generator(seed, _STAGE, "patterns"))
    optimizer = torch.optim.AdamW(unet.parameters(), _LEARNING_RATE)
    for step in range(steps):
        generator = seeding.torch_generator(seed, _STAGE, "base", step)
        ids = torch.randint(len(prompts), (_BATCH,), generator=generator)
        clean = drawn_latents(ids, patterns, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(noising.config.num_train_timesteps, (_BATCH,), generator=generator)
        told = torch.where(torch.rand(_BATCH, generator=generator) < _DROPOUT, len(prompts), ids)
        prediction = unet(noising.add_noise(clean, noise, timesteps), timesteps, embeds[told], return_dict=False)[0]
        optimizer.param_groups[0]["lr"] = _LEARNING_RATE * (1 - step / steps)
        optimizer.zero_grad()
        (prediction - noise).square().mean().backward()
        optimizer.step()
    pipeline.save_pretrained(folder, safe_serialization=True)
    return sum(p.numel() for p in unet.parameters())
