"""The options of the rl stage, and which of them contradict each other."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from medviz.errors import InputError
from train.config import GuidedConfig
from train.real_latents import RealLatentsConfig
from train.rl.advantages import ADVANTAGES
from train.rl.objectives import Objective, get_objective
from train.rl.policy import STARTS
from train.rl.scoring import refuse_stepped

COMPOSITE, LIKENESS = "composite", "likeness"
KEPT = ("best", "newest")


@dataclass
class RlConfig(RealLatentsConfig, GuidedConfig):
    """Options of the rl stage. `steps` counts epochs, each one rollout and `updates` optimiser steps."""

    steps_may_change: ClassVar[bool] = True
    base: str = ""
    """Folder of the fine-tuned pipeline to align."""
    reward: str = ""
    """Folder of the attribute classifier that is trained on."""
    reward_function: str = "attribute"
    """Which reward of `medviz.rewards.registry` is made of it, or `composite`."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """Rewards and their weights, of which `composite` is made; each is brought to unit spread first."""
    contrastive: str = ""
    """The alignment/ folder of a contrastive run's model, for the alignment reward."""
    segmenter: str = ""
    """Folder of the segmenter, for rewards that look at anatomy."""
    likeness_images: int = 0
    """Training images of the reward's half that the likeness reward tells pictures from; 0: none, and none are read."""
    likeness_captions: int = 128
    """Others of that half whose captions are drawn, so that both show one mix of things."""
    likeness_redrawn: int = 32
    """Captions drawn anew each epoch, in turn."""
    tone_blind: bool = False
    """Take from the rewards what mean colours explain of them within a prompt, by one line for all prompts."""
    judge: str = ""
    """Folder of the classifier that only looks on."""
    adapter: str = "attribute"
    """Name of the exported adapter."""
    title: str = "Attribute reward"
    """What the app calls the adapter."""
    objective: str = "forward"
    """One of `train.rl.objectives.OBJECTIVES`: forward, awm, ddpo, ddpo_sf, grpo or draft."""
    advantages: str = ""
    """running, group, centred or leave_one_out; empty: the objective's own."""

    invented_prompts: int = 32
    """Prompts drawn from the domain's grammar and trained on beside its validation prompts."""
    prompts: tuple[str, ...] = ()
    """More prompts that are trained on, e.g. those that name what a reward looks for."""
    prompts_per_epoch: int = 8
    images_per_prompt: int = 8
    """Images an epoch are prompts_per_epoch x images_per_prompt."""
    rollout_steps: int = 10
    """Solver steps of a rollout: the shipped solver for forward and awm, DDIM for the others (random but for draft)."""
    rollout_batch: int = 16
    """Images drawn at a time; memory and speed only."""
    timestep_spacing: str = "trailing"
    """Of the DDIM steps: trailing or leading."""
    window: int = 0
    """Consecutive random steps of a chain, which alone are trained on, at a place drawn each epoch; 0: all of them."""
    draft_steps: int = 1
    """Last steps that the reward's gradient goes through (draft), at most rollout_steps."""
    draft_random: bool = True
    """Draw the number of those steps from 1 .. draft_steps each epoch."""

    updates: int = 4
    """Optimiser steps an epoch; ddpo and grpo need at least 2, ddpo_sf takes 1."""
    micro_batch: int = 16
    """Images in one backward pass, each counted once for every timestep of it that the pass holds; memory and speed
    only, the gradient is the same."""
    timesteps_per_image: int = 2
    """Timesteps of each image trained on an epoch; 0: every random step of the chain (ddpo, ddpo_sf, grpo)."""
    learning_rate: float = 3e-4
    weight_decay: float = 1e-4
    start: str = ""
    """Folder of a LoRA adapter of the same shape, which training goes on from; empty: from no change at all."""
    rank: int = 16
    """Of LoRA, on the attention projections."""
    lora_alpha: float = 16.0
    lora_convolutions: bool = False
    """LoRA on the residual blocks' convolutions as well."""
    lora_start: str = "kaiming"
    """What LoRA's first factor starts from: kaiming, or gaussian, which at small ranks goes further at equal rate."""
    compile: bool = False
    """torch.compile the UNet: minutes of compiling at first, then faster, the more so the smaller the UNet is."""
    bf16: bool = False
    """The UNet's passes in bf16 by autocast; weights, optimiser, losses and log-probs stay fp32."""
    gradient_checkpointing: bool = False
    """Compute activations of UNet and decoder again for the backward pass instead of keeping them."""
    vae_slicing: bool = False
    """Decode one image at a time."""

    clip_range: float = 2e-4
    """Of the ratio in ddpo and grpo. A log-prob is a mean over elements, so smaller latents want a wider range."""
    noise_weighted: bool = False
    """Weigh each step of a random chain by the noise it draws, in gradient and clip (ddpo, grpo). Left out, the steps
    that draw next to none, of which the image depends least, have nearly all of the gradient."""
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
    """Share that the average which draws the images keeps an epoch (forward, awm); 0: the policy itself draws them."""
    anchor_weight: float = 0.5
    """Weight of the diffusion loss on real latents; 0: no anchor, and no training images are read."""
    anchor_batch: int = 16
    """Real latents an optimiser step."""
    min_snr_gamma: float = 5.0
    """Of the anchor's loss, as in the recipe that finished the base."""
    mean_held: int = 0
    """Captions of real images whose mean picture is held where the untrained model has it (forward); 0: none."""
    mean_redrawn: int = 32
    """Of them, drawn anew each epoch, in turn; what is learnt from."""
    mean_weight: float = 20.0
    """Weight of that beside the reward's objective, whose gradient is far noisier."""

    evaluate_every: int = 4
    """Epochs between looks by the judge."""
    evaluation_prompts: int = 16
    """Validation prompts shown to the judge, evenly spaced among the domain's."""
    evaluation_images: int = 4
    """Images a prompt and look, at least 2."""
    evaluation_steps: int = 10
    fidelity_images: int = 0
    """Training images of the judge's half that evaluations are held against; 0: none, and none are read."""
    fidelity_captions: int = 64
    """Others of that half whose captions are drawn once each to be held against them."""
    patience: int = 2
    """Evaluations in a row that must agree before the run stops early."""
    keep: str = "best"
    """Which adapter is exported. best: the eligible one that the judge likes best; newest: that of the last epoch,
    whatever the looks said, so that the judge has chosen nothing."""


