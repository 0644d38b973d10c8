"""A few-step adapter draws all of a picture, or finishes what the generator's own solver began."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import PNDMScheduler, StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer

from medviz.errors import ModelError
from medviz.generation.guidance import Guidance, SemanticGuidance
from medviz.generation.plan import FewSteps, step_count
from medviz.generation.sampling import sample
from medviz.grounding.capture import capture
from medviz.models.adapters import also_using, using_adapter
from medviz.models.manifest import Manifest
from tests.tiny import make_pipeline

PROMPTS = ["a dermoscopic image with nevus", "a dermoscopic image with melanoma"]
CANONICAL = "a dermoscopic image with melanoma (MEL) showing hair, ruler"
ALONG_HAIR = SemanticGuidance("dermatology", ("hair",), 6.0, (150, 900))
KNOWN = {"few_step_adapter": "fast", "adapters": {"fast": {"timesteps": [999, 699, 400]}}}
GUIDANCE = Guidance(3.0, (150, 700), 0.25)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """Off, it holds an adapter that draws fast and one that aligns."""
    return make_pipeline("dermatology", loras=("fast", "aligned"))


@contextmanager
def watching(pipeline: StableDiffusionPipeline) -> Iterator[list[tuple[int, list[str]]]]:
    """Rows of each pass of the UNet and the adapters that are on for it."""
    passes: list[tuple[int, list[str]]] = []
    layer = next(module for module in pipeline.unet.modules() if isinstance(module, BaseTunerLayer))

    def note(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        passes.append((len(args[0]), [] if layer.disable_adapters else list(layer.active_adapters)))

    hook = pipeline.unet.register_forward_pre_hook(note)
    try:
        yield passes
    finally:
        hook.remove()


def test_a_few_step_adapter_goes_along_a_word_where_the_folder_says_so(pipeline: StableDiffusionPipeline) -> None:
    recipe = Guidance(3.0, semantic=ALONG_HAIR).as_recipe()
    plain = FewSteps.of(Manifest("dermatology", recipe=recipe, **KNOWN), 3, 3.0)
    assert plain == FewSteps("fast", (999, 699, 400))
    recipe["few_step_semantic_interval"] = [600, 750]
    along = FewSteps.of(Manifest("dermatology", recipe=recipe, **KNOWN), 3, 3.0)
    assert along == replace(plain, semantic=replace(ALONG_HAIR, interval=(600, 750)))
    with watching(pipeline) as passes:
        drawn = sample(pipeline, [CANONICAL, PROMPTS[1]], [1, 2], few_steps=along)
    assert passes == [(2, ["fast"]), (3, ["fast"]), (2, ["fast"])]
    without = sample(pipeline, [CANONICAL, PROMPTS[1]], [1, 2], few_steps=plain)
    assert torch.allclose(drawn[1], without[1], atol=1e-4)
    assert not torch.allclose(drawn[0], without[0], atol=1e-3)


def test_a_folder_says_how_much_of_other_numbers_of_steps_the_adapter_finishes() -> None:
    recipe = Guidance(3.0).as_recipe()
    assert FewSteps.of(Manifest("dermatology", recipe=recipe, **KNOWN), 20, 3.0) is None
    manifest = Manifest("dermatology", recipe={**recipe, "few_step_finish": 2}, **KNOWN)
    assert FewSteps.of(manifest, 20, 3.0) == FewSteps("fast", (699, 400), lead=20)
    assert FewSteps.of(manifest, 3, 3.0) == FewSteps("fast", (999, 699, 400))
    assert FewSteps.of(manifest, 20, 2.0) is None  # it has learnt one guidance
    assert str(FewSteps.of(manifest, 20, 3.0)) == "`fast` from timestep 699 on"


def test_what_comes_before_is_the_solvers_own_and_the_adapter_is_on_for_the_end_alone(pipeline) -> None:
    finishing, trail, plain = FewSteps("fast", (699, 400), lead=11), [], []
    settings = {"steps": 11, "guidance_scale": GUIDANCE}
    with using_adapter(pipeline.unet, "aligned"):
        whole = sample(pipeline, PROMPTS, [1, 2], **settings, trail=plain)
        with watching(pipeline) as passes:
            drawn = sample(pipeline, PROMPTS, [1, 2], **settings, few_steps=finishing, trail=trail)
        with watching(pipeline) as after:
            again = sample(pipeline, PROMPTS, [1, 2], **settings)
    # 999, 908, 817, 727, and then the adapter's own
    assert passes == [(4, ["aligned"])] * 4 + [(2, ["aligned", "fast"])] * 2
    assert after == [(4, ["aligned"])] * 11
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(trail[:4], plain[:4], strict=True))
    assert torch.equal(again, whole)
    assert not torch.allclose(drawn, whole, atol=1e-3)
    with using_adapter(pipeline.unet, "aligned"):
        assert not torch.equal(drawn, sample(pipeline, PROMPTS, [1, 2], few_steps=FewSteps("fast", (699, 400))))


@pytest.mark.parametrize(("lead", "weights"), [(20, [1] * 6 + [6, 8]), (10, [1] * 3 + [3, 4]), (1, [1, 1, 1])])
def test_a_larger_step_counts_for_those_in_whose_place_it_stands(pipeline, monkeypatch, lead, weights) -> None:
    told: list[float] = []
    with capture(pipeline.unet) as maps:
        begin = maps.begin_step
        monkeypatch.setattr(maps, "begin_step", lambda *given: told.append(given[3]) or begin(*given))
        sample(pipeline, PROMPTS[:1], [1], few_steps=FewSteps("fast", (699, 400), lead=lead), maps=maps)
    assert told == weights


@pytest.mark.parametrize(("steps", "count"), [(1, 3), (2, 3), (3, 3), (10, 5), (20, 8), (50, 17)])
def test_every_number_of_steps_can_be_finished(pipeline, steps: int, count: int) -> None:
    finishing, trail, seen = FewSteps("fast", (699, 400), lead=steps), [], []
    with capture(pipeline.unet, time_bins=2) as maps:
        drawn = sample(
            pipeline,
            PROMPTS[:1],
            [1],
            steps=steps,
            guidance_scale=GUIDANCE,
            few_steps=finishing,
            trail=trail,
            maps=maps,
            on_step=lambda index, x0: seen.append(index),
        )
    assert torch.isfinite(drawn).all()
    assert len(trail) == count == step_count(pipeline, steps, finishing)
    assert seen == list(range(count))
    assert maps.samples == 1


def test_without_one_the_steps_are_those_that_were_asked_for(pipeline) -> None:
    assert step_count(pipeline, 7) == 7
    assert step_count(pipeline, 20, FewSteps("fast", (999, 500))) == 2


def test_a_scheduler_that_cannot_stop_on_the_way_is_refused(pipeline) -> None:
    parts = {**pipeline.components, "scheduler": PNDMScheduler.from_config(pipeline.scheduler.config)}
    other = StableDiffusionPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ModelError, match="PNDMScheduler cannot stop where a few-step adapter goes on"):
        sample(other, PROMPTS[:1], [1], few_steps=FewSteps("fast", (699, 400), lead=20))


def test_one_more_adapter_joins_those_that_are_on_and_leaves_them(pipeline) -> None:
    layer = next(module for module in pipeline.unet.modules() if isinstance(module, BaseTunerLayer))
    with using_adapter(pipeline.unet, "aligned"):
        with also_using(pipeline.unet, "fast"):
            assert layer.active_adapters == ["aligned", "fast"]
        assert layer.active_adapters == ["aligned"]
        with also_using(pipeline.unet, None):
            assert layer.active_adapters == ["aligned"]
    assert layer.disable_adapters
    with also_using(pipeline.unet, "fast"):
        assert layer.active_adapters == ["fast"]
        assert not layer.disable_adapters
    assert layer.disable_adapters
