"""The peer's side of the benchmark: `trl.DDPOTrainer` 0.23.1, the last release that has it, unpatched.

Configured as its documentation configures it (LoRA by its own pipeline class, guidance in training, running statistics
a prompt), in fp32 and on the CPU. What it has no option for stays its own: LoRA's start (Gaussian), alpha equal to its
rank of 4, timesteps shuffled within each image. Its progress bar is off.
"""

from contextlib import nullcontext
from typing import Any

import torch
from accelerate import PartialState

from medviz.errors import InputError
from train.benchmarks.rl.task import Meter, Side, Work, redness

LORA_RANK = 4  # of `DefaultDDPOStableDiffusionPipeline`, which has no option for it


def options(work: Work) -> dict[str, Any]:
    """The options of `DDPOConfig` that do `work`. Raises InputError for work that it cannot do in equal batches."""
    if work.rank != LORA_RANK:
        raise InputError(f"rank is {work.rank}; the peer's LoRA has rank {LORA_RANK} and no option for another")
    if work.images % work.batch or (work.images // work.batch) % work.updates:
        raise InputError(
            f"an epoch has {work.images} images in batches of {work.batch}; the peer needs whole batches and as many "
            f"of them in each of the {work.updates} updates"
        )
    if work.images % work.sample_batch or work.sample_batch % work.batch:
        raise InputError(
            f"sample_batch is {work.sample_batch}; the peer draws {work.images} images in whole batches, each of whole "
            f"training batches of {work.batch}"
        )
    batches = work.images // work.batch
    return {
        "seed": work.seed,
        "num_epochs": work.epochs,
        "save_freq": work.epochs + 1,  # no checkpoint: ours writes none here either
        "mixed_precision": "no",
        "allow_tf32": False,
        "accelerator_kwargs": {"cpu": True},
        "sample_num_steps": work.steps,
        "sample_eta": 1.0,
        "sample_guidance_scale": work.guidance_scale,
        "sample_batch_size": work.sample_batch,
        "sample_num_batches_per_epoch": work.images // work.sample_batch,
        "train_batch_size": work.batch,
        "train_gradient_accumulation_steps": batches // work.updates,
        "train_learning_rate": work.learning_rate,
        "train_adv_clip_max": work.learning["advantage_clip"],
        "train_clip_range": work.learning["clip_range"],
        "per_prompt_stat_tracking": True,
        "per_prompt_stat_tracking_buffer_size": int(work.learning["statistics_size"]),
        "per_prompt_stat_tracking_min_count": int(work.learning["statistics_minimum"]),
        "async_reward_computation": False,
    }


def open_trainer(work: Work, asked: list[str], seen: list[float]) -> Any:
    """The peer's trainer on the pipeline of `work`: it takes its prompts from the front of `asked` and appends its
    images' rewards to `seen`."""
    PartialState(cpu=True)  # before the peer is imported: its loggers and its accelerator take the state there is
    from trl import DDPOConfig, DDPOTrainer, DefaultDDPOStableDiffusionPipeline

    def reward(images: torch.Tensor, _: tuple[str, ...], __: tuple[Any, ...]) -> tuple[torch.Tensor, dict[str, Any]]:
        values = redness(images)
        seen.extend(values.tolist())
        return values, {}

    pipeline = DefaultDDPOStableDiffusionPipeline(work.base, use_lora=True)
    trainer = DDPOTrainer(DDPOConfig(**options(work)), reward, lambda: (asked.pop(0), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    return trainer


def opened(work: Work) -> Side:
    """The peer's trainer on the pipeline of `work`, ready to run epochs."""
    queue: list[str] = []
    found: list[float] = []
    trainer = open_trainer(work, queue, found)
    meter = Meter(trainer.sd_pipeline.unet)
    generate, compute = trainer._generate_samples, trainer.compute_rewards

    def generate_timed(*arguments: Any, **named: Any) -> Any:
        with meter.phase("sample"):
            return generate(*arguments, **named)

    def compute_timed(*arguments: Any, **named: Any) -> Any:
        with meter.phase("sample"):
            return compute(*arguments, **named)

    # Stop-watches around two of its methods; what they do is untouched.
    trainer._generate_samples, trainer.compute_rewards = generate_timed, compute_timed
    state = {"global_step": 0}

    def epoch(number: int) -> float:
        queue.extend(work.asked(number))
        found.clear()
        with meter.phase("train"):
            state["global_step"] = trainer.step(number, state["global_step"])
        return sum(found) / len(found)

    return Side(trainer.sd_pipeline.sd_pipeline, meter, epoch, nullcontext)
