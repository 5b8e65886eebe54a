"""Bytes made to waste time: every walk is linear and has a budget. Steps are counted."""

from __future__ import annotations

import io
import re
import struct
import subprocess
import sys
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from attack import images as attack
from fifa.data import decode
from fifa.data.decode import BadImage, check_image, image_size, open_image
from fifa.data.images import cell_images, file_images, read
from fifa.data.parquet import BATCH, SPARE, rows_at_once

PIXELS = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
GREY = np.full((64, 64, 3), 128, np.uint8)  # ends as an image without data does: decoded twice


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def segment(kind: int, body: bytes = b"") -> bytes:
    return bytes([0xFF, kind]) + struct.pack(">H", len(body) + 2) + body


def chunk(name: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def test_patterns_have_a_fixed_width_so_a_search_is_linear() -> None:
    patterns = [value for value in vars(decode).values() if isinstance(value, re.Pattern)]
    assert len(patterns) >= 2
    for pattern in patterns:
        low, high = re._parser.parse(pattern.pattern).getwidth()
        assert (low, high) == (2, 2), pattern


class Counted(decode._Budgeted):
    """Counts what is read: steps, and bytes."""

    made: list[Counted] = []  # noqa: RUF012

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.total = 0
        Counted.made.append(self)

    def read(self, size: int | None = -1, /) -> bytes:
        found = super().read(size)
        self.total += len(found)
        return found


@pytest.fixture(scope="module", autouse=True)
def counted() -> None:
    before, decode._Budgeted = decode._Budgeted, Counted
    yield
    decode._Budgeted = before


PIECES = st.sampled_from(
    (
        *(b"\xff", b"\xff\xff", b"\0", b"\xff\0", b"a", b"\xff\xd9", b"\xff\xd0", b"\xff\xda\0\2"),
        *(segment(0xFE), segment(0xE1, b"Exif\0\0"), segment(0xC8), b"\xff\xf5", segment(0xC4)),
    )
)
PLACES = st.sampled_from(["front", "frame", "scan", "end"])


@settings(deadline=None, max_examples=40)
@given(st.booleans(), st.booleans(), st.lists(PIECES, min_size=1, max_size=3), PLACES)
def test_steps_through_a_jpeg_are_bounded_wherever_and_whatever_is_put_in(
    grey, progressive, pieces, place
) -> None:
    data = encoded(GREY if grey else PIXELS, "JPEG", progressive=progressive)
    where = {
        "front": 2,
        "frame": re.search(rb"\xff[\xc0\xc2]", data).start(),
        "scan": data.rindex(b"\xff\xda"),
        "end": len(data) - 2,
    }
    at, body = where[place], b"".join(pieces)
    data = data[:at] + body * (60_000 // len(body)) + data[at:]
    Counted.made.clear()
    try:
        check_image(data)
    except BadImage as error:
        assert error.reason
    for file in Counted.made:
        assert file.reads <= decode.READS + 1
        assert file.total <= 2 * len(data) + 100_000  # each byte once, what is put in for more data
    assert len(Counted.made) <= 3  # the image, with more data, and perhaps in full
    steps = 0
    try:
        for _ in decode._markers(data, 64 * 64):
            steps += 1
    except BadImage:
        pass
    assert steps <= decode.SEGMENTS


JPEG, PNG = encoded(PIXELS, "JPEG"), encoded(PIXELS, "PNG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (JPEG[:2] + b"\xff" * 400_000 + JPEG[2:], "stray bytes"),
        (JPEG[:2] + b"\xff\xd9" + b"a" * 400_000 + JPEG[2:], "stray bytes"),
        (JPEG[:2] + segment(0xFE) * 100_000 + JPEG[2:], "too many segments"),
        (JPEG[:2] + segment(0xE5, bytes(60_000)) * 220 + JPEG[2:], "too many segments"),
        (JPEG[:2] + segment(0xE1, b"Exif\0\0" + bytes(60_000)) * 2 + JPEG[2:], "of Exif"),
        (PNG[:33] + chunk(b"teSt") * 201 + PNG[33:], "too many chunks"),
        (PNG[:33] + chunk(b"IDAT") * 40_000 + PNG[33:], "too many chunks"),
        (PNG[:-12] + chunk(b"tEXt", b"a\0b") * 201 + PNG[-12:], "too many chunks"),
    ],
)
def test_a_file_with_more_parts_than_anybody_needs_is_refused(data, reason) -> None:
    with pytest.raises(BadImage, match=reason):
        check_image(data)


@pytest.mark.parametrize("seed", range(3))
def test_changed_images_are_pictures_or_have_a_reason(tmp_path, seed) -> None:
    changed = attack.fuzzed(60, seed)
    pq.write_table(pa.table({"jpg_0": changed}), tmp_path / "a.parquet")
    rows = np.arange(60)
    cells = cell_images([tmp_path / "a.parquet"], np.zeros(60, int), rows, ["jpg_0"] * 60)
    for row in rows:
        (tmp_path / f"{row}.jpg").write_bytes(changed[row])
    files = file_images(tmp_path, [f"{row}.jpg" for row in rows])
    assert attack.outcomes(cells).rpartition(",")[0] == attack.outcomes(files).rpartition(",")[0]


PROGRESSIVE = encoded(GREY, "JPEG", progressive=True)


@pytest.mark.parametrize("data", [JPEG, PROGRESSIVE, encoded(GREY, "JPEG")])
@pytest.mark.parametrize(
    ("fill", "reason"), [(b"\xff", "mostly"), (b"\xff\0", "mostly"), (b"a", "far more data")]
)
def test_data_that_no_picture_needs_are_not_decoded(data, fill, reason, monkeypatch) -> None:
    monkeypatch.setattr(decode, "MAX_SPARE", 10_000)
    last = min(data.rindex(b"\xff\xda") + 14, len(data) - 2)
    for at in (data.index(b"\xff\xda") + 14, last, len(data) - 2):
        with pytest.raises(BadImage, match=reason):
            check_image(data[:at] + fill * (200_000 // len(fill)) + data[at:])


def test_a_strange_exif_is_no_warning_a_tag(tmp_path) -> None:
    tags = b"".join(struct.pack("<HHLL", i, 7, 60_000, 8) for i in range(5000))
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 5000) + tags
    (tmp_path / "a.jpg").write_bytes(JPEG[:2] + segment(0xE1, exif) + JPEG[2:])
    code = "import sys; from fifa.data.decode import *; check_image(open(sys.argv[1], 'rb').read())"
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.jpg")], capture_output=True, check=True
    )
    assert (found.stdout, found.stderr) == (b"", b"")


@pytest.mark.parametrize(
    ("kind", "side", "options", "reason"),
    [
        ("JPEG", 6001, {}, "more than 36,000,000 pixels"),
        ("JPEG", 3800, {"progressive": True}, "several scans with more than 14,000,000 pixels"),
        ("PNG", 6001, {}, "more than 36,000,000 pixels"),
        ("WEBP", 3600, {}, "more than 10,000,000 pixels"),
    ],
)
def test_pixels_that_take_more_than_200_mb_are_refused_by_the_header(kind, side, options, reason):
    data = bytearray(encoded(PIXELS, kind, **options))
    at = {"JPEG": lambda: re.search(rb"\xff[\xc0\xc2]", data).start() + 5, "PNG": lambda: 16}
    if kind == "WEBP":
        data[26:30] = struct.pack("<HH", side, side)
    else:
        form = ">II" if kind == "PNG" else ">HH"
        struct.pack_into(form, data, at[kind](), side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29])) if kind == "PNG" else data[29:33]
    for look in (check_image, image_size):
        with pytest.raises(BadImage, match=reason):
            look(bytes(data))


