import json

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from medviz.errors import InputError
from tests import tiny
from train.rl.safeguards import Anchor, Evaluation, Watch, diversity


def look(epoch, reward=0.0, judge=0.0, kept=1.0, distance=None):
    spread = np.linspace(-0.01, 0.01, 8)
    return Evaluation(epoch, tuple(reward + spread), tuple(judge + spread), 0.5, kept, distance)


def watched(*evaluations, **options):
    watch = Watch(**options)
    return watch, [watch.consider(e) for e in (look(0), *evaluations)]


def test_the_judge_chooses_and_not_the_reward():
    watch, verdicts = watched(look(4, reward=0.1, judge=0.3), look(8, reward=0.9, judge=0.2))
    assert [v.best for v in verdicts] == [False, True, False]
    assert watch.best.epoch == 4


def test_an_adapter_that_lost_diversity_is_not_eligible_however_the_judge_likes_it():
    watch, verdicts = watched(look(4, judge=0.1), look(8, judge=0.9, kept=0.84), look(12, judge=0.2, kept=0.86))
    assert [v.best for v in verdicts] == [False, True, False, True]
    assert watch.best.epoch == 12


def test_stops_when_reward_rises_while_the_judge_falls():
    parted = (look(8, reward=0.4, judge=0.1), look(12, reward=0.5, judge=0.05))
    _, verdicts = watched(look(4, reward=0.3, judge=0.3), *parted)
    assert verdicts[-2].stop == ""
    assert "reward rose and judge fell against epoch 4" in verdicts[-1].stop


def test_does_not_stop_when_both_fall_or_the_fall_is_noise():
    _, verdicts = watched(look(4, 0.3, 0.3), look(8, 0.2, 0.1), look(12, 0.1, 0.0))
    assert verdicts[-1].stop == ""
    rng = np.random.default_rng(0)
    noisy = [Evaluation(e, (0.5,), tuple(0.299 + rng.normal(0, 0.2, 8)), 0.5, 1.0) for e in (8, 12)]
    noisy = [Evaluation(e.epoch, e.rewards, tuple(np.array(e.judge_scores) - e.judge + 0.299), 0.5, 1.0) for e in noisy]
    _, verdicts = watched(look(4, 0.3, 0.3), *noisy)
    assert verdicts[-1].stop == ""


def test_stops_when_diversity_stays_gone():
    watch, verdicts = watched(look(4, judge=0.5, kept=0.5), look(8, judge=0.6, kept=0.4))
    assert "diversity below 85%" in verdicts[-1].stop
    assert watch.best is None


def watched_from(untrained, *evaluations, **options):
    watch = Watch(**options)
    return watch, [watch.consider(e) for e in (look(0, distance=untrained), *evaluations)]


@pytest.mark.parametrize("untrained", [0.5, -0.5])
def test_an_adapter_that_moved_away_from_real_images_is_not_eligible(untrained):
    allowed, beyond = untrained + 0.0999 * abs(untrained), untrained + 0.1001 * abs(untrained)
    far, near = look(4, judge=0.9, distance=beyond), look(8, judge=0.1, distance=allowed)
    watch, verdicts = watched_from(untrained, far, near)
    assert [v.best for v in verdicts] == [False, False, True]
    assert watch.best.epoch == 8


def test_without_real_images_no_distance_is_asked_for():
    watch, verdicts = watched(look(4, judge=0.9))
    assert verdicts[-1].best
    assert "distance" not in watch.best.summary()
    assert look(0, distance=0.2).summary()["distance"] == 0.2


def test_stops_when_images_stay_far_from_real_ones():
    far = (look(4, judge=0.5, distance=0.3), look(8, judge=0.6, distance=0.3))
    watch, verdicts = watched_from(0.2, *far, ceiling=1.2)
    assert "more than 1.20 times as far" in verdicts[-1].stop
    assert watch.best is None


def test_the_first_look_is_at_the_untrained_model():
    with pytest.raises(InputError, match="epoch 0"):
        Watch().consider(look(4))


def test_watch_survives_json_and_goes_on_alike():
    watch, _ = watched_from(0.5, look(4, 0.3, 0.3, distance=0.5), look(8, 0.4, 0.1, distance=0.4))
    other = Watch()
    other.load_state(json.loads(json.dumps(watch.state())))
    assert other == watch
    last = look(12, 0.5, 0.05)
    assert other.consider(last) == watch.consider(last)


def test_diversity_is_the_mean_distance_within_a_prompt():
    features = torch.tensor([[0.0, 0.0], [3.0, 4.0], [100.0, 0.0], [100.0, 1.0], [7.0, 7.0]])
    assert diversity(features, np.array([0, 0, 1, 1, 2])) == pytest.approx((5 + 1) / 2)
    assert diversity(torch.ones(4, 2), np.array([0, 0, 1, 1])) == 0.0
    with pytest.raises(InputError, match="two images"):
        diversity(features, np.arange(5))


def anchor(**options):
    latents = torch.randn(2, 6, tiny.LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    words = []

    def embed(captions):
        words.extend(captions)
        return torch.stack([torch.full((4, 16), float(len(c))) for c in captions])

    return Anchor(latents, lambda i, rng: f"image {i} {rng.random():.3f}", embed, schedule, **options), words


def test_anchor_is_a_function_of_the_update_and_scales_with_its_weight():
    found = []
    for weight in (1.0, 1.0, 0.25):
        unet = tiny.make_unet()
        made, _ = anchor()
        loss = made.accumulate(unet, 3, 4, weight)
        found.append((loss, torch.cat([p.grad.flatten() for p in unet.parameters()])))
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[1][1])
    torch.testing.assert_close(found[2][1], 0.25 * found[0][1], rtol=1e-4, atol=1e-7)
    other, _ = anchor()
    assert other.accumulate(tiny.make_unet(), 4, 4, 1.0) != found[0][0]


def test_anchor_drops_captions_at_its_rate():
    made, words = anchor(caption_dropout=0.5)
    unet = tiny.make_unet().requires_grad_(False)
    unet.conv_out.bias.requires_grad_(True)
    for update in range(8):
        made.accumulate(unet, update, 8, 1.0)
    assert 0.3 < sum(w == "" for w in words) / len(words) < 0.7
