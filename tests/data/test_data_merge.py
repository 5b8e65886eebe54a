"""Ids, merging and counting against naive loops, on pairs that Hypothesis makes up."""

from __future__ import annotations

import json
import struct
import tempfile
import unicodedata
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from murmur_by_hand import murmur3_by_hand

from fifa.data import read_pairs
from fifa.data.ids import fold_prompt, hex_strings, murmur3, pair_hashes, prompt_hashes, prompt_id
from fifa.data.merge import _repeats
from fifa.data.table import PAIRS, load_pairs, save_pairs
from fifa.errors import FifaError
from fifa.scoring.encoders import column_embeddings

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
KEY = st.sampled_from(["a", "b", "c/ä.png", "a longer key that is not short", ""])
ROW = st.fixed_dictionaries(
    {
        "prompt": st.one_of(st.sampled_from(["Red fox", " red  FOX", "\uff52ed fox", "dog"]), TEXT),
        "image_0": KEY,
        "image_1": KEY,
        "label": st.one_of(st.floats(0, 1), st.sampled_from([0, 1, None, "x", "0.5"])),
    }
)


def naive_id(prompt: str, *keys: str) -> str:
    folded = " ".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    hashes = [struct.unpack("<2Q", xxhash.xxh3_128_digest(folded.encode()))]
    hashes += [murmur3_by_hand(key.encode()) for key in keys]
    sums = [sum(words) % 2**64 for words in zip(*hashes, strict=True)]
    return struct.pack("<2Q", *sums).hex()[:20]


# Hashes that share their first word of 32 bits, all 64, the 80 that count, or all 128.
HASH = st.tuples(
    st.sampled_from([0, 1, 1 << 32, (1 << 63) + 7, (1 << 63) + 8, (1 << 64) - 1]),
    st.sampled_from([0, 1, 1 << 16, (1 << 16) + 1]),
)


@given(st.lists(st.lists(HASH, max_size=12), min_size=1, max_size=4))
def test_repeats_are_those_of_a_dictionary(pieces: list[list[tuple[int, int]]]) -> None:
    seen: dict[tuple[int, int], int] = {}
    expected = []
    for row, (key, tail) in enumerate(each for piece in pieces for each in piece):
        first = seen.setdefault((key, tail % 2**16), row)
        if first != row:
            expected.append((row, first))
    again, first_rows = _repeats(
        [np.array(piece, np.uint64).reshape(-1, 2).T.copy() for piece in pieces]
    )
    assert list(zip(again.tolist(), first_rows.tolist(), strict=True)) == expected


def is_pair(row: dict[str, object]) -> bool:
    label = row["label"]
    good = label == "0.5" or (isinstance(label, int | float) and 0 <= label <= 1)
    return bool(good and str(row["prompt"]).strip() and row["image_0"] and row["image_1"])


@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=30))
def test_pairs_are_merged_and_counted_as_a_naive_loop_does(rows: list[dict[str, object]]) -> None:
    good = [dict(row, place=i) for i, row in enumerate(rows) if is_pair(row)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        first = {"prompt": "p", "image_0": "x", "image_1": "y", "label": 1}
        path.write_text(json.dumps([first, *rows]))
        given = [row["label"] for row in [first, *rows] if row["label"] is not None]
        if 2 * given.count("x") >= len(given):  # a vocabulary of its own
            with pytest.raises(FifaError, match=r"not on a scale from 0 to 1; seen: .*\bx"):
                read_pairs(path)
            return
        pairs = read_pairs(path)
    groups = defaultdict(list)
    for row in good:
        key = naive_id(str(row["prompt"]), str(row["image_0"]), str(row["image_1"]))
        groups[key].append(row)
    table = pairs.table.slice(1).to_pylist()
    assert [row["pair_id"] for row in table] == list(groups)
    seen = {("x", "y")}
    for row, members in zip(table, groups.values(), strict=True):
        first = members[0]
        assert (row["image_0"], row["image_1"]) == (first["image_0"], first["image_1"])
        assert row["prompt"] == first["prompt"]
        assert row["row"] == first["place"] + 1
        flipped = [
            1 - float(m["label"]) if m["image_0"] != first["image_0"] else float(m["label"])
            for m in members
        ]
        assert row["label"] == pytest.approx(sum(flipped) / len(flipped), abs=1e-6)
        assert row["votes"] == len(members)
        both = tuple(sorted([str(first["image_0"]), str(first["image_1"])]))
        assert row["repeat"] == (both in seen or both[0] == both[1])
        seen.add(both)
        assert pairs.prompts["prompt_id"][row["prompt_index"]].as_py() == row["prompt_id"]
    assert pairs.rejected.num_rows == len(rows) - len(good)
    assert pairs.origin.rows == len(pairs) + pairs.origin.merged + pairs.rejected.num_rows
    spelled = list(dict.fromkeys(prompt_id(str(row["prompt"])) for row in good))
    assert [p for p in pairs.prompts["prompt_id"].to_pylist() if p != prompt_id("p")] == [
        p for p in spelled if p != prompt_id("p")
    ]


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), max_size=6))
def test_pair_ids_are_the_naive_ones_on_either_side(pairs: list[tuple[str, str, str]]) -> None:
    prompt, zero, one = (pa.array([p[i] for p in pairs], pa.string()) for i in range(3))
    expected = [naive_id(*pair) for pair in pairs]
    for images in (murmur3(zero) + murmur3(one), murmur3(one) + murmur3(zero)):
        hashes = pair_hashes(prompt_hashes(prompt), np.arange(len(pairs)), images)
        assert hex_strings(hashes).to_pylist() == expected


