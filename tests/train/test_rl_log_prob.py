import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from medviz.errors import InputError
from train.rl.log_prob import (
    ZeroVarianceError,
    ddim_step,
    deterministic_schedule,
    deterministic_step,
    gaussian_log_prob,
    kl_same_std,
    stochastic_schedule,
)

CONFIG = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SHAPE = (2, 3, 4, 6)


def configuration(prediction_type="epsilon", spacing="leading", **more):
    return {**CONFIG, "prediction_type": prediction_type, "timestep_spacing": spacing, **more}


def normal(seed, shape=SHAPE, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_every_step_has_the_mean_and_variance_of_diffusers(prediction_type, spacing, eta):
    config = configuration(prediction_type, spacing, steps_offset=1)
    theirs = DDIMScheduler(**config, set_alpha_to_one=False, clip_sample=False)
    theirs.set_timesteps(20)
    ours = stochastic_schedule(config, 20, eta)
    assert ours.timesteps == tuple(theirs.timesteps.tolist())
    latents, prediction, noise = normal(0), normal(1), normal(2)
    for index, t in enumerate(theirs.timesteps):
        still = theirs.step(prediction, t, latents, eta=eta, variance_noise=torch.zeros(SHAPE)).prev_sample
        moved = theirs.step(prediction, t, latents, eta=eta, variance_noise=noise).prev_sample
        step = ddim_step(ours, index, prediction, latents, noise=noise)
        torch.testing.assert_close(step.mean, still, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step.prev_latents, moved, rtol=1e-4, atol=1e-4)
        variance = eta**2 * theirs._get_variance(int(t), int(t) - 50).item()
        assert step.std**2 == pytest.approx(variance, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_step_in_fp32_agrees_with_the_equations_in_float64(prediction_type):
    schedule = stochastic_schedule(configuration(prediction_type, steps_offset=1), 10)
    latents, prediction, noise = (normal(seed, dtype=torch.float64) for seed in range(3))
    alphas = schedule.scheduler.alphas_cumprod.double()
    for index, t in enumerate(schedule.timesteps):
        a, p = alphas[t], alphas[max(t - 100, 0)]
        if prediction_type == "epsilon":
            clean, direction = (latents - (1 - a).sqrt() * prediction) / a.sqrt(), prediction
        else:
            clean = a.sqrt() * latents - (1 - a).sqrt() * prediction
            direction = a.sqrt() * prediction + (1 - a).sqrt() * latents
        variance = (1 - p) / (1 - a) * (1 - a / p)
        mean = p.sqrt() * clean + (1 - p - variance).sqrt() * direction
        drawn = mean + variance.sqrt() * noise
        expected = torch.distributions.Normal(mean, variance.sqrt()).log_prob(drawn).flatten(1).mean(1)
        step = ddim_step(schedule, index, prediction.float(), latents.float(), noise=noise.float())
        torch.testing.assert_close(step.mean.double(), mean, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(step.log_prob.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_rows_at_steps_of_their_own_are_those_of_each_step(prediction_type):
    schedule = stochastic_schedule(configuration(prediction_type, steps_offset=1), 10)
    latents, prediction, noise = normal(0), normal(1), normal(2)
    steps = np.arange(len(latents)) * 4
    assert len(set(steps)) > 1
    together = ddim_step(schedule, steps, prediction, latents, noise=noise)
    again = ddim_step(schedule, steps, prediction, latents, prev_latents=together.prev_latents)
    assert torch.equal(again.log_prob, together.log_prob)
    assert schedule.timestep(steps).tolist() == [schedule.timestep(int(step)) for step in steps]
    for row, step in enumerate(steps):
        one = slice(row, row + 1)
        alone = ddim_step(schedule, int(step), prediction[one], latents[one], noise=noise[one])
        assert together.std[row].item() == pytest.approx(alone.std)
        for found, expected in (
            (together.mean, alone.mean),
            (together.prev_latents, alone.prev_latents),
            (together.log_prob, alone.log_prob),
            (kl_same_std(together.mean, latents, together.std), kl_same_std(alone.mean, latents[one], alone.std)),
        ):
            torch.testing.assert_close(found[one], expected, rtol=1e-6, atol=1e-6)
    windowed = schedule.windowed(0, 1)
    with pytest.raises(ZeroVarianceError, match="step 4 draws nothing"):
        ddim_step(windowed, np.array([0, 4]), prediction[:2], latents[:2], noise=noise[:2])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_log_prob_is_that_of_what_diffusers_draws(prediction_type):
    """At eta 1, its step with the noise 0 gives the mean and with the noise z the outcome, std z away."""
    config = configuration(prediction_type, "trailing", steps_offset=1)
    theirs = DDIMScheduler(**config, set_alpha_to_one=False, clip_sample=False)
    theirs.set_timesteps(10)
    schedule = stochastic_schedule(config, 10)
    latents, prediction, noise = (normal(seed, dtype=torch.float64) for seed in range(3))
    for index, t in enumerate(theirs.timesteps):
        mean = theirs.step(prediction, t, latents, eta=1.0, variance_noise=torch.zeros_like(noise)).prev_sample
        drawn = theirs.step(prediction, t, latents, eta=1.0, variance_noise=noise).prev_sample
        std = (drawn - mean).norm() / noise.norm()
        expected = torch.distributions.Normal(mean, std).log_prob(drawn).flatten(1).mean(1)
        step = ddim_step(schedule, index, prediction.float(), latents.float(), prev_latents=drawn.float())
        # Their variances are fp32, and the last step's is small.
        torch.testing.assert_close(step.log_prob.double(), expected, rtol=1e-3, atol=1e-3)


def test_half_precision_errs_on_the_scale_of_the_clip_range():
    """Why log-probs stay in fp32: rounded to fp16 or bf16 the ratio is off by much of the range 1e-4, or far beyond."""
    schedule = stochastic_schedule(configuration(steps_offset=1), 5)
    log_prob = ddim_step(
        schedule, 2, normal(0, (64, 3, 4, 6)), normal(1, (64, 3, 4, 6)), noise=normal(2, (64, 3, 4, 6))
    ).log_prob
    off = [((log_prob.to(dtype).float() - log_prob).exp() - 1).abs().max() for dtype in (torch.float16, torch.bfloat16)]
    assert off[0] > 0.3 * 1e-4
    assert off[1] > 3 * 1e-4


def test_a_window_leaves_noise_in_its_own_steps_alone():
    schedule = stochastic_schedule(configuration(), 5)
    assert schedule.stochastic == (0, 1, 2, 3, 4)
    inside = schedule.windowed(1, 3)
    assert inside.stochastic == (1, 2, 3)
    assert [inside.stds[i] for i in inside.stochastic] == list(schedule.stds[1:4])
    for start, length in ((0, 0), (-1, 2), (3, 3), (0, 6)):
        with pytest.raises(InputError, match="does not lie in a chain of 5"):
            schedule.windowed(start, length)


def test_a_certain_step_is_diffusers_own_without_noise_and_has_no_log_prob():
    config = configuration("v_prediction", "trailing", steps_offset=1)
    theirs = DDIMScheduler(**config, set_alpha_to_one=False, clip_sample=False)
    theirs.set_timesteps(10)
    schedule = deterministic_schedule(config, 10)
    assert schedule.stochastic == ()
    for index, t in enumerate(theirs.timesteps):
        expected = theirs.step(normal(0), t, normal(1), eta=0.0).prev_sample
        torch.testing.assert_close(
            deterministic_step(schedule, index, normal(0), normal(1)), expected, rtol=1e-4, atol=1e-4
        )
        for given in ({"noise": normal(2)}, {"prev_latents": normal(2)}):
            with pytest.raises(ZeroVarianceError, match=f"step {index} draws nothing"):
                ddim_step(schedule, index, normal(0), normal(1), **given)


def test_log_prob_is_the_mean_over_elements_and_not_their_sum():
    sample, mean = normal(0), normal(1)
    once = gaussian_log_prob(sample, mean, 0.7)
    four_times = gaussian_log_prob(sample.repeat(1, 4, 1, 1), mean.repeat(1, 4, 1, 1), 0.7)
    torch.testing.assert_close(once, four_times)


def test_log_probs_are_fp32_whatever_precision_the_unet_ran_in():
    schedule = stochastic_schedule(configuration(steps_offset=1), 5)
    for dtype in (torch.float16, torch.bfloat16):
        step = ddim_step(schedule, 2, normal(0).to(dtype), normal(1).to(dtype), noise=normal(2))
        assert step.log_prob.dtype == step.mean.dtype == step.prev_latents.dtype == torch.float32


def test_replay_of_what_was_drawn_has_the_same_log_prob_and_carries_gradient():
    schedule = stochastic_schedule(configuration(steps_offset=1), 5)
    prediction = normal(0).requires_grad_()
    drawn = ddim_step(schedule, 1, prediction.detach(), normal(1), noise=normal(2))
    again = ddim_step(schedule, 1, prediction, normal(1), prev_latents=drawn.prev_latents)
    assert torch.equal(again.log_prob, drawn.log_prob)
    again.log_prob.sum().backward()
    assert prediction.grad is not None
    assert prediction.grad.abs().sum() > 0


def test_eta_zero_has_no_log_prob():
    with pytest.raises(ZeroVarianceError, match="eta is 0"):
        stochastic_schedule(configuration(steps_offset=1), 10, eta=0.0)


@pytest.mark.parametrize("eta", [-0.1, 1.1, math.nan, math.inf])
def test_eta_outside_its_range_is_refused(eta):
    with pytest.raises(InputError, match="0 < eta <= 1"):
        stochastic_schedule(configuration(steps_offset=1), 10, eta=eta)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_a_last_step_that_goes_nowhere_is_named_instead_of_clamped(spacing):
    with pytest.raises(ZeroVarianceError, match=r"step 9 \(timestep 0\) of 10 has variance 0"):
        stochastic_schedule(configuration(spacing=spacing, steps_offset=0), 10)


def test_a_config_that_says_nothing_of_the_offset_gets_a_last_step_with_variance():
    schedule = stochastic_schedule(configuration(), 10)
    assert schedule.timesteps[-1] == 1
    assert all(std > 0 for std in schedule.stds)


def test_set_alpha_to_one_would_make_the_last_step_certain_and_is_switched_off():
    asked = stochastic_schedule(configuration(spacing="trailing", set_alpha_to_one=True), 10)
    assert asked.stds == stochastic_schedule(configuration(spacing="trailing", set_alpha_to_one=False), 10).stds


def test_prediction_of_the_sample_itself_is_refused():
    with pytest.raises(InputError, match="'sample'"):
        stochastic_schedule(configuration("sample"), 10)


def test_pure_noise_is_a_start_for_velocity_and_not_for_noise_prediction():
    config = configuration("v_prediction", "trailing", rescale_betas_zero_snr=True)
    schedule = stochastic_schedule(config, 10)
    step = ddim_step(schedule, 0, normal(0), normal(1), noise=normal(2))
    assert torch.isfinite(step.log_prob).all()
    with pytest.raises(InputError, match="no signal"):
        stochastic_schedule({**config, "prediction_type": "epsilon"}, 10)


def test_a_step_takes_either_noise_or_an_outcome():
    schedule = stochastic_schedule(configuration(), 5)
    for both_or_neither in ({}, {"noise": normal(2), "prev_latents": normal(2)}):
        with pytest.raises(InputError, match="not both or neither"):
            ddim_step(schedule, 0, normal(0), normal(1), **both_or_neither)


def test_divergence_of_shifted_normals():
    mean = torch.zeros(SHAPE)
    torch.testing.assert_close(kl_same_std(mean + 0.3, mean, 0.5), torch.full((2,), 0.3**2 / (2 * 0.25)))
    normals = [torch.distributions.Normal(m, 0.5) for m in (mean + 0.3, mean)]
    expected = torch.distributions.kl_divergence(*normals).flatten(1).mean(1)
    torch.testing.assert_close(kl_same_std(mean + 0.3, mean, 0.5), expected)
