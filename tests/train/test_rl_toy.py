"""Every method on a density whose optimum is known: a Gaussian that may be moved, and a reward of where it lies."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from medviz.domains import get_domain
from medviz.errors import InputError
from medviz.models.adapters import load_lora, using_adapter
from medviz.rewards.composite import Composite
from tests import tiny
from tests.train import toy_density
from train import checkpoint
from train.assemble import weaken
from train.evaluate.fidelity import kernel_distance
from train.rl.learner import RlLearner
from train.rl.log_prob import ZeroVarianceError
from train.rl.looking import Looks, RealImages
from train.rl.objectives import OBJECTIVES
from train.rl.recipe import RlConfig, rewards_of
from train.rl.rollout import certain_steps, latent_seeds, replay_step
from train.rl.safeguards import Opinion
from train.rl.scoring import Scorer

DOMAIN = get_domain("dermatology")
GOAL = torch.tensor([1.0, -0.5])
SMALL = RlConfig(
    out="",
    steps=99,
    invented_prompts=0,
    prompts_per_epoch=4,
    images_per_prompt=16,
    rollout_steps=6,
    rollout_batch=64,
    guidance_scale=1.0,
    micro_batch=64,
    timesteps_per_image=0,
    learning_rate=0.05,
    weight_decay=0.0,
    rank=1,
    lora_alpha=1.0,
    clip_range=0.2,
    statistics_minimum=8,
    anchor_weight=0.0,
    evaluate_every=999,
    evaluation_prompts=2,
    evaluation_images=2,
    evaluation_steps=2,
)
METHODS = {
    "ddpo": {"updates": 2},
    "ddpo_sf": {"updates": 1},
    "grpo": {"updates": 2, "kl_weight": 1e-3},
    "forward": {"updates": 2, "timesteps_per_image": 4},
    "awm": {"updates": 1, "timesteps_per_image": 4, "kl_weight": 0.2},
    "draft": {"updates": 2},
}
VARIANTS = {
    **{name: (name, options) for name, options in METHODS.items()},
    "ddpo, noise-weighted": ("ddpo", {"updates": 2, "noise_weighted": True}),
    "grpo, leave one out": ("grpo", {"updates": 2, "advantages": "leave_one_out"}),
    "grpo, window": ("grpo", {"updates": 2, "window": 2}),
    "awm, velocity": ("awm", {**METHODS["awm"], "prediction_type": "v_prediction"}),
    "draft, three steps": ("draft", {"updates": 2, "draft_steps": 3, "draft_random": False}),
    "draft, random truncation": ("draft", {"updates": 2, "draft_steps": 3, "kl_weight": 0.01}),
    "forward, averaged": ("forward", {**METHODS["forward"], "average_decay": 0.3}),
}


def linear(drawn):
    return toy_density.points(drawn.images)[:, 0]


def quadratic(drawn):
    return -(toy_density.points(drawn.images) - GOAL).square().sum(1)


def onlooker(images, parsed):
    return Opinion(images[:, 0, 0, 0], torch.ones(len(images)), images.flatten(1))


@pytest.fixture(scope="module")
def base():
    return tiny.make_pipeline("dermatology")


def learner(base, objective, reward=quadratic, prediction_type="epsilon", functions=None, real=None, **options):
    functions = functions or {"given": reward}
    scorer = Scorer(Composite(functions, dict.fromkeys(functions, 1.0)))
    config = replace(SMALL, objective=objective, **options)
    pipeline = toy_density.pipeline(base, prediction_type)
    made = RlLearner(config, pipeline, DOMAIN, scorer, onlooker, real=real)
    made.watch.ceiling = 100.0  # invented real images say nothing of how far a look may lie
    return made


def mean_drawn(made):
    """The mean of 2,000 draws of noise that no training saw."""
    ids, seeds = np.zeros(2000, int), list(range(2000))
    with made.policy.using(made.policy.behaviour):
        return made.drawing.sample(made.table, ids, seeds, 8).flatten(1).mean(0)


def test_the_table_of_methods_is_complete():
    assert METHODS.keys() == OBJECTIVES.keys()


def test_the_untrained_toy_draws_its_own_density(base):
    for kind in ("epsilon", "v_prediction"):
        made = learner(base, "forward", **METHODS["forward"], prediction_type=kind)
        latents = made.drawing.sample(made.table, np.zeros(2000, int), list(range(2000)), 20).flatten(1)
        assert latents.mean(0).abs().max() < 0.1
        assert (latents.std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_method_moves_the_density_to_where_the_reward_is_greatest(base, variant):
    objective, options = VARIANTS[variant]
    made = learner(base, objective, **options)
    for step in range(30):
        made.update(step)
    off = mean_drawn(made) - GOAL
    # The mean reward is -2 - |mean - goal|^2: at least four fifths of what can be gained was gained.
    assert off.square().sum() < 0.2 * GOAL.square().sum()


@pytest.mark.parametrize("objective", METHODS)
def test_every_method_raises_a_reward_without_a_greatest_place(base, objective):
    made = learner(base, objective, linear, **METHODS[objective])
    for step in range(8):
        made.update(step)
    # The first coordinate alone is rewarded; nothing says where the second should go.
    assert mean_drawn(made)[0] > 0.15


def moved(made):
    """The learner with its weights away from the start, where every term of a loss has a gradient of its own."""
    with torch.no_grad():
        for number, weight in enumerate(made.policy.parameters()):
            weight.add_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)))
    return made


def gradient(made, rollout, epoch=0, advantages=None):
    made.optimizer.zero_grad(set_to_none=True)
    count = len(rollout.indices)
    advantages = np.linspace(-2, 2, count, dtype=np.float32) if advantages is None else advantages
    figures = made.accumulate(epoch, rollout, advantages, np.arange(count))
    return torch.cat([p.grad.flatten() for p in made.policy.parameters()]), figures


@pytest.mark.parametrize("variant", VARIANTS)
def test_micro_batches_add_up_to_the_full_gradient(base, variant):
    objective, options = VARIANTS[variant]
    found = []
    for micro_batch in (64, 7):
        made = moved(learner(base, objective, **{**options, "micro_batch": micro_batch, "kl_weight": 0.1}))
        found.append(gradient(made, made.draw(0))[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("objective", METHODS)
def test_resumed_and_uninterrupted_runs_agree_to_the_last_bit(base, tmp_path, objective):
    """With a reward of two parts, whose scale is part of the state, and real images to be held against."""
    options = {**METHODS[objective], "steps": 4, "evaluate_every": 2, "functions": {"x": linear, "goal": quadratic}}
    options |= {"real": _real_images(9)}
    if OBJECTIVES[objective].replays == "reverse":
        options["window"] = 2
    if OBJECTIVES[objective].replays == "forward":
        options["average_decay"] = 0.3
    if objective == "draft":
        options["draft_steps"] = 3
    whole = learner(base, objective, **options)
    figures = [whole.update(step) for step in range(4)]
    first = learner(base, objective, **options)
    for step in range(3):
        first.update(step)
    checkpoint.save(tmp_path, 3, first.state())
    torch.manual_seed(1234)
    second = learner(base, objective, **options)
    second.load_state(checkpoint.load(tmp_path)[1])
    assert second.update(3) == figures[3]
    assert "look_distance" in figures[3]
    ours, theirs = second.state(), whole.state()
    for part in ("policy", "behaviour", "best"):
        assert all(torch.equal(ours[part][name], theirs[part][name]) for name in theirs[part])
    assert all(ours[part] == theirs[part] for part in ("reward", "statistics", "watch", "failures", "forwards"))
    assert ours["reward"]["running"]["x"] != ours["reward"]["start"]["x"]


def test_the_window_moves_with_the_epoch_and_is_a_function_of_the_seed(base):
    made = learner(base, "ddpo", updates=2, window=2)
    places = [made.draw(epoch).weighed for epoch in range(12)]
    assert {place[0] for place in places} == {0, 1, 2, 3, 4}
    assert all(place == (place[0], place[0] + 1) for place in places)
    again = learner(base, "ddpo", updates=2, window=2)
    assert [again.drawing.schedule_of(epoch).stochastic for epoch in range(12)] == places
    other = learner(base, "ddpo", updates=2, window=2, seed=1)
    assert [other.drawing.schedule_of(epoch).stochastic for epoch in range(12)] != places


def test_outside_the_window_a_step_is_certain_and_inside_the_ratio_is_one(base):
    made = learner(base, "ddpo", updates=2, window=2)
    rollout = made.draw(3)
    embeds = made.table.embeds(rollout.prompt_ids)
    for index in range(6):
        certain = replace(made.schedule, stds=(0.0,) * 6)
        after = certain_steps(made.pipeline.unet, rollout.chain[:, index], [index], embeds, certain, 1.0)[0]
        assert torch.equal(after, rollout.chain[:, index + 1]) == (index not in rollout.weighed)
    assert rollout.log_probs.shape == (64, 2)
    assert rollout.log_probs.isfinite().all()
    _, figures = gradient(made, rollout)
    names = {f"t{made.schedule.timesteps[i]:04d}" for i in rollout.weighed}
    assert {name.partition("/")[2] for name in figures if name.startswith("ratio/")} == names
    assert figures["ratio_deviation"] < 1e-5


def test_a_step_s_gradient_is_weighed_by_its_noise(base):
    plain, weighed = (learner(base, "ddpo", updates=2, noise_weighted=on) for on in (False, True))
    rollout = plain.draw(0)
    rows, advantages = np.arange(len(rollout.prompt_ids)), torch.ones(len(rollout.prompt_ids))
    stds = torch.tensor(plain.schedule.stds)
    for number, weight in enumerate((stds / stds.mean()).tolist()):
        gradients = []
        for made in (plain, weighed):
            made.optimizer.zero_grad()
            passes = made.replayer.passes(0, rollout)
            passes.replay(rows, np.full(len(rows), number), rollout, advantages).loss.mean().backward()
            gradients.append(torch.cat([w.grad.flatten() for w in made.policy.parameters()]))
        assert gradients[0].norm() > 0
        torch.testing.assert_close(gradients[1], weight * gradients[0], rtol=1e-4, atol=1e-7)


def test_a_step_outside_the_window_can_be_neither_weighed_nor_replayed(base):
    made = learner(base, "ddpo", updates=2, window=2)
    rollout = made.draw(3)
    outside = next(i for i in range(6) if i not in rollout.weighed)
    with pytest.raises(InputError, match="no log-probability"):
        rollout.old_log_prob(np.arange(4), outside)
    with pytest.raises(ZeroVarianceError, match="draws nothing"):
        schedule = made.drawing.schedule_of(3)
        replay_step(made.pipeline.unet, made.table, rollout, np.arange(4), outside, schedule, 1.0)


def test_images_of_a_window_do_not_depend_on_their_batch_or_on_what_was_drawn_before(base):
    together, apart = (learner(base, "ddpo", updates=2, window=2, rollout_batch=size) for size in (64, 5))
    together.draw(0)
    first, second = together.draw(1), apart.draw(1)
    torch.testing.assert_close(first.chain, second.chain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first.log_probs, second.log_probs, rtol=1e-4, atol=1e-4)


def test_the_score_function_has_ddpo_s_first_gradient(base):
    made = learner(base, "ddpo_sf", updates=1)
    clipped = learner(base, "ddpo", updates=2)
    torch.testing.assert_close(gradient(made, made.draw(0))[0], gradient(clipped, clipped.draw(0))[0])


def test_the_reward_s_gradient_through_the_whole_chain_is_its_slope(base):
    made = moved(learner(base, "draft", updates=1, draft_steps=6, draft_random=False))
    found = gradient(made, made.draw(0))[0]

    def mean_reward():
        return made.rewarded(made.draw(0)).values.mean()

    slopes = []
    for weight in made.policy.parameters():
        for index in range(weight.numel()):
            values = []
            for change in (1e-2, -2e-2):
                with torch.no_grad():
                    weight.view(-1)[index] += change
                values.append(mean_reward())
            with torch.no_grad():
                weight.view(-1)[index] += 1e-2
            slopes.append((values[0] - values[1]) / 2e-2)
    torch.testing.assert_close(found, -torch.tensor(slopes, dtype=torch.float32), rtol=2e-3, atol=2e-3)


def test_gradients_go_through_the_last_steps_alone(base):
    for length in (1, 3):
        made = learner(base, "draft", updates=1, draft_steps=length, draft_random=False)
        made.learn(0, made.draw(0), made.rewarded(made.draw(0)))
        assert made.forwards["with gradient"] == length * 64
    lengths = [learner(base, "draft", updates=1, draft_steps=3).replayer.tail_length(epoch) for epoch in range(20)]
    assert set(lengths) == {1, 2, 3}


def test_a_reward_without_a_gradient_is_refused(base):
    def counting(drawn):
        return (toy_density.points(drawn.images)[:, 0] > 0).float()

    made = learner(base, "draft", counting, updates=1)
    with pytest.raises(InputError, match="no gradient"):
        made.update(0)
    with pytest.raises(InputError, match="counts matches"):
        learner(base, "draft", updates=1, reward_function="attribute_paper")
    with pytest.raises(InputError, match="counts matches"):
        weights = {"attribute": 1.0, "attribute_paper": 1.0}
        learner(base, "draft", updates=1, reward_function="composite", reward_weights=weights)


def test_an_image_whose_reward_fails_is_left_out_of_the_reward_s_gradient(base):
    def picky(drawn):
        values = quadratic(drawn)
        return torch.where(drawn.images[:, 0, 0, 0] > 0.05, float("nan"), values)

    made = learner(base, "draft", picky, updates=1)
    rewards = made.rewarded(made.draw(0))
    figures = made.learn(0, made.draw(0), rewards)
    assert 0 < figures["reward_failures"] == (~rewards.valid).sum()
    assert np.isfinite(figures["grad_norm"])


def test_the_distance_to_the_adapter_free_model_is_logged_every_epoch(base):
    for objective, options in METHODS.items():
        made = learner(base, objective, **options)
        figures = [made.update(step) for step in range(2)]
        assert 0 < figures[0]["reference_distance"] < figures[1]["reference_distance"]
        assert "zero_variance_groups" in figures[0]
        if OBJECTIVES[objective].replays == "reverse":
            names = {f"{figure}/t{t:04d}" for figure in ("ratio", "clip_fraction") for t in made.schedule.timesteps}
            assert names <= figures[0].keys()


def test_looks_measure_rewards_on_one_scale_from_first_to_last(base):
    functions = {"x": linear, "goal": quadratic}
    made = learner(base, "draft", updates=2, functions=functions, evaluate_every=4, steps=8)
    for step in range(8):
        made.update(step)
    first, *_, last = made.watch.history
    assert abs(first.reward) < 1e-6
    start = made.scorer.composite.start["goal"]
    assert start.count == 4
    assert last.reward > 1.0


def test_a_look_does_not_depend_on_what_training_has_seen_since(base):
    made = learner(base, "draft", updates=2, functions={"x": linear, "goal": quadratic})
    made.looks.evaluate(0)
    before = made.looks.evaluate(1)
    made.scorer.composite.observe({name: torch.linspace(50, 90, 20) for name in ("x", "goal")})
    assert made.looks.evaluate(1) == before


def test_an_image_counts_only_with_all_parts_of_its_reward(base):
    def picky(drawn):
        return torch.where(drawn.images[:, 0, 0, 0] > 0.05, float("nan"), linear(drawn))

    made = learner(base, "ddpo", updates=2, functions={"x": picky, "goal": quadratic})
    rewards = made.rewarded(made.draw(0))
    assert 0 < rewards.valid.sum() < 64
    assert np.isfinite(rewards.values[rewards.valid]).all()
    assert made.failures == (~rewards.valid).sum()
    # What an image that is left out scores elsewhere moves no scale.
    assert made.scorer.composite.running["goal"].count == rewards.valid.sum()


def test_looks_hold_images_against_real_ones(base):
    real = _real_images(20)
    made = learner(base, "draft", updates=1, real=real)
    seen = made.looks.evaluate(0)
    assert seen.distance == made.looks.evaluate(0).distance
    seeds = latent_seeds(made.config.seed, "rl-captions", 0, range(5))
    images = made.drawing.images(made.drawing.sample(made.looks.captions, np.arange(5), seeds, 2))
    expected = kernel_distance(images.flatten(1).numpy(), real.features.numpy()).value
    assert seen.distance == pytest.approx(expected)
    assert seen.distance_error == 0.0
    with torch.no_grad():
        for weight in made.policy.parameters():
            weight.add_(0.5)
    later, resumed = made.looks.evaluate(4), learner(base, "draft", updates=1, real=real)
    resumed.load_state(made.state())
    assert later.distance != seen.distance
    assert later.distance_error > 0
    assert resumed.looks.evaluate(4).distance_error == later.distance_error
    assert learner(base, "draft", updates=1).looks.evaluate(0).distance is None
    with pytest.raises(InputError, match="4 or more"):
        learner(base, "draft", updates=1, real=replace(real, features=real.features[:3]))
    with pytest.raises(InputError, match="at least 4 captions of real images, found 3"):
        learner(base, "draft", updates=1, real=replace(real, captions=real.captions[:3]))
    with pytest.raises(InputError, match="go together"):
        Looks(made.config, made.drawing, made.scorer, onlooker, 4, real=real.features)


def _real_images(count):
    """Features of invented real images, and captions of which one decides nothing that a reward can check."""
    features = torch.randn(count, 3, generator=torch.Generator().manual_seed(5)) * 0.1
    return RealImages(features, ("a dermoscopic image", *DOMAIN.validation_prompts()[:4]))


@pytest.mark.parametrize(
    ("objective", "options", "complaint"),
    [
        ("ddpo_sf", {"updates": 2}, "takes 1"),
        ("awm", {"timesteps_per_image": 1, "updates": 1}, "kl_weight is 0.0"),
        ("awm", {"timesteps_per_image": 1, "kl_weight": 1.0, "updates": 2}, "updates is 2; awm takes 1"),
        ("awm", {"timesteps_per_image": 0, "kl_weight": 1.0, "updates": 1}, "at least 1"),
        ("ddpo", {"window": 7}, "0 to rollout_steps"),
        ("ddpo_sf", {"updates": 1, "noise_weighted": True}, "no ratio to weigh"),
        ("forward", {"timesteps_per_image": 1, "noise_weighted": True}, "no ratio to weigh"),
        ("ddpo", {"window": -1}, "0 to rollout_steps"),
        ("draft", {"window": 2}, "no random steps"),
        ("draft", {"draft_steps": 7}, "1 to rollout_steps"),
        ("draft", {"average_decay": 0.5}, "forward objectives"),
        ("grpo", {"advantages": "best"}, "no advantages 'best'"),
        ("grpo", {"fidelity_images": 3}, "at least 4"),
    ],
)
def test_contradictory_options_are_refused_before_anything_runs(base, objective, options, complaint):
    with pytest.raises(InputError, match=complaint):
        learner(base, objective, **{"updates": 2, **options})


def test_a_weaker_adapter_ships_that_share_of_its_change(base, tmp_path):
    made = moved(learner(base, "forward", **METHODS["forward"]))
    made.policy.save(tmp_path / "whole", {"title": "t"})
    shutil.copytree(tmp_path / "whole", tmp_path / "half")
    weaken(tmp_path / "half", 0.5)
    told = json.loads((tmp_path / "half" / "adapter.json").read_text())
    assert (told["strength"], told["title"]) == (0.5, "t, 50% of its change")
    latents, t = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(0)), torch.tensor(400)
    drawn = {"none": toy_density.GaussianUNet()(latents, t)[0]}
    for name in ("whole", "half"):
        unet = toy_density.GaussianUNet()
        load_lora(unet, tmp_path / name, "attribute")
        with using_adapter(unet, "attribute"):
            drawn[name] = unet(latents, t)[0]
    change = {name: drawn[name] - drawn["none"] for name in ("whole", "half")}
    assert change["whole"].abs().max() > 1e-3
    torch.testing.assert_close(change["half"], change["whole"] / 2)
    for strength in (0.0, 1.1, float("nan")):
        with pytest.raises(InputError, match="above 0 and at most 1"):
            weaken(tmp_path / "half", strength)
    save_file({"unet.to_q.weight": torch.zeros(2, 1)}, next((tmp_path / "half").glob("*.safetensors")))
    with pytest.raises(InputError, match="no LoRA adapter"):
        weaken(tmp_path / "half", 0.5)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"reward_function": "composite"}, "needs reward_weights"),
        ({"reward_function": "attribute", "reward_weights": {"attribute": 1.0}}, "goes with the reward composite"),
    ],
)
def test_a_composite_and_its_weights_go_together(options, complaint):
    with pytest.raises(InputError, match=complaint):
        rewards_of(replace(SMALL, **options))
