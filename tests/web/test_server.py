"""What the server refuses, and how it shares the models: queue, clients that leave, hosts, origins, sizes."""

import asyncio
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from medviz import Studio, limits
from medviz.generation import sampling
from tests.web.conftest import STEPS
from tests.web.test_api import PROMPTS

pytestmark = pytest.mark.web

PROMPT = PROMPTS["dermatology"]
STEP_S = 0.1


def values(seed: int, steps: int = STEPS) -> list[Any]:
    return ["dermatology", PROMPT, seed, steps, 3.0, ""]


@pytest.fixture
def api(url: str) -> str:
    return f"{url}gradio_api/"


@pytest.fixture
def other() -> httpx.Client:
    """A client at another address, as a proxy on this machine names it."""
    with httpx.Client(headers={"X-Forwarded-For": "192.0.2.7"}, timeout=60) as client:
        yield client


@pytest.fixture
def slow_steps(web_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Steps of STEP_S at least; the list gets the time of each."""
    web_studio.compare("dermatology", PROMPT, 1, steps=1)  # loaded now
    steps: list[float] = []
    plain = sampling.noise_pred

    def slow(*arguments: Any) -> Any:
        steps.append(time.monotonic())
        time.sleep(STEP_S)
        return plain(*arguments)

    monkeypatch.setattr(sampling, "noise_pred", slow)
    return steps


def call(client: httpx.Client, api: str, name: str, data: list[Any]) -> tuple[str, Any]:
    """Call a named endpoint over HTTP: the last event and its data."""
    answer = client.post(f"{api}call/{name}", json={"data": data})
    answer.raise_for_status()
    stream = client.get(f"{api}call/{name}/{answer.json()['event_id']}")
    event, text = stream.text.strip().split("\n\n")[-1].split("\n")
    return event.removeprefix("event: "), json.loads(text.removeprefix("data: "))


def seconds(work: Callable[[], Any]) -> float:
    begun = time.monotonic()
    work()
    return time.monotonic() - begun


def function_index(url: str, name: str) -> int:
    dependencies = httpx.get(f"{url}config").json()["dependencies"]
    return next(each["id"] for each in dependencies if each["api_name"] == name)


@pytest.mark.parametrize("path", ["run/compare", "api/compare", "run/compare/", "run/predict", "process_recording"])
def test_no_endpoint_is_reached_past_the_queue(url: str, api: str, path: str) -> None:
    body = {"data": values(1), "fn_index": function_index(url, "compare")}
    answer = httpx.post(f"{api}{path}", json=body, timeout=60)
    assert answer.status_code == 404
    assert "call" in answer.text or "queue" in answer.text


def test_callers_that_leave_hold_up_nobody(url: str, api: str, other: httpx.Client, slow_steps: list[float]) -> None:
    answers: list[int] = []

    async def leave(client: httpx.AsyncClient, number: int) -> None:
        try:
            async with asyncio.timeout(1.5):
                answer = await client.post(f"{api}call/compare", json={"data": values(1000 + number, steps=50)})
                answers.append(answer.status_code)
                if answer.status_code == 200:
                    await client.get(f"{api}call/compare/{answer.json()['event_id']}")
        except TimeoutError:
            pass

    async def all_of_them() -> None:
        limit = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(timeout=10, limits=limit, trust_env=False) as client:
            await asyncio.gather(*(leave(client, number) for number in range(120)))

    crowd = threading.Thread(target=lambda: asyncio.run(all_of_them()))
    crowd.start()
    time.sleep(0.5)
    assert httpx.get(f"{api}info", timeout=5, headers={"X-Forwarded-For": "192.0.2.8"}).status_code == 200
    crowd.join()
    assert 1 <= answers.count(200) <= limits.MAX_QUEUE_PER_CLIENT
    assert set(answers) <= {200, 429}
    with httpx.Client(timeout=30) as same:
        assert seconds(lambda: call(same, api, "compare", values(2, steps=1))) < 5
    assert seconds(lambda: call(other, api, "compare", values(3, steps=1))) < 5


def test_callers_that_never_read_give_way(api: str, other: httpx.Client, slow_steps: list[float]) -> None:
    for seed in range(4):
        assert httpx.post(f"{api}call/compare", json={"data": values(50 + seed, steps=50)}).status_code == 200
    assert seconds(lambda: call(other, api, "compare", values(4, steps=1))) < limits.UNATTENDED_S + 2


def test_cancelled_calls_stop_at_the_next_step_and_hold_their_place_until_then(
    url: str, api: str, other: httpx.Client, slow_steps: list[float]
) -> None:
    index = function_index(url, "compare")
    for number in range(4):
        session = f"cancelled{number}"
        body = {"data": values(60 + number, steps=50), "fn_index": index, "session_hash": session}
        event = httpx.post(f"{api}queue/join", json=body).json()["event_id"]
        begun = len(slow_steps)
        while len(slow_steps) == begun:
            time.sleep(0.02)
        for _ in range(2):  # twice: the second must not free the place, either
            httpx.post(f"{api}cancel", json={"session_hash": session, "fn_index": index, "event_id": event}, timeout=30)
        stopped = len(slow_steps)
        time.sleep(3 * STEP_S)
        assert len(slow_steps) == stopped, "no step is computed once the cancelling was answered"
    assert seconds(lambda: call(other, api, "compare", values(5, steps=1))) < 5


def test_clients_take_turns(api: str, other: httpx.Client, slow_steps: list[float]) -> None:
    ends: dict[str, float] = {}

    def ask(client: httpx.Client, name: str, seed: int) -> None:
        call(client, api, "compare", values(seed, steps=5))
        ends[name] = time.monotonic()

    with httpx.Client(timeout=60) as greedy:
        threads = [threading.Thread(target=ask, args=(greedy, f"greedy {n}", 70 + n)) for n in range(5)]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        ask(other, "other", 90)
        for thread in threads:
            thread.join()
    assert sorted(ends, key=lambda name: ends[name]).index("other") <= 2


def test_a_client_may_have_so_many_requests_and_is_told_when_to_come_back(api: str, slow_steps: list[float]) -> None:
    client = {"X-Forwarded-For": "192.0.2.9"}
    answers = [
        httpx.post(f"{api}call/compare", json={"data": values(100 + n, steps=50)}, headers=client)
        for n in range(limits.MAX_QUEUE_PER_CLIENT + 2)
    ]
    refused = [answer for answer in answers if answer.status_code == 429]
    assert len(refused) >= 1
    assert str(limits.MAX_QUEUE_PER_CLIENT) in refused[0].json()["detail"]
    assert int(refused[0].headers["Retry-After"]) > 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["dermatology", "my secret prompt"], "6 input values are needed, got 2"),
        ([*values(1), "more"], "6 input values are needed, got 7"),
        (["dermatology", 5, 1, STEPS, 3.0, ""], "must be text, got 5"),
        (["dermatology", {"a": 1}, 1, STEPS, 3.0, ""], "must be text"),
        (["dermatology", PROMPT, "1", STEPS, 3.0, ""], "whole number"),
        (["dermatology", PROMPT, 1, None, 3.0, ""], "whole number"),
        (["dermatology", PROMPT, 1, STEPS, "x", ""], "number from 1 to 15"),
        (["dermatology", PROMPT, 1, STEPS, 3.0, 5], "Unknown adapter"),
        ([["dermatology"], PROMPT, 1, STEPS, 3.0, ""], "Unknown domain"),
    ],
)
def test_inputs_of_a_wrong_form_are_answered_in_words_and_not_logged(
    api: str, other: httpx.Client, data: list[Any], said: str, capfd: pytest.CaptureFixture
) -> None:
    event, told = call(other, api, "compare", data)
    assert event == "error"
    assert said in told["error"]
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out
    assert "secret" not in captured.err + captured.out


def test_a_file_that_was_not_uploaded_is_refused_in_words(
    api: str, other: httpx.Client, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for image in ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "x.png", 5, {"a": 1}):
        event, told = call(other, api, "ground", ["dermatology", image, "hair", ""])
        assert event == "error"
        assert told["error"]
        assert "/etc" not in told["error"]
    assert "Traceback" not in capfd.readouterr().err


def test_every_answer_restricts_the_browser(url: str, api: str) -> None:
    for address in (url, f"{api}info", f"{api}file=/etc/passwd"):
        headers = httpx.get(address).headers
        assert "frame-ancestors 'self'" in headers["Content-Security-Policy"]
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "same-origin"


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_another_host_is_not_answered(url: str, method: str) -> None:
    headers = {"Host": "attacker.example", "Origin": "http://attacker.example"}
    answer = httpx.request(method, f"{url}config", headers=headers)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers
    assert "components" not in answer.text


@pytest.mark.parametrize("origin", ["http://localhost:9", "https://attacker.example", "null", "file://"])
def test_a_page_of_another_origin_sends_and_reads_nothing(url: str, api: str, origin: str) -> None:
    headers = {"Origin": origin}
    preflight = {**headers, "Access-Control-Request-Method": "POST"}
    refused = [
        httpx.post(f"{api}call/compare", json={"data": values(1)}, headers=headers),
        httpx.post(f"{api}upload", files={"files": b"x"}, headers=headers),
        httpx.options(f"{api}call/compare", headers=preflight),
    ]
    assert {answer.status_code for answer in refused} == {403}
    read = httpx.get(f"{url}config", headers=headers)
    for answer in (*refused, read):
        assert "access-control-allow-origin" not in answer.headers
        assert "access-control-allow-credentials" not in answer.headers


def test_the_pages_own_origin_may_send(url: str, api: str) -> None:
    answer = httpx.post(f"{api}upload", files={"files": b"x"}, headers={"Origin": url.rstrip("/")})
    assert answer.status_code == 200


def test_bodies_are_bounded(api: str) -> None:
    long = "x" * (limits.MAX_JSON_BYTES + 1)
    assert httpx.post(f"{api}call/compare", json={"data": [long]}).status_code == 413
    chunks = (b"x" * 2**16 for _ in range(limits.MAX_JSON_BYTES // 2**16 + 2))
    assert httpx.post(f"{api}call/compare", content=chunks).status_code == 413
    large = httpx.post(f"{api}upload", files={"files": b"x" * (limits.MAX_UPLOAD_BYTES + 2**17)}, timeout=30)
    assert large.status_code == 413
    assert "upload" in large.json()["detail"]


def test_the_server_fetches_nothing_for_a_client(api: str) -> None:
    for path in ("file=https://example.org/x.png", "proxy=https://a.hf.space/x", "file=HTTP://example.org/"):
        assert httpx.get(f"{api}{path}").status_code == 404


def test_the_clients_library_can_still_upload_and_cancel(url: str, tmp_path: Path, slow_steps: list[float]) -> None:
    client = Client(url, verbose=False)
    job = client.submit(*values(110, steps=50), api_name="/compare")
    begun = len(slow_steps)
    while len(slow_steps) == begun:
        time.sleep(0.02)
    job.cancel()
    time.sleep(2 * STEP_S)
    stopped = len(slow_steps)
    time.sleep(3 * STEP_S)
    assert len(slow_steps) == stopped
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(AppError, match="PNG"):
        client.predict("dermatology", handle_file(tmp_path / "text.png"), "hair", "", api_name="/ground")


def test_no_path_of_the_installation_is_told(url: str, api: str) -> None:
    text = httpx.get(f"{url}config").text + httpx.get(url).text + httpx.get(f"{api}info").text
    for folder in (str(Path.home()), str(Path(__file__).parents[2])):
        assert folder not in text
