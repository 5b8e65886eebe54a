"""Zip files as sources, and members of zip files beside a table."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fifa.data import archive, read_pairs
from fifa.data.archive import listed, member_bytes
from fifa.data.decode import BadImage
from fifa.data.images import has_pixels, read, unique_images
from fifa.data.table import Pairs
from fifa.errors import FifaError


def zipped(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", how) as made:
        for name, data in members.items():
            made.writestr(name, data)
    return path


def images_of(pairs: Pairs) -> list[bytes | str]:
    images, _ = unique_images(pairs)
    found = sorted(read(images), key=lambda one: one[0])
    return [data.reason if isinstance(data, BadImage) else data for _, data in found]


def test_a_zip_file_is_a_source_with_its_images(tmp_path: Path) -> None:
    rows = "prompt,image_0,image_1,label\na,x/0.png,x/1.png,1\nb,x/2.png,../3.png,0\n"
    files = {"set/all.csv": rows.encode(), "__MACOSX/._all.csv": b"no table"}
    images = {f"set/x/{i}.png": b"picture %d" % i for i in range(3)}
    pairs = read_pairs(zipped(tmp_path / "set.zip", files | images | {"3.png": b"outside"}))
    assert pairs.table["label"].to_pylist() == [1.0, 0.0]
    rows = rows.replace("x/", "")  # in a folder of its own, as beside a table that is no member
    again = read_pairs(zipped(tmp_path / "a.zip", images | {"set/x.csv": rows.encode()}))
    assert images_of(again)[:2] == [b"picture 0", b"picture 1"]
    assert has_pixels(pairs.table, pairs.origin)
    gone = "no such file in the archive"
    assert images_of(pairs) == [b"picture 0", b"picture 1", b"picture 2", gone]


def test_cells_and_texts_of_a_zip_file_are_those_of_its_files(tmp_path: Path) -> None:
    table = {"caption": ["a", "b"], "jpg_0": [b"0", b"1"], "jpg_1": [b"2", b"3"]}
    table |= {"label_0": [1.0, 0.0], "label_1": [0.0, 1.0]}
    pq.write_table(pa.table(table), tmp_path / "set.parquet")
    parquet = (tmp_path / "set.parquet").read_bytes()
    far = read_pairs(zipped(tmp_path / "set.zip", {"set.parquet": parquet}))
    near = read_pairs(tmp_path / "set.parquet")
    assert far.table.drop_columns("file").equals(near.table.drop_columns("file"))
    assert not far.origin.remote
    assert images_of(far) == images_of(near) == [b"0", b"2", b"1", b"3"]


def test_members_of_an_archive_beside_the_table(tmp_path: Path) -> None:
    zipped(tmp_path / "in.zip", {"a.png": b"A", "deep/b.png": b"B"})
    (tmp_path / "x::y.png").write_bytes(b"a name with two colons")
    refs = ["in.zip::a.png", "in.zip::deep/b.png", "in.zip::c.png", "no.zip::a.png", "x::y.png"]
    refs.append("../out.zip::a.png")
    zipped(tmp_path.parent / "out.zip", {"a.png": b"secret"})
    rows = [f"p,{ref},{other},1" for ref, other in zip(refs[::2], refs[1::2], strict=True)]
    (tmp_path / "set.csv").write_text("\n".join(["prompt,image_0,image_1,label", *rows]))
    pairs = read_pairs(tmp_path / "set.csv")
    assert has_pixels(pairs.table, pairs.origin)
    assert images_of(pairs) == [
        b"A", b"B", "no such file in the archive", "no such file", b"a name with two colons",
        "the path leaves the data set's folder",
    ]  # fmt: skip


def test_of_a_remote_archive_nothing_is_read_and_that_is_told(tmp_path: Path) -> None:
    system = fsspec.filesystem("memory")
    archive = zipped(tmp_path / "in.zip", {"a.png": b"A"})
    system.pipe("/far/in.zip", archive.read_bytes())
    system.pipe("/far/set.csv", b"prompt,image_0,image_1,label\np,in.zip::a.png,b.png,1\n")
    assert images_of(read_pairs("memory://far/set.csv")) == [
        "a member of a remote archive, of which nothing is read: download it",
        "no such file",
    ]
    with pytest.raises(FifaError, match=r"remote zip file nothing is read(.|\n)*download it"):
        read_pairs("memory://far/in.zip")


def test_what_is_made_to_fill_memory_or_cannot_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bomb = zipped(tmp_path / "bomb.zip", {"a": bytes(50_000_000)})
    with pytest.raises(OSError, match="more than 1,000 bytes"):
        member_bytes(bomb, "a", 1000)
    raw = bytearray(bomb.read_bytes())
    at = raw.index(b"PK\1\2") + 24
    raw[at : at + 4] = struct.pack("<I", 10)  # says that it is small
    (tmp_path / "lies.zip").write_bytes(raw)
    with pytest.raises(OSError, match=r"zip|bytes"):
        assert len(member_bytes(tmp_path / "lies.zip", "a", 1000)) > 10
    locked = bytearray(zipped(tmp_path / "plain.zip", {"a": b"x"}).read_bytes())
    locked[locked.index(b"PK\1\2") + 8] |= 1
    (tmp_path / "locked.zip").write_bytes(locked)
    with pytest.raises(OSError, match="encrypted"):
        member_bytes(tmp_path / "locked.zip", "a", 1000)
    many = zipped(tmp_path / "many.zip", {f"{i}.csv": b"" for i in range(100)})
    monkeypatch.setattr(archive, "LISTING", 1000)
    with pytest.raises(OSError, match="list of members"):
        listed(many)
    with pytest.raises(FifaError, match="list of members"):
        read_pairs(many)


def test_links_in_an_archive_and_files_that_are_none_are_refused(tmp_path: Path) -> None:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as writer:
        link = zipfile.ZipInfo("a.png")
        link.external_attr = 0o120777 << 16
        writer.writestr(link, "/etc/passwd")
    (tmp_path / "link.zip").write_bytes(made.getvalue())
    with pytest.raises(OSError, match="link"):
        member_bytes(tmp_path / "link.zip", "a.png", 1000)
    (tmp_path / "none.zip").write_bytes(b"no zip")
    with pytest.raises(FifaError, match="no zip file"):
        read_pairs(tmp_path / "none.zip")
    with pytest.raises(FifaError, match="nothing to read"):
        read_pairs(zipped(tmp_path / "empty.zip", {"a.png": b""}))
    with pytest.raises(FifaError, match="named by its path"):
        read_pairs(f"zip://{tmp_path}/empty.zip")


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_archive_is_read_or_refused(tmp_path: Path, seed: int) -> None:
    import random

    draw = random.Random(seed)
    rows = b"prompt,image_0,image_1,label\na,0.png,1.png,1\n"
    whole = zipped(tmp_path / "a.zip", {"a.csv": rows, "0.png": b"0", "1.png": b"1"}).read_bytes()
    for number in range(60):
        raw = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        path = tmp_path / f"{number}.zip"
        path.write_bytes(raw[: draw.randrange(len(raw))] if number % 5 == 0 else raw)
        try:
            pairs = read_pairs(path)
        except FifaError:
            continue
        assert len(images_of(pairs)) == 2
