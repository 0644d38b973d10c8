"""`python -m train bench rl`: our DDPO beside `trl.DDPOTrainer`, and our best method beside our DDPO.

Every method starts from one small pipeline folder, sees the same prompts in the same epochs, asks the same reward as
often, and works in equal batches, with equal threads, in fp32; both ddpo methods take as many optimiser steps. Methods
alternate seed by seed, each in a program of its own: its peak memory is its own, and what disturbs the clock disturbs
all. Looks at fixed prompts and noises, between the epochs and outside the clock, give the reward that is reported.
What both ddpo methods make of the same images is compared value by value (`parity`).

The peer's last release with DDPO (trl 0.23.1) asks for transformers 4.56 or newer and runs unpatched with the newest;
where an environment has a release that it does not import with, `--peer-python` names the interpreter of another one
(`pip install trl==0.23.1 diffusers peft transformers` beside the same torch; its figures then carry its versions).
"""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from platform import machine, python_version
from typing import Any

import tyro
from tqdm import tqdm

from medviz.domains import get_domain
from medviz.errors import InputError, ModelError
from train import shipping
from train.benchmarks.rl.task import Work

ROOT = Path(__file__).resolve().parents[3]
DOMAIN = "dermatology"
PEER = "trl"
METHODS = ("ddpo", "forward", "draft")
FORMAT_VERSION = 1
PLAIN = {"compile": False, "noise_weighted": False}
DIFFERENCES = (
    "the peer shuffles timesteps within each image and trains timestep by timestep; here all images of an update share "
    "the order of timesteps, a pass holds several of them, and the gradient is the same sum",
    "the UNet's memory format is the default there, channels last here; LoRA's layers multiply once here; our ddpo's "
    "UNet is compiled where `compile` says so, its attention written out for the compiler",
    "our ddpo weighs a step by the noise it draws where `noise_weighted` says so (TempFlow-GRPO, arXiv 2508.04324); "
    "`parity` is measured without",
    "the learner's looks and safeguards are off: the peer has none",
)


@dataclass
class RlBenchmark:
    """Options of the reinforcement learning benchmark."""

    out: str = "assets/reports/benchmark-rl.json"
    """JSON file to write; empty: standard output alone."""
    picture: str = "assets/reports/benchmark-rl.png"
    """Picture to write; empty: none. Needs matplotlib (the extra `bench`)."""
    peer: bool = True
    """Run the peer, too. Needs trl 0.23.1 (the extra `bench`)."""
    peer_python: str = ""
    """Interpreter in which the peer runs; empty: this one."""
    seeds: tuple[int, ...] = tuple(range(6))
    epochs: int = 15
    warmup: int = 2
    """First epochs of each run whose seconds are not counted."""
    prompts_per_epoch: int = 8
    images_per_prompt: int = 4
    sample_batch: int = 32
    """Images a forward pass in sampling, on all sides; guidance doubles the rows."""
    batch: int = 16
    """Images a forward pass in training, on all sides."""
    pairs: int = 64
    """Images a backward pass of our methods, each counted for every timestep of it that the pass holds. The peer has
    one timestep in a pass."""
    steps: int = 8
    """DDIM steps; the ddpo methods train on all of them."""
    guidance_scale: float = 3.0
    updates: int = 2
    """Optimiser steps an epoch."""
    rank: int = 4
    """Of LoRA on the attention projections; the peer has no other."""
    learning_rate: float = 3e-3
    """Of both ddpo methods."""
    clip_range: float = 1e-3
    """Of both ddpo methods."""
    noise_weighted: bool = True
    """Our ddpo weighs each step of the chain by the noise it draws; the peer has no such option."""
    forward_learning_rate: float = 3e-3
    forward_updates: int = 4
    draft_learning_rate: float = 3e-3
    draft_updates: int = 4
    timesteps_per_image: int = 3
    """Noise levels of each image that the forward method trains on."""
    compile: bool = True
    """Compile the UNet of our ddpo, for minutes in the warm-up of its first run; those seconds are reported apart."""
    evaluation_images: int = 4
    """Images of each prompt in a look."""
    threads: int = 2
    base_steps: int = 400
    """Training steps of the pipeline that all start from."""


def works(config: RlBenchmark, base: str, seed: int) -> list[Work]:
    """The requests of one seed; who goes first rotates with the seed."""
    statistics = {"statistics_size": 32, "statistics_minimum": 16}
    # the peer's start of LoRA, so that no side has another
    ours: dict[str, float | str] = {"lora_start": "gaussian", "micro_batch": config.pairs}
    ddpo: dict[str, float | str] = {"advantage_clip": 5.0, "clip_range": config.clip_range, **statistics}
    forward = {"advantage_clip": 3.0, "timesteps_per_image": config.timesteps_per_image}
    options: dict[str, float | str] = {"compile": config.compile, "noise_weighted": config.noise_weighted}
    methods = {
        **({PEER: (config.learning_rate, config.updates, ddpo)} if config.peer else {}),
        "ddpo": (config.learning_rate, config.updates, ours | ddpo | options),
        "forward": (config.forward_learning_rate, config.forward_updates, ours | forward),
        "draft": (config.draft_learning_rate, config.draft_updates, ours),
    }
    made = [
        Work(
            method=method,
            seed=seed,
            base=base,
            prompts=get_domain(DOMAIN).sheet_prompts(),
            epochs=config.epochs,
            prompts_per_epoch=config.prompts_per_epoch,
            images_per_prompt=config.images_per_prompt,
            sample_batch=config.sample_batch,
            batch=config.batch,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            updates=updates,
            rank=config.rank,
            learning_rate=learning_rate,
            evaluation_images=config.evaluation_images,
            threads=config.threads,
            learning=learning,
        )
        for method, (learning_rate, updates, learning) in methods.items()
    ]
    first = config.seeds.index(seed) % len(made)
    return made[first:] + made[:first]


