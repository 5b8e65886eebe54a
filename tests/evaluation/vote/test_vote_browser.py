"""People at the page, in a real browser: Debian's Chromium without a window."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.parquet as pq
import pytest
from test_vote_server import served
from vote_worlds import make_run

from fifa.evaluation.vote.store import FILE, VoteStore, open_store

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium here: apt-get install chromium"
)
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 60_000  # ms; a machine may be busy
WIDE, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}


SHOWN = """text => document.readyState === "complete"
  && document.querySelector("#count")?.textContent.includes(text)
  && [...document.images].every(image => image.complete && image.naturalWidth)"""
LONG = "a {colour} {shape} on grass, number {i}, " + "with very many further details " * 12


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as started:
        expect.set_options(timeout=PATIENCE)
        browser = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page_for_many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """One server for tests that bring a voter each: its run and link."""
    run = make_run(tmp_path_factory.mktemp("run"), prompts=4, seeds=1, prompt=LONG)
    with served(run, "--port", 0) as (_, link, _):
        yield run, link


@contextmanager
def voter(browser: Any, link: str, **context: Any) -> Iterator[Any]:
    """A person with a browser of their own; no error and no other host by the end."""
    own = browser.new_context(**{"viewport": WIDE, **context})
    own.set_default_timeout(PATIENCE)
    page = own.new_page()
    page.wrong = []
    page.on("pageerror", lambda error: page.wrong.append(str(error)))
    page.on("console", lambda line: page.wrong.append(line.text) if line.type == "error" else 0)
    page.on("request", lambda request: page.wrong.append(request.url)
            if urlsplit(request.url).netloc != urlsplit(link).netloc else 0)  # fmt: skip
    page.goto(link)
    yield page
    assert page.wrong == []
    own.close()


def start(page: Any, name: str = "") -> None:
    page.get_by_label("Your name").fill(name)
    page.get_by_role("button", name="Start").click()
    at(page, 1)


def at(page: Any, number: int) -> None:
    """Wait until pair ``number`` is shown, both its images decoded."""
    page.wait_for_function(SHOWN, arg=f" {number} of ")


def images(page: Any) -> list[str]:
    return [page.locator(f"#{side}").get_attribute("src") for side in ("left", "right")]


def votes(run: Path, number: int = 0) -> list[str]:
    """The answers of a voter, the last one to join if not given."""
    store = VoteStore(run / "evaluate" / FILE)
    number = number or max(store.read().voters)
    return [vote.answer for vote in store.read().votes if vote.voter == number]


def mouse(page: Any, answer: str) -> None:
    page.locator(f"#vote button[value={answer}]").click()


def key(name: str) -> Callable[[Any], None]:
    return lambda page: page.keyboard.press(name)


def test_a_person_votes_20_pairs_by_mouse_and_by_keys(browser: Any, tmp_path: Path) -> None:
    run = make_run(tmp_path, prompts=10, seeds=2)
    ways = [
        (lambda page: mouse(page, "left"), "left"),
        (key("ArrowRight"), "right"),
        (key("ArrowDown"), "tie"),
        (lambda page: mouse(page, "tie"), "tie"),
        (key("ArrowLeft"), "left"),
        (lambda page: mouse(page, "right"), "right"),
        (key("1"), "left"),
        (key("2"), "right"),
        (key("3"), "tie"),
    ]
    answers = []
    with served(run, "--port", 0) as (_, link, _), voter(browser, link) as page:
        start(page, "Ada")
        for number in range(1, 21):
            before = images(page)
            act, answer = ways[number % len(ways)]
            answers.append(answer)
            act(page)
            if number == 20:
                break
            at(page, number + 1)
            # what the next pair says is kept, is kept
            assert votes(run) == answers
            assert images(page) != before
            if number == 9:
                shown = images(page)
                page.reload()
                at(page, 10)
                assert images(page) == shown
            if number == 12:
                page.keyboard.press("u")
                at(page, 12)
                assert images(page) == before
                answers[-1] = "left"
                page.keyboard.press("ArrowLeft")
                at(page, 13)
        expect(page.get_by_role("heading")).to_have_text("Thank you")
        page.get_by_role("button", name="Undo the last vote").click()
        at(page, 20)
        page.keyboard.press("ArrowDown")
        expect(page.get_by_role("heading")).to_have_text("Thank you")
        page.get_by_role("link", name="Results").click()
        expect(page.locator("table").first).to_contain_text("tuned-secret")
    answers[-1] = "tie"
    assert votes(run) == answers
    assert VoteStore(run / "evaluate" / FILE).read().voters == {1: "Ada"}


def test_two_voters_at_once_on_their_own_sides(
    browser: Any, page_for_many: tuple[Path, str]
) -> None:
    run, link = page_for_many
    with voter(browser, link) as one, voter(browser, link) as two:
        start(one)
        start(two)
        seen: list[list[list[bytes]]] = [[], []]
        for number in range(1, 5):
            for who, page in enumerate((one, two)):
                at(page, number)
                seen[who].append(
                    [page.request.get(link.rstrip("/") + src).body() for src in images(page)]
                )
            one.keyboard.press("ArrowLeft")
            two.keyboard.press("ArrowRight")
        for page in (one, two):
            expect(page.get_by_role("heading")).to_have_text("Thank you")
    last = max(VoteStore(run / "evaluate" / FILE).read().voters)
    assert votes(run, last - 1) == ["left"] * 4
    assert votes(run, last) == ["right"] * 4
    assert seen[0] != seen[1]
    assert {frozenset(pair) for pair in seen[0]} == {frozenset(pair) for pair in seen[1]}


def test_a_second_tab_follows_the_first(browser: Any, page_for_many: tuple[Path, str]) -> None:
    run, link = page_for_many
    with voter(browser, link) as page:
        start(page)
        other = page.context.new_page()
        other.goto(link)
        page.keyboard.press("ArrowLeft")
        at(page, 2)
        other.keyboard.press("ArrowRight")  # on the pair that has been voted on
        at(other, 2)
        assert images(other) == images(page)
        assert votes(run) == ["left"]


def test_a_phone_shows_both_images_large_and_nothing_to_scroll(
    browser: Any, page_for_many: tuple[Path, str]
) -> None:
    run, link = page_for_many
    with voter(browser, link, viewport=PHONE, is_mobile=True, has_touch=True) as page:
        start(page)
        size = page.evaluate(
            "() => [document.documentElement.scrollWidth, document.documentElement.scrollHeight]"
        )
        assert size == [PHONE["width"], PHONE["height"]]
        boxes = [page.locator(f"#{side}").bounding_box() for side in ("left", "right")]
        assert min(box["height"] for box in boxes) > 270
        assert boxes[0]["y"] + boxes[0]["height"] <= boxes[1]["y"]  # one above the other
        page.locator("#prompt").focus()
        page.keyboard.press("ArrowDown")  # scrolls the long prompt, and is no vote
        page.wait_for_function("() => document.querySelector('#prompt').scrollTop > 0")
        assert votes(run) == []
        tie = page.get_by_role("button", name="Tie")
        assert tie.bounding_box()["height"] >= 44
        page.get_by_role("button", name="Upper").tap()
        at(page, 2)
        page.get_by_role("button", name="Lower").tap()
        at(page, 3)
        tie.tap()
        at(page, 4)
        page.goto(link + "results")
        assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    assert votes(run) == ["left", "right", "tie"]


def test_a_server_that_is_killed_loses_no_vote_and_the_page_goes_on(
    browser: Any, tmp_path: Path
) -> None:
    run = make_run(tmp_path, prompts=4, seeds=1)
    with served(run, "--port", 0) as (process, link, _), voter(browser, link) as page:
        start(page)
        page.keyboard.press("ArrowLeft")
        at(page, 2)
        process.kill()
        process.join()
        shown = images(page)
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("status")).to_contain_text("Please try again")
        assert images(page) == shown
        assert votes(run) == ["left"]
        with served(run, "--port", urlsplit(link).port):
            page.keyboard.press("ArrowDown")
            at(page, 3)
            expect(page.get_by_role("status")).not_to_contain_text("try again")
            assert votes(run) == ["left", "tie"]
        # killed before a request, or within the reply to one
        cut = ("ERR_CONNECTION", "ERR_CONTENT_LENGTH_MISMATCH", "ERR_EMPTY_RESPONSE")
        page.wrong = [line for line in page.wrong if not any(one in line for one in cut)]


def test_the_next_pair_is_there_before_it_is_asked_for(
    browser: Any, page_for_many: tuple[Path, str]
) -> None:
    with voter(browser, page_for_many[1]) as page:
        start(page)
        page.wait_for_load_state("networkidle")
        page.route("**/image/*", lambda route: route.abort())
        page.keyboard.press("ArrowLeft")
        at(page, 2)
        page.wrong = [line for line in page.wrong if "ERR_FAILED" not in line]  # of the third


def test_without_scripts_the_same_forms_work(browser: Any, page_for_many: tuple[Path, str]) -> None:
    run, link = page_for_many
    with voter(browser, link, java_script_enabled=False) as page:
        page.get_by_role("button", name="Start").click()
        page.get_by_role("button", name="Left").click()
        expect(page.locator("#count")).to_contain_text("2 of 4")
        page.get_by_role("button", name="Undo").click()
        expect(page.locator("#count")).to_contain_text("1 of 4")
        for _ in range(4):
            page.get_by_role("button", name="Tie").click()
        expect(page.get_by_role("heading")).to_have_text("Thank you")
    assert votes(run) == ["tie"] * 4


CONTRAST = """() => {
  const rgb = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(c => (c /= 255) <= .04045 ? c / 12.92
      : ((c + .055) / 1.055) ** 2.4);
    return .2126 * x + .7152 * y + .0722 * z;
  };
  const ground = e => {
    const own = rgb(getComputedStyle(e).backgroundColor);
    return own[3] === 0 && e.parentElement ? ground(e.parentElement) : own;
  };
  return [...document.querySelectorAll("h1, p, #prompt, button, kbd, small, label, th, td, a")]
    .filter(e => e.offsetWidth > 2 && !e.disabled && !e.closest(":disabled"))
    .filter(e => e.textContent.trim())
    .map(e => {
      const [a, b] = [light(rgb(getComputedStyle(e).color)), light(ground(e))];
      return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.textContent.trim()];
    });
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_and_all_be_reached_by_keyboard(
    browser: Any, page_for_many: tuple[Path, str], scheme: str
) -> None:
    run, link = page_for_many
    with voter(browser, link, color_scheme=scheme, reduced_motion="reduce") as page:
        found = page.evaluate(CONTRAST)
        page.keyboard.press("Enter")  # Start has the focus
        at(page, 1)
        found += page.evaluate(CONTRAST)
        side = "getComputedStyle(document.querySelector('.side'))"
        assert page.evaluate(f"{side}.transitionDuration") == "0s"
        for value in ("left", "right", "tie"):
            page.keyboard.press("Tab")
            while page.evaluate("document.activeElement.value") != value:
                page.keyboard.press("Tab")
            assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Enter")
        at(page, 2)
        for _ in range(2, 5):
            shown = images(page)
            page.keyboard.press("ArrowLeft")
            page.wait_for_function(
                "old => document.querySelector('#left')?.getAttribute('src') != old", arg=shown[0]
            )
        expect(page.get_by_role("heading")).to_have_text("Thank you")
        found += page.evaluate(CONTRAST)
        page.goto(link + "results")
        found += page.evaluate(CONTRAST)
    assert len(found) > 30
    assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []
    assert votes(run) == ["tie", "left", "left", "left"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_admin_page_fits_and_can_be_read_wide_and_on_a_phone(
    browser: Any, page_for_many: tuple[Path, str], scheme: str
) -> None:
    run, link = page_for_many
    with voter(browser, link) as page:
        start(page, "a name of one long word " + "x" * 36)
        page.keyboard.press("ArrowLeft")
        at(page, 2)
    token = open_store(run).secret("owner")
    with voter(browser, f"{link}admin?owner={token}", color_scheme=scheme) as page:
        for size in (WIDE, PHONE):
            page.set_viewport_size(size)
            assert page.evaluate("document.documentElement.scrollWidth") == size["width"]
            found = page.evaluate(CONTRAST)
            assert len(found) > 20
            assert [(ratio, text) for ratio, text in found if ratio < 4.5] == []
        expect(page.get_by_label("The link for voters", exact=True)).to_have_value(link)
        expect(page.get_by_role("img", name="QR code of the link for voters")).to_be_visible()
        expect(page.get_by_role("progressbar").first).to_be_visible()
        expect(page.get_by_role("region", name="Voters")).to_have_attribute("tabindex", "0")
        with page.expect_download() as download:
            page.get_by_role("link", name="Download the votes so far").click()
        assert pq.read_metadata(download.value.path()).num_rows >= 1
        page.get_by_role("link", name="Results").click()
        expect(page.get_by_role("heading", name="Voters")).to_be_visible()
