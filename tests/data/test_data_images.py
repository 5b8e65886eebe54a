"""The guarded door: what comes in unchanged, and what does not come in."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fifa.data import decode, read_pairs
from fifa.data.decode import BadImage, check_image, open_image
from fifa.data.images import Images, has_pixels, kept, pair_images, read
from fifa.data.table import Pairs

DATA = Path(__file__).parents[2] / "../shared/data"


def picture(kind: str = "PNG", mode: str = "RGB", seed: int = 0, **options: object) -> bytes:
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"),
     ("PNG", "LA"), ("WEBP", "RGB")],
)  # fmt: skip
def test_ordinary_images_decode_as_pillow_does(kind: str, mode: str) -> None:
    data = picture(kind, mode)
    assert open_image(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_truncated_image_is_refused(kind: str) -> None:
    data = picture(kind)
    for keep in (0.3, 0.6, 0.9):
        with pytest.raises(BadImage):
            check_image(data[: int(len(data) * keep)])


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "TGA"])
def test_other_formats_are_refused(kind: str) -> None:
    with pytest.raises(BadImage, match="no JPEG, PNG, WEBP, AVIF or HEIC"):
        check_image(picture(kind))


def png_of(width: int, height: int, data: bytes = b"") -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        check = zlib.crc32(name + body)
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@pytest.mark.parametrize("side", [8_001, 12_000, 60_000])
def test_pixel_bombs_are_refused_before_they_are_decoded(side: int) -> None:
    with pytest.raises(BadImage):
        check_image(png_of(side, side))


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"<svg/>", b"\xff\xd8\xff", png_of(0, 5)])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        check_image(data)


def test_animations_and_16_bit_grey_are_refused() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    for kind in ("WEBP", "PNG"):
        out = io.BytesIO()
        frames[0].save(out, kind, save_all=True, append_images=frames[1:])
        with pytest.raises(BadImage, match="animation"):
            check_image(out.getvalue())
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(out, "PNG")
    with pytest.raises(BadImage, match="mode"):
        check_image(out.getvalue())


def test_too_many_bytes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "MAX_BYTES", 100)
    with pytest.raises(BadImage, match="100 bytes"):
        check_image(picture())


def pickapic(n: int, **more: list[object]) -> pa.Table:
    columns = {
        "caption": [f"p{i}" for i in range(n)],
        "image_0_uid": [f"u{i}" for i in range(n)],
        "image_1_uid": [f"v{i}" for i in range(n)],
        "label_0": [1.0] * n,
        "label_1": [0.0] * n,
    }
    return pa.table(columns | more)


def everything(pairs: Pairs, rows: list[int] | None = None) -> dict[tuple[int, int], object]:
    chosen = list(range(len(pairs))) if rows is None else rows
    found = {}
    slots = [2 * row + side for row in chosen for side in (0, 1)]
    for i, data in read(pair_images(pairs.table, pairs.origin, slots)):
        row, side = slots[i] // 2, slots[i] % 2
        assert (row, side) not in found
        found[row, side] = data.reason if isinstance(data, BadImage) else data
    assert set(found) == {(row, side) for row in chosen for side in (0, 1)}
    return found


def test_cells_come_back_as_they_are_from_many_files_and_row_groups(tmp_path: Path) -> None:
    for file in range(2):
        cells = {f"jpg_{s}": [b"%d-%d-%d" % (file, i, s) for i in range(100)] for s in (0, 1)}
        cells["jpg_1"][7] = None
        table = pickapic(100, **cells)
        ids = [f"{file}{i}" for i in range(100)]
        table = table.set_column(1, "image_0_uid", pa.array(ids))
        pq.write_table(table, tmp_path / f"{file}.parquet", row_group_size=33)
    pairs = read_pairs(tmp_path)
    assert has_pixels(pairs.table, pairs.origin)
    found = everything(pairs, [199, 3, 40, 41, 107, 0])
    assert found[199, 1] == b"1-99-1"
    assert found[41, 0] == b"0-41-0"
    assert found[107, 1] == "the cell is empty"


def test_swapped_sides_come_from_the_other_cell(tmp_path: Path) -> None:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    chosen = [{"bytes": b"good-%d" % i, "path": f"{i}.jpg"} for i in range(20)]
    rejected = [{"bytes": b"bad-%d" % i, "path": f"{i}.jpg"} for i in range(20)]
    table = pa.table(
        {
            "prompt": [f"p{i}" for i in range(20)],
            "chosen": pa.array(chosen, image),
            "rejected": pa.array(rejected, image),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    found = everything(pairs)
    assert 0 < sum(pairs.table["swapped"].to_pylist()) < 20
    for row in pairs.table.to_pylist():
        winner = 0 if row["label"] == 1 else 1
        assert found[row["row"], winner] == b"good-%d" % row["row"]
        assert found[row["row"], 1 - winner] == b"bad-%d" % row["row"]


def test_what_came_through_a_keeping_door_is_not_read_again(tmp_path: Path) -> None:
    cells = {f"jpg_{side}": [b"%d-%d" % (i, side) for i in range(9)] for side in (0, 1)}
    cells["jpg_1"][4] = None
    pq.write_table(pickapic(9, **cells), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    images, opened = pair_images(pairs.table, pairs.origin), []

    def counted(some: Images) -> Iterator[tuple[int, bytes | BadImage]]:
        opened.append(len(some))
        return read(some)

    with (tmp_path / "kept").open("w+b") as file:
        door = kept(counted, file)
        first = dict(door(images.take(range(4, 18))))
        assert {i: data for i, data in first.items() if i != 5} == {
            i: b"%d-%d" % ((i + 4) // 2, i % 2) for i in range(14) if i != 5
        }
        again = dict(door(images))
    assert opened == [14, 5]  # four that are new and the one that could not be read
    assert again == {**dict(read(images)), 9: again[9]} and isinstance(again[9], BadImage)


def test_struct_in_struct_and_cells_of_other_rows(tmp_path: Path) -> None:
    rows = [
        {
            "images": {"image_1": {"bytes": b"one", "path": None}, "prompt": "p"}
            | {"image_2": {"bytes": b"two", "path": None}},
            "preference.responses": ["image_1"],
        }
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert everything(read_pairs(tmp_path)) == {(0, 0): b"one", (0, 1): b"two"}
    rows = [
        {
            "image": {"bytes": b"i%d" % i, "path": f"x/{i}"},
            "prompt_id": "q",
            "prompt": "p",
            "rank": i,
        }
        for i in range(4)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    found = everything(pairs)
    for i, row in enumerate(pairs.table.to_pylist()):
        assert found[i, 0] == b"i" + row["image_0"][-1].encode()
        assert found[i, 1] == b"i" + row["image_1"][-1].encode()


def test_tar_members_are_read_where_they_are(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for i in range(5):
            for name, data in {
                "jpg_0.jpg": b"zero%d" % i,
                "jpg_1.jpg": b"one%d" % i,
                "label_0.txt": b"1",
                "txt": b"p%d" % i,
            }.items():
                info = tarfile.TarInfo(f"{i}.{name}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))
    pairs = read_pairs(tmp_path)
    assert has_pixels(pairs.table, pairs.origin)
    assert everything(pairs, [3, 1])[3, 1] == b"one3"
    (tmp_path / "a.tar").write_bytes((tmp_path / "a.tar").read_bytes()[:700])
    assert "ends within" in everything(pairs, [3])[3, 0]


def local(tmp_path: Path, *paths: str) -> Pairs:
    folder = tmp_path / "set"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": str(i), "image_0": path, "image_1": "ok.png", "label": 1}
            for i, path in enumerate(paths)]  # fmt: skip
    (folder / "a.json").write_text(json.dumps(rows))
    (folder / "images/ok.png").write_bytes(picture())
    return read_pairs(folder)


def test_paths_that_leave_the_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(picture())
    (tmp_path / "set/images").mkdir(parents=True)
    (tmp_path / "set/images/link.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set/images/up").symlink_to(tmp_path)
    os.mkfifo(tmp_path / "set/images/pipe")
    pairs = local(
        tmp_path, "ok.png", "../secret.png", "../../secret.png", str(tmp_path / "secret.png"),
        "link.png", "up/secret.png", "pipe", "no.png", "nul\0.png", "ok.png/x",
        str(tmp_path / "set/images/ok.png"), "file:///etc/passwd",
    )  # fmt: skip
    found = everything(pairs)
    leaves = "the path leaves the data set's folder"
    assert isinstance(found[0, 0], bytes)
    assert found[1, 0] == "no such file"  # above images/, but still in the folder
    assert [found[i, 0] for i in range(2, 6)] == [leaves] * 4
    assert found[6, 0] == "not a regular file"
    assert found[7, 0] == "no such file"
    assert found[8, 0] == "the path cannot be opened"
    assert found[9, 0] == "no such file"
    assert isinstance(found[10, 0], bytes)
    assert found[11, 0] == leaves
    assert isinstance(found[5, 1], bytes)
    assert has_pixels(pairs.table, pairs.origin)


def test_urls_stay_closed_without_leave(tmp_path: Path) -> None:
    pq.write_table(
        pickapic(2, image_0_url=["http://127.0.0.1/a"] * 2, image_1_url=["http://127.0.0.1/b"] * 2),
        tmp_path / "a.parquet",
    )
    pairs = read_pairs(tmp_path)
    assert not has_pixels(pairs.table, pairs.origin)
    assert set(everything(pairs).values()) == {"only known by URL, and downloads are not allowed"}
    for _, data in read(pair_images(pairs.table, pairs.origin), allow_download=True):
        assert isinstance(data, BadImage)
        assert "not on the public internet" in data.reason


def test_ids_without_cells_or_urls_have_no_images(tmp_path: Path) -> None:
    pq.write_table(pickapic(1), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    assert not has_pixels(pairs.table, pairs.origin)
    assert set(everything(pairs).values()) == {"the source has no image here"}


def test_a_source_that_is_gone_is_a_reason_for_every_image(tmp_path: Path) -> None:
    pq.write_table(pickapic(3, jpg_0=[b"a"] * 3, jpg_1=[b"b"] * 3), tmp_path / "a.parquet")
    pairs = read_pairs(tmp_path)
    (tmp_path / "a.parquet").unlink()
    assert all("cannot be read" in str(reason) for reason in everything(pairs).values())


@pytest.mark.skipif(not DATA.exists(), reason="no ../shared/data")
def test_real_images_all_decode() -> None:
    pairs = read_pairs(DATA / "hpdv2_gallery")
    for _, data in read(pair_images(pairs.table, pairs.origin), range(0, 2 * len(pairs), 40)):
        assert isinstance(data, bytes)
        check_image(data)
