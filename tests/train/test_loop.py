"""A run that was killed and resumed ends with the weights of one that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from medviz.errors import InputError, ModelError
from train import checkpoint, loop
from train.autoencoder import AutoencoderConfig, AutoencoderLearner
from train.config import StageConfig
from train.loop import fit

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24


def tiny_config(out: Path, **options: Any) -> AutoencoderConfig:
    settings = {
        "domains": ("first", "second"),
        "size_px": 24,
        "crop_px": 16,
        "latent_channels": 2,
        "width": 4,
        "decoder_blocks": (1, 1, 1, 0),
        "batch": 4,
        "steps": STEPS,
        "warmup": 5,
        "ema_decay": 0.9,
        "checkpoint_every_s": 0.0,
        "log_every": 6,
    }
    return AutoencoderConfig(out=str(out), **{**settings, **options})


def learner(config: AutoencoderConfig) -> AutoencoderLearner:
    rng = np.random.default_rng(0)
    return AutoencoderLearner(config, [rng.integers(0, 256, (n, 24, 24, 3), np.uint8) for n in (5, 7)])


def train(out: Path, **options: Any) -> dict[str, Any] | None:
    config = tiny_config(out, **options)
    return fit(learner(config), config)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return AutoencoderTiny.from_pretrained(out / "model").state_dict()


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("runs") / "uninterrupted"
    train(out)
    return out


def assert_same_run(out: Path, uninterrupted: Path) -> None:
    """The exported average and every number of the last checkpoint are equal, bit for bit."""
    exported, expected = weights(out), weights(uninterrupted)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    places = [folder / f"checkpoint-{STEPS:08d}" for folder in (out, uninterrupted)]
    first, second = ((place / "tensors.safetensors").read_bytes() for place in places)
    assert first == second
    states = [json.loads((place / "state.json").read_text())["state"]["__items__"] for place in places]
    for state in states:
        state[:] = [item for item in state if item[0] != "trained_s"]
    assert states[0] == states[1]


KILLED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.train.test_loop import learner, tiny_config
from train.loop import fit

config = tiny_config(Path(sys.argv[1]))
taught = learner(config)
update = taught.update
def slow(step):
    time.sleep(0.1)  # so that the kill comes before the end
    return update(step)
taught.update = slow
fit(taught, config)
"""


@pytest.mark.timeout(600)  # importing the libraries again takes long on a busy machine
def test_a_killed_run_resumes_to_the_same_weights_bit_for_bit(tmp_path: Path, uninterrupted: Path) -> None:
    out = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(out)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    enough, moment = random.randint(2, 10), random.random() * 0.2
    deadline = time.monotonic() + 240
    while not any(step >= enough for step in checkpoint.steps(out)):
        assert child.poll() is None, "the run ended by itself"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.005)
    time.sleep(moment)  # any point of a step, the writing of a checkpoint included
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert checkpoint.steps(out)[-1] < STEPS
    assert not (out / "metrics.json").exists()
    with (out / "metrics.jsonl").open("ab") as log:
        log.write(b'{"pixel": 0.1, "st')  # as if the kill had torn a line

    metrics = train(out, resume=True)

    assert metrics is not None
    assert metrics["steps"] == STEPS
    assert_same_run(out, uninterrupted)
    logged = [loop.read_metrics(folder / "metrics.jsonl") for folder in (out, uninterrupted)]
    first, second = ([line | {"trained_s": None} for line in lines] for lines in logged)
    assert first == second


