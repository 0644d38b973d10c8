"""A tracker's page shows what metrics.jsonl holds, and the pictures of each look."""

import json
import sys
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import PartialState

from medviz.errors import InputError
from tests.train.test_loop import Counting
from tests.train.test_rl_trainer import recipe_file
from train import checkpoint, tracking
from train.config import StageConfig
from train.loop import fit
from train.rl.trainer import main
from train.tracking import Tracker, sheet

STEPS = {"steps": 6, "log_every": 2, "checkpoint_every_s": 0.0}


def config(out, **options):
    return StageConfig(out=str(out), **{**STEPS, **options})


def test_without_a_tracker_nothing_but_the_figures_is_written(tmp_path):
    fit(Counting(), config(tmp_path))
    kept = {"checkpoint-00000005", "checkpoint-00000006"}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "metrics.json", *kept}
    assert not Tracker(config(tmp_path))


def test_an_unknown_tracker_and_one_that_is_not_installed_are_refused(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no tracker 'wandb'; allowed are tensorboard, trackio"):
        fit(Counting(), config(tmp_path, tracker="wandb"))
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"trackio is not installed: pip install --editable '\.\[trackio\]'"):
        fit(Counting(), config(tmp_path, tracker="trackio"))


def test_other_processes_than_the_main_one_show_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: ModuleSpec(name, None))
    assert Tracker(config(tmp_path, tracker="tensorboard"))
    monkeypatch.setattr(tracking.processes, "is_main", lambda: False)
    assert not Tracker(config(tmp_path, tracker="tensorboard"))


def test_a_sheet_holds_the_images_in_rows_and_says_what_they_are():
    images = torch.linspace(-1, 1, 6).view(6, 1, 1, 1).expand(6, 3, 256, 256)
    found = sheet(images, 3)
    assert found.shape[1:] == (768, 3)
    assert found.shape[0] >= 512
    assert found[100, 128::256, 0].tolist() == [0, 51, 102]
    assert found[300, 128::256, 0].tolist() == [153, 204, 255]
    assert not np.array_equal(found[-20:], np.broadcast_to(found[-20:, :1], found[-20:].shape)), "the label"


def read(folder):
    """{tag: [(step, figure)]} of what TensorBoard shows, and the steps of each picture."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    page = events.EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    page.Reload()
    tags = page.Tags()
    return (
        {tag: [(e.step, e.value) for e in page.Scalars(tag)] for tag in tags["scalars"]},
        {tag: [e.step for e in page.Images(tag)] for tag in tags["images"]},
    )


def assert_same_figures(out, shown):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in line.keys() - {"step", "trained_s"}:
            assert dict(shown[name])[line["step"]] == pytest.approx(line[name], rel=1e-5)
    assert {step for points in shown.values() for step, _ in points} == {line["step"] for line in lines}


def test_tensorboard_shows_the_figures_and_a_picture_of_each_look(model_root, tmp_path):
    pytest.importorskip("tensorboard")
    options = {"anchor_weight": 0.0, "steps": 2, "evaluate_every": 1, "tracker": "tensorboard"}
    main([recipe_file(tmp_path, model_root / "dermatology", **options)])
    shown, pictures = read(tmp_path / "run")
    assert_same_figures(tmp_path / "run", shown)
    assert pictures == {"look": [0, 1, 2]}


class Failing(Counting):
    def update(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return super().update(step)


def test_a_resumed_run_shows_each_step_once(tmp_path):
    pytest.importorskip("tensorboard")
    settings = config(tmp_path, tracker="tensorboard", checkpoint_every_s=1e9, log_every=1)
    with pytest.raises(KeyboardInterrupt):
        fit(Failing(), settings)
    # As if the checkpoint of step 2 were the newest when the run was killed.
    checkpoint.save(tmp_path, 2, {"count": 2, "trained_s": 0.0})
    fit(Counting(), config(tmp_path, tracker="tensorboard", log_every=1, resume=True))
    shown, _ = read(tmp_path)
    assert shown == {"figure": [(step, step - 1.0) for step in range(1, 7)]}


def test_trackio_is_given_the_same_figures_and_pictures(tmp_path, monkeypatch):
    PartialState._reset_state()  # as in a run of one process
    logged = []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: logged.append("end"))
    fake = SimpleNamespace(init=lambda project: logged.append(project) or run, Image=lambda pixels: pixels.shape)
    fake.__spec__ = ModuleSpec("trackio", None)
    monkeypatch.setitem(sys.modules, "trackio", fake)
    out = tmp_path / "run"
    with Tracker(config(out, tracker="trackio")) as page:
        page.images(0, "look", torch.zeros(4, 3, 256, 256), 2)
        page.figures(2, {"loss": 0.5})
    assert logged[0] == "run"
    assert logged[1][0] == 0
    assert logged[1][1]["look"][1:] == (512, 3)
    assert logged[2:] == [(2, {"loss": 0.5}), "end"]
