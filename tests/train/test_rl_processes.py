"""Several processes train what one trains, and end when one of them is killed.

The processes are forks of a server that has imported the libraries once; they meet on 127.0.0.1 alone.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from accelerate import PartialState
from diffusers import DDPMScheduler

from medviz.errors import InputError
from tests import tiny
from tests.train import test_rl_learner as small
from tests.train import test_rl_toy as toy
from tests.train.test_rl_trainer import recipe_file
from train import checkpoint, processes
from train.__main__ import SHARED, STAGES
from train.__main__ import main as command
from train.loop import fit
from train.rl.safeguards import Anchor

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([small.__name__, toy.__name__])
LEARNING = {"steps": 10, "evaluate_every": 5, "log_every": 1, "rollout_batch": 16}  # 10 epochs of 2 updates
RUNS = {
    "ddpo": {"objective": "ddpo", "updates": 2, "window": 2},
    "forward": {"objective": "forward", "updates": 2, "timesteps_per_image": 3, "average_decay": 0.3},
    "draft": {"objective": "draft", "updates": 2, "draft_steps": 3, "kl_weight": 0.01},
    # One image an update: one of two processes has none.
    "scarce": {"objective": "grpo", "updates": 4, "prompts_per_epoch": 2, "images_per_prompt": 2, "micro_batch": 1},
}


def toy_learner(base, name, out, **options):
    options = {**LEARNING, **RUNS[name], "out": str(out), **options}
    return toy.learner(base, options.pop("objective"), real=toy._real_images(9), fidelity_ceiling=100.0, **options)


def unet_learner(base, out):
    """A real UNet with an anchor and self-play; neither its batches nor its images divide evenly."""
    latents = torch.randn(2, 6, tiny.LATENT_CHANNELS, 8, 8, generator=torch.Generator().manual_seed(0)).half()

    def embed(captions):
        return torch.stack([torch.full((4, 16), len(c) / 9.0) for c in captions])

    schedule = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    anchor = Anchor(latents, lambda i, rng: f"image {i} {rng.random():.3f}", embed, schedule)
    options = {"out": str(out), "objective": "forward", "steps": 2, "kl_weight": 0.1, "micro_batch": 3}
    return small.learner(base, anchor=anchor, anchor_weight=0.5, anchor_batch=3, self_play_images=3, **options)


def train_all(out, names):
    """The runs called `names` below `out`."""
    base = tiny.make_pipeline("dermatology")
    for name in names:
        made = unet_learner(base, out / name) if name == "unet" else toy_learner(base, name, out / name)
        fit(made, made.config)


def train_slowly(out):
    """A run with a checkpoint after each epoch, slow enough to be killed on the way."""
    made = toy_learner(tiny.make_pipeline("dermatology"), "ddpo", out, checkpoint_every_s=0.0)
    update = made.update

    def slow(step):
        time.sleep(0.3)
        return update(step)

    made.update = slow
    fit(made, made.config)


def member(rank, count, port, work, arguments):
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {k: str(v) for k, v in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    processes.join("cpu")
    work(*arguments)
    processes.leave()


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def started(count, work, *arguments):
    """`count` processes at `work`, which reach each other through a free port."""
    port = free_port()
    members = [FORKS.Process(target=member, args=(rank, count, port, work, arguments)) for rank in range(count)]
    for each in members:
        each.start()
    return members


def ended(members, within_s):
    """How the processes ended, all within `within_s` seconds."""
    deadline = time.monotonic() + within_s
    for each in members:
        each.join(max(deadline - time.monotonic(), 0))
    late = [each.pid for each in members if each.is_alive()]
    for each in members:
        each.kill()
    assert not late, f"{len(late)} processes did not end within {within_s} s"
    return [each.exitcode for each in members]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The folder of the runs of one process."""
    out = tmp_path_factory.mktemp("alone")
    train_all(out, (*RUNS, "unet"))
    return out


def assert_same_run(out, alone):
    """Weights within 1e-5, the same forwards, figures and files."""
    differences = []
    (step, ours), (wanted, theirs) = (checkpoint.load(folder) for folder in (out, alone))
    assert step == wanted
    for part in ("policy", "behaviour", "best"):
        assert ours[part].keys() == theirs[part].keys()
        differences += [(found - theirs[part][name]).abs().max().item() for name, found in ours[part].items()]
    assert max(differences) < 1e-5
    assert any(weight.abs().max() > 1e-4 for name, weight in ours["policy"].items() if "lora_B" in name)
    # A process without an image of its own replays another's, which is counted.
    repeated = {"replay", "with gradient"} if out.name == "scarce" else set()
    for name in theirs["forwards"].keys() - repeated:
        assert ours["forwards"][name] == theirs["forwards"][name]
    lines = [[json.loads(x) for x in (f / "metrics.jsonl").read_text().splitlines()] for f in (out, alone)]
    left_out = {"trained_s", *(f"forwards_{name.replace(' ', '_')}" for name in repeated)}
    for line, expected in zip(*lines, strict=True):
        assert line.keys() == expected.keys()
        for name in line.keys() - left_out:
            assert line[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4), name
    assert (out / "model" / "adapter.json").is_file()


