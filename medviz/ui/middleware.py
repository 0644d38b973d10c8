"""What every HTTP request passes before gradio: host names, headers, routes, numbers of requests, sizes of bodies.

Each class is one ASGI application around the next. `guarded` puts them around the whole of gradio's application, its
own answers to preflight requests included. A refusal is JSON {"detail": text}; where waiting helps it has Retry-After.
"""

import asyncio
import ipaddress
import os
import socket
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from urllib.parse import urlsplit

from gradio.routes import App
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medviz import limits

API = "/gradio_api/"
SPACE_SUFFIX = ".hf.space"
_MULTIPART_BYTES = 2**16  # what surrounds an uploaded file in its request
_POST_ROUTES = ("run/predict", "queue/join", "upload", "cancel", "reset", "component_server")
_CLOSED_GET_ROUTES = ("proxy=", "file=http:", "file=https:", "file/http:", "file/https:", "dev/")
_SAFE_METHODS = frozenset({"GET", "HEAD"})


async def refuse(
    scope: Scope, receive: Receive, send: Send, status: int, detail: str, retry_after_s: float | None = None
) -> None:
    """Answer a request without handing it on; the connection is closed, for its body may be unread."""
    headers = {"Connection": "close"}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, round(retry_after_s)))
    await JSONResponse({"detail": detail}, status, headers)(scope, receive, send)


def client_of(scope: Scope) -> str:
    """The client's address, as uvicorn read it from the connection or from a trusted proxy's header."""
    return str((scope.get("client") or ("unknown",))[0])


def route_of(scope: Scope) -> str:
    """The path below gradio's API prefix, without slashes around it; other paths as they are."""
    return str(scope["path"]).removeprefix(API).strip("/")


