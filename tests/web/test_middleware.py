"""The guards one by one, around a small application."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from medviz import limits
from medviz.ui.middleware import BodyLimits, InFlight, Routes, SecurityHeaders, TrustedNames, Uploads, own_names

UPLOAD = "/gradio_api/upload"


async def echo(scope: Scope, receive: Receive, send: Send) -> None:
    """Answers with the number of bytes of the body."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(str(len(body)))(scope, receive, send)


def ask(app: ASGIApp, *requests: tuple[str, str, dict], host: str = "localhost") -> list[httpx.Response]:
    """Send requests (method, path, arguments of httpx) one after the other, each from the address in `client`."""

    async def send_all() -> list[httpx.Response]:
        answers = []
        for method, path, arguments in requests:
            address = arguments.pop("client", "192.0.2.1")
            transport = httpx.ASGITransport(app, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
                answers.append(await client.request(method, path, **arguments))
        return answers

    return asyncio.run(send_all())


@pytest.mark.parametrize(
    ("host", "is_own"),
    [
        ("localhost:7860", True),
        ("127.0.0.1:7860", True),
        ("[::1]:7860", True),
        ("10.1.2.3", True),
        ("someone-medviz.hf.space", True),
        ("medviz.hospital.example", True),
        ("attacker.example", False),
        ("localhost.attacker.example", False),
        ("hf.space.attacker.example", False),
        ("", False),
        ("[::1", False),
    ],
)
def test_a_host_is_an_address_or_a_name_of_this_server(host: str, is_own: bool) -> None:
    assert TrustedNames(echo, {"medviz.hospital.example"}).is_trusted(host) is is_own


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Origin": "http://localhost"}, 200),
        ({"Origin": "http://localhost:9"}, 403),
        ({"Origin": "https://someone-medviz.hf.space", "Host": "someone-medviz.hf.space"}, 200),
        ({"Origin": "https://someone-medviz.hf.space", "X-Forwarded-Host": "someone-medviz.hf.space"}, 200),
        ({"Origin": "https://else-evil.hf.space", "Host": "someone-medviz.hf.space"}, 403),
        ({"Origin": "https://named.example", "Host": "127.0.0.1:7860"}, 200),
        ({"Origin": "null"}, 403),
    ],
)
def test_a_changing_request_comes_from_the_servers_own_page_or_from_no_page(headers: dict, status: int) -> None:
    guarded = TrustedNames(echo, {"named.example"})
    assert ask(guarded, ("POST", "/", {"headers": headers}))[0].status_code == status
    assert ask(guarded, ("GET", "/", {"headers": headers}))[0].status_code == 200


def test_the_servers_names_come_from_the_host_the_space_and_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEDVIZ_HOSTS", "a.example, b.example,")
    monkeypatch.setenv("SPACE_HOST", "someone-medviz.hf.space")
    assert own_names("c.example") >= {"a.example", "b.example", "c.example", "someone-medviz.hf.space"}
    assert "" not in own_names("")


def test_only_a_space_may_be_shown_in_a_frame_of_hugging_face() -> None:
    policies = [
        ask(SecurityHeaders(echo, in_space), ("GET", "/", {}))[0].headers["Content-Security-Policy"]
        for in_space in (False, True)
    ]
    assert "huggingface.co" not in policies[0]
    assert "frame-ancestors 'self' https://huggingface.co" in policies[1]


@pytest.mark.parametrize(
    ("method", "route", "is_open"),
    [
        ("GET", "config", True),
        ("GET", "file=/tmp/x/shown.png", True),
        ("GET", "file=http://example.org", False),
        ("GET", "file=HTTPS://example.org", False),
        ("GET", "proxy=https://x.hf.space", False),
        ("POST", "call/compare", True),
        ("POST", "call/v2/compare", True),
        ("POST", "queue/join", True),
        ("POST", "run/predict", True),
        ("POST", "run/compare", False),
        ("POST", "api/predict", False),
        ("POST", "stream/x", False),
        ("PUT", "upload", False),
        ("DELETE", "config", False),
    ],
)
def test_routes_that_nobody_needs_are_closed(method: str, route: str, is_open: bool) -> None:
    assert Routes.is_open(method, route) is is_open


def test_requests_in_flight_are_bounded_for_each_client_and_in_all() -> None:
    async def flood() -> list[int]:
        release = asyncio.Event()

        async def hold(scope: Scope, receive: Receive, send: Send) -> None:
            await release.wait()
            await PlainTextResponse("done")(scope, receive, send)

        guarded = InFlight(hold, most=3, most_per_client=2, methods={"POST"})

        async def post(client: str) -> httpx.Response:
            transport = httpx.ASGITransport(guarded, client=(client, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as session:
                return await session.post("/")

        waiting = []
        for client in ("a", "a", "a", "b", "c"):
            waiting.append(asyncio.ensure_future(post(client)))
            await asyncio.sleep(0.01)
        release.set()
        answers = await asyncio.gather(*waiting)
        assert all("Retry-After" in answer.headers for answer in answers if answer.status_code != 200)
        assert (await post("a")).status_code == 200, "what has ended is no longer counted"
        return [answer.status_code for answer in answers]

    assert asyncio.run(flood()) == [200, 200, 429, 200, 503]


def test_uploads_of_a_client_and_of_all_are_bounded_while_they_are_kept() -> None:
    now = [0.0]
    uploads = Uploads(most=250, most_per_client=100, kept_s=60, clock=lambda: now[0])
    guarded = BodyLimits(echo, uploads)
    send = lambda client, size: ask(guarded, ("POST", UPLOAD, {"client": client, "content": b"x" * size}))[0]  # noqa: E731
    assert send("a", 80).text == "80"
    now[0] = 10.0
    assert send("a", 20).text == "20"
    refused = send("a", 1)
    assert refused.status_code == 429
    assert "100" in refused.json()["detail"]
    assert refused.headers["Retry-After"] == "50"
    assert send("b", 100).status_code == 200
    assert send("c", 51).status_code == 429, "all together"
    now[0] = 61.0
    assert send("a", 80).status_code == 200


def test_an_upload_of_unknown_size_ends_where_the_bytes_are_spent() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x" * 50

    uploads = Uploads(most=1000, most_per_client=100, kept_s=60)
    answer = ask(BodyLimits(echo, uploads), ("POST", UPLOAD, {"content": chunks()}))[0]
    assert answer.status_code == 429
    assert uploads.left("192.0.2.1") == 0


def test_a_body_that_never_ends_is_cut_off() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        yield b"x"
        await asyncio.sleep(5)
        yield b"x"

    uploads = Uploads(most=1000, most_per_client=100, kept_s=60)
    guarded = BodyLimits(echo, uploads, seconds=0.1)
    answer = ask(guarded, ("POST", UPLOAD, {"content": slowly()}))[0]
    assert answer.status_code == 408
    assert "0.1 s" in answer.json()["detail"]


def test_json_bodies_are_bounded_with_and_without_a_declared_size() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"x" * (limits.MAX_JSON_BYTES // 2)

    guarded = BodyLimits(echo, Uploads(1, 1, 1))
    declared = b"x" * (limits.MAX_JSON_BYTES + 1)
    answers = ask(guarded, *(("POST", "/gradio_api/queue/join", {"content": body}) for body in (declared, chunks())))
    assert [answer.status_code for answer in answers] == [413, 413]
    assert ask(guarded, ("POST", "/gradio_api/queue/join", {"content": b"{}"}))[0].text == "2"