@pytest.mark.parametrize(("count", "names"), [(2, (*RUNS, "unet")), (3, ("ddpo", "forward"))])
def test_several_processes_train_what_one_trains(tmp_path, alone, count, names):
    assert ended(started(count, train_all, tmp_path, names), 240) == [0] * count
    for name in names:
        assert_same_run(tmp_path / name, alone / name)


@pytest.mark.parametrize("killed", [0, 1])
def test_the_others_end_when_one_is_killed_and_one_alone_goes_on(tmp_path, alone, killed):
    members = started(2, train_slowly, tmp_path)
    deadline = time.monotonic() + 120
    while not any(step >= 2 for step in checkpoint.steps(tmp_path)):
        assert all(each.is_alive() for each in members), "the run ended by itself"
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.01)
    os.kill(members[killed].pid, signal.SIGKILL)
    codes = ended(members, 60)
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1
    step, _ = checkpoint.load(tmp_path)
    assert 2 <= step < 10
    resumed = toy_learner(tiny.make_pipeline("dermatology"), "ddpo", tmp_path, resume=True)
    assert fit(resumed, resumed.config) is not None
    expected = checkpoint.load(alone / "ddpo")[1]
    for name, weight in resumed.state()["policy"].items():
        torch.testing.assert_close(weight, expected["policy"][name], rtol=0, atol=1e-5)
    assert resumed.state()["forwards"] == expected["forwards"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_launched_run_ends_when_one_of_it_is_killed_and_resumes_alone(model_root, tmp_path):
    settings = {"anchor_weight": 0.0, "checkpoint_every_s": 0.0, "evaluate_every": 1000}
    path = recipe_file(tmp_path, model_root / "dermatology", steps=1000, **settings)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port"]
    command_line = [sys.executable, *launch, str(free_port()), "-m", "train", "rl", path]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    root, out = Path(__file__).resolve().parents[2], tmp_path / "run"
    launcher = subprocess.Popen(command_line, cwd=root, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 400
        while not any(step >= 2 for step in checkpoint.steps(out)):
            assert launcher.poll() is None, "the run ended by itself"
            assert time.monotonic() < deadline, "no checkpoint appeared"
            time.sleep(0.05)
        members = [p for p in psutil.Process(launcher.pid).children(recursive=True) if "rl" in p.cmdline()]
        assert len(members) == 2
        members[1].kill()
        assert launcher.wait(60) != 0
        assert not any(p.is_running() for p in members)
    finally:
        launcher.kill()
    step, _ = checkpoint.load(out)
    assert command(["rl", path, "--resume", "--steps", str(step + 1)]) == 0
    assert checkpoint.steps(out)[-1] == step + 1
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, step + 2))


def test_shares_hold_every_row_once_and_in_order(monkeypatch):
    for count in (1, 2, 7, 12):
        for size in (1, 2, 3, 5):
            monkeypatch.setattr(processes, "size", lambda size=size: size)
            parts = []
            for rank in range(size):
                monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
                parts.append(processes.share(count))
            assert np.concatenate(parts).tolist() == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("stage", sorted(STAGES.keys() - SHARED))
def test_a_stage_that_cannot_share_refuses_several_processes(stage, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert command([stage, "recipe.yaml"]) == 1
    assert "runs in one process and 2 were started" in capsys.readouterr().err


def test_more_processes_than_images_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 5)
    with pytest.raises(InputError, match="5 processes share 4 images"):
        toy_learner(tiny.make_pipeline("dermatology"), "scarce", "")


def test_each_process_takes_a_card_of_its_own(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="cuda:0 and 2 processes were started; allowed is cuda"):
        processes.join("cuda:0")
    # As where there is no card of the kind: every process would train by itself and write the same files.
    monkeypatch.setattr(processes, "PartialState", lambda **_: None)
    with pytest.raises(InputError, match="2 processes were started, which cannot meet on mps"):
        processes.join("mps")


def test_one_process_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    before = dict(PartialState._shared_state)
    processes.join("cuda:0")
    processes.leave()
    assert before == dict(PartialState._shared_state)
    assert processes.is_main()
