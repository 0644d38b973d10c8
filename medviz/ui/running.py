"""What each browser session shows and what runs for it: a run reports its steps and can be stopped."""

import asyncio
import itertools
import queue
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from medviz.results import Pair, Preview
from medviz.ui.page import caller_has_left

OnPreview = Callable[[Preview], None]
T = TypeVar("T")


async def computed(work: Callable[[Callable[[], bool]], T]) -> T:
    """Run `work(cancelled)` in a thread; `cancelled` tells it when to stop.

    When the task that awaits this is cancelled, it goes on waiting until `work` has ended.
    """
    stopped, has_left = threading.Event(), caller_has_left()
    running = asyncio.ensure_future(asyncio.to_thread(work, lambda: stopped.is_set() or has_left()))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        stopped.set()
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                continue  # cancelled again: the thread cannot be left alone
        running.exception()  # what the thread raised is no one's any more
        raise


@dataclass(eq=False)
class Run:
    """One request between the button and the screen.

    asked: keyword arguments of Studio.compare. is_draft: drawn in few steps while a person edits the prompt.
    pair, text: the result and the status line to show with it. problem: markup of the message if there is no result.
    """

    asked: Mapping[str, Any]
    is_draft: bool = False
    ticket: str = field(default_factory=lambda: uuid.uuid4().hex)
    stopped: threading.Event = field(default_factory=threading.Event)
    pair: Pair | None = None
    text: str = ""
    problem: str = ""


class Runs:
    """The current run of each session; thread-safe. A run that was stopped or replaced is no longer current."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._current: dict[str, Run] = {}

    def start(self, session: str, run: Run) -> None:
        """Make `run` the session's current run and stop the one before it."""
        with self._lock:
            older = self._current.get(session)
            self._current[session] = run
        if older is not None:
            older.stopped.set()

    def current(self, session: str, ticket: str | None = None) -> Run | None:
        """Return the session's current run; None if there is none, or if it is not the one with `ticket`."""
        with self._lock:
            run = self._current.get(session)
        return run if run is not None and ticket in (None, run.ticket) else None

    def end(self, session: str, run: Run) -> bool:
        """Remove a run whose result is about to be shown; False if it is no longer the current one."""
        with self._lock:
            if self._current.get(session) is not run:
                return False
            del self._current[session]
        return True

    def stop(self, session: str) -> None:
        """Stop the session's run at its next step; nothing happens when none is running."""
        with self._lock:
            run = self._current.pop(session, None)
        if run is not None:
            run.stopped.set()


class Screens:
    """Numbers what each session shows, so that an answer to what was shown before can be dropped; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._shown: dict[str, int] = {}

    def change(self, session: str) -> int:
        """Return a new number for what the session shows from now on."""
        with self._lock:
            self._shown[session] = next(self._numbers)
            return self._shown[session]

    def shows(self, session: str, number: int) -> bool:
        """Whether the session still shows what `number` was given to."""
        with self._lock:
            return self._shown.get(session) == number

    def forget(self, session: str) -> None:
        """Drop what is known of a session that has ended."""
        with self._lock:
            self._shown.pop(session, None)


def stream(work: Callable[[OnPreview], Pair], stopped: threading.Event) -> Iterator[Preview | Pair]:
    """Run `work` in a thread; yield the previews it reports as they come, then its pair; raise what it raises.

    stopped: set when nobody takes the rest, so that the work can end; leaving waits for it.
    """
    inbox: queue.SimpleQueue[Preview | None] = queue.SimpleQueue()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="compare") as executor:
        future = executor.submit(work, inbox.put)
        future.add_done_callback(lambda _: inbox.put(None))
        try:
            while (preview := inbox.get()) is not None:
                yield preview
            yield future.result()
        finally:
            stopped.set()
