import json
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fifa.errors import FifaError
from fifa.shards.files import (
    PREFIX,
    atomic_folder,
    atomic_path,
    column_digest,
    digest,
    read_json,
    read_json_lines,
    read_yaml,
    sweep,
    write_json,
    write_table,
    write_text,
)


def leftovers(folder):
    return [path.name for path in folder.rglob(f"{PREFIX}*")]


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "cannot read the recipe: "),
        (b"[1]", "it holds no mapping but a list"),
        (b"[" * 100_000, "cannot read the recipe: "),
        (b'{"a": "\xff"}', "utf-8"),
    ],
)
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read, text, message):
    path = tmp_path / "file"
    path.write_bytes(text)
    with pytest.raises(FifaError, match=message) as caught:
        read(path, "the recipe")
    assert caught.value.where == str(path)
    assert caught.value.do
    with pytest.raises(FifaError, match=message):
        read(path, "the recipe", missing={})


@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_a_file_is_read_once_it_is_there_and_not_too_large(tmp_path, read, monkeypatch):
    path = tmp_path / "folder" / "file"
    with pytest.raises(FifaError, match="cannot read the recipe"):
        read(path, "the recipe")
    assert read(path, "the recipe", missing={"a": 1}) == {"a": 1}
    path.parent.mkdir()
    path.write_text('\ufeff{"a": "ä"}', "utf-8")
    assert read(path, "the recipe") == {"a": "ä"}
    assert read(path / "below a file", "the recipe", missing={}) == {}
    monkeypatch.setattr("fifa.shards.files.MAX_JSON", 9)
    monkeypatch.setattr("fifa.shards.files.MAX_YAML", 9)
    with pytest.raises(FifaError, match="more than 0 MB"):
        read(path, "the recipe")


def test_an_empty_yaml_file_is_an_empty_mapping_and_json_may_hold_a_list(tmp_path):
    (tmp_path / "empty").write_text("# nothing\n")
    assert read_yaml(tmp_path / "empty", "the recipe") == {}
    (tmp_path / "list").write_text("[1, 2]")
    assert read_json(tmp_path / "list", "the modules", list) == [1, 2]


def test_lines_that_a_kill_cut_short_are_counted(tmp_path):
    assert read_json_lines(tmp_path / "log") == ([], 0)
    (tmp_path / "log").write_text('{"a": 1}\n[]\n{"b": 2}\n{"c"')
    assert read_json_lines(tmp_path / "log") == ([{"a": 1}, {"b": 2}], 2)


def test_a_folder_is_replaced_whole_and_what_a_kill_left_goes(tmp_path):
    folder = tmp_path / "subset"
    (tmp_path / f"{PREFIX}dead" / "a").mkdir(parents=True)
    for names in (["a", "b"], ["c"]):
        with atomic_folder(folder) as temporary:
            for name in names:
                (temporary / name).write_text(name)
    assert [path.name for path in folder.iterdir()] == ["c"]
    assert leftovers(tmp_path) == []


def test_a_folder_whose_making_fails_keeps_the_old_one(tmp_path):
    folder = tmp_path / "subset"
    with atomic_folder(folder) as temporary:
        (temporary / "a").write_text("a")
    with pytest.raises(RuntimeError), atomic_folder(folder) as temporary:
        (temporary / "b").write_text("b")
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["a"]


def test_sweep_removes_what_a_killed_write_left(tmp_path):
    code = f"""
        import os, signal
        from pathlib import Path
        from fifa.shards.files import atomic_path
        with atomic_path(Path({str(tmp_path / "scores" / "x.txt")!r})) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(leftovers(tmp_path)) == 1
    sweep(tmp_path)
    assert leftovers(tmp_path) == []
    assert not (tmp_path / "scores" / "x.txt").exists()


def test_the_same_table_gives_the_same_bytes_however_it_is_chunked(tmp_path):
    whole = pa.table({"a": list(range(100)), "b": [str(i) for i in range(100)]})
    pieces = pa.concat_tables([whole[:7], whole[7:60], whole[60:]])
    write_table(tmp_path / "whole.parquet", whole)
    write_table(tmp_path / "pieces.parquet", pieces)
    assert (tmp_path / "whole.parquet").read_bytes() == (tmp_path / "pieces.parquet").read_bytes()


def test_a_table_that_was_read_gives_the_bytes_of_the_one_that_was_written(tmp_path):
    halves = pa.array(np.arange(6, dtype=np.float16))
    columns = {
        "vectors": pa.FixedSizeListArray.from_arrays(halves, 2),
        "lists": pa.array([[1.5], [], None]),
        "structs": pa.array([{"a": [1]}, None, {"a": None}]),
        "words": pa.array(["x", "y", "x"]).dictionary_encode(),
        "nothing": pa.nulls(3),
    }
    table = pa.table(columns, metadata={"made by": "hand"})
    write_table(tmp_path / "made.parquet", table)
    write_table(tmp_path / "read.parquet", pq.read_table(tmp_path / "made.parquet"))
    assert (tmp_path / "read.parquet").read_bytes() == (tmp_path / "made.parquet").read_bytes()


def test_a_place_that_cannot_be_written_is_told_with_its_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FifaError, match="cannot write") as caught:
        write_text(tmp_path / "file" / "below.txt", "x")
    assert str(tmp_path / "file") in str(caught.value)


def test_files_get_the_permissions_of_the_users_mask(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1})
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o666 & ~mask
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": 1}


@given(st.lists(st.text(max_size=5), max_size=6), st.lists(st.text(max_size=5), max_size=6))
def test_digests_name_the_parts_and_their_borders(a, b):
    assert (digest(*a) == digest(*b)) == (a == b)


@given(st.lists(st.text(max_size=4), max_size=20), st.integers(0, 20))
def test_a_columns_digest_does_not_see_chunks_but_sees_every_border(values, cut):
    whole = pa.chunked_array([values], pa.string())
    parts = pa.chunked_array([values[:cut], values[cut:]], pa.string())
    assert column_digest(whole) == column_digest(parts)
    if len(values) > 1 and values[0]:
        moved = [values[0][:-1], values[0][-1] + values[1], *values[2:]]
        assert column_digest(pa.chunked_array([moved], pa.string())) != column_digest(whole)
