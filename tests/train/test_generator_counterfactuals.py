"""Counterfactual pairs in the generator's training: what the two pictures share, and what the loss makes of them."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from medviz.errors import InputError, ModelError
from medviz.grounding.capture import watch
from tests.train.test_generator_stages import invented_split, stages
from tests.train.test_rl_processes import ended, started
from train import checkpoint, diffusion
from train.attention_losses import token_mask_loss
from train.datasets.counterfactuals import Counterfactual
from train.datasets.counterfactuals.pairs import CounterfactualPairs
from train.datasets.split import Split
from train.diffusion import ORDINARY, PASTED, TWIN, DiffusionConfig, DiffusionLearner
from train.loop import export_newest, fit

__all__ = ["stages"]

PLACES = {"upper edge": 0, "lower edge": 24}


class Bars:
    """A family that lays a white bar of 8 rows along an edge; image 0 never takes one."""

    name, attributes = "bars", ("ruler", "ink")

    def add(
        self,
        split: Split,
        index: int,
        attribute: str,
        rng: np.random.Generator,
        size_px: int = 256,
        place: str | None = None,
    ) -> Counterfactual | None:
        if index == 0:
            return None
        place = place or str(rng.choice(list(PLACES)))
        without = split.image(index, size_px)
        mask = np.zeros((size_px, size_px), np.float32)
        mask[PLACES[place] : PLACES[place] + 8] = 1
        record, column = split.records[index], f"artefact_{attribute}"
        return Counterfactual(
            without=without,
            image=np.where(mask[..., None] > 0, np.uint8(255), without),
            mask=mask,
            without_record={**record, column: 0.0},
            record={**record, column: 1.0, "artefact_place": {attribute: place}},
            attribute=attribute,
            place=place,
        )

    def eligible(self, split: Split, attribute: str) -> np.ndarray:
        return np.arange(len(split))


@pytest.fixture
def config(stages, tmp_path: Path) -> DiffusionConfig:
    return replace(
        stages[3],
        out=str(tmp_path / "run"),
        latents=str(tmp_path / "latents"),
        batch=8,
        counterfactuals=("ruler=0.2", "ink=0.05"),
        caption_dropout=0.5,
    )


def learner(stages: tuple[Any, ...], config: DiffusionConfig) -> DiffusionLearner:
    return DiffusionLearner(config, stages[1], stages[2], Bars())


def said(learner: DiffusionLearner) -> list[str]:
    """The captions of all batches that `learner` makes from here on."""
    captions: list[str] = []
    tokens = learner.tokens
    learner.tokens = lambda given: captions.extend(given) or tokens(given)  # type: ignore[method-assign]
    return captions


def test_twins_share_noise_and_timestep_and_differ_in_the_addition_alone(stages, config) -> None:
    made = learner(stages, config)
    captions = said(made)
    levels: list[int] = []
    for step in range(8):
        captions.clear()
        batch = made.batch(step)
        assert batch.kinds.tolist() == [ORDINARY] * 4 + [TWIN] * 2 + [PASTED] * 2
        twins, pasted = slice(4, 6), slice(6, 8)
        assert torch.equal(batch.noise[twins], batch.noise[pasted])
        assert torch.equal(batch.timesteps[twins], batch.timesteps[pasted])
        assert len(set(batch.timesteps.tolist())) == 6
        levels += batch.timesteps[pasted].tolist()
        differ = (batch.latents[twins] != batch.latents[pasted]).any(dim=1)
        assert torch.equal(differ.float(), batch.differing[pasted])
        assert torch.equal(batch.differing[twins], batch.differing[pasted])
        assert batch.differing[pasted].sum(dim=(1, 2)).tolist() == [4.0, 4.0]
        assert torch.equal(batch.added[pasted], batch.differing[pasted])
        assert not batch.added[:6].any()
        assert not batch.differing[:4].any()
        for twin, caption in zip(captions[4:6], captions[6:8], strict=True):
            assert re.search(r"\b(ruler|ink)\b", caption)
            assert not re.search(r"\b(ruler|ink)\b", twin)
    assert min(levels) < 333  # pairs come at every noise level
    assert max(levels) > 666


def test_a_share_of_the_twins_shows_the_addition_elsewhere(stages, config) -> None:
    made = learner(stages, replace(config, elsewhere=1.0))
    moved = 0
    for step in range(4):
        batch = made.batch(step)
        assert torch.equal(batch.differing[4:6], batch.differing[6:8])
        for twin, pasted, differing in zip(batch.added[4:6], batch.added[6:8], batch.differing[6:8], strict=True):
            assert torch.equal(torch.maximum(twin, pasted), differing)
            assert not (twin * pasted).any()
            moved += bool(twin.any())
    assert moved >= 7


def test_pairs_make_up_their_share_in_the_mean_over_steps() -> None:
    split = invented_split("train", 12)
    pairs = CounterfactualPairs(split, Bars(), {"ruler": 0.2, "ink": 0.1}, np.ones(12), 32, 0)
    counts = [pairs.count(step, 16) for step in range(100)]
    assert set(counts) == {4, 5}
    assert sum(counts) == 480
    drawn = [pairs.draw(number).attribute for number in range(300)]
    assert drawn.count("ruler") == pytest.approx(200, abs=25)


def test_a_pair_is_a_function_of_the_seed_and_its_number() -> None:
    split = invented_split("train", 12)
    make = [CounterfactualPairs(split, Bars(), {"ruler": 0.2}, np.ones(12), 32, seed, 0.5) for seed in (0, 0, 1)]
    one, again, other = ([pairs.draw(number) for number in (5, 3, 5)] for pairs in make)
    for pair, same in zip(one, again, strict=True):
        assert np.array_equal(pair.images, same.images)
        assert (pair.captions, pair.words) == (same.captions, same.words)
    assert np.array_equal(one[0].images, one[2].images)
    assert any(not np.array_equal(pair.images, same.images) for pair, same in zip(one, other, strict=True))
    assert all("ruler" in pair.words and all(word in pair.captions[0] for word in pair.words) for pair in one)


def test_the_loss_counts_more_inside_the_mask_and_as_much_in_the_mean(stages, config, monkeypatch) -> None:
    """An error of 1 everywhere weighs what it did; one inside the masks alone weighs as many times as is said, over
    the mean weight."""
    errors: list[torch.Tensor] = []

    def known(unet, latents, prompt_embeds, noise, timesteps, schedule, gamma) -> torch.Tensor:
        return next(given) + 0.0 * unet(latents, timesteps, encoder_hidden_states=prompt_embeds).sample.mean(dim=1)

    monkeypatch.setattr(diffusion, "denoising_error", known)
    for weight in (1.0, 8.0):
        made = learner(stages, replace(config, mask_weight=weight))
        masks = made.batch(0).differing
        given: Iterator[torch.Tensor] = iter([torch.ones_like(masks), masks])
        assert made.update(0)["loss"] == pytest.approx(1)
        mean = 1 + (weight - 1) * 4 / 16
        assert made.batch(1).differing.sum() == masks.sum()
        assert made.update(0)["loss"] == pytest.approx(4 / 8 * weight * (4 / 16) / mean)
    assert not errors


def test_the_losses_of_each_kind_of_rows_are_told_apart(stages, config, monkeypatch) -> None:
    made = learner(stages, replace(config, mask_weight=8.0))
    added = made.batch(0).added

    def known(unet, latents, prompt_embeds, noise, timesteps, schedule, gamma) -> torch.Tensor:
        base = torch.tensor([1.0] * 4 + [2.0] * 2 + [3.0] * 2)[:, None, None]
        zero = 0.0 * unet(latents, timesteps, encoder_hidden_states=prompt_embeds).sample.mean(dim=1)
        return base + 4 * added + zero

    monkeypatch.setattr(diffusion, "denoising_error", known)
    figures = made.update(0)
    expected = {"loss_ordinary": 1, "loss_twin": 2, "loss_outside": 3, "loss_inside": 7}
    assert {name: float(figures[name]) for name in expected} == pytest.approx(expected)


def test_token_mask_loss_is_the_squared_share_of_attention_outside() -> None:
    probs = torch.zeros(2, 4, 4, 3)
    probs[0, 0, 0, 1] = 0.6
    probs[0, 3, 3, 1] = 0.2
    probs[..., 2] = 0.5
    probs[1, 3, 3, 1] = 0.9
    masks = torch.zeros(2, 8, 8)
    masks[:, 0, 1] = 1
    words = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    assert token_mask_loss(probs, words, masks).tolist() == pytest.approx([0.25**2, 1.0])
    with pytest.raises(InputError, match="must agree"):
        token_mask_loss(probs, words[:1], masks)


@pytest.mark.parametrize("separate", [False, True], ids=["one pass", "a pass of its own"])
def test_the_attention_loss_draws_words_to_their_mask(stages, config, monkeypatch, separate) -> None:
    """compile: the plain UNet stands in for the compiled one, which takes minutes to make."""
    monkeypatch.setattr(diffusion, "compiled_forward", lambda unet: unet.forward)
    options = {"attention_loss": 10.0, "learning_rate": 3e-3, "warmup": 0, "steps": 40, "compile": separate}
    made = learner(stages, replace(config, **options))
    outside = [float(made.update(step)["attention_loss"]) for step in range(40)]
    assert np.mean(outside[-8:]) < 0.6 * np.mean(outside[:8])
    batch = made.batch(50)
    maps: dict[str, torch.Tensor] = {}
    with torch.no_grad(), watch(made.unet, maps.__setitem__):
        diffusion.denoising_error(
            made.unet, batch.latents.float(), made.embed(batch.tokens), batch.noise, batch.timesteps, made.schedule, 0.0
        )
    share = [
        1 - token_mask_loss(probs[6:], batch.words[6:], batch.added[6:]).sqrt().mean().item() for probs in maps.values()
    ]
    assert max(share) > 0.5  # a quarter of the picture is mask


@pytest.mark.parametrize("options", [{}, {"dropout": 0.3, "attention_loss": 1.0, "workers": 1}], ids=str)
def test_a_resumed_run_learns_the_same_bit_for_bit(stages, config, tmp_path, options) -> None:
    config = replace(config, mask_weight=8.0, elsewhere=0.5, steps=4, **options)
    whole = replace(config, out=str(tmp_path / "whole"))
    fit(learner(stages, whole), whole)
    stopped = learner(stages, config)
    for step in range(2):
        stopped.update(step)
    checkpoint.save(Path(config.out), 2, stopped.state())
    made = learner(stages, replace(config, resume=True))
    start, state = checkpoint.load(Path(config.out))
    made.load_state(state)
    for step in range(start, 4):
        made.update(step)
    expected = checkpoint.load(tmp_path / "whole")[1]["modules"]
    found = made.modules.state_dict()
    assert start == 2
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def train_on_pairs(config: DiffusionConfig) -> None:
    """What each of several processes does."""
    fit(DiffusionLearner(config, invented_split("train", 12), invented_split("validation", 8), Bars()), config)


def test_several_processes_see_the_pairs_that_one_sees(stages, config, tmp_path) -> None:
    """Three processes part pairs among them."""
    for name, count in (("one", 1), ("three", 3)):
        shared = replace(config, out=str(tmp_path / name), attention_loss=1.0, mask_weight=4.0, steps=2)
        assert ended(started(count, train_on_pairs, shared), 120) == [0] * count
    one, three = (json.loads((tmp_path / name / "metrics.jsonl").read_text()) for name in ("one", "three"))
    assert {"loss_ordinary", "loss_twin", "loss_inside", "loss_outside", "attention_loss"} <= one.keys()
    assert three == pytest.approx(one | {"trained_s": three["trained_s"]}, rel=1e-3)


def test_the_text_encoder_learns_at_its_own_rate(stages, config) -> None:
    moved = []
    for rate in (0.0, 1e-6):
        made = learner(stages, replace(config, warmup=0, learning_rate=1e-3, text_encoder_learning_rate=rate))
        before = {name: weight.clone() for name, weight in made.modules.state_dict().items()}
        made.update(0)
        change = {
            name: (weight - before[name]).abs().max().item() for name, weight in made.modules.state_dict().items()
        }
        moved.append([max(v for n, v in change.items() if n.startswith(part)) for part in ("unet", "text_encoder")])
    (unet, text), (slow_unet, slow_text) = moved
    assert unet == pytest.approx(slow_unet, rel=0.1)
    assert slow_text < 0.01 * text


def test_a_run_is_exported_from_its_checkpoint_and_left_as_it_was(stages, config) -> None:
    first = replace(config, steps=3, max_minutes=1e-9)
    assert fit(learner(stages, first), first) is None
    run = Path(config.out)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    metrics = export_newest(learner(stages, replace(first, resume=True, export_only=True)), first)
    assert metrics is not None
    assert (metrics["steps"], metrics["images_seen"]) == (1, 8)
    assert all(path.read_bytes() == content for path, content in before.items())
    state = checkpoint.load(run)[1]
    written = UNet2DConditionModel.from_pretrained(run / "model/unet").state_dict()
    learnt = learner(stages, first)
    learnt.load_state(state)
    learnt.ema.copy_to(learnt.modules.parameters())
    assert all(torch.equal(written[name], w.bfloat16()) for name, w in learnt.unet.state_dict().items())
    with pytest.raises(ModelError, match="no checkpoint"):
        export_newest(learner(stages, first), replace(first, out=str(run / "elsewhere")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counterfactuals": ("nodule=0.1",)}, r"family 'bars' draws no \['nodule'\]; it draws ruler, ink"),
        ({"counterfactuals": ("ruler=0.6",)}, "sum to 0.5 at most"),
        ({"counterfactuals": ("ruler",)}, "counterfactuals must read NAME=SHARE"),
        ({"counterfactuals": (), "mask_weight": 2.0}, "mask_weight weighs the masks of counterfactuals"),
        ({"mask_weight": 0.5}, "mask_weight must be at least 1, found 0.5"),
        ({"elsewhere": 1.5}, r"must be in \[0, 1\], found 1.5"),
        ({"export_only": True}, "it needs --resume"),
        ({"train_text_encoder": False, "text_encoder_learning_rate": 1e-5}, "train_text_encoder is false"),
    ],
)
def test_options_that_do_not_go_together_are_refused(stages, config, options, message) -> None:
    with pytest.raises(InputError, match=message):
        learner(stages, replace(config, **options))


def test_an_addition_that_no_image_takes_is_an_error() -> None:
    split = invented_split("train", 12)
    weights = np.zeros(12)
    weights[0] = 1.0  # the one that never takes a bar
    pairs = CounterfactualPairs(split, Bars(), {"ruler": 0.2}, weights, 32, 0)
    with pytest.raises(InputError, match="none of 100 images of dermatology train took 'ruler'"):
        pairs.draw(0)
