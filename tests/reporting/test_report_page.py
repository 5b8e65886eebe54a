import base64
import hashlib
import html
import re
import shutil
from html.parser import HTMLParser

import pyarrow.parquet as pq
import pytest
from report_runs import HOSTILE, make_run

from fifa.config import Recipe, Score, Select
from fifa.data.table import load_pairs
from fifa.errors import FifaError
from fifa.reporting import page
from fifa.reporting.page import write_report
from fifa.scoring.table import Scores
from fifa.shards.files import sealed_line, write_table, write_yaml


class Page(HTMLParser):
    """Tags, attributes and visible words of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.words, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *attribute) for attribute in attrs]

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    make_run(folder, images=tmp_path_factory.mktemp("images"))
    return folder


@pytest.fixture(scope="module")
def text(run):
    return write_report(run).read_text("utf-8")


@pytest.fixture(scope="module")
def parsed(text):
    return Page(text)


def test_the_page_fetches_nothing(parsed):
    fetching = {"src", "href", "action", "srcset", "poster", "data", "background"}
    for tag, name, value in parsed.attributes:
        if name in fetching:
            assert value.startswith(("data:image/", "#")), (tag, name, value)
    assert not {"link", "iframe", "object", "embed", "form", "base"} & set(parsed.tags)
    assert "@import" not in "".join(parsed.words)
    assert "url(" not in (page.HERE / "style.css").read_text("utf-8")


def test_the_policy_allows_the_style_sheet_and_the_one_script_alone(text, parsed):
    policy = next(v for t, n, v in parsed.attributes if t == "meta" and "default-src" in (v or ""))
    assert "default-src 'none'" in policy
    for tag in ("style", "script"):
        (found,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.S)
        assert found == (page.HERE / page.PARTS[tag]).read_text("utf-8")
        seal = base64.b64encode(hashlib.sha256(found.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{seal}';" in policy
    assert "unsafe-inline" not in policy
    assert not [
        name for _, name, _ in parsed.attributes if name == "style" or name.startswith("on")
    ]


def test_hostile_text_is_shown_and_never_obeyed(text, parsed):
    assert text.count("<script") == 1  # ours
    assert "<b>bad</b>" not in text
    assert '<script>alert("x")</script>' in parsed.text
    assert "\u202e" in HOSTILE
    assert "\u202e" not in text


def test_the_same_files_give_the_same_bytes(run, text):
    assert write_report(run).read_text("utf-8") == text


def test_what_is_in_memory_gives_the_bytes_of_the_files(tmp_path, run, text):
    copy, margins = shutil.copytree(run, tmp_path / run.name), {}
    for path in sorted((run / "scores").glob("margin-*.parquet")):
        name = path.name.split("-")[1]
        margins[f"column:{name}_0,{name}_1"] = pq.read_table(path)
    quality, diversity = (
        pq.read_table(next((run / "scores").glob(f"{step}-*"))) for step in ("quality", "diversity")
    )
    held = {
        "pairs": load_pairs(copy),
        "scores": Scores(margins=margins, quality=quality, diversity=diversity),
        "selection": pq.read_table(copy / "selection.parquet").replace_schema_metadata(None),
    }
    for path in (*copy.glob("p*.parquet"), *(copy / "scores").glob("margin-*")):
        path.unlink()
    assert write_report(copy, **held).read_text("utf-8") == text


def test_another_report_in_the_log_does_not_change_the_page(tmp_path, run, text):
    copy = shutil.copytree(run, tmp_path / run.name)
    log = (copy / "log.jsonl").read_text("utf-8")
    entry = {"step": "report", "started": "2026-01-01T00:00:00+00:00", "seconds": 3.0}
    line = sealed_line(entry)
    (copy / "log.jsonl").write_text(line + log, "utf-8")
    assert write_report(copy).read_text("utf-8") == text


def test_the_counts_on_the_page_add_up(run, parsed):
    selection = pq.read_table(run / "selection.parquet")
    reasons = selection["reason"].to_pylist()
    assert "Kept 80 of 400 pairs (20.0 %)" in parsed.text
    told = parsed.text.replace(",", "")
    rows, pairs, merged, rejected, again, kept, dropped = map(
        int,
        re.search(
            r"(\d+) read = (\d+) pairs \+ (\d+) merged \+ (\d+) rejected; "
            r"(\d+) pairs = (\d+) selected \+ (\d+) dropped",
            told,
        ).groups(),
    )
    assert rows == pairs + merged + rejected
    assert pairs == again == kept + dropped == len(reasons)
    assert kept == reasons.count("selected")
    for reason in set(reasons) - {"selected"}:
        assert re.search(rf"{reason}[^\u2212]*?\u2212{reasons.count(reason)}\b", told), reason


def test_agreement_on_the_page_is_that_of_the_selection(run, parsed):
    table = pq.read_table(
        run / "selection.parquet", columns=["signed_margin", "status"]
    ).to_pylist()
    known = [row for row in table if row["signed_margin"] is not None]
    kept = [row for row in known if row["status"] == "selected"]
    for rows in (known, kept):
        share = sum(row["signed_margin"] > 0 for row in rows) / len(rows)
        assert f"{share * 100:.1f} %" in parsed.text
        assert f"{len(rows)} pairs" in parsed.text


def test_a_flagged_prompt_is_behind_a_toggle(text):
    flagged = re.findall(r"<article.*?</article>", text, re.S)
    flagged = [card for card in flagged if "Prompt flagged" in card]
    assert flagged
    for card in flagged:
        assert re.search(r"<details><summary>Prompt flagged: sexual, violence", card)
        assert "<img" not in card


def test_figures_take_the_pages_colours_and_have_words_for_those_who_cannot_see(parsed):
    labels = [v for tag, name, v in parsed.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == 6  # curve, tenths, three distributions, plane
    assert all(labels)
    figures = {v for tag, name, v in parsed.attributes if tag == "path" and name == "stroke"}
    assert "var(--kept)" in figures
    ids = [v for _, name, v in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = {v for tag, name, v in parsed.attributes if tag == "use" and name == "href"}
    assert used <= {f"#{i}" for i in ids}


def test_pictures_are_in_the_page_and_light(run, parsed):
    pictures = [v for tag, name, v in parsed.attributes if (tag, name) == ("img", "src")]
    assert len(pictures) >= 30
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in pictures)
    assert (run / "report.html").stat().st_size < 1_000_000


def test_time_and_tokens_are_told(parsed):
    assert "1 min 17 s" in parsed.text  # 0.4 + 75.2 + 1 seconds
    assert "tokens in 1,234" in parsed.text
    assert "recall 0.987" in parsed.text
    assert "1 line of the log could not be read" in parsed.text


def test_files_that_do_not_belong_together_are_told(tmp_path, run):
    copy = shutil.copytree(run, tmp_path / "copy")
    rejected = copy / "rejected.parquet"
    write_table(rejected, pq.read_table(rejected)[:2])
    assert "do not add up" in write_report(copy).read_text("utf-8")


def test_a_run_with_nothing_but_a_selection(tmp_path):
    make_run(tmp_path, pairs=12, scorers=1, keep=3)
    shutil.rmtree(tmp_path / "scores")
    (tmp_path / "log.jsonl").unlink()
    recipe = Recipe(score=Score(quality="none", diversity="none"), select=Select(keep=3))
    write_yaml(tmp_path / "recipe.yaml", recipe.to_yaml())
    told = Page(write_report(tmp_path).read_text("utf-8")).text
    assert "a curve needs 20" in told
    assert "no prompt embeddings" in told
    assert "The run has no log" in told


@pytest.mark.parametrize("knobs", [{"strategy": "consensus"}, {"min_agreement": 0.5}])
def test_agreement_by_construction_is_not_sold_as_evidence(tmp_path, run, knobs):
    copy = shutil.copytree(run, tmp_path / "copy")
    write_yaml(copy / "recipe.yaml", Recipe(select=Select(keep=80, **knobs)).to_yaml())
    assert "is no evidence" in write_report(copy).read_text("utf-8")


def test_a_recipe_that_is_newer_than_the_selection_is_told(tmp_path, run, text):
    assert "changed after this selection" not in text
    copy = shutil.copytree(run, tmp_path / "copy")
    write_yaml(copy / "recipe.yaml", Recipe(select=Select(keep=79)).to_yaml())
    assert "changed after this selection" in write_report(copy).read_text("utf-8")


def test_the_page_tells_the_command_that_makes_it_again(tmp_path, run):
    copy = shutil.copytree(run, tmp_path / "it's a <run>")
    told = write_report(copy).read_text("utf-8")
    command = html.escape("fifa report 'it'\"'\"'s a <run>'").replace("&#x27;", "&#39;")
    assert told.count(command.replace("&quot;", "&#34;")) == 2  # for the buttons, and to be read


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FifaError):
        write_report(tmp_path)


def test_text_and_lines_can_be_told_from_the_ground_in_both_schemes():
    light, _, dark = (page.HERE / "style.css").read_text("utf-8").partition("@media screen")
    schemes = [dict(re.findall(r"--([\w-]+): #(\w{6})", part)) for part in (light, dark)]

    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2] + 0.05

    least = {"ink": 4.5, "muted": 4.5, "kept": 4.5, "dropped": 4.5, "good": 4.5, "all": 3}
    least |= {f"scorer-{i}": 3 for i in range(7)}
    for scheme in schemes:
        for name, ratio in least.items():
            for ground in ("page", "card", "soft"):
                one, other = sorted((luminance(scheme[name]), luminance(scheme[ground])))
                assert other / one >= ratio, (name, ground)
