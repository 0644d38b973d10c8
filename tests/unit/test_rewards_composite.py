import json
import math

import numpy as np
import pytest
import torch

from medviz.domains.base import ParsedPrompt
from medviz.errors import InputError
from medviz.rewards.composite import Composite, RunningMoments, composite
from medviz.rewards.registry import Drawn

PROMPT = ParsedPrompt("a prompt", {}, {}, (), ())


def drawn(count=6, seed=0, requires_grad=False) -> Drawn:
    images = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return Drawn(images.requires_grad_(requires_grad), (PROMPT,) * count)


def brightness(batch: Drawn) -> torch.Tensor:
    return batch.images.mean(dim=(1, 2, 3))


def contrast(batch: Drawn) -> torch.Tensor:
    return 1000 + 50 * batch.images.std(dim=(1, 2, 3))


def both(**weights: float) -> Composite:
    return Composite({"bright": brightness, "sharp": contrast}, {"bright": 1.0, "sharp": 1.0, **weights})


def test_running_moments_are_those_of_everything_seen():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3 + 1e6
    seen = RunningMoments()
    for part in values.split([1, 9, 40]):
        seen.add(part)
    assert seen.count == 50
    assert seen.mean == pytest.approx(values.mean().item(), rel=1e-12)
    assert seen.spread == pytest.approx(np.std(values.numpy()), rel=1e-9)


def test_what_is_not_finite_is_not_seen_and_without_spread_nothing_is_divided():
    seen = RunningMoments()
    assert seen.spread == 1.0
    seen.add(torch.tensor([2.0, math.nan, math.inf, 2.0]))
    assert (seen.count, seen.mean, seen.spread) == (2, 2.0, 1.0)


def test_each_reward_counts_by_its_spread_and_its_weight():
    made, batch = both(sharp=-0.5), drawn()
    parts = made.parts(batch)
    made.observe(parts)
    expected = [(p - p.double().mean()) / p.double().std(correction=0) for p in parts.values()]
    torch.testing.assert_close(made.combine(parts), (expected[0] - 0.5 * expected[1]).float(), rtol=1e-3, atol=1e-4)
    assert parts["sharp"].mean() > 1000


def test_one_reward_is_left_as_it_is():
    made, batch = Composite({"sharp": contrast}, {"sharp": 1.0}), drawn()
    made.observe(made.parts(batch))
    assert torch.equal(made.combine(made.parts(batch)), contrast(batch))


def test_the_start_stays_and_the_running_moments_run():
    made = both()
    made.observe(made.parts(drawn(seed=1)))
    before = made.combine(made.parts(drawn()), at_start=True)
    made.observe({name: part + 7 for name, part in made.parts(drawn(seed=2)).items()})
    assert torch.equal(made.combine(made.parts(drawn()), at_start=True), before)
    assert not torch.equal(made.combine(made.parts(drawn())), before)


def test_state_survives_json_to_the_last_bit():
    made = both()
    made.observe(made.parts(drawn(seed=1)))
    made.observe(made.parts(drawn(seed=2)))
    other = both()
    other.load_state(json.loads(json.dumps(made.state())))
    assert (other.running, other.start) == (made.running, made.start)


def test_a_composite_has_a_gradient_and_leaves_the_images_alone():
    made, batch = both(), drawn(requires_grad=True)
    before = batch.images.detach().clone()
    made.combine(made.parts(batch)).sum().backward()
    assert batch.images.grad.abs().sum() > 0
    assert torch.equal(batch.images.detach(), before)


def test_a_reward_that_fails_on_an_image_spoils_that_image_alone():
    made = both()
    parts = made.parts(drawn())
    parts["sharp"][2] = math.nan
    assert made.combine(parts).isnan().tolist() == [False, False, True, False, False, False]


def test_nonsense_is_refused():
    with pytest.raises(InputError, match="unknown reward 'beauty'"):
        composite({"beauty": 1.0})
    for weight in (0.0, math.nan, math.inf):
        with pytest.raises(InputError, match="finite number other than 0"):
            composite({"attribute": weight})
    with pytest.raises(InputError, match="by the same names"):
        composite({})
    assert composite({"attribute": 1.0, "anatomy": 0.5}).weights == {"attribute": 1.0, "anatomy": 0.5}
