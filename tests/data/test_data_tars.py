"""WebDataset tars: a sample's columns are its own, whatever its key and its members are called."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fifa.data import read_pairs
from fifa.data.images import pair_images, read
from fifa.errors import FifaError

DOTS = {"__key__": "dots"}


def write(path: Path, members: list[tuple[str | bytes, bytes]]) -> None:
    with tarfile.open(path, "w", encoding="utf-8", errors="surrogateescape") as archive:
        for name, data in members:
            text = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
            info = tarfile.TarInfo(text)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def picture(i: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), i, np.uint8)).save(out, "PNG")
    return out.getvalue()


PARTS = ["jpg_0.png", "jpg_1.png", "label_0.txt", "original_prompt.txt"]


@settings(max_examples=40, derandomize=True)
@given(
    st.dictionaries(
        st.from_regex(r"(d\.1/)?[a-b]\.?[0-9]{0,2}(\.[0-9]{1,2}){0,2}_0", fullmatch=True),
        st.tuples(st.sets(st.sampled_from(PARTS)), st.integers(0, 1)),
        min_size=1,
        max_size=5,
    )
)
def test_samples_with_dots_in_their_keys_are_their_own(samples) -> None:
    members = []
    for i, (key, (lacks, label)) in enumerate(samples.items()):
        data = [picture(2 * i), picture(2 * i + 1), str(label).encode(), key.encode()]
        members += [
            (f"{key}.{part}", each)
            for part, each in zip(PARTS, data, strict=True)
            if part not in lacks
        ]
    whole = {key for key, (lacks, _) in samples.items() if not lacks}
    some = {key for key, (lacks, _) in samples.items() if len(lacks) < len(PARTS)}
    with TemporaryDirectory() as folder:
        write(Path(folder) / "a.tar", members)
        try:
            pairs = read_pairs(folder, columns=DOTS)
        except FifaError:
            assert not whole
            return
        images = [data for _, data in sorted(read(pair_images(pairs.table, pairs.origin)))]
    order = list(samples)
    rows = pairs.table.to_pylist()
    assert {row["prompt"] for row in rows} == whole
    assert len(rows) + len(pairs.rejected) == len(some)
    for n, row in enumerate(rows):
        i = order.index(row["prompt"])
        assert row["label"] == samples[row["prompt"]][1]
        assert images[2 * n : 2 * n + 2] == [picture(2 * i), picture(2 * i + 1)]


def test_keys_with_dots_and_fields_in_json(tmp_path: Path) -> None:
    members = []
    for i, key in enumerate(("v1.0_a", "v1.0_b", "v1.1_a")):
        fields = {"caption": key, "label_0": i % 2}
        members += [(f"{key}.json", json.dumps(fields).encode())]
        members += [(f"{key}.jpg_{k}.png", picture(2 * i + k)) for k in (0, 1)]
    write(tmp_path / "a.tar", members)
    pairs = read_pairs(tmp_path, columns=DOTS)
    assert pairs.table["prompt"].to_pylist() == ["v1.0_a", "v1.0_b", "v1.1_a"]
    assert pairs.table["label"].to_pylist() == [0, 1, 0]
    with pytest.raises(FifaError, match="--columns __key__=dots if it is longer"):
        read_pairs(tmp_path)
    with pytest.raises(FifaError, match="__key__ is 'first'"):
        read_pairs(tmp_path, columns={"__key__": "first"})


def test_names_in_another_encoding_are_names(tmp_path: Path) -> None:
    key = b"caf\xe9"
    data = [picture(0), picture(1), b"1", b"p"]
    write(
        tmp_path / "a.tar", [(key + b"." + p.encode(), d) for p, d in zip(PARTS, data, strict=True)]
    )
    pairs = read_pairs(tmp_path)
    assert [data for _, data in sorted(read(pair_images(pairs.table, pairs.origin)))] == data_of(2)
    assert pairs.table["image_0"].to_pylist() == ["a.tar#caf\\udce9.jpg_0.png"]


def data_of(n: int) -> list[bytes]:
    return [picture(i) for i in range(n)]


NAMES = st.from_regex(
    r"[a.]{0,3}(jpg_0|jpg_1|label_0|caption|a)?\.(png|txt|json|cls|b)", fullmatch=True
)
DATA = st.sampled_from([b"", b"1", b"{}", b'{"label_0": 0}', b"[1]", b"\xff", b"p", picture(0)])


@settings(max_examples=60, derandomize=True)
@given(st.lists(st.tuples(NAMES, DATA), max_size=12), st.booleans(), st.integers(0, 3000))
def test_any_members_are_pairs_or_rejected(members, dots: bool, cut: int) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "a.tar"
        write(path, members)
        if cut % 2:
            path.write_bytes(path.read_bytes()[:-cut])
        try:
            pairs = read_pairs(path, columns=DOTS if dots else {})
        except FifaError as error:
            str(error).encode()
            return
        assert pairs.origin.rows == len(pairs) + pairs.origin.merged + len(pairs.rejected)
        rows = [row["row"] for row in [*pairs.table.to_pylist(), *pairs.rejected.to_pylist()]]
        assert len(set(rows)) == len(rows)
        list(read(pair_images(pairs.table, pairs.origin)))
