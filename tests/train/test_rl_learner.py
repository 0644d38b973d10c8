import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline

from medviz.domains import get_domain
from medviz.errors import InputError, ModelError
from medviz.generation.sampling import decode, decode_latents, sample
from medviz.models.adapters import load_lora, using_adapter
from medviz.rewards.composite import Composite
from tests import tiny
from train import checkpoint
from train.loop import fit
from train.rl.learner import RlLearner
from train.rl.prompts import invented_prompts
from train.rl.recipe import RlConfig
from train.rl.safeguards import Opinion
from train.rl.scoring import Scorer

DOMAIN = get_domain("dermatology")
SMALL = RlConfig(
    out="",
    steps=2,
    adapter="bright",
    objective="ddpo",
    invented_prompts=2,
    prompts_per_epoch=2,
    images_per_prompt=4,
    rollout_steps=4,
    rollout_batch=8,
    guidance_scale=2.0,
    updates=2,
    micro_batch=8,
    timesteps_per_image=2,
    rank=2,
    lora_alpha=2.0,
    anchor_weight=0.0,
    evaluate_every=2,
    evaluation_prompts=2,
    evaluation_images=2,
    evaluation_steps=2,
    checkpoint_every_s=1e9,
    log_every=1,
)


def brightness(drawn):
    return drawn.images.mean(dim=(1, 2, 3))


def onlooker(images, parsed):
    return Opinion(images.mean(dim=(1, 2, 3)), torch.ones(len(images)), images.flatten(1)[:, ::64])


@pytest.fixture(scope="module")
def base():
    return tiny.make_pipeline("dermatology")


