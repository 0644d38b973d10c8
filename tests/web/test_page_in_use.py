"""The page as people use it: switching during a run, mistakes, refused uploads, drafts, the keyboard, small screens."""

import io
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from medviz import Studio
from medviz.errors import Cancelled
from medviz.results import Pair, Preview
from tests.dicoms import dicom
from tests.web.browsing import in_browser, open_page, set_steps, shown
from tests.web.conftest import STEPS

pytestmark = in_browser

AXE = Path(__file__).resolve().parents[2] / "node_modules" / "axe-core" / "axe.min.js"
BLANK = Image.new("RGB", (64, 64), (128, 128, 128))
PROMPT = "a dermoscopic image with nevus (NV)"


class HeldStudio:
    """Stands in for `Studio.compare`: a run shows one intermediate pair, then waits until the test lets it go.

    heeds: whether a run ends when it is cancelled; one that is nearly done does not.
    """

    def __init__(self, studio: Studio, *, heeds: bool = True) -> None:
        self.compare, self.heeds = studio.compare, heeds
        self.begun, self.ended, self.go = (threading.Semaphore(0) for _ in range(3))
        self.asked: list[dict] = []

    def __call__(self, on_preview=None, cancelled=None, **asked) -> Pair:
        self.asked.append(asked)
        on_preview(Preview(1, 2, (BLANK, BLANK)))
        self.begun.release()
        try:
            while not self.go.acquire(timeout=0.05):
                if self.heeds and cancelled():
                    raise Cancelled("cancelled")
            return self.compare(**{**asked, "steps": STEPS, "guidance_scale": 1.5})
        finally:
            self.ended.release()


@pytest.fixture
def held(web_studio: Studio, monkeypatch: pytest.MonkeyPatch) -> Iterator[HeldStudio]:
    held = HeldStudio(web_studio)
    monkeypatch.setattr(web_studio, "compare", held)
    yield held
    held.heeds = False
    held.go.release(100)


def generate(page: Page, held: HeldStudio, prompt: str = PROMPT) -> None:
    """Press Generate and wait until the intermediate images are shown."""
    page.locator("#mv-prompt textarea").fill(prompt)
    page.locator("#mv-generate").click()
    assert held.begun.acquire(timeout=30)
    expect(page.locator("#mv-baseline img")).to_have_attribute("src", re.compile("unfinished"))


def title(page: Page):
    return page.locator("#mv-shown textarea")


@pytest.mark.parametrize("leave", ["domain", "example"])
def test_what_is_chosen_during_a_run_is_not_overwritten_by_it(page: Page, held: HeldStudio, leave: str) -> None:
    held.heeds = False  # nearly done: it cannot be stopped any more
    generate(page, held)
    if leave == "domain":
        page.locator("#mv-domain label", has_text="Radiology").click()
        expect(page.locator("#mv-progress")).to_contain_text("Enter a prompt")
    else:
        page.locator(".mv-examples button").first.click()
        expect(page.locator("#mv-progress")).to_contain_text("Precomputed example")
    held.go.release()
    assert held.ended.acquire(timeout=30)
    page.wait_for_timeout(2500)
    expect(page.locator("#mv-generate")).to_be_enabled()
    if leave == "domain":
        expect(page.locator("#mv-progress")).to_contain_text("Enter a prompt")
        expect(page.locator("#mv-baseline img")).to_have_count(0)
        expect(page.locator("#mv-scores")).to_be_hidden()
        expect(title(page)).to_have_value("")
    else:
        expect(page.locator("#mv-progress")).to_contain_text("Precomputed example")
        expect(title(page)).to_have_value(re.compile("melanoma.*seed 1"))
        expect(page.locator("#mv-words label", has_text="melanoma")).to_be_visible()
    assert page.failures == []


