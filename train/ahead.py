"""Batches made ahead of the step that needs them, by processes of their own.

A graphics card takes a batch in less time than one processor core needs to caption, turn and noise its images. Each
batch is a function of its step alone (`train.seeding`), so it is the same whoever makes it.
"""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")
READY = 4  # batches a worker holds ready


class _Steps(Dataset[T]):
    def __init__(self, make: Callable[[int], T]) -> None:
        self.make = make

    def __getitem__(self, step: int) -> T:
        return self.make(step)


def _alone(worker: int) -> None:
    """Threads that OpenCV started before the fork are not there after it, and it would wait for them for ever."""
    cv2.setNumThreads(0)


class Ahead(Generic[T]):
    """`make(step)`, called with steps in order; with workers made up to `READY` steps ahead by each of so many.

    make: touches no graphics card, and hands back a tuple of tensors and text; workers leave tensors in memory that a
    card copies from without waiting.
    """

    def __init__(self, make: Callable[[int], T], steps: int, workers: int, device: str) -> None:
        """steps: of the whole run; workers 0: made when asked for."""
        self.make, self.steps, self.workers = make, steps, workers
        self.pinned = device.startswith("cuda")
        self._next, self._batches = -1, iter(())  # type: ignore[var-annotated]

    def __call__(self, step: int) -> T:
        """What `make(step)` gives."""
        if not self.workers:
            return self.make(step)
        if step != self._next:
            self._batches = self._started(step)
        self._next = step + 1
        return next(self._batches)

    def _started(self, step: int) -> Iterator[Any]:
        return iter(
            DataLoader(
                _Steps(self.make),
                sampler=range(step, self.steps),
                batch_size=None,
                num_workers=self.workers,
                prefetch_factor=READY,
                pin_memory=self.pinned,
                multiprocessing_context="fork",
                worker_init_fn=_alone,
                generator=torch.Generator(),  # the loader draws a seed that nothing here uses, and not from the run's
            )
        )
