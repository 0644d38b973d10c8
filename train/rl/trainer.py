"""`python -m train rl RECIPE`: align a generator with rewards by reinforcement learning.

Opens what the recipe names and hands it to the learner: the fine-tuned pipeline, the reward network, the held-out
judge, the real latents of the anchor, and real images that evaluations are held against.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, StableDiffusionPipeline

from medviz.domains import get_domain
from medviz.domains.base import Domain, ParsedPrompt
from medviz.errors import InputError, ModelError
from medviz.generation.prompts import encode_prompts
from medviz.grounding.anatomy import Segmenter
from medviz.rewards.alignment import AlignmentNetwork
from medviz.rewards.attribute import attribute_reward, prompt_accuracy, prompt_targets
from medviz.rewards.classifier import AttributeClassifier
from medviz.rewards.composite import composite
from medviz.rewards.likeness import Likeness
from train import processes, seeding
from train.classifier import HALVES
from train.compiling import compiled_forward
from train.config import parse
from train.datasets.latents import check_same_encoder
from train.datasets.split import open_split
from train.evaluate.features import FeatureSpace
from train.loop import fit
from train.real_latents import open_real_latents
from train.rl.learner import RlLearner
from train.rl.looking import RealImages
from train.rl.recipe import RlConfig, needs_real_latents, rewards_of, uses_likeness
from train.rl.safeguards import Anchor, Judge, Opinion
from train.rl.scoring import Scorer
from train.tracking import Tracker


def open_pipeline(folder: str, device: str, autoencoder: str = "") -> StableDiffusionPipeline:
    """The pipeline in `folder`, fp32, frozen, without adapters; with the autoencoder in that folder, if one is named.

    Raises ModelError when it cannot be loaded, InputError for an autoencoder with another encoder.
    """
    if not (Path(folder) / "model_index.json").is_file():
        raise ModelError(f"no pipeline in {folder!r} (model_index.json is missing): train the diffusion stage first")
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None, use_safetensors=True, local_files_only=True
    )
    if autoencoder:
        named = AutoencoderTiny.from_pretrained(autoencoder, dtype=torch.float32)
        check_same_encoder(pipeline.vae, named, autoencoder)
        pipeline.vae = named
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    # Channels last: a sixth faster on a CPU.
    pipeline.unet.to(memory_format=torch.channels_last)
    return pipeline.to(device)


def spare_memory(config: RlConfig, pipeline: StableDiffusionPipeline) -> None:
    """Turn on what the recipe spares memory by: the unet in bf16, checkpointed gradients, a decoder of slices."""
    unet, vae = pipeline.unet, pipeline.vae
    if config.bf16:
        # Around the unet's own forward: guidance, the step and its log-probability are computed outside, in fp32.
        unet.forward = torch.autocast(torch.device(config.device).type, torch.bfloat16)(unet.forward)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        vae.enable_gradient_checkpointing()
    if config.vae_slicing:
        vae.enable_slicing()


def open_scorer(config: RlConfig, domain: Domain, real: RealImages | None = None) -> Scorer:
    """The recipe's reward, with the networks that it names to look through; real: what likeness is told from."""
    classifier = AttributeClassifier.load(config.reward, config.device) if config.reward else None
    return Scorer(
        composite(rewards_of(config)),
        classifier=classifier,
        anatomy=Segmenter.load(config.segmenter, config.device) if config.segmenter else None,
        alignment=AlignmentNetwork.load(config.contrastive, config.device) if config.contrastive else None,
        likeness=Likeness(classifier.features, real.features.to(config.device)) if classifier and real else None,
        aspects=domain.aspects,
        device=config.device,
    )


def open_judge(config: RlConfig) -> Judge:
    """The held-out classifier's opinion of images; it compares them in its own feature space.

    Raises InputError when the judge and the reward are one folder: a judge that was trained on judges nothing.
    """
    if config.reward and Path(config.judge).resolve() == Path(config.reward).resolve():
        raise InputError(
            f"the judge is the reward network itself ({config.judge}); it must be one that is not trained on"
        )
    classifier = AttributeClassifier.load(config.judge, config.device)

    def judge(images: torch.Tensor, parsed: Sequence[ParsedPrompt]) -> Opinion:
        targets, mask = prompt_targets(parsed, classifier.heads)
        logits = classifier.logits(images)
        accuracy = prompt_accuracy(logits, targets, mask, classifier.thresholds)
        margin = attribute_reward(logits, targets, mask, thresholds=classifier.thresholds)
        return Opinion(margin, accuracy, classifier.features(images))

    return judge


def open_anchor(config: RlConfig, pipeline: StableDiffusionPipeline, domain: Domain) -> Anchor:
    """The anchor on the domain's training images, drawn as the diffusion stage draws them."""
    real = open_real_latents(config, pipeline)
    return Anchor(
        latents=real.latents,
        caption=lambda i, rng: domain.caption(real.split.records[i], rng),
        embed=lambda captions: encode_prompts(pipeline, captions).cond,
        schedule=DDPMScheduler.from_config(pipeline.scheduler.config),
        seed=config.seed,
        weights=real.weights,
        min_snr_gamma=config.min_snr_gamma,
    )


def open_real(config: RlConfig, role: str = "judge") -> RealImages:
    """Training images of the half that the network `role` learnt from, as it sees them, and captions of others.

    For the judge, what evaluations are held against (fidelity_images, fidelity_captions): its own half, so that no
    image which the reward has learnt from decides which adapter is kept. For the reward, what the likeness reward
    tells pictures from (likeness_images, likeness_captions). A function of the seed. Raises InputError when the half
    has fewer.
    """
    name, folder = ("fidelity", config.judge) if role == "judge" else ("likeness", config.reward)
    images_wanted, captions_wanted = (getattr(config, f"{name}_{what}") for what in ("images", "captions"))
    split, domain = open_split(config.domain, "train"), get_domain(config.domain)
    mine, wanted = np.flatnonzero(split.halves == HALVES[role]), images_wanted + captions_wanted
    if len(mine) < wanted:
        raise InputError(
            f"{name}_images and {name}_captions are {wanted} together; the {role}'s half of {config.domain} has "
            f"{len(mine)} images"
        )
    order = seeding.numpy_generator(config.seed, "rl-real").permutation(mine)
    images = split.images(config.size_px, np.sort(order[:images_wanted]).tolist())
    space = FeatureSpace(role, f"features of the {role}", AttributeClassifier.load(folder, config.device).features)
    captions = tuple(
        domain.caption(split.records[i], random.Random(seeding.key(config.seed, "rl-real-caption", int(i))))
        for i in order[images_wanted:wanted]
    )
    features = torch.from_numpy(space.embed(images, batch=config.rollout_batch, device=config.device))
    return RealImages(features, captions)


def main(arguments: list[str]) -> None:
    """`python -m train rl RECIPE [overrides]`."""
    config = parse(arguments, RlConfig)
    processes.join(config.device)
    tracker = Tracker(config)
    domain = get_domain(config.domain)
    pipeline = open_pipeline(config.base, config.device, config.autoencoder)
    if config.compile:
        pipeline.unet.forward = compiled_forward(pipeline.unet)
    spare_memory(config, pipeline)
    anchor = open_anchor(config, pipeline, domain) if needs_real_latents(config) else None
    real = open_real(config) if config.fidelity_images else None
    liked = open_real(config, "reward") if uses_likeness(config) else None
    scorer, judge = open_scorer(config, domain, liked), open_judge(config)
    captions = liked.captions if liked else ()
    fit(RlLearner(config, pipeline, domain, scorer, judge, anchor, real, tracker, captions), config, tracker)
    processes.leave()