def copied(base, prediction_type="v_prediction"):
    config = {**base.scheduler.config, "prediction_type": prediction_type, "lambda_min_clipped": -5.1}
    if prediction_type == "epsilon":
        # Stable Diffusion's own: the cosine schedule ends in noise alone, from which no noise prediction can start.
        config |= {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    return StableDiffusionPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=copy.deepcopy(base.unet),
        scheduler=DPMSolverMultistepScheduler.from_config(config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def learner(base, reward=brightness, judge=onlooker, prediction_type="v_prediction", anchor=None, **options):
    scorer = Scorer(Composite({"given": reward}, {"given": 1.0}))
    return RlLearner(replace(SMALL, **options), copied(base, prediction_type), DOMAIN, scorer, judge, anchor)


def gradient(learner):
    return torch.cat([p.grad.flatten() for p in learner.policy.parameters()])


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
@pytest.mark.parametrize("objective", ["ddpo", "grpo"])
def test_ratio_is_one_before_the_first_update_and_not_after(base, prediction_type, objective):
    # Other batch sizes in rollout and replay, and the divergence's adapter switching, must not disturb it.
    made = learner(
        base, prediction_type=prediction_type, objective=objective, rollout_batch=3, micro_batch=8,
        timesteps_per_image=0, kl_weight=0.1, learning_rate=1e-2,
    )  # fmt: skip
    rollout = made.draw(0)
    assert rollout.chain.dtype == rollout.log_probs.dtype == torch.float32
    advantages, rows = np.ones(8, np.float32), np.arange(8)
    assert made.accumulate(0, rollout, advantages, rows)["ratio_deviation"] < 1e-5
    made.optimizer.step()
    assert made.accumulate(0, rollout, advantages, rows)["ratio_deviation"] > 1e-5


def test_dropout_is_off_and_guidance_the_same_in_rollout_and_replay(base):
    pipeline, asked = copied(base), []
    for module in pipeline.unet.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    pipeline.unet.train()
    scorer = Scorer(Composite({"given": brightness}, {"given": 1.0}))
    made = RlLearner(replace(SMALL, timesteps_per_image=0, updates=2), pipeline, DOMAIN, scorer, onlooker)

    def note(_, __, named, ___):
        asked.append(named["encoder_hidden_states"].detach())

    pipeline.unet.register_forward_hook(note, with_kwargs=True)
    rollout = made.draw(0)
    drawn = len(asked)
    figures = made.accumulate(0, rollout, np.ones(8, np.float32), np.arange(8))
    assert figures["ratio_deviation"] < 1e-5
    assert len(asked) == 2 * drawn
    embeds = made.table.embeds(rollout.prompt_ids)
    assert all(torch.equal(text, torch.cat([embeds.uncond, embeds.cond])) for text in asked)


def test_a_reward_can_be_followed_through_the_decoder_that_is_served(base):
    made = learner(base, objective="draft", updates=1, draft_steps=2, draft_random=False)
    rollout = made.draw(0)
    latents = rollout.latents.clone().requires_grad_()
    images = decode_latents(made.pipeline.vae, latents)
    assert torch.equal(images.detach(), decode(made.pipeline, rollout.latents))
    figures = made.accumulate(0, rollout, np.zeros(8, np.float32), np.arange(8))
    # Before any update the tail ends where the rollout ended.
    assert figures["tail_reward"] == pytest.approx(made.rewarded(rollout).values.mean(), rel=1e-4)
    assert gradient(made).abs().max() > 0
    assert made.forwards["with gradient"] == 2 * 8 * 2  # steps, images, both halves of guidance


def test_the_noise_of_an_image_does_not_depend_on_its_batch(base):
    together, apart = learner(base).draw(1), learner(base, rollout_batch=1).draw(1)
    torch.testing.assert_close(together.chain, apart.chain, rtol=1e-4, atol=1e-4)
    assert not torch.equal(together.chain[0, 0], together.chain[1, 0])
    assert not torch.equal(together.chain[:, 0], learner(base).draw(2).chain[:, 0])


@pytest.mark.parametrize("objective", ["ddpo", "grpo", "forward"])
def test_micro_batches_add_up_to_the_full_gradient(base, objective):
    found = []
    for micro_batch in (8, 3, 16):  # an image's timesteps each by itself, cut across, and together
        made = learner(base, objective=objective, micro_batch=micro_batch, kl_weight=0.1)
        # Away from the start, where the divergence and the implicit policies have gradients of their own.
        with torch.no_grad():
            for number, weight in enumerate(made.policy.parameters()):
                weight.add_(0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
        rollout = made.draw(0)
        made.accumulate(0, rollout, np.linspace(-2, 2, 8, dtype=np.float32), np.arange(8))
        found.append(gradient(made))
    assert found[0].abs().max() > 0
    for other in found[1:]:
        torch.testing.assert_close(found[0], other, rtol=1e-3, atol=1e-6)


def test_guidance_that_rests_at_some_timesteps_is_replayed_as_it_was_drawn(base):
    """Rows of one pass through the unet are then at guidance scales of their own."""
    options = {"guidance_scale": 3.0, "guidance_interval": (100, 600), "timesteps_per_image": 0}
    found = []
    for micro_batch in (8, 64):
        made = learner(base, micro_batch=micro_batch, **options)
        figures = made.accumulate(0, made.draw(0), np.linspace(-2, 2, 8, dtype=np.float32), np.arange(8))
        assert figures["ratio_deviation"] < 1e-5
        found.append((gradient(made), {name: value for name, value in figures.items() if "/" in name}))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-3, atol=1e-6)
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)
    assert len(found[0][1]) == 3 * len(made.schedule)


def test_equal_rewards_leave_the_policy_where_it_was(base):
    for objective in ("ddpo", "forward"):
        made = learner(base, reward=lambda drawn: torch.ones(len(drawn)), objective=objective, weight_decay=0.0)
        before = made.policy.weights("bright")
        figures = made.update(0)
        assert figures["zero_variance_groups"] == 1.0
        for name, weight in made.policy.weights("bright").items():
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-5 if objective == "forward" else 0)


