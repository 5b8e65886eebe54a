"""docs/extending.md is applied to a copy of the project: few files are touched, the tests pass."""

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text("utf-8")
SECTIONS = {text.partition("\n")[0]: text for text in re.split("^## ", PAGE, flags=re.M)[1:]}
BLOCK = re.compile(r"^```(python|diff)\n(?:#|---) (\S+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
MOST = {"src": 2, "tests": 1, "docs": 1}


def apply(block: re.Match[str], root: Path) -> None:
    """Write the file that a block holds, or change the file that it names."""
    language, name, body = block.groups()
    path = root / name
    if language == "python":
        assert not path.exists(), name
        path.write_text(body, "utf-8")
        return
    text = path.read_text("utf-8")
    for hunk in body.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert all(line[0] in " +-" for line in lines), hunk
        old, new = ("".join(line[1:] for line in lines if line[0] in (" ", one)) for one in "-+")
        assert text.count(old) == 1, f"{name} has {text.count(old)} times:\n{old}"
        text = text.replace(old, new)
    path.write_text(text, "utf-8")


@pytest.mark.parametrize("title", SECTIONS)
def test_what_is_added_touches_the_few_files_that_the_table_names(title):
    files = list(dict.fromkeys(block[2] for block in BLOCK.finditer(SECTIONS[title])))
    [row] = [line for line in PAGE.splitlines() if line.startswith(f"| [{title}]")]
    assert sorted(re.findall("`(.+?)`", row)) == sorted(files)
    counts = Counter(name.partition("/")[0] for name in files)
    assert counts.keys() == MOST.keys()
    assert all(counts[where] <= most for where, most in MOST.items())


def test_the_changes_work_together(tmp_path):
    for name in ("src", "tests", "docs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    blocks = [block for text in SECTIONS.values() for block in BLOCK.finditer(text)]
    for block in blocks:
        apply(block, tmp_path)
    tests = {block[2] for block in blocks if block[2].startswith("tests/")}
    tests |= {"tests/models/test_families.py", "tests/scoring/test_specs.py"}
    environment = {name: v for name, v in os.environ.items() if not name.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sorted(tests)],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": str(tmp_path / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
