"""Along which timesteps a picture is drawn, by which solver, with which guidance: in parts, where a few-step adapter
draws all of it or takes over for the end."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from medviz.errors import ModelError
from medviz.generation.guidance import Guidance, SemanticGuidance
from medviz.limits import DEFAULT_GUIDANCE_SCALE

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from medviz.models.manifest import Manifest


@dataclass(frozen=True)
class FewSteps:
    """How a few-step adapter draws: at these timesteps, falling, one unguided pass each; its guidance is folded in.

    semantic: along words it may be guided all the same, at a step or two, where it has learnt too little of that.
    lead: of so many steps of the generator's own solver, guided as ever, those above the first timestep come before;
    None: nothing does, the adapter draws all of the picture.
    """

    adapter: str
    timesteps: tuple[int, ...]
    semantic: SemanticGuidance | None = None
    lead: int | None = None

    @classmethod
    def of(cls, manifest: Manifest, steps: int, guidance_scale: float) -> FewSteps | None:
        """That of a model folder at its own guidance scale: for as many steps as the adapter has, all of the picture.

        For another number of steps it is the end of it, where the folder's recipe says so (`few_step_finish`); else
        None.
        """
        recipe, name = manifest.recipe, manifest.few_step_adapter
        own = Guidance.of_recipe(recipe, manifest.domain, DEFAULT_GUIDANCE_SCALE)
        if name is None or guidance_scale != own.scale:
            return None
        timesteps = tuple(manifest.adapters[name]["timesteps"])
        semantic = None
        if own.semantic and "few_step_semantic_interval" in recipe:
            low, high = recipe["few_step_semantic_interval"]
            semantic = replace(own.semantic, interval=(int(low), int(high)))
        if steps == manifest.few_steps:
            return cls(name, timesteps, semantic)
        last = int(recipe.get("few_step_finish", 0))
        return cls(name, timesteps[-last:], semantic, lead=steps) if last else None

    def __str__(self) -> str:
        said = f"`{self.adapter}`, {self.semantic} on top" if self.semantic else f"`{self.adapter}`"
        return said if self.lead is None else f"{said} from timestep {self.timesteps[0]} on"


def fresh_scheduler(pipeline: StableDiffusionPipeline) -> SchedulerMixin:
    """A scheduler of the pipeline's kind with no state: schedulers count steps, so calls must not share one."""
    return type(pipeline.scheduler).from_config(pipeline.scheduler.config)


@dataclass(frozen=True)
class Part:
    """Timesteps that one scheduler walks through, how they are guided, and the adapter that is on for them as well.

    weights: of how many of the generator's own steps each stands in the place; empty: of one.
    """

    scheduler: SchedulerMixin
    timesteps: torch.Tensor
    guidance: float | Guidance
    adapter: str | None = None
    weights: tuple[int, ...] = ()


def parts_of(
    pipeline: StableDiffusionPipeline, steps: int, guidance: float | Guidance, few_steps: FewSteps | None
) -> list[Part]:
    """The parts of one drawing, in order."""
    own, device = fresh_scheduler(pipeline), pipeline.unet.device
    if few_steps is None:
        own.set_timesteps(steps, device=device)
        return [Part(own, own.timesteps, guidance)]
    from diffusers import DPMSolverMultistepScheduler

    # deterministic first-order steps (DDIM)
    few = DPMSolverMultistepScheduler.from_config(
        pipeline.scheduler.config, algorithm_type="dpmsolver++", solver_order=1, final_sigmas_type="zero"
    )
    few.set_timesteps(timesteps=list(few_steps.timesteps), device=device)
    end = Part(few, few.timesteps, Guidance(1.0, semantic=few_steps.semantic), few_steps.adapter)
    if few_steps.lead is None:
        return [end]
    if "timesteps" not in inspect.signature(own.set_timesteps).parameters:
        raise ModelError(f"{type(own).__name__} cannot stop where a few-step adapter goes on; DPM-Solver++ can")
    own.set_timesteps(few_steps.lead, device=device)
    first, replaced = few_steps.timesteps[0], own.timesteps
    spans = zip(few_steps.timesteps, (*few_steps.timesteps[1:], -1), strict=True)
    weights = tuple(max(int(((low < replaced) & (replaced <= high)).sum()), 1) for high, low in spans)
    before = [int(t) for t in replaced if t > first]
    own.set_timesteps(timesteps=[*before, first], device=device)  # its last step here ends at `first`
    return [Part(own, own.timesteps[:-1], guidance), replace(end, weights=weights)]


def step_count(pipeline: StableDiffusionPipeline, steps: int, few_steps: FewSteps | None = None) -> int:
    """How many steps `sample` takes, those of the few-step adapter's own included."""
    return sum(len(part.timesteps) for part in parts_of(pipeline, steps, 1.0, few_steps))


def sampling_settings(
    pipeline: StableDiffusionPipeline, steps: int, guidance: float | Guidance, few_steps: FewSteps | None
) -> dict[str, Any]:
    """Name what a drawing depends on beside the request and the models, in JSON's types.

    device, processor (the CPU's instruction set), threads and dtype decide how sums are rounded. parts: the schedulers
    in their order, each with its timesteps, guidance and the adapter that is on for it alone.
    """
    return {
        "device": pipeline.unet.device.type,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "parts": [
            {
                "scheduler": type(part.scheduler).__name__,
                "timesteps": [float(t) for t in part.timesteps],
                "guidance": str(part.guidance),
                "adapter": part.adapter,
            }
            for part in parts_of(pipeline, steps, guidance, few_steps)
        ],
    }


def semantic_of(parts: Sequence[Part]) -> SemanticGuidance | None:
    """What prompts are encoded for: the words are the same in all parts, whose intervals and scales may differ."""
    found = [part.guidance.semantic for part in parts if isinstance(part.guidance, Guidance)]
    return next((semantic for semantic in found if semantic is not None), None)
