"""Files that no other test opens: they are read by package indexes, GitHub and people."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
RAISED = {"click", "huggingface-hub", "safetensors"}  # by transformers 5


def requirements():
    named = [*PROJECT["dependencies"], *(one for name in EXTRAS for one in EXTRAS[name])]
    return [one for one in map(Requirement, named) if one.name != PROJECT["name"]]


def test_the_oldest_versions_are_the_lower_bounds_of_the_ranges():
    lines = (ROOT / "constraints-oldest.txt").read_text("utf-8").splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    for one in requirements():
        low = next(spec.version for spec in one.specifier if spec.operator == ">=")
        pin = pinned.pop(one.name, None) or low  # an extra's may be another's, too
        assert Version(pin) >= Version(low), one.name
        if one.name not in RAISED:
            assert Version(pin).release[:2] == Version(low).release[:2], one.name
    assert not pinned, "neither the core nor an extra asks for these"


def test_all_is_every_extra_that_is_not_left_out_on_purpose():
    (everything,) = map(Requirement, EXTRAS["all"])
    assert everything.extras == set(EXTRAS) - {"all", "quant", "heic", "postgres", "s3", "gcs"}


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / "CITATION.cff"],
    ids=lambda p: p.name,
)
def test_yaml_that_others_read(path):
    found = yaml.safe_load(path.read_text("utf-8"))
    for job in found.get("jobs", {}).values():
        assert "timeout-minutes" in job
        assert all("uses" in step or "run" in step for step in job["steps"])
    if path.parent.name == "workflows":
        assert found["permissions"] == {"contents": "read"}
