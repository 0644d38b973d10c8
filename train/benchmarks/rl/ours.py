"""Our side of the benchmark: the learner of the rl stage, without its looks and safeguards, which the peer has not."""

from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch

from medviz.domains import get_domain
from medviz.domains.base import Domain, ParsedPrompt
from medviz.errors import InputError
from medviz.rewards.composite import Composite
from medviz.rewards.registry import Drawn
from train.benchmarks.rl.task import Meter, Side, Work, redness
from train.compiling import compiled_forward
from train.rl.learner import RlLearner
from train.rl.recipe import RlConfig
from train.rl.safeguards import Opinion
from train.rl.scoring import Scorer
from train.rl.trainer import open_pipeline

DOMAIN = "dermatology"


def narrowed(domain: Domain, prompts: tuple[str, ...]) -> Domain:
    """`domain` with no other validation prompts than `prompts`."""
    kind = type("Narrowed", (type(domain),), {"validation_prompts": lambda _: prompts})
    return kind(**{f.name: getattr(domain, f.name) for f in fields(domain)})


def recipe(work: Work) -> RlConfig:
    """The options of the rl stage that do `work`. Its timesteps are spaced as the peer's: leading."""
    methods: dict[str, dict[str, Any]] = {
        "ddpo": {"timesteps_per_image": 0, "timestep_spacing": "leading"},
        "forward": {},
        "draft": {"timesteps_per_image": 0, "draft_steps": 1},
    }
    return RlConfig(
        out="",
        seed=work.seed,
        steps=work.epochs,
        domain=DOMAIN,
        adapter="bench",
        objective=work.method,
        invented_prompts=0,
        prompts_per_epoch=work.prompts_per_epoch,
        images_per_prompt=work.images_per_prompt,
        rollout_steps=work.steps,
        rollout_batch=work.sample_batch,
        guidance_scale=work.guidance_scale,
        updates=work.updates,
        learning_rate=work.learning_rate,
        rank=work.rank,
        lora_alpha=float(work.rank),
        anchor_weight=0.0,
        **{"micro_batch": work.batch, **methods[work.method], **work.learning},
    )


def _reward(drawn: Drawn) -> torch.Tensor:
    return redness(drawn.images / 2 + 0.5)


def _no_judge(_: torch.Tensor, __: Sequence[ParsedPrompt]) -> Opinion:
    raise InputError("the benchmark takes its own looks")


def learner(work: Work) -> RlLearner:
    """The learner on the pipeline of `work`; it has no judge, so only its epochs can be run, not its looks."""
    scorer = Scorer(Composite({"redness": _reward}, {"redness": 1.0}))
    domain = narrowed(get_domain(DOMAIN), work.prompts)
    config, pipeline = recipe(work), open_pipeline(work.base, "cpu")
    if config.compile:
        pipeline.unet.forward = compiled_forward(pipeline.unet)
    return RlLearner(config, pipeline, domain, scorer, _no_judge)


def opened(work: Work) -> Side:
    """The learner of `work`, ready to run epochs."""
    made = learner(work)
    meter = Meter(made.pipeline.unet)

    def epoch(number: int) -> float:
        with meter.phase("sample"):
            rollout = made.draw(number)
            rewards = made.rewarded(rollout)
        with meter.phase("train"):
            made.learn(number, rollout, rewards)
            made.policy.average(made.config.average_decay)
        return float(rewards.values[rewards.valid].mean())

    return Side(made.pipeline, meter, epoch, partial(made.policy.using, made.policy.behaviour))