def test_during_a_run_nothing_is_left_of_the_pair_before_and_then_all_is_the_new_ones(
    page: Page, held: HeldStudio
) -> None:
    save = page.locator("#mv-save-3")
    expect(save).to_be_enabled()
    generate(page, held, "a dermoscopic image with hair")
    expect(page.locator("#mv-progress")).to_contain_text("50 %")
    expect(title(page)).to_have_value("Generating: intermediate images")
    expect(page.locator("#mv-words label")).to_have_count(1)
    expect(page.locator("#mv-scores")).to_be_hidden()
    for index in range(4):
        expect(page.locator(f"#mv-save-{index}")).to_be_disabled()
    for tab, part in (("Slider", "#mv-slider"), ("Difference", "#mv-difference")):
        page.get_by_role("tab", name=tab).click()
        expect(page.locator(f"{part} img")).to_have_count(0)
    page.get_by_role("tab", name="Side by side").click()
    held.go.release()
    expect(page.locator("#mv-progress")).to_contain_text("Done in")
    for side in ("baseline", "aligned"):
        assert "unfinished" not in str(shown(page, side)), "the images are final when the page says so"
    expect(page.locator("#mv-words label", has_text="hair")).to_be_visible()
    expect(page.locator("#mv-scores table").first).to_be_visible()
    expect(save).to_be_enabled()
    with page.expect_download() as download:
        save.click()
    assert download.value.suggested_filename == "dermatology_1.zip"


def test_a_mistake_leaves_generate_enabled_and_says_what_to_do(page: Page) -> None:
    alert, prompt = page.locator("#mv-alert [role=alert]"), page.locator("#mv-prompt textarea")
    seed, go = page.locator("#mv-seed input"), page.locator("#mv-generate")
    before = title(page).input_value()
    for text, number, said in (
        ("  ", "1", "prompt is empty; write"),
        (PROMPT, "", "seed is empty; enter a whole number"),
        (PROMPT, "-1", "whole number from 0 to 4294967295"),
    ):
        prompt.fill(text)
        seed.fill(number)
        go.click()
        expect(alert).to_contain_text(said)
        expect(go).to_be_enabled()
        expect(page.locator("#mv-progress")).to_contain_text("Precomputed example")
    assert title(page).input_value() == before
    assert page.failures == []


def test_a_full_queue_or_a_failure_leaves_generate_enabled_and_the_pair_before(
    page: Page, web_studio: Studio, monkeypatch: pytest.MonkeyPatch
) -> None:
    alert, go = page.locator("#mv-alert [role=alert]"), page.locator("#mv-generate")
    before = title(page).input_value()
    full = {"status": 503, "json": {"detail": "Queue is full. Max size is 16 and size is 16."}}
    page.route("**/queue/join*", lambda route: route.fulfill(**full))
    go.click()
    expect(alert).to_contain_text("Wait a minute, then press Generate again")
    expect(go).to_be_enabled()
    expect(page.locator("#mv-cancel")).to_be_disabled()
    expect(title(page)).to_have_value(before)
    page.unroute("**/queue/join*")

    def fail(**asked) -> None:
        raise RuntimeError("/secret")

    with monkeypatch.context() as patch:
        patch.setattr(web_studio, "compare", fail)
        go.click()
        expect(alert).to_contain_text("failed on the server")
    expect(go).to_be_enabled()
    expect(title(page)).to_have_value(before)
    set_steps(page, STEPS)
    go.click()
    expect(alert).to_have_count(0)
    expect(page.locator("#mv-progress")).to_contain_text(re.compile("Done in|from memory"))


def test_enter_generates_and_a_line_break_is_read_as_a_space(page: Page, held: HeldStudio) -> None:
    prompt = page.locator("#mv-prompt textarea")
    prompt.fill("a dermoscopic image")
    prompt.press("Shift+Enter")
    prompt.type("with hair")
    assert prompt.input_value() == "a dermoscopic image\nwith hair"
    prompt.press("Enter")
    assert held.begun.acquire(timeout=30)
    assert prompt.input_value() == "a dermoscopic image\nwith hair", "Enter adds no line"
    assert held.asked[-1]["prompt"] == "a dermoscopic image with hair"
    held.go.release()
    expect(page.locator("#mv-progress")).to_contain_text("Done in")


def test_a_pair_that_was_kept_is_not_said_to_have_taken_as_long_as_its_drawing(page: Page) -> None:
    set_steps(page, STEPS)
    page.locator("#mv-prompt textarea").fill("a dermoscopic image with ink")
    for said in ("Done in", "shown from memory"):
        page.locator("#mv-generate").click()
        expect(page.locator("#mv-progress")).to_contain_text(said)


