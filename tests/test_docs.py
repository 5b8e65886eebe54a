"""The code in README.md and docs/ is run: every ```python block of a page, top to bottom."""

import re
from pathlib import Path
from pkgutil import resolve_name

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_CODE = {
    "index.md": "it leads to the others",
    "options.md": "the site makes it from the commands: test_knobs.py",
    "extending.md": "its code is files of the project: test_extending.py",
    "reliability.md": "its commands take minutes; the tests that it names are the small ones",
    "report.md": "it describes a page that other pages' commands write",
    "study.md": "its commands take hours: tests/run/test_run_study.py runs a small one",
    "rewards.md": "its models are gigabytes from the hub; tests/scoring/rewards runs small ones",
}
ROWS = {"quality.md": 40}  # the default rater takes its time for each prompt
BLOCK = re.compile(r"^```python\n(?!# (?:src|tests)/)(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs(page, shipped, tmp_path, monkeypatch):
    text = page.read_text("utf-8")
    blocks = list(BLOCK.finditer(text))
    assert bool(blocks) == (page.name not in WITHOUT_CODE), "no code: say why in WITHOUT_CODE"
    monkeypatch.chdir(tmp_path)
    feedback = pq.read_table(shipped).slice(0, ROWS.get(page.name))
    pq.write_table(feedback, tmp_path / "feedback.parquet")  # what pages call so
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks:
        line = text[: block.start(1)].count("\n")
        code = compile("\n" * line + block.group(1), str(page), "exec")
        exec(code, names)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            if not target.startswith(("http://", "https://", "mailto:")):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_commands_of_the_readme_exist():
    from fifa.cli import cli

    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    used = set(re.findall(r"^\s*fifa ([a-z-]+)", text, re.MULTILINE))
    assert used <= set(cli.commands), used - set(cli.commands)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_names_in_the_text_exist(page):
    text = BLOCK.sub("", page.read_text("utf-8"))
    for name in re.findall(r"`(fifa(?:\.\w+)+)", text):
        resolve_name(name)  # raises for modules and attributes that are not there


def test_files_in_the_text_exist():
    for page in PAGES:
        if page.name == "extending.md":
            continue  # which adds the files that it names
        for name in re.findall(
            r"`((?:src|tests|scripts|benchmarks)/[\w/.-]+)`", page.read_text("utf-8")
        ):
            assert (ROOT / name).exists(), f"{page.name}: {name}"