def test_only_the_adapter_learns_and_without_it_the_images_are_the_same(base):
    made = learner(base, learning_rate=1e-2)
    prompts, seeds = list(made.table.prompts[:2]), [1, 2]
    plain = sample(base, prompts, seeds, steps=2, guidance_scale=2.0)
    frozen = {n: p.clone() for n, p in made.pipeline.unet.named_parameters() if "lora_" not in n}
    made.update(0)
    assert all(torch.equal(p, frozen[n]) for n, p in made.pipeline.unet.named_parameters() if n in frozen)
    assert not made.pipeline.unet.training
    with using_adapter(made.pipeline.unet, None):
        assert torch.equal(sample(made.pipeline, prompts, seeds, steps=2, guidance_scale=2.0), plain)
    with using_adapter(made.pipeline.unet, "bright"):
        assert not torch.equal(sample(made.pipeline, prompts, seeds, steps=2, guidance_scale=2.0), plain)


def test_the_judge_leaves_no_trace_in_the_weights(base):
    def contrary(images, parsed):
        return Opinion(-9 * images.mean(dim=(1, 2, 3)), torch.zeros(len(images)), images.flatten(1)[:, ::64])

    found = []
    for judge in (onlooker, contrary):
        made = learner(base, judge=judge, evaluate_every=1)
        made.update(0)
        found.append(made.policy.weights("bright"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_reward_that_fails_masks_its_image_and_is_counted(base):
    seen = []

    def moody(drawn):
        seen.append(len(drawn))
        if len(drawn) > 1:
            raise ValueError("the batch holds an image this reward cannot read")
        if len(seen) == 3:
            raise ZeroDivisionError("nothing to compare")
        return torch.tensor([float("nan") if len(seen) == 5 else drawn.images.mean()])

    made = learner(base, reward=moody, evaluate_every=99, steps=99)
    rollout = made.draw(0)
    rewards = made.rewarded(rollout)
    assert rewards.valid.tolist() == [True, False, True, False, True, True, True, True]
    assert made.failures == 2
    figures = made.learn(0, rollout, rewards)
    assert figures["reward_failures"] == 2.0
    assert np.isfinite(list(figures.values())).all()


def test_an_epoch_without_any_reward_is_an_error(base):
    def broken(drawn):
        raise RuntimeError("no weights")

    made = learner(base, reward=broken)
    rollout = made.draw(0)
    with pytest.raises(ModelError, match="none of the 8 images"):
        made.rewarded(rollout)


@pytest.mark.parametrize("objective", ["ddpo", "forward"])
def test_resumed_and_uninterrupted_runs_agree_to_the_last_bit(base, tmp_path, objective):
    options = {
        "objective": objective, "steps": 3, "evaluate_every": 2, "learning_rate": 1e-2, "kl_weight": 0.01,
        "average_decay": 0.3 if objective == "forward" else 0.0, "statistics_minimum": 2,
    }  # fmt: skip
    whole = learner(base, **options)
    figures = [whole.update(step) for step in range(3)]
    first = learner(base, **options)
    first.update(0)
    first.update(1)
    checkpoint.save(tmp_path, 2, first.state())
    torch.manual_seed(1234)
    second = learner(base, **options)
    second.load_state(checkpoint.load(tmp_path)[1])
    assert second.update(2) == figures[2]
    assert second.watch == whole.watch
    assert second.statistics.history == whole.statistics.history
    ours, theirs = second.state(), whole.state()
    for part in ("policy", "behaviour", "best"):
        assert ours[part].keys() == theirs[part].keys()
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in ours[part])
    for number, moments in ours["optimizer"]["state"].items():
        assert all(torch.equal(moments[k], theirs["optimizer"]["state"][number][k]) for k in moments)


@pytest.mark.parametrize("objective", ["ddpo", "forward"])
def test_training_raises_the_reward_of_noise_it_never_saw(base, objective):
    made = learner(
        base, objective=objective, learning_rate=2e-2, lora_convolutions=objective == "forward", clip_range=0.05,
        statistics_minimum=8, timesteps_per_image=0 if objective == "ddpo" else 2, images_per_prompt=8,
        rollout_batch=16, micro_batch=16,
        invented_prompts=0, steps=99, evaluate_every=99,
    )  # fmt: skip
    first = made.rewarded(made.draw(50)).values
    for step in range(6):
        made.update(step)
    gain = made.rewarded(made.draw(50)).values - first
    assert gain.mean() > 3 * gain.std() / np.sqrt(len(gain))


def test_run_through_the_loop_writes_an_adapter_that_loads_and_counts_its_cost(base, tmp_path):
    out = tmp_path / "run"
    made = learner(base, out=str(out), objective="forward", learning_rate=1e-2)
    metrics = fit(made, made.config)
    assert metrics == json.loads((out / "metrics.json").read_text())
    assert metrics["kept_epoch"] in (2, None)
    assert metrics["n_images"] == metrics["judge_gain"]["n"] == 4
    forwards = metrics["unet_forwards"]
    assert forwards["rollout"] == 2 * 8 * 4 * 2  # epochs, images, steps, both halves of guidance
    assert forwards["replay"] == 2 * 8 * 2 * 2  # epochs, images, timesteps, policy and the old one
    assert forwards["with gradient"] == 2 * 8 * 2
    assert forwards["evaluation"] == 2 * 4 * 2 * 2
    other = copied(base)
    load_lora(other.unet, out / "model", "bright")
    images = []
    for pipeline in (made.pipeline, other):
        with using_adapter(pipeline.unet, "bright"):
            images.append(sample(pipeline, [made.table.prompts[0]], [3], steps=2, guidance_scale=2.0))
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-5)  # training multiplies W + sBA, the other W, A and B
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"reward", "reward_std", "zero_variance_groups", "grad_norm", "look_judge"} <= lines[-1].keys()


