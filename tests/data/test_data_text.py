"""Text as people's programs write it: encodings, separators, wrapped JSON, names twice."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fifa.data import read_pairs
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


def test_more_votes_than_fit_are_as_many_as_fit(tmp_path: Path) -> None:
    row = {"caption": "p", "jpg_0": "a.png", "jpg_1": "b.png", "label_0": 1, "label_votes": 2**30}
    (tmp_path / "a.json").write_text(json.dumps([row] * 3))
    assert read_pairs(tmp_path).table["votes"].to_pylist() == [2**31 - 1]
