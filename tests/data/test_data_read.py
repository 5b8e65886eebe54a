"""Sources of every kind, and everything that can be wrong with them."""

from __future__ import annotations

import functools
import gzip
import http.server
import json
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa.data import read_pairs
from fifa.data.source import find_files
from fifa.errors import FifaError
from fifa.scoring.table import Scores

DATA = Path(__file__).parents[2] / "../shared/data"
GOOD = {"prompt": "x", "image_0": "a", "image_1": "b", "label": 1}


def table(n: int, start: int = 0) -> pa.Table:
    rows = [dict(GOOD, prompt=f"p{i}") for i in range(start, start + n)]
    return pa.Table.from_pylist(rows)


def lines(*rows: object) -> str:
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "set/deep").mkdir(parents=True)
    pq.write_table(table(3), tmp_path / "set/b.parquet")
    pq.write_table(table(3, 3), tmp_path / "set/deep/a.parquet")
    (tmp_path / "set/deep/c.jsonl").write_text(lines(dict(GOOD, prompt="p6")))
    (tmp_path / "set/.cache").mkdir()
    (tmp_path / "set/.cache/d.jsonl").write_text(lines(dict(GOOD, prompt="p7")))
    (tmp_path / "set/notes.txt").write_text("nothing")
    return tmp_path / "set"


def test_file_folder_glob_and_url_find_the_same_pairs(folder: Path) -> None:
    whole = read_pairs(folder)
    assert whole.table["prompt"].to_pylist() == [f"p{i}" for i in range(7)]
    assert whole.table["file"].to_pylist()[3] == "deep/a.parquet"
    assert len(read_pairs(folder / "b.parquet")) == 3
    assert len(read_pairs(f"{folder}/**/*.parquet")) == 6
    assert read_pairs(f"{folder}/*.parquet").table["file"][0].as_py() == "b.parquet"
    assert read_pairs(f"file://{folder}").origin.fingerprint == whole.origin.fingerprint


def test_pairs_and_scores_are_shown_in_a_line(folder: Path) -> None:
    (folder / "bad.jsonl").write_text("{")
    pairs = read_pairs(folder)
    assert repr(pairs) == f"<7 pairs of 7 prompts from {folder}, 1 rows rejected>"
    scores = Scores({"clip": pairs.table, "blip": pairs.table}, quality=pairs.prompts)
    assert repr(scores) == "<7 margins of clip, 7 margins of blip, 7 qualities>"
    assert repr(Scores()) == "<no scores>"


def test_memory_urls_work_as_folders_do(folder: Path) -> None:
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/bucket/set", recursive=True)
    try:
        pairs = read_pairs("memory://bucket/set")
        assert pairs.table.to_pylist() == read_pairs(folder).table.to_pylist()
        assert len(read_pairs("memory://bucket/set/deep/*.parquet")) == 3
        assert len(read_pairs("memory://bucket/set/b.parquet")) == 3
        with pytest.raises(FifaError, match="no such file"):
            read_pairs("memory://bucket/elsewhere")
    finally:
        memory.rm("/bucket", recursive=True)


