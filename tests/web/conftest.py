"""The app on a free port with tiny models and stored examples, started once for all web tests."""

import logging
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

from medviz import Studio
from medviz.domains import DOMAINS
from medviz.export.examples import write_example
from medviz.results import TABLES_NAME
from tests.tiny import add_few_steps
from tests.web.browsing import CHROMIUM, open_page

STEPS = 2  # not as many as dermatology's few-step adapter has


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def assets(model_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like assets/: models, one stored example for dermatology, one report."""
    root = tmp_path_factory.mktemp("assets")
    shutil.copytree(model_root, root / "models")
    add_few_steps(root / "models" / "dermatology", [999, 500, 200])
    maker = Studio(root / "models", device="cpu")
    prompt = DOMAINS["dermatology"].examples[0].prompt
    write_example(maker.compare("dermatology", prompt, 1, STEPS), root / "examples" / "dermatology" / "01")
    (root / "reports").mkdir()
    (root / "reports" / TABLES_NAME).write_text("### A domain\n\n| Figure | n |\n| --- | --- |\n| Distance | 256 |\n")
    return root


@pytest.fixture(scope="session")
def web_studio(assets: Path) -> Studio:
    return Studio(assets / "models", device="cpu")


@pytest.fixture(scope="session")
def url(web_studio: Studio, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the running app."""
    patch = pytest.MonkeyPatch()
    patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("served")))
    from medviz.ui import build, launch_settings

    logging.getLogger("httpx").setLevel(logging.WARNING)
    page = build(web_studio)
    _, address, _ = page.launch(
        server_name="127.0.0.1",
        server_port=free_port(),
        prevent_thread_lock=True,
        quiet=True,
        _frontend=False,  # leaves out the check that the address answers within seconds; the tests wait longer
        **launch_settings(),
    )
    yield address
    page.close()
    patch.undo()


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=CHROMIUM, headless=True, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser, url: str) -> Iterator[Page]:
    opened = open_page(browser, url)
    yield opened
    opened.close()
