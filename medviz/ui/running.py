"""Computations beside the page: a session's comparison reports its steps, and each can be stopped.

Whoever waits for a computation that is cancelled waits until it has ended: until then it holds the models.
"""

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from medviz.results import Pair, Preview
from medviz.ui.page import caller_has_left

OnPreview = Callable[[Preview], None]
T = TypeVar("T")


class Switch:
    """Stops a run: turned by hand, or by the one who asked for it leaving. Make it while answering the request."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._has_left = caller_has_left()

    def set(self) -> None:
        """Stop the run at its next step."""
        self._event.set()

    def is_set(self) -> bool:
        """Whether the run has to stop; raises Cancelled when the server stops."""
        return self._event.is_set() or self._has_left()


async def computed(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run `work(cancelled)` in a thread; `cancelled` tells it when to stop.

    When the task that awaits this is cancelled, it goes on waiting until `work` has ended.
    """
    switch = Switch()
    running = asyncio.ensure_future(asyncio.to_thread(work, switch.is_set))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        switch.set()
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue  # cancelled again: the thread cannot be left alone
        running.exception()  # what the thread raised is no one's any more
        raise


class Runs:
    """Stop switches of the running comparisons, one a session; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._switches: dict[str, Switch] = {}

    @contextmanager
    def running(self, session: str) -> Iterator[Switch]:
        """Yield the switch of a new run; an older run of the session is stopped, and leaving stops this one."""
        switch = Switch()
        with self._lock:
            older = self._switches.get(session)
            self._switches[session] = switch
        if older is not None:
            older.set()
        try:
            yield switch
        finally:
            switch.set()
            with self._lock:
                if self._switches.get(session) is switch:
                    del self._switches[session]

    def stop(self, session: str) -> None:
        """Stop the session's run at its next step; nothing happens when none is running."""
        with self._lock:
            switch = self._switches.get(session)
        if switch is not None:
            switch.set()


def stream(work: Callable[[OnPreview], Pair]) -> Iterator[Preview | Pair]:
    """Run `work` in a thread; yield the previews it reports as they come, then its pair; raise what it raises."""
    inbox: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="compare") as executor:
        future = executor.submit(work, inbox.put)
        future.add_done_callback(lambda _: inbox.put(None))
        while (preview := inbox.get()) is not None:
            yield preview
        yield future.result()
