"""Inputs that users met have the right values, and what differs is printed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "cases"

spec = importlib.util.spec_from_file_location("field", ROOT / "scripts" / "field.py")
assert spec is not None
assert spec.loader is not None
field = importlib.util.module_from_spec(spec)
spec.loader.exec_module(field)


@pytest.mark.skipif(not CASES.exists(), reason="no ../shared/cases")
def test_the_cases_have_their_right_values() -> None:
    assert field.differences(CASES, field.EXPECTED) == []


def test_what_differs_is_printed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,image_0,image_1,label\np,a,b,0.25\n")
    right = {"file": "a.csv", "labels": [0.25], "votes": [1]}
    entries = [right, right | {"labels": [0.3]}, {"file": "a.csv", "error": "no label"}]
    (tmp_path / "expected.yaml").write_text(yaml.safe_dump(entries))
    assert field.differences(tmp_path, tmp_path / "expected.yaml") == [
        "a.csv: labels is [0.25], not [0.3]",
        "a.csv: error is no error, not no label",
    ]