def uses_likeness(config: RlConfig) -> bool:
    """Whether the likeness reward is among those the run is trained on."""
    return LIKENESS in rewards_of(config)


def needs_real_latents(config: RlConfig) -> bool:
    """Whether the run reads real images, latents or captions: for the anchor or to hold the mean."""
    return config.anchor_weight > 0 or config.mean_held > 0


def rewards_of(config: RlConfig) -> dict[str, float]:
    """The rewards a run is trained on and their weights. Raises InputError for a composite without any, or for weights
    that nothing is made of."""
    if config.reward_function != COMPOSITE:
        if config.reward_weights:
            raise InputError(f"reward_weights goes with the reward {COMPOSITE}, found {config.reward_function}")
        return {config.reward_function: 1.0}
    if not config.reward_weights:
        raise InputError("the reward composite needs reward_weights, e.g. {attribute: 1.0, anatomy: 0.5}")
    return dict(config.reward_weights)


def check(config: RlConfig) -> None:
    """Raises InputError for options that contradict each other or the method."""
    objective = get_objective(config.objective)
    for is_wrong, message in (*_of_the_run(config), *_of_the_method(config, objective)):
        if is_wrong:
            raise InputError(message)
    if objective.replays == "direct":
        refuse_stepped(list(rewards_of(config)), config.objective)