def test_a_draft_waits_for_a_pause_is_marked_and_can_be_cancelled(page: Page, held: HeldStudio) -> None:
    set_steps(page, STEPS)
    prompt, words = page.locator("#mv-prompt textarea"), "a dermoscopic image with hair and ink"
    prompt.fill(words)
    page.wait_for_timeout(1000)
    assert held.asked == [], "not asked for yet"
    page.locator("#mv-live input").check()
    assert held.begun.acquire(timeout=30)
    page.locator("#mv-cancel").click()
    expect(page.locator("#mv-progress")).to_contain_text("Cancelled")
    expect(title(page)).to_have_value(re.compile("melanoma"))
    held.asked.clear()
    prompt.press("End")
    prompt.type(", patches", delay=60)
    assert held.begun.acquire(timeout=30)
    assert [asked["prompt"] for asked in held.asked] == [f"{words}, patches"], "one draft, of the whole prompt"
    held.go.release()
    expect(page.locator("#mv-progress")).to_contain_text("Draft done in")
    expect(title(page)).to_have_value(re.compile("^Draft: .*patches"))


def test_a_refused_upload_says_why_and_a_switch_of_domain_keeps_the_preview(page: Page, tmp_path: Path) -> None:
    def png(width: int, height: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("1", (width, height)).save(buffer, "PNG")
        return buffer.getvalue()

    page.get_by_role("tab", name="Locate").click()
    upload, alert = page.locator("#mv-ground-image input[type=file]"), page.locator("#mv-ground-alert [role=alert]")
    frames = dicom(np.zeros((2, 64, 64), np.uint8), NumberOfFrames=2)
    for number, (name, content, said) in enumerate(
        (
            ("text.png", b"no image at all", "PNG, JPEG"),
            ("paper.pdf", b"%PDF-1.7\n1 0 obj\n", "PNG, JPEG"),
            ("small.png", png(20, 20), "at least 32 pixels"),
            ("large.png", png(6000, 5000), "30.0 million"),
            ("slice.dcm", dicom(Modality="CT"), "modality 'CT'"),
            ("frames.dcm", frames, "frames"),
        )
    ):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / name).write_bytes(content)
        upload.set_input_files(tmp_path / f"{number}" / name)
        expect(alert).to_contain_text(said)
        page.locator("#mv-ground-image").get_by_label("Clear").click()
        expect(alert).to_have_count(0)
    page.locator("#mv-ground-find").click()
    expect(alert).to_contain_text("upload one")
    Image.linear_gradient("L").save(tmp_path / "good.png")
    upload.set_input_files(tmp_path / "good.png")
    preview = page.locator("#mv-ground-picture img")
    expect(preview).to_be_visible()
    expect(alert).to_have_count(0)
    page.locator("#mv-ground-domain label", has_text="Radiology").click()
    expect(page.locator("#mv-ground-phrase textarea")).to_have_value("bacterial pneumonia")
    expect(preview).to_be_visible()
    assert page.failures == []


def choose(page: Page, field: str, choice: str) -> None:
    page.locator(f"#mv-field-dermatology-{field} input").click()
    page.get_by_role("option", name=choice, exact=True).click()


def test_contradicting_choices_leave_the_menus_usable(page: Page) -> None:
    prompt = page.locator("#mv-prompt textarea")
    expect(prompt).to_have_value(re.compile("hair, ruler"))
    choose(page, "artefacts", "no visible artifacts")
    expect(prompt).to_have_value(re.compile("no visible artifacts"))
    choose(page, "artefacts", "ink")
    expect(prompt).to_have_value(re.compile("showing ink"))
    choose(page, "sex", "male")
    expect(prompt).to_have_value(re.compile("male patient"))
    assert page.failures == []


def test_the_example_of_the_api_names_this_server_and_the_guidance_of_the_page(page: Page, url: str) -> None:
    page.get_by_role("tab", name="API", exact=True).click()
    code = page.locator("#mv-code")
    expect(code).to_contain_text(f'Client("{url.rstrip("/")}")')
    scale = page.get_by_label("number input for Guidance scale")
    page.get_by_role("tab", name="Generate").click()
    page.get_by_role("button", name="Settings").click()
    page.get_by_role("tab", name="API", exact=True).click()
    expect(code).to_contain_text(f"guidance_scale={float(scale.input_value()):g}")