@given(TEXT, TEXT)
def test_a_prompt_id_does_not_know_spaces(a: str, b: str) -> None:
    assert prompt_id(f"  {a}\t{b} ") == prompt_id(f"{a}  {b}")
    assert fold_prompt(fold_prompt(a).upper()) == fold_prompt(a.upper()) or not a.isascii()


PROMPTS = st.one_of(
    TEXT,
    st.text(
        st.sampled_from(" \t\n\x0b\x1f\x85\xa0\u2003aB\u00c4\u00df\u0130\ufb01\uff21\u0301\x7f")
    ),
)


@given(st.lists(PROMPTS, max_size=8))
def test_prompts_are_hashed_as_they_are_folded(prompts: list[str]) -> None:
    hashes = prompt_hashes(pa.array(prompts, pa.string()))
    digests = [xxhash.xxh3_128_digest(fold_prompt(prompt).encode()) for prompt in prompts]
    assert [struct.pack("<2Q", *column) for column in hashes.T.tolist()] == digests
    assert hex_strings(hashes).to_pylist() == [digest.hex()[:20] for digest in digests]


def test_votes_weigh_when_rankings_repeat_a_pair(tmp_path: Path) -> None:
    def ranking(orders: list[list[int]]) -> dict[str, object]:
        notes = [{"rank": order} for order in orders]
        return {"prompt": "p", "image_path": ["a", "b"], "rank": [1, 2], "raw_annotations": notes}

    rows = [ranking([[1, 2]] * 3), ranking([[2, 1]])]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path)
    row = pairs.table.to_pylist()[0]
    assert row["votes"] == 4
    assert row["label"] == pytest.approx(0.75 if row["image_0"] == "a" else 0.25)
    assert (pairs.origin.rows, pairs.origin.merged) == (2, 1)


def test_many_merged_rows_are_filtered_alike(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"p{i % 3000}", "image_0": "a", "image_1": "b", "label": i // 3000}
        for i in range(6000)
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 3000
    assert set(pairs.table["label"].to_pylist()) == {0.5}
    assert pairs.table["prompt"].to_pylist() == [f"p{i}" for i in range(3000)]


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "image_0": "a", "image_1": "b", "label": 1} for i in range(5)]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"prompt": ""}]))
    pairs = read_pairs(tmp_path)
    save_pairs(pairs, tmp_path / "run")
    again = load_pairs(tmp_path / "run")
    assert again.origin == pairs.origin
    assert again.table.to_pylist() == pairs.table.to_pylist()
    assert again.rejected.equals(pairs.rejected)
    assert pairs.table.schema.names[: len(PAIRS)] == PAIRS.names
    assert all(pairs.table.schema.field(f.name).type == f.type for f in PAIRS)


@pytest.mark.parametrize("pieces", [0, 2_000])
def test_pairs_on_the_disk_are_those_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pieces: int
) -> None:
    monkeypatch.setattr("fifa.data.merge.MAX_PIECES", pieces)
    monkeypatch.setattr("fifa.data.merge.PIECE", 10_000)
    monkeypatch.setattr("fifa.data.merge.PART", 7)
    rng = np.random.default_rng(0)
    source, runs = tmp_path / "source", [tmp_path / "memory", tmp_path / "disk"]
    source.mkdir()
    for file in range(3):
        number = rng.integers(0, 12, 40)
        columns = {
            "caption": [f"prompt {n}" for n in number],
            "image_0_uid": [f"{n}-{rng.integers(3)}" for n in number],
            "image_1_uid": [f"{n}-{rng.integers(3)}" for n in number],
            "jpg_0": pa.nulls(40, pa.binary()),
            "jpg_1": pa.nulls(40, pa.binary()),
            "label_0": rng.choice([0.0, 0.5, 1.0], 40),
            "score": rng.normal(size=40),
            "vector": pa.array([[float(n), 1.0] for n in number], pa.list_(pa.float32())),
        }
        pq.write_table(pa.table(columns), source / f"{file}.parquet")
    named = {"vector": "vector"}
    memory = read_pairs(source, columns=named)
    monkeypatch.setattr("fifa.shards.mapped.LEAST", 1)
    disk = read_pairs(source, columns=named, spill=tmp_path)
    assert disk.origin.merged > 10
    assert disk.table.to_pylist() == memory.table.to_pylist()
    for pairs, run in zip((memory, disk), runs, strict=True):
        save_pairs(pairs, run)
    written = [[path.read_bytes() for path in sorted(run.iterdir())] for run in runs]
    assert written[0] == written[1]
    assert load_pairs(runs[0]).table.to_pylist() == memory.table.to_pylist()


def test_an_embedding_stays_in_the_first_row_of_its_prompt(tmp_path: Path) -> None:
    rows = [
        {"prompt": p, "image_0": f"{i}a", "image_1": f"{i}b", "label": 1, "v": [float(i), 2.0]}
        for i, p in enumerate(["Fox", "fox", "dog", "fox", "dog", "cat"])
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    pairs = read_pairs(tmp_path / "a.json", columns={"vector": "v"})
    kept = pairs.table["vector"].to_pylist()
    # two spellings of one prompt are two until all files are there
    assert kept == [[0.0, 2.0], [1.0, 2.0], [2.0, 2.0], None, None, [5.0, 2.0]]
    assert column_embeddings(pairs, "vector").shape == (3, 2)