def check(config: RlBenchmark) -> None:
    """Raises InputError for options that leave nothing to measure, and for a peer that is not installed."""
    refused = (
        (not config.seeds or len(set(config.seeds)) < len(config.seeds), f"seeds must differ, found {config.seeds}"),
        (
            not 0 <= config.warmup < config.epochs,
            f"warmup is {config.warmup}; allowed are 0 to {config.epochs - 1}, one less than the epochs",
        ),
        (config.threads < 1, f"threads is {config.threads}; at least 1 is needed"),
        (
            config.evaluation_images < 2,
            f"evaluation_images is {config.evaluation_images}; diversity needs at least 2",
        ),
    )
    for is_wrong, message in refused:
        if is_wrong:
            raise InputError(message)
    if config.peer and not _has_peer(config.peer_python or sys.executable):
        raise InputError(
            f"{config.peer_python or sys.executable} has no {PEER}: install the extra `bench`, name another "
            "interpreter with --peer-python, or leave the peer out with --no-peer"
        )


def _has_peer(python: str) -> bool:
    question = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({PEER!r}) is None)"
    try:
        return subprocess.run([python, "-c", question], check=False).returncode == 0
    except OSError as error:
        raise InputError(f"cannot run the interpreter {python!r}: {error}") from error


def run_side(work: Work, folder: Path, python: str, program: str = "side") -> dict[str, Any]:
    """Do `work` in a program of its own, of this package; `folder` holds its request and answer.

    Raises ModelError with the end of what it wrote when it fails.
    """
    name = f"{program}-{work.method}-{work.seed}"
    asked, answer = folder / f"{name}-request.json", folder / f"{name}-answer.json"
    asked.write_text(json.dumps(asdict(work)))
    known = {
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(work.threads),
    }
    ended = subprocess.run(
        [python, "-m", f"train.benchmarks.rl.{program}", str(asked), str(answer)],
        env={**os.environ, **known},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode != 0:
        raise ModelError(f"{work.method} on seed {work.seed} failed:\n" + "\n".join(ended.stderr.splitlines()[-15:]))
    return json.loads(answer.read_text())


def measure(config: RlBenchmark) -> dict[str, Any]:
    """Make the base, run every method on every seed, and return the report. Raises as `check` and `run_side`."""
    from train.benchmarks.rl.base import write_base
    from train.benchmarks.rl.summary import summary

    check(config)
    answers: dict[str, list[Mapping[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as place:
        base, domain = Path(place) / "base", get_domain(DOMAIN)
        parameters = write_base(base, domain, domain.sheet_prompts(), steps=config.base_steps, seed=0)
        requests = [work for seed in config.seeds for work in works(config, str(base), seed)]
        parity = run_parity(config, requests, Path(place))
        for work in tqdm(requests, unit="run", dynamic_ncols=True):
            python = config.peer_python if work.method == PEER and config.peer_python else sys.executable
            answers.setdefault(work.method, []).append(run_side(work, Path(place), python))
    order = {name: answers[name] for name in (PEER, *METHODS) if name in answers}
    images = config.prompts_per_epoch * config.images_per_prompt
    return {
        "format_version": FORMAT_VERSION,
        "kind": "benchmark",
        "title": "Reinforcement learning: our DDPO beside TRL's, our other methods beside both",
        "settings": {k: v for k, v in asdict(config).items() if k not in ("out", "picture", "peer_python")},
        "unet_parameters": parameters,
        "reward": "redness: mean red less the mean of green and blue, of images in [0, 1]",
        "prompts": list(domain.sheet_prompts()),
        "versions": {name: found[0]["versions"] for name, found in order.items()},
        "machine": {"architecture": machine(), "cpus": os.cpu_count(), "python": python_version()},
        "differences": list(DIFFERENCES),
        "parity": parity,
        **summary(order, images, config.warmup),
    }


def run_parity(config: RlBenchmark, requests: Sequence[Work], folder: Path) -> dict[str, Any] | None:
    """What `train.benchmarks.rl.parity` finds on the first seed; None without a peer beside us. With nothing that the
    peer has not, and not compiled: that changes rounding and takes minutes."""
    if not config.peer or config.peer_python:
        return None
    work = next(work for work in requests if work.method == "ddpo")
    return run_side(replace(work, learning={**work.learning, **PLAIN}), folder, sys.executable, "parity")


def main(arguments: list[str]) -> None:
    """`python -m train bench rl [options]`."""
    config = tyro.cli(RlBenchmark, args=arguments, prog="python -m train bench rl")
    report = {**measure(config), "command": shlex.join(["python", "-m", "train", "bench", "rl", *arguments])}
    text = json.dumps(report, indent=1, allow_nan=False) + "\n"
    if config.out:
        out = shipping.place(config.out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text)
    if config.picture:
        from train.benchmarks.rl.picture import draw

        draw(report["methods"], shipping.place(config.picture))
    sys.stdout.write(text)