def test_the_page_can_be_used_by_keyboard(page: Page) -> None:
    group = page.get_by_role("radiogroup", name="Domain")
    group.get_by_role("radio", name=re.compile("Dermatology")).focus()
    page.keyboard.press("ArrowDown")
    expect(group.get_by_role("radio", name=re.compile("Radiology"))).to_be_checked()
    expect(page.locator("#mv-prompt textarea")).to_have_value(re.compile("X-ray"))
    page.keyboard.press("ArrowUp")
    expect(page.locator("#mv-prompt textarea")).to_have_value(re.compile("melanoma"))
    thumb = page.get_by_role("button", name=re.compile("melanoma, hair, ruler"))
    expect(thumb).to_be_visible()
    unmarked, seen = [], set()
    page.locator("body").evaluate("body => { document.activeElement.blur(); window.scrollTo(0, 0); }")
    for _ in range(60):
        page.keyboard.press("Tab")
        found = page.evaluate(
            """() => {
                const part = document.activeElement;
                if (!part || part === document.body) return null;
                const drawn = [part, part.closest("label"), part.closest(".wrap")].filter(Boolean).some((one) => {
                    const style = getComputedStyle(one);
                    return style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
                });
                return [drawn, part.outerHTML.slice(0, 120)];
            }"""
        )
        if found is None:
            break
        seen.add(found[1])
        if not found[0]:
            unmarked.append(found[1])
    assert len(seen) > 20
    assert unmarked == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser, url: str, theme: str) -> None:
    if not AXE.is_file():
        pytest.skip("axe-core is not installed: npm install --no-save axe-core")
    opened = open_page(browser, f"{url}?__theme={theme}")
    opened.add_script_tag(path=AXE)
    serious = []
    for tab in ("Generate", "Locate a finding", "About", "API"):
        opened.get_by_role("tab", name=tab, exact=True).click()
        opened.wait_for_timeout(500)
        found = opened.evaluate("axe.run()")["violations"]
        serious += [
            (tab, rule["id"], rule["nodes"][0]["html"][:200])
            for rule in found
            if rule["impact"] in ("serious", "critical")
        ]
    opened.close()
    assert serious == []


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 800), (1920, 1080)])
def test_the_result_is_in_view_when_work_starts_and_uses_the_width(
    browser, url: str, held: HeldStudio, width: int, height: int
) -> None:
    opened = open_page(browser, url, width, height)
    in_view = "part => { const {top, bottom} = part.getBoundingClientRect(); return [top, bottom, innerHeight]; }"
    generate(opened, held)
    opened.wait_for_timeout(1200)  # for the scrolling
    for part in ("#mv-progress", "#mv-baseline img", "#mv-aligned img"):
        top, bottom, inner = opened.locator(part).first.evaluate(in_view)
        assert top >= 0, part
        assert bottom <= inner, part
    held.go.release()
    expect(opened.locator("#mv-progress")).to_contain_text("Done in")
    expect(opened.locator("#mv-scores table").first).to_be_visible()
    if width >= 1280:
        top, _, inner = opened.locator("#mv-scores tbody tr").nth(2).evaluate(in_view)
        assert top < inner, "the first scores are on the first screen"
        assert opened.locator("#mv-result").evaluate("part => innerWidth - part.getBoundingClientRect().right") < 60
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is cut off at the side"
    opened.close()


def test_a_mistake_does_not_scroll_away_from_the_prompt(browser, url: str) -> None:
    opened = open_page(browser, url, 390, 844)
    opened.locator("#mv-prompt textarea").fill("")
    opened.locator("#mv-generate").click()
    expect(opened.locator("#mv-alert [role=alert]")).to_be_in_viewport()
    opened.wait_for_timeout(700)
    expect(opened.locator("#mv-alert [role=alert]")).to_be_in_viewport()
    opened.close()


def test_on_a_phone_the_map_of_a_located_finding_comes_into_view(browser, url: str, tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "image.png")
    opened = open_page(browser, url, 390, 844)
    opened.get_by_role("tab", name="Locate").click()
    opened.locator("#mv-ground-image input[type=file]").set_input_files(tmp_path / "image.png")
    picture = opened.locator("#mv-ground-picture img")
    expect(picture).to_be_visible()
    opened.locator("#mv-ground-find").click()
    expect(opened.get_by_label("Bounding box of highest attention")).to_have_value(re.compile("x "))
    expect(picture).to_be_in_viewport(ratio=0.9)
    opened.close()