class Clock:
    """Stands in for the time module of the loop; moves only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    stopped = Clock()
    monkeypatch.setattr(loop, "time", stopped)
    return stopped


@pytest.mark.parametrize("stops", [(1,), (6, 7, 20)])
def test_a_run_out_of_minutes_stops_with_a_checkpoint_and_ends_with_the_same_weights(
    tmp_path: Path, uninterrupted: Path, stops: tuple[int, ...], clock: Clock
) -> None:
    out = tmp_path / "stopped"
    for i, stop in enumerate(stops):
        config = tiny_config(out, max_minutes=1.0, checkpoint_every_s=1e9, resume=i > 0)
        taught = learner(config)

        def update(step: int, stop: int = stop, update: Callable[[int], dict[str, float]] = taught.update) -> Any:
            clock.now += 61.0 if step + 1 == stop else 0.0
            return update(step)

        taught.update = update  # type: ignore[method-assign]
        assert fit(taught, config) is None
        assert checkpoint.steps(out)[-1] == stop
        assert not (out / "model").exists()
    assert train(out, resume=True) is not None
    assert_same_run(out, uninterrupted)


def test_every_log_interval_and_the_final_metrics_are_written(uninterrupted: Path) -> None:
    lines = [json.loads(line) for line in (uninterrupted / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert all({"pixel", "edge", "grad_norm", "trained_s"} <= line.keys() for line in lines)
    metrics = json.loads((uninterrupted / "metrics.json").read_text())
    assert (metrics["steps"], metrics["seed"]) == (STEPS, 0)
    assert {"psnr_db_train_first", "psnr_db_train_second", "scaling_factor"} <= metrics.keys()


def test_another_seed_gives_other_weights(tmp_path: Path, uninterrupted: Path) -> None:
    train(tmp_path / "other", seed=1)
    exported, expected = weights(tmp_path / "other"), weights(uninterrupted)
    assert not all(torch.equal(exported[name], expected[name]) for name in expected)


class Counting:
    """A learner whose whole state is how often it was updated."""

    def __init__(self) -> None:
        self.count = 0
        self.exported = False

    def state(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state(self, state: dict[str, Any]) -> None:
        self.count = state["count"]

    def update(self, step: int) -> dict[str, float]:
        assert step == self.count
        self.count += 1
        return {"figure": float(step)}

    def export(self, folder: Path) -> dict[str, Any]:
        self.exported = True
        return {"count": self.count}


def test_a_fresh_run_does_not_overwrite_a_checkpoint(tmp_path: Path) -> None:
    fit(Counting(), StageConfig(out=str(tmp_path), steps=3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = Counting()
    with pytest.raises(ModelError, match=r"already holds a checkpoint.*--resume"):
        fit(again, StageConfig(out=str(tmp_path), steps=3))
    assert again.count == 0
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_resuming_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    never = Counting()
    with pytest.raises(ModelError, match="no checkpoint"):
        fit(never, StageConfig(out=str(tmp_path / "new"), steps=3, resume=True))
    assert never.count == 0


def test_resuming_a_damaged_checkpoint_is_an_error_and_trains_nothing(tmp_path: Path) -> None:
    fit(Counting(), StageConfig(out=str(tmp_path), steps=3))
    (tmp_path / "checkpoint-00000003" / "state.json").write_text("{}")
    never = Counting()
    with pytest.raises(ModelError, match=r"checkpoint-00000003 is damaged: state.json"):
        fit(never, StageConfig(out=str(tmp_path), steps=3, resume=True))
    assert never.count == 0


def test_resuming_a_finished_run_only_exports(tmp_path: Path) -> None:
    fit(Counting(), StageConfig(out=str(tmp_path), steps=3))
    again = Counting()
    metrics = fit(again, StageConfig(out=str(tmp_path), steps=3, resume=True))
    assert metrics is not None
    assert (again.count, again.exported, metrics["count"]) == (3, True, 3)


class Timed(Counting):
    """A counting learner whose updates take ten seconds each, and which breaks off before the step given."""

    def __init__(self, clock: Clock, breaks_at: int | None = None) -> None:
        super().__init__()
        self.clock, self.breaks_at = clock, breaks_at

    def update(self, step: int) -> dict[str, float]:
        if step == self.breaks_at:
            raise KeyboardInterrupt
        self.clock.now += 10.0
        return super().update(step)


def test_a_run_over_its_minutes_in_the_last_step_still_exports(tmp_path: Path, clock: Clock) -> None:
    metrics = fit(Timed(clock), StageConfig(out=str(tmp_path), steps=7, max_minutes=1.0))
    assert metrics is not None
    assert (tmp_path / "metrics.json").exists()


def test_trained_seconds_add_up_over_resumes(tmp_path: Path, clock: Clock) -> None:
    assert fit(Timed(clock), StageConfig(out=str(tmp_path), steps=9, max_minutes=0.5)) is None
    clock.now += 3600.0  # nobody trains in between
    metrics = fit(Timed(clock), StageConfig(out=str(tmp_path), steps=9, resume=True))
    assert metrics is not None
    assert metrics["trained_s"] == 90.0


def test_checkpoints_come_at_the_interval_asked(tmp_path: Path, clock: Clock) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=8), StageConfig(out=str(tmp_path), steps=20, checkpoint_every_s=25.0))
    assert checkpoint.steps(tmp_path) == [3, 6], "after each third step of ten seconds"


def test_a_resumed_run_logs_each_step_once(tmp_path: Path, clock: Clock) -> None:
    settings: dict[str, Any] = {"steps": 10, "checkpoint_every_s": 25.0, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=8), StageConfig(out=str(tmp_path), **settings))
    fit(Timed(clock), StageConfig(out=str(tmp_path), resume=True, **settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))


def test_a_resumed_run_logs_what_an_undisturbed_one_logs(tmp_path: Path, clock: Clock) -> None:
    """Also where the stop fell between two lines: their means are of the same updates."""
    settings: dict[str, Any] = {"steps": 10, "checkpoint_every_s": 0.0, "log_every": 4}
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=6), StageConfig(out=str(tmp_path), **settings))
    fit(Timed(clock), StageConfig(out=str(tmp_path), resume=True, **settings))
    lines = loop.read_metrics(tmp_path / "metrics.jsonl")
    assert [sum(range(4)) / 4, sum(range(4, 8)) / 4, 8.5] == [line["figure"] for line in lines]


TORN = {
    "a torn last line": b'{"figure": 5.0, "ste',
    "NULs": b"\0" * 40,
    "a blank line": b"\n",
    "spaces": b"   \n",
    "no object": b"[1, 2]\n",
    "no step": b'{"figure": 5.0}\n',
    "no text": b"\xff\xfe\n",
}


@pytest.mark.parametrize("damage", TORN)
def test_a_damaged_log_is_mended_and_told_of(
    tmp_path: Path, clock: Clock, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"steps": 8, "checkpoint_every_s": 25.0, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=5), StageConfig(out=str(tmp_path), **settings))
    log = tmp_path / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + TORN[damage])
    fit(Timed(clock), StageConfig(out=str(tmp_path), resume=True, **settings))
    assert f"{log}: left out what is no record, in line 6" in caplog.text
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, 9))


def test_a_run_that_was_stopped_before_its_first_checkpoint_starts_its_log_anew(tmp_path: Path, clock: Clock) -> None:
    settings: dict[str, Any] = {"steps": 4, "checkpoint_every_s": 1e9, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=2), StageConfig(out=str(tmp_path), **settings))
    fit(Timed(clock), StageConfig(out=str(tmp_path), **settings))
    assert [line["step"] for line in loop.read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_merged_lines_lose_only_what_was_torn(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"loss": 1.0, "step": 1}{"loss": 2.0, "step": 2}\n{"loss": 3.0, "st{"loss": 4.0, "step": 4}\n')
    assert [record["step"] for record in loop.read_metrics(log)] == [1, 2, 4]


def test_a_kill_while_the_log_is_rewritten_leaves_it_whole(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"steps": 8, "checkpoint_every_s": 25.0, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=5), StageConfig(out=str(tmp_path), **settings))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def kill(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            fit(Timed(clock), StageConfig(out=str(tmp_path), resume=True, **settings))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch": 5}, {"learning_rate": 1e-4}, {"steps": STEPS + 1}])
def test_another_recipe_is_not_resumed(tmp_path: Path, uninterrupted: Path, change: dict[str, Any]) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    with pytest.raises(InputError, match=f"{next(iter(change))} was .* and is "):
        train(out, resume=True, **change)


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path) -> None:
    fit(Counting(), StageConfig(out=str(tmp_path), steps=3))
    path = tmp_path / "checkpoint-00000003" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"recipe": None}))
    with pytest.raises(InputError, match=r"steps is 2, and .* is after 3"):
        fit(Counting(), StageConfig(out=str(tmp_path), steps=2, resume=True))


def test_a_damaged_newest_checkpoint_costs_its_steps_alone(tmp_path: Path, uninterrupted: Path) -> None:
    out = shutil.copytree(uninterrupted, tmp_path / "run")
    assert checkpoint.steps(out) == [STEPS - 1, STEPS]
    (out / f"checkpoint-{STEPS:08d}" / "tensors.safetensors").write_bytes(b"")
    train(out, resume=True)
    assert_same_run(out, uninterrupted)


class Breaking(Counting):
    """A counting learner whose figure is not finite after the step given, counted from 1."""

    def __init__(self, step: int, figure: float) -> None:
        super().__init__()
        self.step, self.figure = step, figure

    def update(self, step: int) -> dict[str, Any]:
        super().update(step)
        return {"loss": torch.tensor(self.figure if step + 1 == self.step else 1.0), "rate": 0.5}


@pytest.fixture
def _no_settings_of_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a run on a card sets for the whole process."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)


@pytest.mark.usefixtures("_no_settings_of_cards")
@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_figure_that_is_not_finite_ends_the_run_by_name_before_its_checkpoint(
    tmp_path: Path, figure: float, device: str, clock: Clock
) -> None:
    """On a card, figures are looked at only when they are logged or a checkpoint is due, and the step is known."""
    config = StageConfig(out=str(tmp_path), device=device, steps=20, log_every=4, checkpoint_every_s=1e9)
    checkpoint.save(tmp_path, 4, {"count": 4, "trained_s": 0.0})
    learner = Breaking(6, figure)
    with pytest.raises(ModelError, match=rf"stage run .* ended at step 6 of 20: loss is {figure}.*checkpoint-00000004"):
        fit(learner, replace(config, resume=True))
    assert learner.count == (6 if device == "cpu" else 8)
    assert checkpoint.steps(tmp_path) == [4]


@pytest.mark.usefixtures("_no_settings_of_cards")
def test_a_checkpoint_due_on_a_card_is_not_made_of_what_is_not_finite(tmp_path: Path) -> None:
    config = StageConfig(out=str(tmp_path), device="cuda", steps=20, log_every=20, checkpoint_every_s=0.0)
    with pytest.raises(ModelError, match="step 6 of 20: loss is nan"):
        fit(Breaking(6, float("nan")), config)
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    class Silent(Counting):
        def state(self) -> dict[str, Any]:
            weight = torch.full((3,), float("nan") if self.count >= 6 else 1.0)
            return {"count": self.count, "model": {"layer": [weight]}}

    with pytest.raises(ModelError, match=r"step 6 of 20: model\.layer\.0 of the learner's state is not finite"):
        fit(Silent(), StageConfig(out=str(tmp_path), steps=20, checkpoint_every_s=0.0))
    assert checkpoint.steps(tmp_path) == [4, 5]


def test_a_final_figure_that_is_not_finite_is_named(tmp_path: Path) -> None:
    class Undefined(Counting):
        def export(self, folder: Path) -> dict[str, Any]:
            return {"heads": {"hair": {"auroc": float("nan")}}}

    with pytest.raises(ModelError, match=r"heads.hair.auroc of the final figures is not finite"):
        fit(Undefined(), StageConfig(out=str(tmp_path), steps=2))
    assert not (tmp_path / "metrics.json").exists()
