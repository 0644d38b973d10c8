"""The page in a real browser: both domains generate, a word changes the overlay, no other server is asked."""

import re
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from medviz.domains import get_domain
from tests.dicoms import dicom, ramp
from tests.web.browsing import WAIT_MS, in_browser, set_steps, shown, wait_for_change
from tests.web.conftest import STEPS

pytestmark = in_browser


def test_the_first_screen_shows_a_stored_pair_its_words_and_the_notice(page: Page) -> None:
    expect(page.locator("#mv-notice")).to_contain_text("Not for diagnosis")
    expect(page.locator("#mv-baseline img")).to_be_visible()
    expect(page.locator("#mv-words label")).not_to_have_count(1)
    before = shown(page, "aligned")
    page.locator("#mv-words label").nth(1).click()
    wait_for_change(page, "aligned", before)
    expect(page.locator("#mv-progress")).to_contain_text("Precomputed example")


def test_a_quick_person_is_not_overwritten_by_the_page_that_is_still_opening(browser, url: str) -> None:
    opened = browser.new_page(viewport={"width": 1280, "height": 1500})
    opened.set_default_timeout(WAIT_MS)
    held = []
    opened.route("**/gradio_api/run/**", lambda route: held.append(route))
    opened.goto(url)
    prompt, generate = opened.locator("#mv-prompt textarea"), opened.locator("#mv-generate")
    prompt.fill("a dermoscopic image of a nevus")
    expect(generate).to_be_disabled()
    expect(opened.locator("#mv-domain input").first).to_be_disabled()
    opened.wait_for_timeout(500)
    assert held, "the opening request was not held back: this test proves nothing"
    for opening in held:
        opening.continue_()
    expect(generate).to_be_enabled()
    expect(opened.locator("#mv-progress")).to_contain_text("Precomputed example")
    expect(prompt).to_have_value("a dermoscopic image of a nevus")
    opened.close()


def test_both_domains_generate_and_a_word_changes_the_overlay(page: Page, tmp_path: Path) -> None:
    set_steps(page, STEPS)
    for domain, label in (("radiology", "Radiology"), ("dermatology", "Dermatology")):
        page.locator("#mv-domain label", has_text=label).click()
        expect(page.locator("#mv-shown textarea")).to_be_visible()
        prompt = page.locator("#mv-prompt textarea")
        expect(prompt).to_have_value(re.compile("X-ray" if domain == "radiology" else "dermoscopic"))
        page.locator("#mv-generate").click()
        expect(page.locator("#mv-progress")).to_contain_text(re.compile("Done in|shown from memory"))
        expect(page.locator("#mv-shown textarea")).to_have_value(re.compile("2 steps"))
        plain = {side: shown(page, side) for side in ("baseline", "aligned")}
        assert plain["baseline"] != plain["aligned"]
        page.locator("#mv-words label").nth(1).click()
        for side, before in plain.items():
            wait_for_change(page, side, before)
        expect(page.locator("#mv-legend .mv-bar")).to_be_visible()
        expect(page.locator("#mv-scores table").first).to_be_visible()
        page.screenshot(path=tmp_path / f"{domain}.png", full_page=True)
        assert (tmp_path / f"{domain}.png").stat().st_size > 20_000
    assert page.strangers == [], "the page must ask no other server"
    assert page.failures == []


def test_a_phrase_is_found_in_an_uploaded_radiograph_and_its_overlay_can_be_changed(page: Page, tmp_path: Path) -> None:
    (tmp_path / "chest.dcm").write_bytes(dicom(ramp(rows=120, columns=90)))
    page.get_by_role("tab", name="Locate").click()
    page.locator("#mv-ground-domain label", has_text="Radiology").click()
    page.locator("#mv-ground-image input[type=file]").set_input_files(tmp_path / "chest.dcm")
    expect(page.locator("#mv-ground-picture img")).to_be_visible()
    before = shown(page, "ground-picture")
    page.locator("#mv-ground-phrase textarea").fill("lung opacity in the right lower zone")
    page.locator("#mv-ground-find").click()
    seen = wait_for_change(page, "ground-picture", before)
    expect(page.get_by_label("Bounding box of highest attention")).to_have_value(
        re.compile(r"x \d+ to \d+, y \d+ to \d+")
    )
    # an untrained segmenter finds no lungs to outline: the checkbox redraws, and what is missing is said
    page.get_by_role("checkbox", name="Outline regions").check()
    outlined = wait_for_change(page, "ground-picture", seen)
    slider = page.locator("#mv-ground-opacity input[type=range]")
    slider.fill("0.2")
    slider.dispatch_event("pointerup")
    wait_for_change(page, "ground-picture", outlined)
    expect(page.locator("#mv-ground-opacity input[type=number]")).to_have_value("0.2")
    page.screenshot(path=tmp_path / "ground.png", full_page=True)
    assert page.strangers == []
    assert page.failures == []


