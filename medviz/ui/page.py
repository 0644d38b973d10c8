"""gr.Blocks with a queue that is fair to clients, notices those that leave, and says what was wrong with an input.

This file alone knows the inside of gradio's queue (6.31).
"""

import logging
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import fastapi
import gradio as gr
import pydantic
from gradio.block_function import BlockFunction
from gradio.context import LocalContext
from gradio.data_classes import PredictBodyInternal
from gradio.exceptions import ComponentProcessingError, InvalidPathError
from gradio.queueing import Event, Queue
from gradio.server_messages import ProcessCompletedMessage
from gradio.state_holder import SessionState

from medviz.errors import Cancelled
from medviz.limits import MAX_QUEUE_PER_CLIENT, UNATTENDED_S
from medviz.ui.guard import message

logger = logging.getLogger(__name__)

STOPPING = "The server is stopping; send the request again later."
_POLL_S = 0.05
_REMEMBERED_CLIENTS = 1000


class FairQueue(Queue):
    """Gradio's queue, in which clients take turns.

    The next request is the oldest one of the client that was served longest ago. A request is unattended while messages
    to it lie unread: its event stream was closed or never opened. It comes after all others, leaves the queue after
    UNATTENDED_S, and is stopped while it runs when others wait.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.closing = False  # no new requests
        self._stopping = False  # running requests end at their next step
        self._turn = 0
        self._served: dict[str, int] = {}  # client -> number of its last turn
        self._unread_since: WeakKeyDictionary[Event, float] = WeakKeyDictionary()

    async def push(self, body: PredictBodyInternal, request: fastapi.Request, username: str | None) -> Any:
        """Take a request in; HTTPException 429 when too many of the client are there, 503 when the server stops."""
        if self.closing:
            raise fastapi.HTTPException(503, STOPPING, {"Retry-After": "30"})
        pending = sum(_client(event) == _host(request) for event in self.event_ids_to_events.values())
        if pending >= MAX_QUEUE_PER_CLIENT:
            detail = f"{pending} requests of this client wait or run; at most {MAX_QUEUE_PER_CLIENT} may"
            raise fastapi.HTTPException(429, detail, {"Retry-After": "5"})
        return await super().push(body, request, username)

    def unread_s(self, event: Event) -> float:
        """For how long messages to whoever sent a request have lain unread; infinity where nobody can read them."""
        messages = self.pending_messages_per_session.get(event.session_hash)
        if messages is None or not event.alive:
            return math.inf
        if messages.empty():
            self._unread_since.pop(event, None)
            return 0.0
        now = time.monotonic()
        return now - self._unread_since.setdefault(event, now)

    def has_left(self, event_id: str) -> bool:
        """Whether the one who sent a request is gone; raises Cancelled once running requests have to end."""
        if self._stopping:
            raise Cancelled(STOPPING)
        event = self.event_ids_to_events.get(event_id)
        if event is None or not event.alive:
            return True
        return self.unread_s(event) >= UNATTENDED_S and len(self) > 0

    def get_events(self) -> tuple[list[Event], bool, str] | None:
        """Choose the next request; called by gradio every millisecond while one waits."""
        for event_queue in self.event_queue_per_concurrency_id.values():
            waiting = event_queue.queue
            for event in list(waiting):
                if self._stopping:
                    self._drop(event, STOPPING)
                elif self.unread_s(event) >= UNATTENDED_S:
                    self._drop(event, "Nobody read the answer; open its event stream at once.")
            waiting.sort(key=lambda event: (self.unread_s(event) > _POLL_S, self._served.get(_client(event), 0)))
        found = super().get_events()
        if found is not None:
            client = _client(found[0][0])
            self._turn += 1
            self._served.pop(client, None)
            self._served[client] = self._turn  # the one that was served longest ago stands first
            if len(self._served) > _REMEMBERED_CLIENTS:
                del self._served[next(iter(self._served))]
        return found

    def finish(self, seconds: float) -> None:
        """Take no new requests, give those that are there `seconds`, then stop them; returns when none is left."""
        self.closing = True
        self._wait_until_empty(seconds)
        self._stopping = True
        self._wait_until_empty(seconds / 2)

    def _wait_until_empty(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while self.event_ids_to_events and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _drop(self, event: Event, reason: str) -> None:
        self.event_queue_per_concurrency_id[event.concurrency_id].queue.remove(event)
        self.event_ids_to_events.pop(event._id, None)
        if event.session_hash in self.pending_messages_per_session:
            output = {"error": reason, "visible": True, "title": "Stopped", "duration": 12}
            self.send_message(event, ProcessCompletedMessage(output=output, title="Stopped", success=False))


class Page(gr.Blocks):
    """gr.Blocks with a FairQueue, whose refusals of malformed inputs are messages and quote nothing."""

    def queue(self, *arguments: Any, **settings: Any) -> "Page":
        """Set the queue up as gr.Blocks does."""
        super().queue(*arguments, **settings)
        plain: Queue = self._queue
        self._queue: Queue = FairQueue(
            live_updates=plain.live_updates,
            concurrency_count=plain.max_thread_count,
            update_intervals=plain.update_intervals,
            max_size=plain.max_size,
            blocks=self,
            default_concurrency_limit=plain.default_concurrency_limit,
        )
        return self

    def finish(self, seconds: float) -> None:
        """Take no new requests and give running ones `seconds`; see FairQueue.finish."""
        self._queue.finish(seconds)

    def validate_inputs(self, block_fn: BlockFunction, inputs: list[Any]) -> None:
        """Raise gr.Error unless there is one value for each input."""
        if len(inputs) != len(block_fn.inputs):
            raise message(f"{len(block_fn.inputs)} input values are needed, got {len(inputs)}.")

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: SessionState | None, explicit_call: bool = False
    ) -> list[Any]:
        """Return the inputs as the function takes them; gr.Error for a value of a wrong form or a foreign file."""
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error:  # a ValueError, too
            raise
        except InvalidPathError:
            raise message("A file has to be uploaded first; send the path that the upload returned.") from None
        except (ComponentProcessingError, pydantic.ValidationError, ValueError, TypeError, KeyError, OSError) as error:
            logger.warning("an input of %s was refused: %s", block_fn.name, type(error).__name__)
            raise message("An input value is not of the form that this endpoint takes.") from None


def caller_has_left() -> Callable[[], bool]:
    """Return what tells whether the sender of the request that is being answered is gone; call it while answering."""
    page, event_id = LocalContext.blocks.get(None), LocalContext.event_id.get(None)
    if not isinstance(page, Page) or event_id is None:
        return lambda: False
    return partial(page._queue.has_left, event_id)


def _client(event: Event) -> str:
    return _host(event.request)


def _host(request: fastapi.Request) -> str:
    return request.client.host if request.client else "unknown"
