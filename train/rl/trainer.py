"""`python -m train rl RECIPE`: align a generator with rewards by reinforcement learning.

Opens what the recipe names and hands it to the learner: the fine-tuned pipeline, the reward network, the held-out
judge, and the real latents of the anchor.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline
from medviz.rewards.attribute import attribute_reward, prompt_accuracy, prompt_targets
from medviz.rewards.classifier import AttributeClassifier

from medviz.domains import get_domain
from medviz.domains.base import Domain, ParsedPrompt
from medviz.errors import ModelError
from medviz.generation.sampling import encode_prompts
from train.config import read_recipe
from train.datasets.latents import split_latents
from train.datasets.split import open_split
from train.diffusion import sample_weights
from train.loop import fit
from train.rl.learner import RlLearner
from train.rl.recipe import RlConfig
from train.rl.rollout import Reward
from train.rl.safeguards import Anchor, Judge, Opinion


def open_pipeline(folder: str, device: str) -> StableDiffusionPipeline:
    """The pipeline in `folder`, fp32, frozen, without adapters. Raises ModelError when it cannot be loaded."""
    if not (Path(folder) / "model_index.json").is_file():
        raise ModelError(f"no pipeline in {folder!r} (model_index.json is missing): train the diffusion stage first")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, torch_dtype=torch.float32, safety_checker=None, use_safetensors=True, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    return pipeline.to(device)


def attribute_scorer(classifier: AttributeClassifier) -> Reward:
    """The continuous attribute reward of `classifier`: mean clamped logit margin of what was asked, in [-1, 1]."""

    def reward(images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> torch.Tensor:
        targets, mask = prompt_targets(parsed, classifier.heads)
        return attribute_reward(classifier.logits(images), targets, mask)

    return reward


def attribute_judge(classifier: AttributeClassifier) -> Judge:
    """What `classifier` says of images as the held-out judge; it compares them in its own feature space."""

    def judge(images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Opinion:
        targets, mask = prompt_targets(parsed, classifier.heads)
        logits = classifier.logits(images)
        accuracy = prompt_accuracy(logits, targets, mask, classifier.thresholds)
        return Opinion(attribute_reward(logits, targets, mask), accuracy, classifier.features(images))

    return judge


def open_anchor(config: RlConfig, pipeline: StableDiffusionPipeline, domain: Domain) -> Anchor:
    """The anchor on the domain's training images, drawn as the diffusion stage draws them."""
    split = open_split(config.domain, "train")
    vae = AutoencoderTiny.from_pretrained(config.autoencoder).eval() if config.autoencoder else pipeline.vae
    latents = split_latents(vae, split, config.size_px, config.orientations, config.latents_seed, Path(config.latents))
    return Anchor(
        latents=latents,
        caption=lambda i, rng: domain.caption(split.records[i], rng),
        embed=lambda captions: encode_prompts(pipeline, captions).cond,
        schedule=DDPMScheduler.from_config(pipeline.scheduler.config),
        seed=config.seed,
        weights=sample_weights(split, config.source_shares, config.rarity_power),
    )


def main(arguments: list[str]) -> None:
    """`python -m train rl RECIPE [overrides]`."""
    config = read_recipe(arguments[0], RlConfig, arguments[1:])
    domain = get_domain(config.domain)
    pipeline = open_pipeline(config.base, config.device)
    reward = AttributeClassifier.load(config.reward, config.device)
    judge = AttributeClassifier.load(config.judge, config.device)
    anchor = open_anchor(config, pipeline, domain) if config.anchor_weight > 0 else None
    fit(RlLearner(config, pipeline, domain, attribute_scorer(reward), attribute_judge(judge), anchor), config)
