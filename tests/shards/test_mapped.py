"""Tables on the disk are the tables they were, and their memory can be given back."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fifa.shards import mapped
from fifa.shards.files import table_bytes
from fifa.shards.mapped import Shelf, give_back


@pytest.fixture(autouse=True)
def small_tables_too(monkeypatch):
    monkeypatch.setattr(mapped, "LEAST", 1)


def example(rows: int = 3000) -> pa.Table:
    return pa.table(
        {
            "text": pa.array([f"row {i}" if i % 7 else None for i in range(rows)]),
            "name": pa.array(["a", "b", None] * (rows // 3)).dictionary_encode(),
            "list": pa.array([[i, 0.5] if i % 5 == 0 else None for i in range(rows)]),
            "number": np.arange(rows),
        }
    )


def test_tables_on_a_shelf_are_what_was_put_there(tmp_path):
    shelf, table = Shelf(tmp_path), example()
    parts = [shelf.put(table.slice(start, 1000)) for start in (0, 1000, 2000)]
    del shelf
    give_back()
    assert pa.concat_tables(parts).equals(table)
    assert table_bytes(pa.concat_tables(parts)) == table_bytes(table)
    assert list(tmp_path.iterdir()) == []  # the file has no name


def test_a_map_goes_with_its_table(tmp_path):
    gc.collect()
    before = len(mapped._maps)
    table = Shelf(tmp_path).put(example())
    assert len(mapped._maps) == before + 1
    del table
    gc.collect()
    assert len(mapped._maps) == before


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what is resident")
def test_memory_is_given_back(tmp_path):
    def resident() -> int:
        text = Path("/proc/self/status").read_text()
        return int(text.split("RssFile:")[1].split()[0]) // 1024

    table = Shelf(tmp_path).put(pa.table({"number": np.arange(8 << 20)}))
    give_back()
    before = resident()
    assert table["number"].to_numpy().sum() == (8 << 20) * ((8 << 20) - 1) // 2
    assert resident() - before > 60
    give_back()
    assert resident() - before < 4


def test_small_tables_and_folders_that_take_no_file_stay_in_memory(tmp_path, monkeypatch):
    table = example()
    assert Shelf(None).put(table) is table
    assert Shelf(tmp_path / "not there").put(table) is table
    monkeypatch.setattr(mapped, "LEAST", table.nbytes + 1)
    assert Shelf(tmp_path).put(table) is table


def test_rows_are_taken_as_arrow_takes_them(monkeypatch):
    monkeypatch.setattr(mapped, "STEP", 7)
    table = pa.concat_tables([example(30), example(99)])
    for rows in ([5, 128, 3, 3, 40], list(range(129)), []):
        expected = table.take(pa.array(rows, pa.int64())).to_pylist()
        assert mapped.take(table, rows).to_pylist() == expected
