"""Starting and stopping the app: one line that names the cause, and nothing left behind."""

import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

import app
from medviz import ModelError, Studio, limits
from medviz.errors import StartError
from medviz.serving import FOLDER_PREFIX, address, private_folder
from medviz.ui import build
from tests.web.conftest import free_port

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HOST", "PORT", "GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT", "GRADIO_TEMP_DIR", "MEDVIZ_MODELS"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("port", ["abc", "0", "65536", "-1", "78 60", "７８６０"])
def test_a_port_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("PORT", port)
    with pytest.raises(StartError, match=f"65535, got '{port}'"):
        address()


def test_a_port_that_is_taken_and_a_host_that_is_not_ours_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setenv("PORT", str(taken.getsockname()[1]))
        with pytest.raises(StartError, match=r"127\.0\.0\.1 port \d+: Address already in use"):
            address()
    monkeypatch.setenv("HOST", "192.0.2.1")
    with pytest.raises(StartError, match=r"192\.0\.2\.1 port"):
        address()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder in which nobody can write")
def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/proc/medviz")
    with pytest.raises(StartError, match="/proc/medviz cannot be written"), private_folder():
        pass


def test_the_app_says_in_one_line_why_it_cannot_start(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setenv("PORT", "abc")
    assert app.main() == 1
    assert capfd.readouterr().err.strip().splitlines() == [
        "medviz cannot start: PORT must be a whole number from 1 to 65535, got 'abc'"
    ]


def test_the_folder_is_private_and_leaves_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    with private_folder() as folder, private_folder() as other:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "upload.png").write_bytes(b"x")
        assert folder != other
        assert folder.is_dir(), "a living server's folder stays"
    assert list(tmp_path.iterdir()) == []


def test_folders_of_servers_that_were_killed_are_removed_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    abandoned, living, foreign = (tmp_path / name for name in (f"{FOLDER_PREFIX}a", f"{FOLDER_PREFIX}b", "foreign"))
    for folder in (abandoned, living, foreign):
        folder.mkdir()
        (folder / ".lock").touch()
        (folder / "upload.png").write_bytes(b"x")
    with (living / ".lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with private_folder():
            assert not abandoned.exists()
            assert living.exists()
            assert foreign.exists()


def test_a_damaged_manifest_leaves_the_other_domain_on_the_page(
    model_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = shutil.copytree(model_root, tmp_path / "models")
    (root / "dermatology" / "manifest.json").write_text("{")
    page = build(Studio(root, device="cpu"))
    radio = next(block for block in page.blocks.values() if getattr(block, "elem_id", None) == "mv-domain")
    assert [value for _, value in radio.choices] == ["radiology"]
    assert str(root / "dermatology" / "manifest.json") in caplog.text
    (root / "radiology" / "manifest.json").write_text("{")
    with pytest.raises(ModelError, match="no domain can be used"):
        build(Studio(root, device="cpu"))


def test_a_folder_without_models_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"there are no models in {tmp_path}"):
        build(Studio(tmp_path, device="cpu"))


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_the_server_tells_running_calls_and_removes_uploads(
    model_root: Path, tmp_path: Path, number: signal.Signals
) -> None:
    port = free_port()
    places = {"PORT": str(port), "MEDVIZ_MODELS": str(model_root), "GRADIO_TEMP_DIR": str(tmp_path)}
    server = subprocess.Popen(
        [sys.executable, "app.py"], cwd=ROOT, env={**os.environ, **places, "CUDA_VISIBLE_DEVICES": ""}
    )
    try:
        api, told = f"http://127.0.0.1:{port}/gradio_api/", []
        with httpx.Client(timeout=60, transport=httpx.HTTPTransport(retries=0)) as client:
            for _ in range(400):
                try:
                    if client.get(f"{api}startup-events").status_code == 200:
                        break
                except httpx.TransportError:
                    time.sleep(0.2)
            uploaded = Path(client.post(f"{api}upload", files={"files": ("x.png", b"upload")}).json()[0])
            assert uploaded.read_bytes() == b"upload"
            folder = next(tmp_path.iterdir())
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            data = ["dermatology", "a dermoscopic image with hair", 1, 50, 3.0, ""]
            event = client.post(f"{api}call/compare", json={"data": data}).json()["event_id"]

            def read() -> None:
                with httpx.Client(timeout=60) as reader:
                    told.append(reader.get(f"{api}call/compare/{event}").text)

            reading = threading.Thread(target=read)
            reading.start()
            time.sleep(0.3)
            begun = time.monotonic()
            server.send_signal(number)
            assert server.wait(timeout=60) == 0
            assert time.monotonic() - begun < 1.5 * limits.MAX_SHUTDOWN_S + 10
            reading.join()
        assert "event: complete" in told[0] or "stopping" in told[0]
        assert list(tmp_path.iterdir()) == []
    finally:
        server.kill()
        server.wait()
