"""`fifa trust`, and what `fifa filter` does where a margin is near chance."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import fifa

COLUMNS = "prompt=text,image_0=a,image_1=b,label=won"
PLAIN = ["--quality", "none", "--diversity", "none", "--keep", "0.2"]


@pytest.fixture
def source(tmp_path):
    """400 pairs of two generators: a judge by chance, a good one and one that says "first"."""
    rng = np.random.default_rng(0)
    n = 400
    won = rng.choice([0.0, 1.0], n)
    good = np.where(rng.random(n) < 0.8, 2 * won - 1, 1 - 2 * won) * rng.uniform(0.5, 1, n)
    columns = {
        "text": [f"a scene of {i // 2}" for i in range(n)],
        "a": [f"{i}-0.png" for i in range(n)],
        "b": [f"{i}-1.png" for i in range(n)],
        "won": won,
        "model_0": rng.choice(["alpha", "beta"], n),
        "model_1": ["gamma"] * n,
        "chance_0": rng.normal(size=n),
        "chance_1": rng.normal(size=n),
        "good_0": good,
        "good_1": np.zeros(n),
        "first_0": np.ones(n),
        "first_1": np.zeros(n),
    }
    path = tmp_path / "votes.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def test_a_margin_near_chance_is_refused_before_anything_is_selected(source, tmp_path):
    run = tmp_path / "run"
    asked = ["filter", source, "--columns", COLUMNS, *PLAIN, "--out", run]
    refused = fifa(*asked, "--margin", "column:chance_0,chance_1")
    assert refused.returncode == 1 and refused.stderr.count("error:") == 1
    for words in ("near chance here: right on ", f"where: {run}", "go on with --anyway"):
        assert words in refused.stderr
    assert list((run / "scores").iterdir()) and not (run / "selection.parquet").exists()
    assert fifa(*asked, "--margin", "column:chance_0,chance_1", "--anyway").returncode == 0
    page = (run / "report.html").read_text()
    assert "Can this margin be trusted here?" in page and "near chance here" in page


def test_the_table_of_a_source_is_that_of_its_run(source, tmp_path):
    judges = ("good", "first", "chance")
    margins = [w for j in judges for w in ("--margin", f"column:{j}_0,{j}_1")]
    asked = [source, "--columns", COLUMNS, *margins]
    run = tmp_path / "run"
    assert fifa("score", *asked, *PLAIN[:4], "--out", run).returncode == 0
    found = json.loads(fifa("trust", run, "--json").stdout)
    assert found == json.loads(fifa("trust", *asked, "--json").stdout)
    findings = {judge["judge"]: judge["finding"] for judge in found["judges"]}
    assert findings.pop("committee")
    assert findings == {
        "column:good_0,good_1": "usable",
        "column:first_0,first_1": "position",
        "column:chance_0,chance_1": "near chance",
    }
    assert next(group["name"] for group in found["groups"]["generator"]) == "gamma"
    assert len(found["groups"]["two generators"]) == 2 and len(found["same"]) == 3
    some = json.loads(fifa("trust", run, "--limit", 90, "--json").stdout)["judges"][0]
    assert (some["pairs"], len(some["parts"])) == (90, 4)
    text = fifa("trust", run).stdout
    for words in (
        "answers by position: right on 100 %",
        "<- usable from here on",
        "alpha",
        "first_0",
    ):
        assert words in text
    no_margin = fifa("trust", source, "--columns", COLUMNS)
    assert no_margin.returncode == 1 and "no margin to judge" in no_margin.stderr
    by_names = ["--margin", "arena", "--anyway", "--out", tmp_path / "arena"]
    assert fifa("filter", source, "--columns", COLUMNS, *PLAIN, *by_names).returncode == 0
    page = (tmp_path / "arena" / "report.html").read_text()
    assert "holds by construction" in page and "own choice is left out" in page
    arena = fifa("trust", source, "--columns", COLUMNS, "--margin", "arena", "--scores", run)
    assert "by its generators' names alone" in arena.stdout and list(run.glob("margin-arena-*"))
