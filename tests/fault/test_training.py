"""Whatever ends a training run, it ends by name and keeps the checkpoints from before: the same for every stage."""

import errno
import io
import os
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from medviz.errors import ModelError
from tests import tiny
from tests.train import (
    test_anatomy_prompts,
    test_classifier,
    test_distil,
    test_generator_stages,
    test_loop,
    test_rl_toy,
    test_segmenter,
)
from train import checkpoint, loop
from train.contrastive import ContrastiveConfig, ContrastiveLearner
from train.diffusion import DiffusionConfig, DiffusionLearner
from train.loop import fit

EVERY_STEP: dict[str, Any] = {"steps": 9, "checkpoint_every_s": 0.0, "log_every": 1}


def autoencoder(root: Path) -> Any:
    return test_loop.learner(test_loop.tiny_config(root / "run", **EVERY_STEP))


def contrastive(root: Path) -> Any:
    config = ContrastiveConfig(
        out=str(root / "run"),
        size_px=32,
        corpus=200,
        text_width=16,
        text_layers=1,
        image_width=64,
        image_layers=1,
        projection=8,
        batch=4,
        **EVERY_STEP,
    )
    return ContrastiveLearner(config, *splits())


def diffusion(root: Path) -> Any:
    pipeline = tiny.make_pipeline("dermatology")
    pipeline.save_pretrained(root / "base")
    config = DiffusionConfig(
        out=str(root / "run"),
        autoencoder=str(root / "base/vae"),
        contrastive=str(root / "base"),
        size_px=32,
        channels=(16, 32),
        cross_attention=(False, True),
        heads=2,
        batch=4,
        **EVERY_STEP,
    )
    return DiffusionLearner(config, *splits())


def distil(root: Path) -> Any:
    tiny.make_pipeline("dermatology").save_pretrained(root / "base")
    return test_distil.learner(test_distil.config_for(root / "base", root / "run", **EVERY_STEP), root / "cache")


def classifier(root: Path) -> Any:
    return test_classifier.learner(root / "run", **EVERY_STEP)


def segmenter(root: Path) -> Any:
    return test_segmenter.learner(root / "run", **EVERY_STEP)


def anatomy_prompts(root: Path) -> Any:
    return test_anatomy_prompts.learner(root / "run", **EVERY_STEP)


def rl(root: Path) -> Any:
    out = {"out": str(root / "run")}
    return test_rl_toy.learner(
        tiny.make_pipeline("dermatology"), "forward", updates=2, timesteps_per_image=2, **out, **EVERY_STEP
    )


def splits() -> tuple[Any, Any]:
    return test_generator_stages.invented_split("train", 12), test_generator_stages.invented_split("validation", 8)


STAGES: dict[str, Callable[[Path], Any]] = {
    each.__name__: each
    for each in (
        autoencoder,
        contrastive,
        diffusion,
        distil,
        classifier,
        segmenter,
        anatomy_prompts,
        rl,
    )
}


@pytest.mark.parametrize("stage", STAGES)
def test_weights_that_break_at_step_6_end_the_run_there_and_keep_what_was_before(stage: str, tmp_path: Path) -> None:
    learner = STAGES[stage](tmp_path)
    update = learner.update

    def broken(step: int) -> Any:
        if step + 1 == 6:
            for group in learner.optimizer.param_groups:
                for weight in group["params"]:
                    weight.data.fill_(float("nan"))
        return update(step)

    learner.update = broken
    with pytest.raises(ModelError) as ended:
        fit(learner, learner.config)
    assert f"{stage} run {tmp_path / 'run'} ended at step 6 of 9: " in str(ended.value)
    assert str(ended.value).count("checkpoint-") == 2
    assert checkpoint.steps(tmp_path / "run") == [4, 5]
    assert all(bool(t.isfinite().all()) for t in tensors(checkpoint.load(tmp_path / "run")[1]))
    assert [line["step"] for line in loop.read_metrics(tmp_path / "run" / loop.METRICS_LOG)] == [1, 2, 3, 4, 5]
    assert not (tmp_path / "run" / "metrics.json").exists()


def tensors(state: dict[str, Any]) -> list[torch.Tensor]:
    return [value for _, value in loop._leaves(state) if isinstance(value, torch.Tensor)]


def fill_the_disk(room: int) -> None:
    """From now on no file may grow past `room` bytes, which the system tells as it tells of a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("moment", ["the log", "the checkpoint", "the exported model", "the final figures"])
def test_a_full_disk_is_named_and_the_run_goes_on_to_the_same_end(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "tqdm", partial(tqdm, file=io.StringIO()))  # what is captured goes to a file
    whole = test_loop.tiny_config(tmp_path / "whole", **EVERY_STEP)
    fit(test_loop.learner(whole), whole)
    out = tmp_path / "run"
    config = test_loop.tiny_config(out, **EVERY_STEP)
    learner = test_loop.learner(config)
    update, export, limit = learner.update, learner.export, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(step: int) -> Any:
        if step + 1 == 6 and moment in ("the log", "the checkpoint"):
            fill_the_disk((out / loop.METRICS_LOG).stat().st_size + 5 if moment == "the log" else 2000)
        return update(step)

    def exporting(folder: Path) -> Any:
        if moment == "the exported model":
            fill_the_disk(2000)
        found = export(folder)
        fill_the_disk(0)
        return found

    learner.update, learner.export = filling, exporting  # type: ignore[method-assign]
    try:
        with pytest.raises(ModelError, match=rf"cannot be written.*{os.strerror(errno.EFBIG)}.*--resume"):
            fit(learner, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    resumed = test_loop.tiny_config(out, **EVERY_STEP, resume=True)
    assert fit(test_loop.learner(resumed), resumed) is not None
    first, second = (loop.read_metrics(each / loop.METRICS_LOG) for each in (out, tmp_path / "whole"))
    assert [line | {"trained_s": 0} for line in first] == [line | {"trained_s": 0} for line in second]
    first, second = (test_loop.weights(each) for each in (out, tmp_path / "whole"))
    assert all(torch.equal(weight, second[name]) for name, weight in first.items())