@pytest.fixture
def server(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::DeprecationWarning")
def test_a_file_is_read_over_http(server: str, folder: Path) -> None:
    pytest.importorskip("aiohttp")
    pairs = read_pairs(f"{server}/b.parquet")
    assert pairs.table["prompt"].to_pylist() == ["p0", "p1", "p2"]
    assert pairs.origin.root == server
    assert len(read_pairs(f"{server}/deep/c.jsonl?token=1")) == 1
    with pytest.raises(FifaError):
        read_pairs(f"{server}/no.parquet")


def test_hf_ids_go_to_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfFileSystem

    asked = []

    def offline(self: object, path: str, **_: object) -> dict[str, object]:
        asked.append(path)
        raise OSError("no network")

    monkeypatch.setattr(HfFileSystem, "resolve_path", offline)
    with pytest.raises(FifaError, match="no network"):
        find_files("hf://datasets/someone/feedback")
    assert asked == ["datasets/someone/feedback"]


def test_an_unknown_scheme_is_explained() -> None:
    with pytest.raises(FifaError, match="cannot open the source"):
        read_pairs("nosuch://bucket/a.parquet")


@pytest.mark.parametrize("name", ["", "nothing-here", "none-*.parquet"])
def test_a_source_that_is_not_there(tmp_path: Path, name: str) -> None:
    with pytest.raises(FifaError):
        read_pairs(tmp_path / name if name else tmp_path)
    with pytest.raises(FifaError, match="no source"):
        read_pairs("")


def test_links_out_of_the_folder_are_refused_and_counted(folder: Path, tmp_path: Path) -> None:
    pq.write_table(table(1, 50), tmp_path / "secret.parquet")
    (folder / "link.parquet").symlink_to(tmp_path / "secret.parquet")
    (folder / "outside").symlink_to(tmp_path)
    (folder / "inside.parquet").symlink_to(folder / "b.parquet")
    pairs = read_pairs(folder)
    assert "p50" not in pairs.table["prompt"].to_pylist()
    assert pairs.rejected.to_pylist() == [
        {"file": "link.parquet", "row": None, "reason": "a link that leaves the folder"},
        {
            "file": "outside",
            "row": None,
            "reason": "a link to a folder: name that folder as a source",
        },
    ]
    assert pairs.origin.merged == 3


def test_the_hub_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/rev").mkdir(parents=True)
    pq.write_table(table(2), tmp_path / "blobs/123")
    (tmp_path / "snapshots/rev/a.parquet").symlink_to("../../blobs/123")
    assert len(read_pairs(tmp_path / "snapshots/rev")) == 2


def test_the_fingerprint_follows_files_and_the_way_they_are_read(folder: Path) -> None:
    first = read_pairs(folder).origin.fingerprint
    assert read_pairs(folder).origin.fingerprint == first
    pq.write_table(table(4, 20), folder / "b.parquet")
    assert read_pairs(folder).origin.fingerprint != first


def reasons(path: Path) -> dict[int | None, str]:
    return {row["row"]: row["reason"] for row in read_pairs(path).rejected.to_pylist()}


def test_every_malformed_row_is_counted_with_its_reason(tmp_path: Path) -> None:
    bad: list[tuple[object, str]] = [
        ("{broken", "broken JSON"),
        ("[1, 2]", "not a JSON object"),
        (dict(GOOD, prompt=None), "no prompt, or no valid text"),
        (dict(GOOD, prompt=" \n "), "no prompt"),
        (dict(GOOD, prompt=7), "no prompt, or no valid text"),
        (dict(GOOD, prompt="\ud800"), "no prompt, or no valid text"),
        (dict(GOOD, prompt="x" * 10_000_000), "10,000,000 bytes"),
        (dict(GOOD, image_0=""), "image 0 is missing"),
        (dict(GOOD, image_1=None), "image 1 is missing"),
        (dict(GOOD, image_1="y" * 5000), "name of image 1"),
        (dict(GOOD, label=None), "no number between"),
        (dict(GOOD, label="left"), "no number between"),
        (dict(GOOD, label=[1]), "no number between"),
        ('{"prompt": "x", "image_0": "a", "image_1": "b", "label": NaN}', "no number between"),
        ("[" * 200_000, "broken JSON"),
        ('{"label": ' + "9" * 10_000 + "}", "broken JSON"),
    ]
    (tmp_path / "a.jsonl").write_text(lines(GOOD, *(row for row, _ in bad)))
    with (tmp_path / "a.jsonl").open("ab") as file:
        file.write(b'{"prompt": "\xff\xfe", "image_0": "a", "image_1": "b", "label": 1}\n')
    found = reasons(tmp_path)
    for i, (_, reason) in enumerate(bad, start=1):
        assert reason in found.pop(i)
    assert "not UTF-8" in found.pop(len(bad) + 1)
    assert not found
    assert len(read_pairs(tmp_path)) == 1


def test_a_json_list_that_breaks_off_keeps_what_came_before(tmp_path: Path) -> None:
    text = json.dumps([dict(GOOD, prompt=f"p{i}") for i in range(10)])
    (tmp_path / "a.json").write_text(text[:-150])
    pairs = read_pairs(tmp_path)
    assert 6 <= len(pairs) < 10
    assert "broken JSON from here" in pairs.rejected["reason"][0].as_py()
    assert pairs.rejected["row"].to_pylist() == [len(pairs)]


def test_bytes_that_are_no_utf8_spoil_one_record_of_a_json_list(tmp_path: Path) -> None:
    raw = json.dumps([GOOD, dict(GOOD, prompt="HERE"), dict(GOOD, prompt="z")]).encode()
    (tmp_path / "a.json").write_bytes(raw.replace(b"HERE", b"\xff\xfe"))
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == ["x", "z"]
    assert pairs.rejected["row"].to_pylist() == [1]


def test_csv_rows_break_one_by_one(tmp_path: Path) -> None:
    rows = [b"prompt,image_0,image_1,label", b"x,a,b,1", b"y,a,b", b"z,a,b,zero", b"\xff,a,b,1"]
    rows += [b"long" * 50_000 + b",a,b,1", b'"a ""quoted"" one, with\na line",a,b,0.25']
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows) + b"\r\n")
    pairs = read_pairs(tmp_path)
    assert pairs.table["prompt"].to_pylist() == ["x", 'a "quoted" one, with\na line']
    assert pairs.table["label"].to_pylist() == [1.0, 0.25]
    assert pairs.rejected["row"].to_pylist() == [1, 2, 3, 4]
    found = pairs.rejected["reason"].to_pylist()
    assert found[0] == "3 cells where the header has 4"
    assert found[2].startswith("the prompt is not UTF-8")


