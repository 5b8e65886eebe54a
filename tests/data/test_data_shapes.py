"""Whatever bytes a table is of: its rows are pairs, merged or rejected, or it is refused."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.data import read_pairs
from fifa.data.images import pair_images, read
from fifa.errors import FifaError

ROWS = [
    {"prompt": f"p{i}", "image_0": f"{i}a", "image_1": f"{i}b", "label": i % 2} for i in range(4)
]
COLUMNS = [*ROWS[0], "data", "caption", "path"]
LEAF = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2),
    st.floats(width=16),
    st.text(max_size=3),
    st.sampled_from(["a", "data:image/png;base64," + "A" * 40, "\ud800", "tar:0+5:x"]),
)
JSON = st.recursive(
    LEAF,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=5),
        st.lists(st.fixed_dictionaries(dict.fromkeys(ROWS[0], LEAF)), max_size=4),
    ),
    max_leaves=12,
)


def check(path: Path) -> None:
    """Reads a file; what comes of it is complete, or words that can be printed."""
    try:
        pairs = read_pairs(path)
    except FifaError as error:
        str(error).encode()
        return
    assert pairs.origin.rows == len(pairs) + pairs.origin.merged + len(pairs.rejected)
    places = [(row["file"], row["row"]) for row in pairs.table.to_pylist()]
    places += [(row["file"], row["row"]) for row in pairs.rejected.to_pylist()]
    assert len(set(places)) == len(places)
    assert all(0 <= label <= 1 for label in pairs.table["label"].to_pylist())
    list(read(pair_images(pairs.table, pairs.origin)))


@settings(max_examples=100, derandomize=True)
@given(JSON, st.sampled_from(["a.json", "a.jsonl", "a.json.gz"]), st.sampled_from([None, 1]))
def test_any_json_is_read_or_refused(value: object, name: str, indent: int | None) -> None:
    with TemporaryDirectory() as folder:
        data = json.dumps(value, indent=indent).encode()
        (Path(folder) / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        check(Path(folder))


def whole(kind: str) -> bytes:
    """A file of `ROWS`."""
    out = io.BytesIO()
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), out, compression="none")
    elif kind == "tar":
        with tarfile.open(fileobj=out, mode="w") as archive:
            for i, row in enumerate(ROWS):
                for name, data in {"json": json.dumps(row), "image_0.png": "x"}.items():
                    info = tarfile.TarInfo(f"{i}.{name}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data.encode()))
    elif kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, list(ROWS[0]))
        writer.writeheader()
        writer.writerows(ROWS)
        out.write(text.getvalue().encode())
    else:
        lines = "\n".join(map(json.dumps, ROWS)).encode()
        out.write(
            {"jsonl": lines, "jsonl.gz": gzip.compress(lines)}.get(kind, json.dumps(ROWS).encode())
        )
    return out.getvalue()


KINDS = ("parquet", "tar", "csv", "tsv", "jsonl", "jsonl.gz", "json")
CHANGE = st.tuples(st.integers(0, 4000), st.integers(0, 3), st.binary(min_size=1, max_size=4))


def changed(data: bytes, changes: list[tuple[int, int, bytes]]) -> bytes:
    """The bytes with some replaced by others: ``(place, how many, by what)``."""
    for place, size, new in changes:
        at = place % (len(data) + 1)
        data = data[:at] + new + data[at + size :]
    return data


@settings(max_examples=150, derandomize=True)
@given(st.sampled_from(KINDS), st.lists(CHANGE, max_size=3), st.integers(0, 40))
def test_any_damage_is_told(kind: str, changes, cut: int) -> None:
    with TemporaryDirectory() as folder:
        data = changed(whole(kind), changes)
        path = Path(folder) / f"a.{kind}"
        path.write_bytes(data[: len(data) - cut if cut % 3 == 0 else None])
        check(path)
