"""What the browser tests share: finding Chromium, waiting, and reading what the page shows."""

import shutil

import pytest
from playwright.sync_api import Page, expect

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
in_browser = [pytest.mark.web, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
WAIT_MS = 30_000
expect.set_options(timeout=WAIT_MS)


def open_page(browser, url: str, width: int = 1280, height: int = 1500) -> Page:
    """A new page that records in `strangers` which other servers it asks and in `failures` what went wrong in it."""
    opened = browser.new_page(viewport={"width": width, "height": height})
    opened.strangers = []
    opened.failures = []
    opened.on("request", lambda request: opened.strangers.append(request.url) if not _ours(request.url, url) else None)
    opened.on("pageerror", lambda error: opened.failures.append(str(error)))
    opened.on("response", lambda answer: opened.failures.append(answer.url) if answer.status == 500 else None)
    opened.set_default_timeout(WAIT_MS)
    opened.goto(url)
    # what is set before the page has filled its settings in would be set back
    expect(opened.locator("#mv-generate")).to_be_enabled()
    return opened


def _ours(address: str, url: str) -> bool:
    return address.startswith((url, "data:", "blob:"))


def shown(page: Page, side: str) -> str | None:
    return page.locator(f"#mv-{side} img").first.get_attribute("src", timeout=WAIT_MS)


def set_steps(page: Page, steps: int) -> None:
    page.get_by_role("button", name="Settings").click()
    box = page.locator("#mv-steps input[type=number]")
    # An accordion fills in its parts as it opens, and a robot types before that is done: no person is so quick.
    for _ in range(20):
        box.fill(str(steps))
        box.press("Tab")
        page.wait_for_timeout(300)
        if box.input_value() == str(steps):
            return
    raise AssertionError(f"the number of steps went back to {box.input_value()} 20 times")


def wait_for_change(page: Page, side: str, before: str | None) -> str:
    page.wait_for_function(
        "([side, before]) => { const i = document.querySelector(`#mv-${side} img`); return i && i.src !== before; }",
        arg=[side, _absolute(page, before)],
        timeout=WAIT_MS,
    )
    return str(shown(page, side))


def _absolute(page: Page, source: str | None) -> str | None:
    return page.evaluate("s => s && new URL(s, document.baseURI).href", source)
