"""Parquet files made to fill memory: what is read is a stated multiple of what is in the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa.data import parquet, read_pairs
from fifa.data.images import cell_images, read
from fifa.data.parquet import read_columns
from fifa.errors import FifaError
from fifa.evaluation.prompts import read_prompts
from fifa.training.pairs import read_training_pairs

N = 20_000
READERS = (read_pairs, read_training_pairs, read_prompts)


def again(value: str, n: int = N) -> pa.DictionaryArray:
    """One value, as often as there are rows."""
    return pa.DictionaryArray.from_arrays(pa.array(np.zeros(n, np.int32)), pa.array([value]))


def table(n: int = N, **columns: object) -> pa.Table:
    cells = {"jpg_0": pa.array([b"a"] * n), "jpg_1": pa.array([b"b"] * n)}
    return pa.table({"caption": again("c", n), **cells, "label_0": np.ones(n)} | columns)


def nothing(n: int) -> pa.Table:
    return (
        table(0).schema.empty_table()
        if not n
        else pa.table([pa.nulls(n, kind.type) for kind in table(1).schema], schema=table(1).schema)
    )


BOMBS = {
    "a value in every row": lambda: table(label=again("x" * 50_000), pair_id=again("x" * 50_000)),
    "a long run": lambda: table(1, label_0=[np.zeros(3_000_000)]),
    "a page": lambda: table(1, caption=["x" * 20_000_000]),
    "empty rows": lambda: nothing(150_000),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_within_memory(tmp_path: Path, bomb: str, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "SPARE", 8 << 20)
    monkeypatch.setattr(parquet, "ROWS", 100_000)
    path = tmp_path / "a.parquet"
    pq.write_table(BOMBS[bomb](), path, compression="zstd", store_schema=False)
    assert path.stat().st_size < 50_000
    for reader in READERS if bomb == "empty rows" else READERS[1:2]:
        before = pa.total_allocated_bytes()
        with pytest.raises(FifaError, match=r"rows in [\d,]+ bytes|unpack to [\d,]+ bytes or more"):
            reader(path)
        assert pa.total_allocated_bytes() - before < 1 << 20


def test_paths_in_structs_are_counted_as_they_are_written_out(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "SPARE", 4 << 20)
    paths = pa.StructArray.from_arrays([again("x" * 5000).cast(pa.string())], ["path"])
    path = tmp_path / "a.parquet"
    pq.write_table(table(jpg_0=paths), path, compression="zstd", store_schema=False)
    with pytest.raises(FifaError, match="unpack to"):
        read_columns(path, ["jpg_0.path"], "a.parquet")


def test_a_table_of_many_columns_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(1, **{f"score_{i}": [0.5] for i in range(1000)}), path)
    assert len(read_pairs(path).table.column_names) > 1000


@pytest.mark.parametrize("rows", [2**40, 2**60])
def test_a_footer_that_claims_any_number_of_rows_is_refused(tmp_path: Path, rows: int) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(table(3), path)
    data = path.read_bytes()
    size = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - size], data[-8 - size : -8]
    claim = bytes([(rows << 1) >> 7 * i & 127 | 128 for i in range(9)]) + b"\0"  # a varint
    footer = footer.replace(b"\x16\x06", b"\x16" + claim, 1)
    path.write_bytes(body + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    for reader in READERS:
        with pytest.raises(FifaError):
            reader(path)


def test_cells_that_are_not_there_are_told_one_by_one(tmp_path: Path) -> None:
    paths = pa.array([{"path": f"{i}.png"} for i in range(40)])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"jpg_0": paths}), path)
    images = cell_images([path], np.zeros(40, np.int64), np.arange(40), ["jpg_0"] * 40)
    found = dict(read(images))
    assert sorted(found) == list(range(40))
    assert all("cannot be read" in data.reason for data in found.values())


@pytest.mark.parametrize("stored", [True, False])
def test_good_tables_are_read_as_pyarrow_reads_them(tmp_path: Path, stored: bool) -> None:
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(300)]
    expected = pa.table(
        {
            "text": rng.choice(["a", "b", None], 300).tolist(),
            "large": pa.array(names, pa.large_string()),
            "raw": pa.array([name.encode() for name in names], pa.binary()),
            "number": rng.random(300),
            "class": pa.array(rng.choice(["x", "y"], 300).tolist()).dictionary_encode(),
            "image": [{"path": name, "bytes": None} for name in names],
            "tags": [["x", "y"][: i % 3] for i in range(300)],
        }
    )
    path = tmp_path / "a.parquet"
    pq.write_table(expected, path, row_group_size=100, store_schema=stored)
    found = read_columns(path, expected.column_names, "a.parquet")
    assert found.select(expected.column_names).to_pylist() == expected.to_pylist()
    assert not any(pa.types.is_dictionary(field.type) for field in found.schema)