def test_ddpo_logs_the_ratio_of_every_timestep(base):
    made = learner(base, timesteps_per_image=0, evaluate_every=99, steps=99)
    figures = made.update(0)
    assert {f"ratio_deviation/t{t:04d}" for t in made.schedule.timesteps} <= figures.keys()
    assert {"ratio", "approx_kl", "clip_fraction"} <= figures.keys()


def test_after_an_early_stop_nothing_is_drawn_any_more(base):
    made = learner(base)
    made.watch.stopped = "enough"
    assert made.update(1) == {"stopped": 1.0}
    assert not made.forwards


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"updates": 1}, "needs at least 2"),
        ({"objective": "grpo", "updates": 1}, "needs at least 2"),
        ({"updates": 9}, "each update needs one"),
        ({"objective": "forward", "timesteps_per_image": 0}, "at least 1"),
        ({"objective": "forward", "beta": 0.0}, "0 < beta"),
        ({"average_decay": 0.5}, "goes with the forward objective"),
        ({"images_per_prompt": 1}, "needs at least 2"),
        ({"evaluation_images": 1}, "needs at least 2"),
        ({"timestep_spacing": "linspace"}, "variance 0"),
        ({"anchor_weight": 0.5}, "need an anchor"),
        ({"objective": "ppo"}, "no objective"),
    ],
)
def test_contradictory_options_are_refused_before_anything_runs(base, options, complaint):
    with pytest.raises(InputError, match=complaint):
        learner(base, **options)


def test_invented_prompts_are_new_rewardable_and_a_function_of_the_seed():
    found = invented_prompts(DOMAIN, 20, seed=3)
    assert len(set(found)) == 20
    assert not set(found) & set(DOMAIN.validation_prompts())
    assert all(DOMAIN.parse(p).targets for p in found)
    assert found == invented_prompts(DOMAIN, 20, seed=3) != invented_prompts(DOMAIN, 20, seed=4)