class SecurityHeaders:
    """Adds headers that restrict what a browser does with an answer, and takes gradio's CORS headers away.

    in_space: Hugging Face may show the page in a frame, its script may adapt the frame's height, and the page may ask
    Hugging Face for the Space's state.
    """

    def __init__(self, app: ASGIApp, in_space: bool = False) -> None:
        self.app = app
        script, connect, ancestors = "", "", "'self'"
        if in_space:
            script = " https://cdnjs.cloudflare.com/ajax/libs/iframe-resizer/"
            connect = " https://huggingface.co"
            ancestors += " https://huggingface.co https://*.huggingface.co https://*.hf.space"
        policy = {
            "default-src": "'self'",
            "script-src": f"'self' 'unsafe-inline' 'unsafe-eval'{script}",
            "style-src": "'self' 'unsafe-inline'",
            "img-src": "'self' data: blob:",
            "font-src": "'self' data:",
            "media-src": "'self' data: blob:",
            "worker-src": "'self' blob:",
            "connect-src": f"'self' data: blob:{connect}",
            "object-src": "'none'",
            "base-uri": "'self'",
            "form-action": "'self'",
            "frame-ancestors": ancestors,
        }
        self.headers = {
            "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "same-origin",
            "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(self.headers)
                for name in ("Access-Control-Allow-Origin", "Access-Control-Allow-Credentials"):
                    if name in headers:
                        del headers[name]
            await send(message)

        await self.app(scope, receive, send_with_headers)


class TrustedNames:
    """Refuses a Host that is not the server's, and a changing request that a page of another origin sends.

    names: host names besides localhost, Spaces and IP addresses, which nobody else can point at this server. A request
    without Origin comes from no page. An Origin is the server's own when it names the Host, the host that a proxy
    forwards, or one of `names`.
    """

    def __init__(self, app: ASGIApp, names: Collection[str] = ()) -> None:
        self.app = app
        self.names = frozenset(name.casefold() for name in names)

    def is_trusted(self, host: str) -> bool:
        """Whether a Host header, with or without a port, names this server."""
        name = _host_name(host)
        return name == "localhost" or name in self.names or name.endswith(SPACE_SUFFIX) or _is_address(name)

    def is_own_origin(self, headers: Headers) -> bool:
        """Whether the Origin of a request is the server's own."""
        origin = urlsplit(headers["origin"])
        if origin.scheme not in ("http", "https") or not origin.hostname:
            return False
        hosts = [headers.get("host", ""), headers.get("x-forwarded-host", "").rpartition(",")[2].strip()]
        return origin.netloc.casefold() in map(str.casefold, filter(None, hosts)) or origin.hostname in self.names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            if not self.is_trusted(headers.get("host", "")):
                detail = "this server does not answer to the Host of this request; MEDVIZ_HOSTS names others"
                await refuse(scope, receive, send, 400, detail)
                return
            if scope["method"] not in _SAFE_METHODS and "origin" in headers and not self.is_own_origin(headers):
                await refuse(scope, receive, send, 403, "a page of another origin may not send this request")
                return
        await self.app(scope, receive, send)


class Routes:
    """Closes gradio's routes that this page does not use; a queued endpoint is reached through the queue alone."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self.is_open(scope["method"], route_of(scope)):
            detail = "there is no such endpoint; named ones are called through /gradio_api/call/NAME"
            await refuse(scope, receive, send, 404, detail)
            return
        await self.app(scope, receive, send)

    @staticmethod
    def is_open(method: str, route: str) -> bool:
        """Whether the page or a client of the named endpoints needs the route."""
        if method in _SAFE_METHODS:
            return not route.casefold().startswith(_CLOSED_GET_ROUTES)
        return method == "POST" and (route in _POST_ROUTES or route.startswith("call/"))


class InFlight:
    """Bounds how many requests are in flight, in all and of one client; methods: the ones that count, None all."""

    def __init__(self, app: ASGIApp, most: int, most_per_client: int, methods: Collection[str] | None = None) -> None:
        self.app = app
        self.most, self.most_per_client, self.methods = most, most_per_client, methods
        self.counts: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (self.methods is not None and scope["method"] not in self.methods):
            await self.app(scope, receive, send)
            return
        client = client_of(scope)
        if self.counts[client] >= self.most_per_client:
            detail = (
                f"at most {self.most_per_client} requests of one client are answered at a time; send it again later"
            )
            await refuse(scope, receive, send, 429, detail, 1)
            return
        if self.counts.total() >= self.most:
            await refuse(scope, receive, send, 503, "the server answers too many requests; send it again later", 2)
            return
        self.counts[client] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.counts[client] -= 1
            if not self.counts[client]:
                del self.counts[client]


class Uploads:
    """Counts the bytes that clients uploaded within the time for which uploads are kept."""

    def __init__(self, most: int, most_per_client: int, kept_s: float, clock: Callable[[], float] = time.monotonic):
        self.most, self.most_per_client, self.kept_s, self.clock = most, most_per_client, kept_s, clock
        self._entries: deque[tuple[float, str, int]] = deque()
        self._bytes: Counter[str] = Counter()

    def left(self, client: str) -> int:
        """How many bytes a client may upload now."""
        while self._entries and self._entries[0][0] <= self.clock() - self.kept_s:
            _, other, size = self._entries.popleft()
            self._bytes[other] -= size
            if not self._bytes[other]:
                del self._bytes[other]
        return min(self.most_per_client - self._bytes[client], self.most - self._bytes.total())

    def add(self, client: str, size: int) -> None:
        """Count bytes that arrived."""
        if size:
            self._entries.append((self.clock(), client, size))
            self._bytes[client] += size

    def retry_after_s(self) -> float:
        """When the oldest upload is no longer counted."""
        return self._entries[0][0] + self.kept_s - self.clock() if self._entries else 1.0


class BodyLimits:
    """Bounds size and duration of request bodies, and what is uploaded altogether.

    A body that grows too large or arrives too slowly ends for gradio as if the client had left; the client is told why.
    """

    def __init__(self, app: ASGIApp, uploads: Uploads, seconds: float = limits.MAX_BODY_S) -> None:
        self.app, self.uploads, self.seconds = app, uploads, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in _SAFE_METHODS:
            await self.app(scope, receive, send)
            return
        is_upload, client = route_of(scope) == "upload", client_of(scope)
        most = limits.MAX_UPLOAD_BYTES + _MULTIPART_BYTES if is_upload else limits.MAX_JSON_BYTES
        declared = Headers(scope=scope).get("content-length", "")
        size = int(declared) if declared.isdecimal() else 0
        deadline = asyncio.get_running_loop().time() + self.seconds
        is_answered, is_refused, is_read, received = False, False, False, 0

        async def end(status: int, detail: str, retry_after_s: float | None = None) -> Message:
            nonlocal is_refused
            if not is_answered and not is_refused:
                is_refused = True
                await refuse(scope, receive, send, status, detail, retry_after_s)
            return {"type": "http.disconnect"}

        async def check(total: int, more: int) -> Message | None:
            if total > most:
                what = "an upload" if is_upload else "the body of this request"
                return await end(413, f"{what} may have at most {most} bytes")
            if is_upload and more > self.uploads.left(client):
                detail = (
                    f"uploads of one client within {self.uploads.kept_s:g} s may have {self.uploads.most_per_client} "
                    f"bytes, those of all {self.uploads.most}; send it again later"
                )
                return await end(429, detail, self.uploads.retry_after_s())
            return None

        async def receive_within_limits() -> Message:
            nonlocal received, is_read
            if is_refused:
                return {"type": "http.disconnect"}
            if is_read:
                return await receive()
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                return await end(408, f"the body of a request has to arrive within {self.seconds:g} s")
            if message["type"] != "http.request":
                return message
            more = len(message.get("body", b""))
            received += more
            refusal = await check(received, more)
            if refusal is not None:
                return refusal
            if is_upload:
                self.uploads.add(client, more)
            is_read = not message.get("more_body", False)
            return message

        async def send_unless_refused(message: Message) -> None:
            nonlocal is_answered
            if not is_refused:
                is_answered = True
                await send(message)

        if await check(size, size) is not None:
            return
        try:
            await self.app(scope, receive_within_limits, send_unless_refused)
        except ClientDisconnect:
            if not is_refused:
                raise


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def own_names(host: str = "") -> set[str]:
    """Names that this server answers to: `host`, the machine's, the Space's, and those that MEDVIZ_HOSTS lists."""
    listed = os.environ.get("MEDVIZ_HOSTS", "").split(",")
    found = {host, socket.gethostname(), os.environ.get("SPACE_HOST", ""), *(name.strip() for name in listed)}
    return {name for name in found if name}


def guarded(names: Collection[str], in_space: bool) -> Callable[[App], AbstractAsyncContextManager[None]]:
    """Return a lifespan for gradio's application that puts every guard of this file around it.

    Gradio adds its own CORS layer outside all middleware that it is given, so this one is laid around the finished
    stack when the server starts.
    """

    @asynccontextmanager
    async def lifespan(app: App) -> AsyncIterator[None]:
        uploads = Uploads(limits.MAX_UPLOADS_BYTES, limits.MAX_UPLOADS_BYTES_PER_CLIENT, limits.UPLOADS_KEPT_S)
        stack: ASGIApp = app.middleware_stack or app.build_middleware_stack()
        stack = BodyLimits(stack, uploads)
        stack = InFlight(stack, limits.MAX_POSTS, limits.MAX_POSTS_PER_CLIENT, {"POST"})
        stack = InFlight(stack, limits.MAX_CONNECTIONS, limits.MAX_CONNECTIONS_PER_CLIENT)
        app.middleware_stack = SecurityHeaders(TrustedNames(Routes(stack), names), in_space)
        yield

    return lifespan
