"""Text as people's programs write it: encodings, separators, wrapped JSON, names twice."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from commands import fifa
from fifa.data import read_pairs, records, source
from fifa.errors import FifaError

ROWS = [
    {"prompt": "café au lait", "image_0": "a.png", "image_1": "b.png", "label": "1"},
    {"prompt": "plain", "image_0": "c.png", "image_1": "d.png", "label": "0"},
]
CSV = "\n".join([",".join(ROWS[0]), *(",".join(row.values()) for row in ROWS)])
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
FILES = {
    "a.csv": CSV,
    "b.csv": CSV.replace(",", ";"),
    "c.csv": CSV.replace(",", "\t"),
    "a.tsv": CSV.replace(",", "\t"),
    "a.json": json.dumps(ROWS),
    "b.json": json.dumps({"version": 2, "data": ROWS}, indent=1),
    "c.json": json.dumps(COLUMNS),
    "d.json": "\n".join(map(json.dumps, ROWS)),
    "a.jsonl": "\n".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("name", FILES)
def test_every_form_and_encoding_gives_the_same_pairs(
    tmp_path: Path, name: str, encoding: str
) -> None:
    (tmp_path / name).write_bytes(FILES[name].encode(encoding))
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == ["café au lait", "plain"]
    assert pairs.table["label"].to_pylist() == [1, 0]
    assert len(pairs.rejected) == 0


def test_latin_1_spoils_its_own_rows_and_names(tmp_path: Path) -> None:
    text = CSV.replace("label", "label,größe").replace(",1\n", ",1,7\n") + ",8"
    (tmp_path / "a.csv").write_bytes(text.encode("latin-1"))
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == ["plain"]
    assert pairs.rejected["row"].to_pylist() == [0]
    assert pairs.origin.score_columns == ("gr\\udcf6\\udcdfe",)


def test_a_lone_surrogate_in_a_key_is_a_name_like_others(tmp_path: Path) -> None:
    rows = [row | {"\ud800": 1.5} for row in ROWS]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    assert read_pairs(tmp_path).table["\\ud800"].to_pylist() == [1.5, 1.5]
    (tmp_path / "a.json").write_text(json.dumps([{"\ud800": 1}]))
    with pytest.raises(FifaError, match="no known format") as error:
        read_pairs(tmp_path)
    str(error.value).encode()


def test_two_values_of_one_name_are_no_value(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,image_0,image_1,label,label\nx,a,b,1,0\n")
    with pytest.raises(FifaError, match="two columns are named 'label'"):
        read_pairs(tmp_path)
    good = json.dumps(ROWS[1])
    (tmp_path / "b.jsonl").write_text(good + "\n" + good[:-1] + ', "label": 1}\n')
    pairs = read_pairs(tmp_path / "b.jsonl")
    assert len(pairs) == 1
    assert "'label' is there twice" in pairs.rejected["reason"][0].as_py()


def test_what_is_no_file_is_refused_and_counted(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    os.mkfifo(tmp_path / "b.csv")
    (tmp_path / "c.csv").symlink_to(tmp_path / "d.csv")
    (tmp_path / "d.csv").symlink_to(tmp_path / "c.csv")
    (tmp_path / os.fsdecode(b"e\xff.csv")).write_text(CSV)
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 2
    assert pairs.rejected["file"].to_pylist() == ["b.csv", "c.csv", "d.csv", "e\\udcff.csv"]


@pytest.fixture
def small(monkeypatch) -> None:
    """The bounds of what is read at once, at a sixteenth."""
    monkeypatch.setattr(records, "MAX_LINE", 4 << 20)
    monkeypatch.setattr(source, "UNPACKED", (100, 4 << 20))


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("start", [b"", b"prompt,image_0,image_1,label\n", b"[", b"{", b"\xff\xfe"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "tar", "parquet"])
def test_ten_gigabytes_of_nothing_end_soon(tmp_path: Path, kind: str, start: bytes) -> None:
    path = tmp_path / f"a.{kind}"
    path.write_bytes(start)
    os.truncate(path, 10 << 30)
    began = time.process_time()
    with pytest.raises(FifaError) as error:
        read_pairs(path)
    str(error.value).encode()
    assert time.process_time() - began < 5


@pytest.mark.usefixtures("small")
def test_a_hole_ends_its_file_and_no_row_before_it(tmp_path: Path) -> None:
    for name in ("a.csv", "a.jsonl", "b.json"):
        path = tmp_path / name
        text = FILES["a.json"][:-1] + "," if name == "b.json" else FILES[name] + "\n"
        path.write_text(text)
        os.truncate(path, 1 << 27)
    (tmp_path / "b.json").write_text(FILES["a.json"][:-1] + ",")
    pairs = read_pairs(tmp_path)
    assert (len(pairs), pairs.origin.merged) == (2, 4)
    assert pairs.rejected["file"].to_pylist() == ["a.csv", "a.jsonl", "b.json"]
    assert set(pairs.rejected["row"].to_pylist()) == {2}


@pytest.mark.usefixtures("small")
def test_gzip_is_read_within_bounds(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode("utf-16")))
    (tmp_path / "z.CSV.GZ").write_bytes(
        gzip.compress(CSV.encode() + (b"x" * 999 + b"\n") * (20 << 10))
    )
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(CSV.encode())[:-9])
    (tmp_path / "none.csv.gz").write_bytes(CSV.encode())
    (tmp_path / "b.tar.gz").write_bytes(b"")
    pairs = read_pairs(tmp_path)
    assert (len(pairs), pairs.origin.merged) == (2, 2 * len(FILES) - 2)
    reasons = {row["file"]: row["reason"] for row in pairs.rejected.to_pylist()}
    assert sorted(reasons) == ["b.tar.gz", "cut.csv.gz", "none.csv.gz", "z.CSV.GZ"]
    assert reasons["b.tar.gz"] == "packed: unpack it first (gzip -d, unzip)"
    assert "unpacks to over" in reasons["z.CSV.GZ"]


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "pipe"])
def test_a_pipe_or_device_is_no_source(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FifaError, match="a pipe, socket or device"):
        read_pairs(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("a" * 5000, "cannot be opened: File name too long"),
        ("a\0b", "cannot be opened"),
        ("~nobody/a", "no such file"),
        ("caf\udce9", "no UTF-8"),
        ("zip://a.csv::https://a.b/c.zip", "a zip file is named by its path"),
        ("{}/loop", "cannot be opened|no such file"),
        ("{}/file/x.csv", "cannot be opened: Not a directory"),
    ],
)
def test_what_cannot_be_a_source_is_told(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("")
    with pytest.raises(FifaError, match=says) as error:
        read_pairs(name.format(tmp_path))
    str(error.value).encode()


def test_messages_can_be_printed_wherever_they_go(tmp_path: Path) -> None:
    (tmp_path / "ä").mkdir()
    row = '{"prompt": "p", "image_0": "a", "image_1": "b", "label": "\\ud800é"}\n'
    (tmp_path / "ä" / "ö.jsonl").write_text(row)
    ascii_ = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    ascii_ |= {"PYTHONCOERCECLOCALE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "fifa", "read", ".", "--out", "run"]
    done = subprocess.run(words, cwd=tmp_path / "ä", env=ascii_, capture_output=True, check=False)
    assert done.returncode == 1
    assert b"error: no pairs" in done.stderr
    assert b"Traceback" not in done.stderr
    told = fifa("read", tmp_path, "--out", "caf\udce9")
    assert (told.returncode, "this is no UTF-8" in told.stderr) == (1, True)


def test_a_list_of_one_text_is_that_text(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"prompt": ["a cat"]}, ROWS[1] | {"prompt": ["a", "b"]}, ROWS[1]]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows[:2]), tmp_path / "b.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == ["a cat", "plain"]
    assert pairs.table["votes"].to_pylist() == [2, 1]
    assert set(pairs.rejected["reason"].to_pylist()) == {
        "a list of 2 prompts: which one the people saw is not known"
    }


def test_more_votes_than_fit_are_as_many_as_fit(tmp_path: Path) -> None:
    row = {"caption": "p", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1, "label_votes": 2**30}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3))
    assert read_pairs(tmp_path).table["votes"].to_pylist() == [2**31 - 1]