def test_parquet_with_bytes_that_are_no_utf8(tmp_path: Path) -> None:
    prompt = pa.array([b"good", b"\xff\xfe"], pa.binary())
    prompt = pa.Array.from_buffers(pa.string(), 2, prompt.buffers())
    keys = pa.Array.from_buffers(pa.string(), 2, pa.array([b"\xff", b"k"], pa.binary()).buffers())
    columns = {"prompt": prompt, "image_0": keys, "image_1": ["a", "b"], "label": [1, 1]}
    good = table(1)
    pq.write_table(good, tmp_path / "a.parquet")
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    pairs = read_pairs(tmp_path)
    assert len(pairs) == 1
    assert pairs.rejected["reason"].to_pylist() == [
        "image 0 is missing",
        "no prompt, or no valid text",
    ]


def test_labels_that_do_not_sum_to_one_and_rows_nobody_labelled(tmp_path: Path) -> None:
    columns = {
        "caption": ["a", "b", "c", "d", "e"],
        "image_0_uid": list("vwxyz"),
        "image_1_uid": list("VWXYZ"),
        "label_0": [1.0, 1.0, 0.5, None, 0.7],
        "label_1": [0.0, 1.0, 0.5, 0.0, None],
        "has_label": [True, True, False, True, True],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    assert reasons(tmp_path) == {
        1: "label_0 and label_1 do not sum to 1",
        2: "nobody labelled it (has_label is false)",
        3: "the label is no number between 0 and 1",
        4: "label_0 and label_1 do not sum to 1",
    }


def test_a_broken_file_is_one_rejected_row(folder: Path) -> None:
    whole = (folder / "deep/a.parquet").read_bytes()
    (folder / "deep/a.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "e.tar").write_bytes(gzip.compress(b"x" * 5000))
    (folder / "f.json").write_text('"text"')
    (folder / "g.jsonl").write_bytes(b"")
    pairs = read_pairs(folder)
    assert len(pairs) == 4
    found = {row["file"]: row for row in pairs.rejected.to_pylist()}
    assert set(found) == {"deep/a.parquet", "e.tar", "f.json", "g.jsonl"}
    assert all(row["row"] is None for row in found.values())
    assert pairs.origin.rows == 8


def test_a_tar_that_breaks_off_keeps_whole_samples(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as archive:
        for i in range(4):
            for name in ("jpg_0.jpg", "jpg_1.jpg", "label_0.txt", "original_prompt.txt"):
                path = tmp_path / f"{i}.{name}"
                path.write_text({"label_0.txt": "1"}.get(name, f"text {i}"))
                archive.add(path, path.name)
    raw = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "a.tar").write_bytes(raw[: 1024 * 4 * 3 + 700])
    pairs = read_pairs(tmp_path / "a.tar")
    assert pairs.table["prompt"].to_pylist() == ["text 0", "text 1", "text 2"]
    assert len(pairs.rejected) >= 1


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nonsense")
    with pytest.raises(FifaError, match="cannot be read"):
        read_pairs(tmp_path)
    pq.write_table(table(0), tmp_path / "a.parquet")
    with pytest.raises(FifaError, match="empty"):
        read_pairs(tmp_path)
    pq.write_table(pa.table({"prompt": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(FifaError, match="columns: prompt"):
        read_pairs(tmp_path)


def test_an_empty_table_of_the_right_columns_is_an_empty_data_set(tmp_path: Path) -> None:
    names = ("prompt", "image_0", "image_1")
    empty = pa.table({n: pa.array([], pa.string()) for n in names} | {"label": pa.array([], "f8")})
    pq.write_table(empty, tmp_path / "a.parquet")
    with pytest.raises(FifaError, match="the data set is empty"):
        read_pairs(tmp_path)


def test_rankings_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    row = {"prompt": "p", "generations": ["a", "b"], "ranking": [1, 2]}
    rows = [
        row,
        row | {"ranking": [1]},
        row | {"generations": ["a"], "ranking": [1]},
        row | {"generations": [str(i) for i in range(300)], "ranking": list(range(300))},
        row | {"generations": "ab"},
        row | {"ranking": [1, None]},
        row | {"ranking": [1, 10**400]},
        row | {"prompt": ""},
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    found = reasons(tmp_path)
    assert list(found) == [1, 2, 3, 4, 5, 6, 7]
    assert "300 images" in found[3]


def test_columns_of_categories_are_text(tmp_path: Path) -> None:
    texts = {"prompt": ["b", "a", "b"], "image_0": ["x", "y", "y"], "image_1": ["z", "z", "x"]}
    small = pa.dictionary(pa.int8(), pa.large_string())
    coded = {name: pa.array(values).cast(small) for name, values in texts.items()}
    label = {"label": [1.0, 0.0, 0.5]}
    pq.write_table(pa.table(coded | label), tmp_path / "a.parquet")
    pq.write_table(pa.table(texts | {"image_0": ["p", "q", "r"]} | label), tmp_path / "b.parquet")
    table = read_pairs(tmp_path).table
    assert table["prompt"].to_pylist() == ["b", "a", "b"] * 2
    assert table["image_0"].to_pylist() == ["x", "y", "y", "p", "q", "r"]
    assert table["image_1"].to_pylist() == ["z", "z", "x"] * 2


def test_prompts_are_numbered_as_the_rows_have_them_not_as_a_files_dictionary(
    tmp_path: Path,
) -> None:
    codes = pa.array([2, 0, 2, 1, 4], pa.int32())
    prompt = pa.DictionaryArray.from_arrays(codes, ["c", "", "b", "never", " B"])
    row = {"image_0": list("vwxyz"), "image_1": list("VWXYZ"), "label": [1] * 5}
    pq.write_table(pa.table({"prompt": prompt, **row}), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.prompts["prompt"].to_pylist() == ["b", "c"]
    assert pairs.table["prompt"].to_pylist() == ["b", "c", "b", " B"]
    assert pairs.table["prompt_index"].to_pylist() == [0, 1, 0, 0]
    assert [
        word for chunk in pairs.table["prompt"].chunks for word in chunk.dictionary.to_pylist()
    ] == ["b", "c", " B"]
    assert pairs.rejected["row"].to_pylist() == [3]


def test_a_column_of_two_kinds_is_told(tmp_path: Path) -> None:
    row = {"prompt": ["p"], "image_0": ["x"], "image_1": ["y"], "label": [1]}
    pq.write_table(pa.table(row | {"e": [[1.0, 2.0]]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(row | {"e": [1.0]}), tmp_path / "b.parquet")
    with pytest.raises(FifaError, match=r"column 'e' is list.* in an earlier file, double here"):
        read_pairs(tmp_path, columns={"e": "e"})


def test_the_columns_of_images_are_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    columns = {"caption": ["a"], "jpg_0": [b"x"], "jpg_1": [b"y"], "label_0": [1.0]}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    asked = []
    read = pq.ParquetFile.read
    monkeypatch.setattr(
        pq.ParquetFile, "read", lambda self, columns: asked.extend(columns) or read(self, columns)
    )
    assert len(read_pairs(tmp_path)) == 1
    assert asked == ["caption", "label_0"]


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_real_pickapic_pairs_have_their_labels_and_scores() -> None:
    path = DATA / "pickapic_val500/pairs.parquet"
    pairs, source = read_pairs(path), pq.read_table(path)
    assert len(pairs) == 338
    assert pairs.origin.format == "pickapic"
    assert pairs.table["label"].to_pylist() == source["label_0"].to_pylist()
    assert len(pairs.origin.score_columns) == 10
    for name in pairs.origin.score_columns:
        np.testing.assert_array_equal(pairs.table[name].to_numpy(), source[name].to_numpy())


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_real_hpdv2_rankings_become_all_pairs_with_vote_shares() -> None:
    pairs = read_pairs(DATA / "hpdv2_gallery")
    rankings = json.loads((DATA / "hpdv2_gallery/test.json").read_text())
    expected = sum(len(r["image_path"]) * (len(r["image_path"]) - 1) // 2 for r in rankings)
    assert (len(pairs), len(pairs.prompts)) == (expected, 29)
    assert set(pairs.table["votes"].to_pylist()) == {10}
    for row in pairs.table.to_pylist()[:200]:
        ranking = rankings[row["row"]]
        zero, one = (ranking["image_path"].index(row[f"image_{side}"]) for side in (0, 1))
        votes = [note["rank"] for note in ranking["raw_annotations"]]
        share = np.mean([(v[zero] < v[one]) + 0.5 * (v[zero] == v[one]) for v in votes])
        assert row["label"] == pytest.approx(share)
    ahead = np.mean(pairs.table["label"].to_numpy() > 0.5)
    assert 0.4 < ahead < 0.6


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_real_prompts_are_no_pairs() -> None:
    with pytest.raises(FifaError, match="columns: prompt"):
        read_pairs(DATA / "prompts/pickapic.parquet")
