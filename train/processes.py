"""Several processes that train as one: who computes which rows, and how the parts come together again.

`accelerate launch --num_processes N -m train rl RECIPE` starts N copies of the same run, one a GPU (without GPUs add
--multi_gpu: despite its name it is what makes accelerate start more than one). Every copy holds the whole run, weights,
rewards, statistics and all; only the work on rows is shared, and every random draw is a function of the row's number
(`train.seeding`), so any number of processes trains the same. This is the only file that knows `torch.distributed`;
in a run of one process nothing here does more than hand its argument back.
"""

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState

from medviz.errors import InputError, ModelError

# For a peer that hangs: one that was killed closes its connections, which is noticed at once. Longer than others may
# wait for the main process to write a checkpoint.
TIMEOUT = timedelta(minutes=10)


def launched() -> int:
    """How many processes the launcher started this run with, by its WORLD_SIZE."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def refuse_several(stage: str) -> None:
    """Raises InputError when the launcher started several processes of a stage that does not share its work."""
    if launched() > 1:
        raise InputError(
            f"{stage} runs in one process and {launched()} were started, which would all train the same and overwrite "
            f"each other's files: start it with python -m train {stage} RECIPE"
        )


def join(device: str) -> None:
    """Meet the other processes of this run, if there are any; `device` is the recipe's.

    Raises InputError for a device with a number, since each process takes a card of its own, and for one on which
    processes cannot meet.
    """
    if launched() == 1:
        return
    wanted = torch.device(device)
    if wanted.index is not None:
        raise InputError(
            f"device is {device} and {launched()} processes were started; allowed is {wanted.type}, a card each"
        )
    PartialState(cpu=wanted.type == "cpu", timeout=TIMEOUT)
    if size() != launched():
        raise InputError(
            f"{launched()} processes were started, which cannot meet on {device}; start one, or take cuda or cpu"
        )
    if not is_main():
        logging.getLogger().setLevel(logging.WARNING)


def leave() -> None:
    """Part from the others at the end of a run."""
    if size() > 1:
        dist.destroy_process_group()


def size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this process is the one that writes files and shows progress."""
    return rank() == 0


def share(count: int) -> np.ndarray:
    """Which of `count` rows this process computes, ascending int64; empty where there are fewer rows than processes.

    The parts differ by at most one row, are in the order of the processes, and hold every row once.
    """
    return np.array_split(np.arange(count), size())[rank()]


def gather(part: torch.Tensor, count: int) -> torch.Tensor:
    """All `count` rows on every process, from the part (len(share(count)), ...) that each computed; bit for bit.

    The trailing shape must be the same on all, an empty part included.
    """
    if size() == 1:
        return part
    if part.dtype == torch.bool:
        return gather(part.byte(), count).bool()
    whole = part.new_zeros((count, *part.shape[1:]))
    whole[torch.from_numpy(share(count)).to(part.device)] = part
    return _summed(whole)


def total(figures: Mapping[str, float]) -> dict[str, float]:
    """The sum of each figure over all processes; every process must have the same names."""
    if size() == 1:
        return dict(figures)
    names = sorted(figures)
    sums = _summed(torch.tensor([figures[name] for name in names], dtype=torch.float64))
    return dict(zip(names, sums.tolist(), strict=True))


def summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's `values`, which stay where they were; they themselves in a run of one process."""
    return values if size() == 1 else _summed(values)


def greatest(figure: float) -> float:
    """The greatest of the processes' figures."""
    return float(gather(torch.tensor([figure], dtype=torch.float64), size()).max())


def from_main(decision: bool) -> bool:
    """What the main process decided, on all; every process waits here for every other."""
    return bool(total({"decision": float(decision and is_main())})["decision"])


def sum_gradients(parameters: Iterable[torch.Tensor]) -> None:
    """Add up, in place, the gradients that the processes found for the same parameters."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if size() == 1 or not gradients:
        return
    # One message for all: a collective a weight would wait for the network hundreds of times.
    sums = _summed(torch.cat([g.flatten() for g in gradients]))
    for gradient, summed in zip(gradients, sums.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def check_enough(rows: Sequence[tuple[str, int]]) -> None:
    """Raises InputError when more processes were started than one of the named numbers of rows gives work to."""
    for name, count in rows:
        if size() > count:
            raise InputError(f"{size()} processes share {count} {name}; allowed are at most {count} processes")


def _summed(values: torch.Tensor) -> torch.Tensor:
    """The sum of every process's `values`, where they were. Raises ModelError when one of them does not answer."""
    moved = values.to(PartialState().device)
    try:
        dist.all_reduce(moved)
    except RuntimeError as error:
        raise ModelError(
            "another process of this run has ended or does not answer; --resume goes on from the newest checkpoint "
            f"({error})"
        ) from error
    return moved.to(values.device)
