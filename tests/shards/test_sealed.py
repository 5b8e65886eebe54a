"""A file that carries its own digest: whatever is changed in it, it is told."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa.config import Recipe
from fifa.errors import FifaError
from fifa.scoring.table import array_once, map_array
from fifa.shards.files import (
    parse_table,
    read_json,
    read_json_lines,
    read_table,
    read_yaml,
    sealed_line,
    table_bytes,
    write_json,
    write_table,
    write_yaml,
)
from fifa.shards.sealed import SEAL, DamagedError

TABLE = pa.table({"a": [1.5, None], "b": ["x", "y"]}, metadata={"fifa.score": "{}"})


def table(path):
    write_table(path, TABLE, compression="none", use_dictionary=["b"])
    return lambda: read_table(path)


def json_object(path):
    write_json(path, {"b": 1, "a": [{SEAL: "0" * 32}], "c": {}}, sealed=True)
    return lambda: read_json(path, "the list", sealed=True)


def empty_object(path):
    write_json(path, {}, sealed=True)
    return lambda: read_json(path, "the list", sealed=True)


def recipe(path):
    write_yaml(path, "select:\n  keep: 7\n")
    return lambda: read_yaml(path, "the recipe", sealed=True)


def array(path):
    array_once(path, lambda ledger: [np.arange(6.0).reshape(3, 2)], 3)
    return lambda: map_array(path).tolist()


@pytest.mark.parametrize("write", [table, json_object, empty_object, recipe, array])
def test_a_changed_byte_and_a_cut_are_told_wherever_they_are(tmp_path, write):
    path = tmp_path / "file.npy"
    read = write(path)
    right, data = read(), path.read_bytes()
    rng = np.random.default_rng(0)
    places = rng.permutation(len(data))[:150].tolist()
    for place, mask in zip(places, rng.integers(1, 256, len(places)).tolist(), strict=True):
        for wrong in (data[:place], data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]):
            path.write_bytes(wrong)
            with pytest.raises(DamagedError, match="is damaged") as caught:
                read()
            assert caught.value.where == str(path)
    path.write_bytes(data)
    assert read() == right
    path.unlink()
    with pytest.raises(FifaError):
        read()


def test_what_is_read_is_what_was_written(tmp_path):
    path = tmp_path / "table.parquet"
    write_table(path, TABLE)
    read = read_table(path)
    assert read.equals(TABLE) and read.schema.metadata == TABLE.schema.metadata
    assert read_table(path, ["b"]).column_names == ["b"]
    assert parse_table(table_bytes(TABLE), "memory").equals(TABLE)
    with pytest.raises(DamagedError):
        parse_table(table_bytes(TABLE)[:-1], "memory")
    assert pq.read_table(path).equals(TABLE)  # for others it is a table like any
    write_json(tmp_path / "x.json", {"b": "ä", "a": [1]}, sealed=True)
    assert list(read_json(tmp_path / "x.json", "it")) == ["a", "b"]


def test_a_digest_that_is_there_is_looked_at_where_it_need_not_be(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('{"a": 1}')
    assert read_json(path, "it") == {"a": 1}
    with pytest.raises(DamagedError):
        read_json(path, "it", sealed=True)
    write_json(path, {"a": 1}, sealed=True)
    path.write_text(path.read_text().replace("1,", "2,"))
    with pytest.raises(DamagedError):
        read_json(path, "it")


def test_a_line_that_was_changed_is_none(tmp_path):
    path = tmp_path / "log"
    line = sealed_line({"step": "ä", "seconds": 1.25, "when": pa.int32()})
    path.write_text(line + line.replace("1.25", "1.75") + '{"step": "x"}\n', "utf-8")
    found, broken = read_json_lines(path, sealed=True)
    assert (found, broken) == ([{"step": "ä", "seconds": 1.25, "when": "int32"}], 2)
    assert len(read_json_lines(path)[0]) == 3


def test_an_edited_copy_of_a_recipe_is_read_and_an_empty_one_is_not(tmp_path):
    path = tmp_path / "recipe.yaml"
    write_yaml(path, Recipe().to_yaml())
    assert Recipe.from_yaml(path, sealed=True) == Recipe.from_yaml(path) == Recipe()
    path.write_text(path.read_text().replace("k: 10", "k: 11"))
    assert Recipe.from_yaml(path).score.k == 11
    with pytest.raises(DamagedError, match="another folder"):
        Recipe.from_yaml(path, sealed=True)
    for text in ("", "# nothing\n", "{}"):
        path.write_text(text)
        with pytest.raises(FifaError, match="the recipe is empty"):
            Recipe.from_yaml(path)
