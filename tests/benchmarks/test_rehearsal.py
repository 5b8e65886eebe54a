"""The rehearsal of ten million pairs, tiny."""

from __future__ import annotations

import json
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import rehearsal
from fifa.data import merge, read_pairs
from fifa.selection.table import load_selection, reason_counts


def test_the_whole_way_from_columns_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rehearsal, "ROWS", 1000)
    monkeypatch.setattr(sys, "argv", ["rehearsal.py", "--pairs", "2500", "--folder", str(tmp_path)])
    monkeypatch.setenv("PYTHONPATH", str(Path(rehearsal.__file__).parents[1] / "src"))
    rehearsal.main()
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert [line["name"] for line in told] == ["rehearsal"] * 3
    assert told[0]["exponent"] is None and told[-1]["exponent"] is not None
    run = tmp_path / "run-2500"
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(rehearsal.STEPS[:-1])
    read = steps[0]
    assert read["pairs"] + read["merged"] == read["rows"] == 2500
    counts = reason_counts(load_selection(run))
    assert sum(counts.values()) == read["pairs"]
    kept = pq.read_table(run / "subset" / "data").num_rows
    assert kept == counts["selected"] == round(0.1 * read["pairs"])
    assert (run / "report.html").exists()


def test_pairs_lie_on_the_disk_while_they_are_read_and_then(tmp_path, monkeypatch):
    rehearsal.make(tmp_path / "source", 50_000)
    read_pairs(tmp_path / "source", columns=rehearsal.CARRIED)  # what is imported and kept by it
    held, tables = [], merge._tables

    def counted(files, *more):
        held.append(pa.total_allocated_bytes() - before)
        return tables(files, *more)

    monkeypatch.setattr(merge, "_tables", counted)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        pairs = read_pairs(tmp_path / "source", columns=rehearsal.CARRIED, spill=tmp_path)
        own, _ = tracemalloc.get_traced_memory()  # NumPy's
    finally:
        tracemalloc.stop()
    assert (pa.total_allocated_bytes() - before + own) / len(pairs) < 20
    assert held[0] / len(pairs) < 40  # of all files: prompts, and each pair's


def test_the_source_is_the_same_bytes_every_time(tmp_path):
    for name in ("one", "two"):
        rehearsal.make(tmp_path / name, 1200)
    files = [sorted((tmp_path / name).iterdir()) for name in ("one", "two")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]


def test_the_exponent_of_a_square_is_two():
    assert round(rehearsal.exponent([10, 100, 1000], [0.2, 20, 2000]), 6) == 2
