import json
import os

import pyarrow.parquet as pq
import pytest

from commands import fifa
from fifa.errors import FifaError
from fifa.run.info import info
from fifa.shards.lock import only_writer

LIGHT = ["--margin", "column:clipscore_0,clipscore_1", "--quality", "none", "--diversity", "none"]


def states(folder):
    return {part.name: part.state for part in info(folder).parts}


def test_what_a_run_holds_and_what_is_stale(shipped, tmp_path):
    run, source = tmp_path / "run", tmp_path / "source.parquet"
    pq.write_table(pq.read_table(shipped), source)
    assert fifa("score", source, *LIGHT, "--out", run).returncode == 0
    assert states(run) == {"pairs": "done", "scores": "done", "selection": "open"}
    assert info(run).next == [f"fifa select {run}"]
    for command in ("select", "export", "report"):
        assert fifa(command, run).returncode == 0
    assert set(states(run).values()) == {"done"}
    assert info(run).next == [f"fifa train {run} --model MODEL --out CHECKPOINT"]
    assert info(run / "subset").kind == "a subset"

    assert fifa("select", run, "--keep", "7").returncode == 0
    os.utime(run / "report.html", (0, 0))
    assert states(run) == {
        **{"pairs": "done", "scores": "done", "selection": "done"},
        **{"subset": "stale", "report": "stale"},
    }
    with only_writer(run):
        assert "is writing here" in fifa("info", run).stdout
        assert info(run).next == []
    pq.write_table(pq.read_table(source)[:100], source)
    assert states(run)["pairs"] == "stale"
    found = json.loads(fifa("info", run, "--json").stdout)
    assert found["kind"] == "a run"
    assert found["next"] == info(run).next
    (run / "scores.json").unlink()
    assert f"fifa score {run}" in info(run).next


def test_other_folders(tmp_path):
    training = tmp_path / "training"
    training.mkdir()
    (training / "train.yaml").write_text("model: m\nsource: s\n")
    (training / "stats.jsonl").write_text('{"step": 20, "seconds": 75.0, "loss": 0.5}\n')
    assert "20 steps in 1 min 15 s, loss 0.5000; not finished" in fifa("info", training).stdout
    assert info(training).next == [f"fifa train --recipe {training}/train.yaml --out {training}"]
    with pytest.raises(FifaError, match="no folder of fifa's"):
        info(tmp_path)
    with pytest.raises(FifaError, match="--explain"):
        info(training / "train.yaml")