def test_menus_write_the_prompt_and_the_prompt_sets_the_menus(page: Page) -> None:
    prompt = page.locator("#mv-prompt textarea")
    expect(prompt).to_have_value(re.compile("melanoma"))
    sex = page.locator("#mv-field-dermatology-sex input")
    sex.click()
    page.get_by_role("option", name="female", exact=True).click()
    expect(prompt).to_have_value(re.compile("woman|female"))
    prompt.fill("a dermoscopic image with nevus (NV) on a quokka")
    prompt.blur()
    expect(page.locator("#mv-unknown textarea, #mv-unknown input")).to_have_value(re.compile("quokka"))


def test_a_choice_writes_the_prompt_once(page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    # What came back a second time would overwrite what a person typed in between.
    domain, written = get_domain("dermatology"), []
    build = type(domain).build_prompt
    monkeypatch.setattr(
        type(domain), "build_prompt", lambda self, values: written.append(values) or build(self, values)
    )
    prompt = page.locator("#mv-prompt textarea")
    for sex in ("female", "male"):
        page.locator("#mv-field-dermatology-sex input").click()
        page.get_by_role("option", name=sex, exact=True).click()
        expect(prompt).to_have_value(re.compile(f"\\b{sex}"))
        prompt.click()
        page.wait_for_timeout(700)
    assert [values["sex"] for values in written] == ["female", "male"]


def test_a_draft_follows_the_prompt_where_the_domain_can_draw_one(page: Page) -> None:
    prompt, drawn = page.locator("#mv-prompt textarea"), page.locator("#mv-shown textarea")
    set_steps(page, STEPS)  # opens the settings and waits until they are filled in
    before = shown(page, "aligned")
    prompt.fill("a dermoscopic image of basal cell carcinoma")
    page.wait_for_timeout(500)
    assert shown(page, "aligned") == before  # not asked for yet
    page.locator("#mv-live input").check()
    wait_for_change(page, "aligned", before)
    expect(drawn).to_have_value(re.compile("basal cell carcinoma.*3 steps"))  # what stands there, at the tick itself
    before = shown(page, "aligned")
    prompt.fill("a dermoscopic image of melanoma")
    wait_for_change(page, "aligned", before)
    expect(page.locator("#mv-progress")).to_contain_text("Draft done in")
    expect(drawn).to_have_value(re.compile("melanoma.*3 steps"))
    expect(page.locator("#mv-warnings textarea")).to_have_value(re.compile("Drawn in 3 steps"))
    page.locator("#mv-domain label", has_text="Radiology").click()
    expect(page.locator("#mv-live")).to_be_hidden()
    assert page.failures == []


def test_what_a_person_types_is_shown_as_text(page: Page) -> None:
    prompt = page.locator("#mv-prompt textarea")
    set_steps(page, 1)
    prompt.fill('melanoma <img src=x onerror="window.hacked=1"> **bold**')
    prompt.blur()
    page.locator("#mv-generate").click()
    expect(page.locator("#mv-progress")).to_contain_text("Done in")
    expect(page.locator("#mv-warnings textarea")).to_be_visible()
    assert page.evaluate("window.hacked") is None
    assert page.locator("img[src=x]").count() == 0
    prompt.fill("<b id=planted>x</b>" * 30)
    page.locator("#mv-generate").click()
    assert page.locator("#planted").count() == 0


def test_a_run_can_be_cancelled_and_what_was_shown_comes_back(page: Page) -> None:
    expect(page.locator("#mv-baseline img")).to_be_visible()
    set_steps(page, 50)
    page.locator("#mv-generate").click()
    expect(page.locator("#mv-cancel")).to_be_enabled()
    page.locator("#mv-cancel").click()
    expect(page.locator("#mv-progress")).to_contain_text("Cancelled")
    expect(page.locator("#mv-generate")).to_be_enabled()
    expect(page.locator("#mv-baseline img")).to_be_visible()
    expect(page.locator("#mv-shown textarea")).to_have_value(re.compile(f"{STEPS} steps"))


def test_the_about_tab_shows_the_tables_of_the_reports(page: Page) -> None:
    page.get_by_role("tab", name="About").click()
    cell = page.locator("#mv-tables td").first
    expect(page.get_by_role("button", name="A domain")).to_be_visible()
    expect(cell).not_to_be_visible()
    page.get_by_role("button", name="A domain").click()
    expect(cell).to_have_text("Distance")
    expect(cell).to_be_visible()
