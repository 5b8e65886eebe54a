"""No row gets another one's label, image or place: identity is content, or a key that is one."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.data import read_pairs
from fifa.errors import FifaError

SAMPLE = {"jpg_0.png": b"x", "jpg_1.png": b"y", "label_0.txt": b"1", "original_prompt.txt": b"p"}


def tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def sample(key: str, **other: bytes | None) -> list[tuple[str, bytes]]:
    named = SAMPLE | {name.replace("__", "."): data for name, data in other.items()}
    return [(f"{key}.{name}", data) for name, data in named.items() if data is not None]


def test_members_of_a_sample_never_replace_each_other(tmp_path: Path) -> None:
    members = [*sample("a"), *sample("b"), *sample("b"), *sample("c")]
    members += [("d.json", b'{"label_0": 0}'), *sample("d"), *sample("e")]
    members += [
        ("e.json", b'{"jpg_0": "old.png", "label_0": "1"}'),
        *sample("f", label_0__txt=None),
    ]
    members += [("g.json", b"{no"), *sample("g")]
    pairs = read_pairs(tar(tmp_path / "a.tar", members))
    assert [ref.split(":")[2] for ref in pairs.table["image_0_ref"].to_pylist()] == [
        "a.jpg_0.png", "c.jpg_0.png", "e.jpg_0.png",
    ]  # fmt: skip
    found = dict(
        zip(pairs.rejected["row"].to_pylist(), pairs.rejected["reason"].to_pylist(), strict=True)
    )
    assert sorted(found) == [1, 3, 5, 6]
    assert "'b.jpg_0.png' is a second value of 'jpg_0'" in found[1]
    assert "'label_0'" in found[3]
    assert "broken JSON" in found[6]


@pytest.mark.parametrize("missing", ["label_0__txt", "jpg_0__png"])
def test_keys_with_dots_give_nobody_a_neighbours_label(tmp_path: Path, missing: str) -> None:
    split = sample("sd1.5_0000", **{missing: None})
    rest = [one for one in sample("sd1.5_0001") if missing.replace("__", ".") in one[0]]
    pairs = read_pairs(tar(tmp_path / "a.tar", [*sample("plain"), *split, *rest]))
    assert len(pairs) == 1
    assert "'sd1' (a name up to its first dot)" in pairs.rejected["reason"][0].as_py()
    with pytest.raises(FifaError, match=r"second value|another key"):
        read_pairs(tar(tmp_path / "b.tar", [*sample("sd1.5_0000"), *sample("sd1.5_0001")]))


def test_a_tar_of_chosen_and_rejected_images_with_a_prompt(tmp_path: Path) -> None:
    members = [(f"0.{name}.png", name.encode()) for name in ("chosen", "rejected")]
    pairs = read_pairs(tar(tmp_path / "a.tar", [*members, ("0.prompt.txt", b"a kettle")]))
    assert pairs.origin.format == "chosen-rejected"
    assert pairs.table["prompt"].to_pylist() == ["a kettle"]


def test_one_name_beside_bytes_is_no_identity(tmp_path: Path) -> None:
    def cell(name: str, i: int) -> dict[str, object]:
        return {"bytes": b"%s %d" % (name.encode(), i), "path": f"tmp/{name}.png"}

    rows = [
        {"prompt": "p", "image_0": cell("left", i), "image_1": cell("right", i), "label": i % 2}
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert pairs.table["label"].to_pylist() == [0, 1, 0, 1]
    assert pairs.origin.merged == 0
    assert not any(pairs.table["repeat"].to_pylist())


ROW = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["p", "q", "", None]),
        "image_0": st.sampled_from(["a.png", "b.png", None]),
        "image_1": st.sampled_from(["c.png", "d.png"]),
        "label": st.sampled_from(["1", "0", "0.5", "0.25", None]),
    }
)
GOOD = {"prompt": "first", "image_0": "x.png", "image_1": "y.png", "label": "1"}


def write(folder: Path, kind: str, rows: list[dict[str, str | None]]) -> None:
    path = folder / f"a.{kind}"
    if kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    elif kind == "csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, list(GOOD))
            table.writeheader()
            table.writerows(rows)
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        names = {"image_0": "image_0.png", "image_1": "image_1.png"}
        members = []
        for i, row in enumerate(rows):
            members += [
                (f"{i}.{names.get(name, f'{name}.txt')}", value.encode())
                for name, value in row.items()
                if value is not None
            ]
        tar(path, members)


@settings(max_examples=12, deadline=None)
@given(st.lists(ROW, max_size=12))
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "tar"])
def test_every_row_is_a_pair_merged_or_rejected(
    kind: str, rows: list[dict[str, str | None]]
) -> None:
    rows = [GOOD, *rows]
    good = [row for row in rows if all(row.values())]
    groups: dict[tuple[object, ...], list[float]] = {}
    for i, row in enumerate(good):
        images = (i,) if kind == "tar" else (row["image_0"], row["image_1"])
        groups.setdefault((row["prompt"], *images), []).append(float(row["label"] or 0))
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), kind, rows)
        pairs = read_pairs(folder)
    assert pairs.table["label"].to_pylist() == pytest.approx(
        [sum(labels) / len(labels) for labels in groups.values()]
    )
    assert pairs.origin.merged == len(good) - len(groups)
    assert len(pairs.rejected) == len(rows) - len(good)
    assert pairs.origin.rows == len(rows)
    assert len(set(pairs.rejected["row"].to_pylist())) == len(pairs.rejected)
