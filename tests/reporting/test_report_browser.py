"""A report in a real browser: Debian's Chromium without a window."""

import shutil
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from report_runs import make_run

from fifa.data.table import load_pairs, save_pairs
from fifa.reporting.page import write_report

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
FOCUSED = "document.activeElement.getAttribute('aria-label')"


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def link(tmp_path_factory):
    """The report of a run whose images are of three generators, one with a hostile name."""
    folder, images = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("images")
    make_run(folder, pairs=80, keep=20, images=images)
    pairs, names = load_pairs(folder), ["sdxl", "<i>flux</i>", "sd 1.5"]
    table = pairs.table
    for name, first in (("model_0", 0), ("model_1", 1)):
        makers = pa.DictionaryArray.from_arrays(((np.arange(80) + first) % 3).astype("i4"), names)
        table = table.append_column(name, makers)
    save_pairs(replace(pairs, table=table), folder)
    return write_report(folder).as_uri()


@contextmanager
def reader(browser, link, **context):
    """Somebody who reads the page; nothing was fetched, refused or wrong by the end."""
    own = browser.new_context(**context)
    page, wrong = own.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.on("request", lambda asked: wrong.append(asked.url) if asked.url[:4] == "http" else None)
    page.goto(link)
    yield page
    assert wrong == []
    own.close()


def test_pairs_open_larger_keys_step_and_filters_choose(browser, link):
    with reader(browser, link) as page:
        pairs, dialog = page.locator("#examples .pair"), page.locator("dialog")
        total = pairs.count()
        small = pairs.locator("img").first.bounding_box()["width"]
        pairs.locator("img").first.click()
        assert dialog.locator("img").first.bounding_box()["width"] > 1.5 * small
        place = dialog.get_by_role("status")
        assert place.text_content().startswith(f"1 of {total}: Kept, first")
        for key, number in (("j", 2), ("ArrowRight", 3), ("k", 2), ("ArrowLeft", 1), ("k", total)):
            page.keyboard.press(key)
            assert place.text_content().startswith(f"{number} of ")
        page.keyboard.press("Escape")
        assert dialog.is_hidden()
        last = pairs.last.locator("bdi").text_content()[:20]
        assert last in page.evaluate(FOCUSED)  # where one was, and keys go on from there
        page.keyboard.press("j")
        assert last not in page.evaluate(FOCUSED)
        page.keyboard.press("Enter")
        assert place.text_content().startswith("1 of ")
        page.keyboard.press("Escape")

        page.get_by_label("Reason").select_option("tie")
        ties = page.locator("#examples .pair:visible").count()
        assert page.locator("#examples h3:visible").all_text_contents() == ["Dropped: tie"]
        assert page.locator(".filter [role=status]").text_content() == f"{ties} of {total} pairs"
        page.get_by_label("Reason").select_option("")
        page.get_by_label("Generator").select_option("<i>flux</i>")
        shown = page.locator("#examples .pair:visible")
        assert 0 < shown.count() < total
        # flagged prompts have no pictures to name a generator at
        named = shown.filter(has=page.locator(".images")).all_text_contents()
        assert named and all("<i>flux</i>" in text for text in named)


def test_the_command_of_a_figure_is_copied_or_shown(browser, link):
    command = f"fifa report {link.split('/')[-2]}"
    with reader(browser, link) as page:
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        buttons = page.locator("figure").get_by_role("button", name="Copy the command")
        assert buttons.count() == page.locator("svg.plot").count()
        buttons.first.click()
        page.get_by_role("button", name="Copied").wait_for()
        assert page.evaluate("navigator.clipboard.readText()") == command
        page.evaluate("() => { navigator.clipboard.writeText = () => Promise.reject() }")
        page.locator("figure").nth(1).get_by_role("button").click()
        page.locator("code.copy").wait_for()
        assert page.evaluate("getSelection().toString()") == command


def test_without_scripts_and_on_paper_all_is_there_but_what_is_flagged(browser, link):
    with reader(browser, link, java_script_enabled=False) as page:
        assert page.locator(".pair").count() == page.locator(".pair:visible").count()
        assert page.locator(".live:visible, button:visible, select:visible").count() == 0
    with reader(browser, link, color_scheme="dark") as page:
        assert page.locator(".live:visible").count() > 0
        page.emulate_media(media="print")
        assert page.locator(".live:visible, .tool:visible").count() == 0
        ground = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(ground) == "rgb(255, 255, 255)"
        folded = page.locator("details")
        inner = "d => d.lastElementChild.checkVisibility({contentVisibilityAuto: true})"
        for i in range(folded.count()):
            flagged = folded.nth(i).locator("xpath=ancestor::article").count() > 0
            assert folded.nth(i).evaluate(inner) == (not flagged)


def test_a_phone_need_not_scroll_sideways(browser, link):
    for width in (390, 320, 1280):
        with reader(browser, link, viewport={"width": width, "height": 800}) as page:
            assert page.evaluate("document.documentElement.scrollWidth") == width
