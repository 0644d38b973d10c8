"""The options of the rl stage, and which of them contradict each other."""

from dataclasses import dataclass

from medviz.errors import InputError
from train.config import StageConfig
from train.rl.objectives import get_objective


@dataclass
class RlConfig(StageConfig):
    """Options of the rl stage. `steps` counts epochs, each one rollout and `updates` optimiser steps."""

    domain: str = "dermatology"
    base: str = ""
    """Folder of the fine-tuned pipeline to align."""
    reward: str = ""
    """Folder of the attribute classifier that is trained on."""
    reward_function: str = "attribute"
    """Which reward of `medviz.rewards.registry` is made of it."""
    segmenter: str = ""
    """Folder of the segmenter, for rewards that look at anatomy."""
    judge: str = ""
    """Folder of the classifier that only looks on."""
    autoencoder: str = ""
    """Folder of the autoencoder whose latents of real images the anchor uses; empty: the base's own."""
    latents: str = "runs/latents"
    """Folder in which latents are kept; those of the diffusion stage with the same autoencoder are found there."""
    latents_seed: int = 0
    """Seed of the diffusion run whose latents these are."""
    size_px: int = 128
    """Side of the images the latents were made of."""
    orientations: int = 1
    """Orientations of each real image, as in the diffusion recipe."""
    source_shares: tuple[str, ...] = ()
    """SOURCE=SHARE of the real images, as in the diffusion recipe."""
    rarity_power: float = 0.5
    """How much rare labels are favoured among the real images, as in the diffusion recipe."""
    adapter: str = "attribute"
    """Name of the exported adapter."""
    title: str = "Attribute reward"
    """What the app calls the adapter."""
    objective: str = "forward"
    """forward, ddpo or grpo."""

    invented_prompts: int = 32
    """Prompts drawn from the domain's grammar and trained on beside its validation prompts."""
    prompts_per_epoch: int = 8
    images_per_prompt: int = 8
    """Images an epoch are prompts_per_epoch x images_per_prompt."""
    rollout_steps: int = 10
    """Solver steps of a rollout: the shipped solver for `forward`, stochastic DDIM for `ddpo` and `grpo`."""
    rollout_batch: int = 16
    """Images drawn at a time; memory and speed only."""
    guidance_scale: float = 3.0
    """Of every rollout and every evaluation; `ddpo` and `grpo` train at the same."""
    eta: float = 1.0
    """Noise of a stochastic DDIM step, 0 < eta <= 1."""
    timestep_spacing: str = "trailing"
    """Of the stochastic DDIM steps: trailing or leading."""

    updates: int = 4
    """Optimiser steps an epoch; ddpo and grpo need at least 2."""
    micro_batch: int = 16
    """Images in one backward pass; memory and speed only, the gradient is the same."""
    timesteps_per_image: int = 2
    """Timesteps of each image trained on an epoch; 0: every step of the chain (ddpo and grpo)."""
    train_guidance_scale: float = 1.0
    """Of the forward objective: 1 trains the conditional half alone at half the cost."""
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    rank: int = 16
    """Of LoRA, on the attention projections."""
    lora_alpha: float = 16.0
    lora_convolutions: bool = False
    """LoRA on the residual blocks' convolutions as well."""

    clip_range: float = 2e-4
    """Of the ratio in ddpo and grpo. A log-prob is a mean over elements, so smaller latents want a wider range."""
    advantage_clip: float = 5.0
    statistics_size: int = 32
    """Rewards remembered a prompt (ddpo)."""
    statistics_minimum: int = 16
    """Below so many a prompt is compared with the whole batch (ddpo)."""
    beta: float = 1.0
    """Strength of the implicit policies of the forward objective, in (0, 1]."""
    kl_weight: float = 0.0
    """Weight of the divergence from the adapter-free model; above 0 costs one more forward pass an image."""
    average_decay: float = 0.0
    """Share that the average which draws the images keeps an epoch (forward); 0: the policy itself draws them."""
    anchor_weight: float = 0.5
    """Weight of the diffusion loss on real latents; 0: no anchor, and no training images are read."""
    anchor_batch: int = 16
    """Real latents an optimiser step."""

    evaluate_every: int = 4
    """Epochs between looks by the judge."""
    evaluation_prompts: int = 16
    """Validation prompts shown to the judge, evenly spaced among the domain's."""
    evaluation_images: int = 4
    """Images a prompt and look, at least 2."""
    evaluation_steps: int = 10
    diversity_floor: float = 0.85
    """Least share of the untrained per-prompt diversity that an eligible adapter keeps."""
    patience: int = 2
    """Evaluations in a row that must agree before the run stops early."""


def check(config: RlConfig) -> None:
    """Raises InputError for options that contradict each other or the method."""
    objective = get_objective(config.objective)
    forward, images = objective.process == "forward", config.prompts_per_epoch * config.images_per_prompt
    few = (
        f"updates is {config.updates}; {config.objective} needs at least {objective.minimum_updates}: with fewer every "
        "ratio is 1 when it is made and the clip never acts"
    )
    refused = (
        (config.updates < objective.minimum_updates, few),
        (config.updates > images, f"updates is {config.updates}; an epoch has {images} images, each update needs one"),
        (config.images_per_prompt < 2, f"images_per_prompt is {config.images_per_prompt}; comparing needs at least 2"),
        (config.evaluation_images < 2, f"evaluation_images is {config.evaluation_images}; diversity needs at least 2"),
        (
            forward and config.timesteps_per_image < 1,
            f"timesteps_per_image is {config.timesteps_per_image}; the forward objective needs at least 1",
        ),
        (not 0 < config.beta <= 1, f"beta is {config.beta}; allowed are 0 < beta <= 1"),
        (not 0 <= config.average_decay < 1, f"average_decay is {config.average_decay}; allowed are 0 <= decay < 1"),
        (
            not forward and config.average_decay > 0,
            f"average_decay goes with the forward objective; {config.objective} draws from the policy itself",
        ),
    )
    for is_wrong, message in refused:
        if is_wrong:
            raise InputError(message)
