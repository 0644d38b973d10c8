"""One comparison at a time for each browser session: it runs beside the page, reports its steps and can be stopped."""

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from medviz.results import Pair, Preview

OnPreview = Callable[[Preview], None]


class Runs:
    """Stop switches of the running comparisons, one a session; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._switches: dict[str, threading.Event] = {}

    @contextmanager
    def running(self, session: str) -> Iterator[threading.Event]:
        """Yield the switch of a new run; an older run of the session is stopped, and leaving stops this one."""
        switch = threading.Event()
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
