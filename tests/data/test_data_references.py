"""References to where bytes are cannot be spelt by a source: a path is a path, whatever it says."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fifa.data.images import pair_images, read
from fifa.data.read import read_pairs
from fifa.data.records import OURS, out_of_file, outside, tar_ref
from fifa.errors import FifaError


def picture(seed: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


REFS = [
    *("cell:x", "cell:abc:jpg_0", "cell:0:image_0", "cell:", "cell:9999999999999999999999:image_0"),
    *("tar:99999999999999999999+5:x", "tar:0+67108864:x", "tar:0+100:x", "tar:", "tar:0+5:a://b"),
    *("in:1:x:cell:0:jpg_0", "in:9999999:x", "in:"),
]


def own(ref: str) -> dict[str, object]:
    return {"prompt": "p", "image_0": ref, "image_1": "sound.png", "label": 1.0}


def two_paths(ref: str) -> dict[str, object]:
    return {"prompt": "p", "file_path": [ref, "sound.png"], "human_preference": [1, 0]}


def generations(ref: str) -> dict[str, object]:
    return {"prompt": "p", "generations": [ref, "sound.png"], "ranking": [1, 2]}


def write(folder, kind: str, row: dict[str, object]) -> None:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([row]), folder / "data.parquet")
    elif kind == "jsonl":
        (folder / "data.jsonl").write_text(json.dumps(row))
    else:
        with tarfile.open(folder / "data.tar", "w") as archive:
            for name, data in {"0.json": json.dumps(row).encode(), "0.secret": b"x" * 500}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("ref", REFS)
@pytest.mark.parametrize("kind", ["parquet", "jsonl", "tar"])
@pytest.mark.parametrize("row", [own, two_paths, generations])
def test_a_path_that_looks_like_a_reference_is_a_path(tmp_path, row, kind, ref) -> None:
    sound, named = picture(0), picture(1)
    (tmp_path / "sound.png").write_bytes(sound)
    write(tmp_path, kind, row(ref))
    if row is own and kind == "parquet":
        (tmp_path / "cell:x").write_bytes(named)
    if row is not generations and kind == "tar":  # there an image is a member
        with pytest.raises(FifaError, match="image 1 is missing"):
            read_pairs(tmp_path)
        return
    pairs = read_pairs(tmp_path)
    found = dict(read(pair_images(pairs.table, pairs.origin)))
    assert len(found) == 2
    reads = [data for data in found.values() if isinstance(data, bytes)]
    expected = [named] if ref == "cell:x" and row is own and kind == "parquet" else []
    assert sorted(reads) == sorted([sound, *expected])


def test_members_are_still_found_and_folders_may_be_named_like_references(tmp_path) -> None:
    folder = tmp_path / "tar:0+500:x"
    folder.mkdir()
    with tarfile.open(folder / "data.tar", "w") as archive:
        for name, data in {
            "0.jpg_0.png": picture(0),
            "0.jpg_1.png": picture(1),
            "0.json": b'{"caption": "p", "label_0": 1.0}',
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    pairs = read_pairs(tmp_path)
    found = dict(read(pair_images(pairs.table, pairs.origin)))
    assert sorted(found.values()) == sorted([picture(0), picture(1)])
    (folder / "data.tar").unlink()
    (folder / "sound.png").write_bytes(picture(2))
    write(folder, "jsonl", {**own("sound.png"), "image_1": "none.png"})
    pairs = read_pairs(tmp_path)
    found = dict(read(pair_images(pairs.table, pairs.origin)))
    assert picture(2) in found.values()


@settings(max_examples=30)
@given(st.one_of(st.sampled_from(REFS), st.text()))
def test_nothing_spelt_outside_is_a_reference_of_ours(text: str) -> None:
    assert not outside(text).startswith(OURS)
    assert tar_ref(outside(text)) is None
    assert out_of_file(outside(text))[0] is None
