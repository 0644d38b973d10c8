"""Distillation: the student walks as it is trained, comes nearer to the teacher, and goes on where it stopped."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file

from medviz.errors import InputError
from medviz.generation.sampling import sample
from medviz.models.adapters import load_lora, using_adapter
from tests import tiny
from tests.train.test_evaluate_stage import write_split
from train import checkpoint, distil
from train.assemble import read_parts
from train.config import read_recipe
from train.distil import DistilConfig, DistilLearner, draw_trajectories, student_timesteps
from train.loop import fit
from train.rl.policy import LoraPolicy

RECIPES = Path(__file__).resolve().parents[2] / "train" / "recipes"
SMALL = {
    "domain": "dermatology",
    "teacher_steps": 8,
    "starts": (0, 3, 6),
    "trajectories": 10,
    "held_out": 4,
    "draw_batch": 4,
    "batch": 5,
    "rank": 4,
    "guidance_scale": 2.0,
    "warmup": 1,
    "log_every": 1,
}


def config_for(base: Path, out: Path, **options) -> DistilConfig:
    return DistilConfig(out=str(out), base=str(base), **{**SMALL, "steps": 4, **options})


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    tiny.make_pipeline("dermatology").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def learner(config: DistilConfig, cache: Path) -> DistilLearner:
    return DistilLearner(config, distil.open_pipeline(config.base, "cpu"), cache)


def test_trajectories_are_the_generators_own_and_drawn_once(base, cache, tmp_path, monkeypatch) -> None:
    config = config_for(base, tmp_path)
    pipeline = distil.open_pipeline(config.base, "cpu")
    drawn = draw_trajectories(config, pipeline, cache)
    assert drawn.states.shape[:2] == (14, 4)
    assert len(drawn.captions) == 14
    seeds = [distil.seeding.key(0, "distil", "noise", i) for i in (4, 5)]
    trail: list[torch.Tensor] = []
    finished = sample(pipeline, drawn.captions[4:6], seeds, steps=8, guidance_scale=config.guidance, trail=trail)
    expected = torch.stack([trail[0], trail[3], trail[6], finished], dim=1)
    torch.testing.assert_close(drawn.states[4:6].float(), expected, atol=2e-3, rtol=2e-3)

    def refuse(*_, **__):
        raise AssertionError("drawn again")

    monkeypatch.setattr(distil, "sample", refuse)
    again = draw_trajectories(config, pipeline, cache)
    assert torch.equal(again.states, drawn.states)
    with pytest.raises(AssertionError, match="drawn again"):
        draw_trajectories(replace(config, guidance_scale=3.0), pipeline, cache)


def test_the_student_is_trained_in_the_steps_that_it_draws_in(base, cache, tmp_path) -> None:
    made = learner(config_for(base, tmp_path), cache)
    with torch.no_grad():
        for weight in made.policy.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
        rows = torch.arange(4)
        latents = made.states[0, rows, 0].float()
        for number in range(len(made.timesteps)):
            latents = made._step(number, latents, rows)
    seeds = [distil.seeding.key(0, "distil", "noise", i) for i in range(4)]
    drawn = sample(made.pipeline, made.captions[:4], seeds, few_steps=made.few_steps)
    torch.testing.assert_close(latents, drawn, atol=5e-3, rtol=5e-3)  # the first noise was kept in fp16


@torch.no_grad()
def missed(made: DistilLearner) -> float:
    """How far the averaged student ends from the teacher, on what it learns from."""
    rows = torch.arange(made.config.trajectories)
    latents = made.states[0, rows, 0].float()
    with made.policy.using(made.policy.behaviour):
        for number in range(len(made.timesteps)):
            latents = made._step(number, latents, rows)
    return made._error(number, latents, made.states[0, rows].float()).mean().item()


def test_the_student_comes_nearer_and_the_generator_stays(base, cache, tmp_path) -> None:
    config = config_for(base, tmp_path / "run", steps=60, learning_rate=1e-2, average_decay=0.9)
    made = learner(config, cache)
    before = missed(made)
    plain = {name: weight.clone() for name, weight in made.pipeline.unet.state_dict().items() if "lora" not in name}
    metrics = fit(made, config)
    assert metrics is not None
    assert missed(made) < 0.9 * before
    assert {name: error["n"] for name, error in metrics["rmse_from_teacher"].items()} == {"student": 4, "solver": 4}
    assert metrics["unet_passes"] == {"student": 3, "teacher": 16}
    after = made.pipeline.unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in plain.items())
    pipeline = distil.open_pipeline(config.base, "cpu")
    load_lora(pipeline.unet, tmp_path / "run/model", "few_steps")
    seeds = [distil.seeding.key(0, "distil", "noise", 11)]
    with using_adapter(pipeline.unet, "few_steps"):
        read = sample(pipeline, made.captions[11:12], seeds, few_steps=made.few_steps)
    with made.policy.using(made.policy.name):
        kept = sample(made.pipeline, made.captions[11:12], seeds, few_steps=made.few_steps)
    torch.testing.assert_close(read, kept, atol=1e-4, rtol=1e-3)


def test_passes_that_measure_are_not_compiled(base, cache, tmp_path, monkeypatch) -> None:
    passes = []

    def compiled(unet):
        def forward(*inputs, **named):
            passes.append(len(inputs[0]))
            return unet(*inputs, **named)

        return forward

    monkeypatch.setattr(distil, "compiled_forward", compiled)
    made = learner(config_for(base, tmp_path, compile=True), cache)
    made.update(0)
    assert passes == [made.config.batch] * 3
    assert set(made.held_out_errors()) == {"student", "solver"}
    assert len(passes) == 3


def test_a_run_goes_on_from_the_adapter_of_another(base, cache, tmp_path) -> None:
    config = config_for(base, tmp_path / "first", steps=30, learning_rate=1e-2, average_decay=0.9)
    first = learner(config, cache)
    untrained = missed(first)
    fit(first, config)
    second = learner(config_for(base, tmp_path / "second", start=str(tmp_path / "first/model")), cache)
    assert missed(second) == pytest.approx(missed(first), rel=1e-3)
    assert missed(second) < untrained
    with pytest.raises(InputError, match="another rank"):
        learner(config_for(base, tmp_path / "third", start=str(tmp_path / "first/model"), rank=2), cache)


@pytest.fixture
def with_adversary(tmp_path, monkeypatch) -> dict[str, object]:
    write_split(tmp_path / "images/dermatology", "train", 12, seed=4)
    monkeypatch.setenv("MEDVIZ_DATA", str(tmp_path / "images"))
    return {
        "adversarial_weight": 0.5,
        "adversary_alone": 1,
        "orientations": 2,
        "size_px": 64,
        "latents": str(tmp_path / "latents"),
    }


@pytest.mark.parametrize("adversarial", [False, True])
def test_a_resumed_run_is_the_uninterrupted_one(base, cache, tmp_path, with_adversary, adversarial) -> None:
    options = with_adversary if adversarial else {}
    config = config_for(base, tmp_path / "whole", **options)
    fit(learner(config, cache), config)
    stopped = config_for(base, tmp_path / "stopped", checkpoint_every_s=0.0, **options)
    half = learner(stopped, cache)
    states = []
    for step in range(2):
        half.update(step)
        states.append(half.state())
    checkpoint.save(tmp_path / "stopped", 2, {**states[-1], "trained_s": 0.0})
    resumed = replace(stopped, resume=True)
    fit(learner(resumed, cache), resumed)
    (_, one), (_, other) = (checkpoint.load(tmp_path / name) for name in ("whole", "stopped"))
    parts = [one["policy"], one["average"], *([one["adversary"]["network"]] if adversarial else [])]
    others = [other["policy"], other["average"], *([other["adversary"]["network"]] if adversarial else [])]
    for part, same in zip(parts, others, strict=True):
        assert part.keys() == same.keys()
        assert all(torch.equal(weight, same[name]) for name, weight in part.items())


def test_passes_in_bf16_err_as_those_in_fp32_do(base, cache, tmp_path) -> None:
    full, half = (
        learner(config_for(base, tmp_path / str(bf16), bf16=bf16), cache).update(0)["loss"] for bf16 in (False, True)
    )
    assert half != full
    assert half == pytest.approx(full, rel=0.02)


def test_the_adversary_is_heeded_once_it_has_learnt_alone(base, cache, tmp_path, with_adversary) -> None:
    alone = learner(config_for(base, tmp_path / "a"), cache)
    watched = learner(config_for(base, tmp_path / "b", **with_adversary), cache)

    def weights(made: DistilLearner) -> torch.Tensor:
        return torch.cat([weight.detach().flatten() for weight in made.policy.parameters()])

    figures = [made.update(0) for made in (alone, watched)]
    assert torch.equal(weights(alone), weights(watched))
    assert figures[1].keys() - figures[0].keys() == {"adversary", "told_apart"}
    for made in (alone, watched):
        made.update(1)
    assert not torch.equal(weights(alone), weights(watched))


@pytest.fixture(scope="module")
def aligned(base, tmp_path_factory) -> Path:
    """An adapter that changes what the generator draws."""
    unet = distil.open_pipeline(str(base), "cpu").unet
    policy = LoraPolicy(unet, "aligned", rank=2, alpha=2.0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    folder = tmp_path_factory.mktemp("aligned")
    policy.save(folder, {"title": "Aligned"})
    return folder


def test_an_adapter_beside_is_learnt_with_from_what_it_draws(base, cache, tmp_path, aligned) -> None:
    config = config_for(base, tmp_path / "run", steps=3, beside=str(aligned))
    made = learner(config, cache)
    assert made.states.shape[:3] == (2, 14, 4)
    assert torch.equal(made.states[0], learner(config_for(base, tmp_path / "other"), cache).states[0])
    # The second kind is what the generator draws with the adapter.
    pipeline = distil.open_pipeline(config.base, "cpu")
    load_lora(pipeline.unet, aligned, "aligned")
    seeds = [distil.seeding.key(0, "distil", "noise", i) for i in (4, 5)]
    with using_adapter(pipeline.unet, "aligned"):
        drawn = sample(pipeline, made.captions[4:6], seeds, steps=8, guidance_scale=config.guidance)
    torch.testing.assert_close(made.states[1, 4:6, -1].float(), drawn, atol=2e-3, rtol=2e-3)
    assert not torch.equal(made.states[0, :, -1], made.states[1, :, -1])
    # Every second step has it on; neither it nor the generator is learnt.
    on: list[tuple[str, ...]] = []
    step = made._step
    layer = next(module for module in made.pipeline.unet.modules() if isinstance(module, BaseTunerLayer))
    made._step = lambda *given: on.append(tuple(layer.active_adapters)) or step(*given)
    kept = {name: weight.clone() for name, weight in made.pipeline.unet.state_dict().items() if "few_steps" not in name}
    metrics = fit(made, config)
    assert on == [("few_steps",)] * 3 + [("few_steps", "beside")] * 3 + [("few_steps",)] * 3
    after = made.pipeline.unet.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in kept.items())
    assert metrics is not None
    assert set(metrics["rmse_from_teacher"]) == {"student", "solver", "student_beside", "solver_beside"}
    saved = load_file(next((tmp_path / "run/model").glob("*.safetensors")))
    assert not any("beside" in name for name in saved)
    # What is exported draws with the adapter what the learner measured.
    load_lora(pipeline.unet, tmp_path / "run/model", "few_steps")
    with using_adapter(pipeline.unet, "few_steps", "aligned"):
        read = sample(
            pipeline, made.captions[11:12], [distil.seeding.key(0, "distil", "noise", 11)], few_steps=made.few_steps
        )
    with using_adapter(made.pipeline.unet, "few_steps", "beside"):
        mine = sample(
            made.pipeline,
            made.captions[11:12],
            [distil.seeding.key(0, "distil", "noise", 11)],
            few_steps=made.few_steps,
        )
    torch.testing.assert_close(read, mine, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("starts", [(), (1, 3), (0, 3, 3), (0, 8)])
def test_steps_that_the_teacher_does_not_have_are_refused(base, tmp_path, starts) -> None:
    config = config_for(base, tmp_path, starts=starts)
    with pytest.raises(InputError, match="starts must rise from 0 and stay below 8"):
        student_timesteps(config, distil.open_pipeline(config.base, "cpu"))


@pytest.mark.parametrize("wrong", [{"held_out": 1}, {"trajectories": 0}, {"rank": 0}, {"adversarial_weight": -1}])
def test_options_that_leave_nothing_to_learn_or_measure_are_refused(base, cache, tmp_path, wrong) -> None:
    (name,) = wrong
    with pytest.raises(InputError, match=f"{name} must be at least"):
        learner(config_for(base, tmp_path, **wrong), cache)


@pytest.mark.parametrize("domain", ["dermatology", "radiology"])
def test_the_recipes_learn_the_guidance_and_go_with_the_adapter_that_ship(domain) -> None:
    first, config = (
        read_recipe(RECIPES / f"{name}.yaml", DistilConfig, ["--domain", domain]) for name in ("distil-start", "distil")
    )
    parts = read_parts(str(RECIPES / f"assemble-{domain}.yaml"))
    assert config.start == f"{first.out}/model"
    if config.beside:
        assert config.beside == parts.adapters[parts.default_adapter]
    assert parts.adapters[parts.few_step_adapter] == f"{config.out}/model"
    assert first.domain == config.domain == domain
    assert config.base == parts.pipeline
    assert config.guidance == parts.guidance