def test_scans_are_few_where_pixels_are_many() -> None:
    data = encoded(np.full((3000, 4000, 3), 200, np.uint8), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    assert image_size(data) == (3000, 4000)
    with pytest.raises(BadImage, match="more than 16 scans"):
        image_size(data[:at] + 10 * data[at:-2] + data[-2:])


def test_what_good_files_have_comes_in() -> None:
    expected = PIXELS.tobytes()
    fill = JPEG[:2] + b"\xff" * 1000 + JPEG[2:-2] + b"\xff" * 100_000 + JPEG[-2:]
    icc = segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(60_000))
    for data in (fill, JPEG[:2] + icc * 30 + JPEG[2:], JPEG + b"\xff" * 100_000):
        assert open_image(data).tobytes() == open_image(JPEG).tobytes()
    raw = zlib.compress(b"".join(b"\0" + row.tobytes() for row in PIXELS), 0)
    pieces = b"".join(chunk(b"IDAT", raw[i : i + 1]) for i in range(len(raw)))
    texts = chunk(b"tEXt", b"a\0b") * 100
    at = PNG.index(b"IDAT") - 4
    assert open_image(PNG[:at] + texts + pieces + chunk(b"IEND")).tobytes() == expected


def written(path, values: list[bytes], rows: int, **options: object) -> pq.ParquetFile:
    """A column of ``rows`` cells, each the next of ``values``."""
    cells = pa.array([values[i % len(values)] for i in range(rows)], pa.binary())
    pq.write_table(pa.table({"jpg_0": cells}), path, **options)
    return pq.ParquetFile(path)


def test_cells_that_unpack_to_far_more_than_their_file_are_not_unpacked(tmp_path) -> None:
    path = tmp_path / "bomb.parquet"
    written(path, [bytes(70 << 20)], 2, compression="zstd")
    assert path.stat().st_size < 20_000
    before = pa.total_allocated_bytes()
    found = read(cell_images([path], np.zeros(2, np.int64), np.arange(2), ["jpg_0"] * 2))
    reasons = [data.reason for _, data in found]
    assert all("its cells unpack from" in reason for reason in reasons)
    assert len(reasons) == 2
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_a_batch_holds_as_many_rows_as_fit_for_certain(tmp_path) -> None:
    rng = np.random.default_rng(0)
    photo = [rng.bytes(20_000) for _ in range(100)]
    for options in ({}, {"compression": "zstd"}, {"use_dictionary": False}):
        group = written(tmp_path / "a.parquet", photo, 100, **options).metadata.row_group(0)
        assert rows_at_once(group, ["jpg_0"]) == BATCH
    large = [rng.bytes(30 << 20)]
    path = tmp_path / "b.parquet"  # one value of a dictionary, in every row
    group = written(path, large, 8, dictionary_pagesize_limit=1 << 30).metadata.row_group(0)
    rows = rows_at_once(group, ["jpg_0"])
    assert 1 <= rows <= SPARE // (30 << 20)
    found = read(cell_images([path], np.zeros(8, np.int64), np.arange(8), ["jpg_0"] * 8))
    assert all(data == large[0] for _, data in found)
