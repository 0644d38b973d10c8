"""Batches made ahead are the batches that would have been made."""

import os

import pytest
import torch

from train.ahead import Ahead


def _batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((2, 3), float(step)), torch.tensor([os.getpid()])


@pytest.mark.parametrize("workers", [0, 2])
def test_each_step_gets_its_own_batch_also_after_a_resume(workers: int) -> None:
    ahead = Ahead(_batch, 12, workers, "cpu")
    assert [ahead(step)[0][0, 0].item() for step in (0, 1, 2)] == [0, 1, 2]
    assert [ahead(step)[0][0, 0].item() for step in range(7, 12)] == [7, 8, 9, 10, 11]


def test_workers_are_other_processes() -> None:
    assert Ahead(_batch, 4, 0, "cpu")(0)[1].item() == os.getpid()
    assert Ahead(_batch, 4, 1, "cpu")(0)[1].item() != os.getpid()


def test_workers_draw_nothing_from_the_runs_own_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Ahead(_batch, 4, 1, "cpu")(0)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_fails_in_a_worker_fails_the_run() -> None:
    def broken(step: int) -> tuple[torch.Tensor, ...]:
        raise ValueError(f"no batch {step}")

    with pytest.raises(ValueError, match="no batch 0"):
        Ahead(broken, 4, 1, "cpu")(0)