def _of_the_run(config: RlConfig) -> Iterator[tuple[bool, str]]:
    images = config.prompts_per_epoch * config.images_per_prompt
    yield config.updates > images, f"updates is {config.updates}; an epoch has {images} images, each update needs one"
    yield config.images_per_prompt < 2, f"images_per_prompt is {config.images_per_prompt}; comparing needs at least 2"
    yield config.evaluation_images < 2, f"evaluation_images is {config.evaluation_images}; diversity needs at least 2"
    yield config.lora_start not in STARTS, f"no lora_start {config.lora_start!r}; allowed are {', '.join(STARTS)}"
    yield config.keep not in KEPT, f"no keep {config.keep!r}; allowed are {', '.join(KEPT)}"
    yield not 0 < config.beta <= 1, f"beta is {config.beta}; allowed are 0 < beta <= 1"
    yield (
        not 0 <= config.average_decay < 1,
        f"average_decay is {config.average_decay}; allowed are 0 <= decay < 1",
    )
    yield (
        config.fidelity_images != 0 and config.fidelity_images < 4,
        f"fidelity_images is {config.fidelity_images}; allowed are 0 and at least 4",
    )
    yield (
        uses_likeness(config) and min(config.likeness_images, config.likeness_captions) < 4,
        f"likeness_images is {config.likeness_images} and likeness_captions {config.likeness_captions}; the likeness "
        "reward needs at least 4 of each",
    )
    yield config.likeness_redrawn < 1, f"likeness_redrawn is {config.likeness_redrawn}; allowed are 1 and more"
    yield config.fidelity_captions < 4, f"fidelity_captions is {config.fidelity_captions}; allowed are 4 and more"
    held = min(config.mean_held, config.mean_redrawn)
    yield (
        config.mean_held != 0 and held < max(config.updates, 2),
        f"mean_held is {config.mean_held} and mean_redrawn {config.mean_redrawn}; each of {config.updates} updates "
        "needs one of them, and a mean two",
    )
    yield config.mean_weight <= 0, f"mean_weight is {config.mean_weight}; allowed are those above 0"
    yield (
        config.advantages not in ("", *ADVANTAGES),
        f"no advantages {config.advantages!r}; allowed are {', '.join(ADVANTAGES)}, or empty for the objective's own",
    )


def _of_the_method(config: RlConfig, objective: Objective) -> Iterator[tuple[bool, str]]:
    name, replays, steps = config.objective, objective.replays, config.rollout_steps
    yield (
        config.updates < objective.minimum_updates,
        f"updates is {config.updates}; {name} needs at least {objective.minimum_updates}: with fewer every "
        "ratio is 1 when it is made and the clip never acts",
    )
    yield (
        0 < objective.maximum_updates < config.updates,
        f"updates is {config.updates}; {name} takes {objective.maximum_updates}: after it the images are another "
        "policy's, and nothing corrects for that",
    )
    yield (
        replays == "forward" and config.timesteps_per_image < 1,
        f"timesteps_per_image is {config.timesteps_per_image}; {name} needs at least 1",
    )
    yield (
        objective.needs_kl and config.kl_weight <= 0,
        f"kl_weight is {config.kl_weight}; {name} needs one above 0: without it an image below average is pushed away "
        "without end",
    )
    yield (
        replays != "forward" and config.average_decay > 0,
        f"average_decay goes with the forward objectives; {name} draws from the policy itself",
    )
    yield config.mean_held > 0 and name != "forward", f"mean_held goes with the forward objective, found {name}"
    yield (
        config.window != 0 and replays != "reverse",
        f"window is {config.window}; {name} has no random steps to choose from",
    )
    yield (
        config.noise_weighted and objective.minimum_updates < 2,
        f"noise_weighted goes with ddpo and grpo; {name} has no ratio to weigh",
    )
    yield not 0 <= config.window <= steps, f"window is {config.window}; allowed are 0 to rollout_steps, {steps}"
    yield (
        replays == "direct" and not 1 <= config.draft_steps <= steps,
        f"draft_steps is {config.draft_steps}; allowed are 1 to rollout_steps, {steps}",
    )
