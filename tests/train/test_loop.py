"""A run that was killed and resumed ends with the weights of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny

from medviz.errors import ModelError
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

    metrics = train(out, resume=True)

    assert metrics is not None
    assert metrics["steps"] == STEPS
    assert_same_run(out, uninterrupted)


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
        assert checkpoint.steps(out) == [stop]
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
        return {"step": float(step)}

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
        fit(never, StageConfig(out=str(tmp_path), steps=9, resume=True))
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
    assert checkpoint.steps(tmp_path) == [6], "after each third step of ten seconds"


def test_a_resumed_run_logs_each_step_once(tmp_path: Path, clock: Clock) -> None:
    settings: dict[str, Any] = {"steps": 10, "checkpoint_every_s": 25.0, "log_every": 1}
    with pytest.raises(KeyboardInterrupt):
        fit(Timed(clock, breaks_at=8), StageConfig(out=str(tmp_path), **settings))
    fit(Timed(clock), StageConfig(out=str(tmp_path), resume=True, **settings))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
