"""Headers that lie: refused where the data run out, whatever a decoder fills the rest with."""

from __future__ import annotations

import io
import re
import struct
import zlib

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from fifa.data.decode import SCANS, BadImage, check_image, open_image

PROMISE = "promises more pixels"


@st.composite
def pictures(draw) -> Image.Image:
    """Noise, a photograph's smoothness, flat colours, and flat or grey below."""
    size = draw(st.integers(33, 150)), draw(st.integers(33, 150))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    detail = draw(st.sampled_from([1, 4, 24, 150]))
    image = Image.fromarray(rng.integers(0, 256, (detail, detail, 3), np.uint8))
    image = image.resize(size, Image.Resampling.BICUBIC)
    below = draw(st.sampled_from([None, (128, 128, 128), (127, 128, 129), (0, 0, 0), (255,) * 3]))
    if below:
        top = draw(st.integers(8, size[1]))
        ImageDraw.Draw(image).rectangle([0, top, *size], fill=below)
    return image


@st.composite
def jpegs(draw) -> bytes:
    options: dict[str, object] = {
        "quality": draw(st.sampled_from([5, 50, 75, 90, 100])),
        "subsampling": draw(st.sampled_from([0, 1, 2])),
        "progressive": draw(st.booleans()),
        "optimize": draw(st.booleans()),
    }
    restart = draw(st.sampled_from([None, "restart_marker_blocks", "restart_marker_rows"]))
    if restart:
        options[restart] = draw(st.integers(1, 9))
    mode = draw(st.sampled_from(["RGB", "RGB", "L", "CMYK"]))
    return encoded(draw(pictures()).convert(mode), "JPEG", **options)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def lying_jpeg(data: bytes, width: int, height: int) -> bytes:
    """The JPEG with ``width`` and ``height`` more than it has."""
    at = re.search(rb"\xff[\xc0-\xc2]\x00[\x0b\x11\x14]", data).start() + 5
    h, w = struct.unpack(">HH", data[at : at + 4])
    return data[:at] + struct.pack(">HH", h + height, w + width) + data[at + 4 :]


def lying_png(data: bytes, width: int, height: int) -> bytes:
    w, h = struct.unpack(">II", data[16:24])
    header = data[12:16] + struct.pack(">II", w + width, h + height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def lying_webp(data: bytes, width: int, height: int) -> bytes:
    if data[12:16] == b"VP8 ":
        w, h = struct.unpack("<HH", data[26:30])
        return data[:26] + struct.pack("<HH", w + width, h + height) + data[30:]
    (bits,) = struct.unpack("<I", data[21:25])
    return data[:21] + struct.pack("<I", bits + width + (height << 14)) + data[25:]


MORE = st.sampled_from([(0, 16), (0, 17), (0, 200), (16, 0), (90, 0), (16, 16), (33, 70)])


@settings(deadline=None, max_examples=150)
@given(jpegs(), st.sampled_from([b"", b"\0" * 9, b"\xff\xd9", b"\xff\xd8\xff\xda" * 200]))
def test_whole_jpegs_come_in_as_pillow_decodes_them(data: bytes, behind: bytes) -> None:
    assert open_image(data + behind).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@settings(deadline=None, max_examples=150)
@given(jpegs(), MORE)
def test_jpegs_that_promise_more_blocks_than_they_have_are_refused(data, more) -> None:
    """All of them in one scan, whatever is in it: at least ten blocks are missing."""
    image = Image.open(io.BytesIO(data))
    if "progressive" in image.info:  # without data it would be grey as well
        last = np.asarray(image.convert("RGB"), int)[-16:, -16:]
        assume(np.abs(last - 128).max() > 3)
    with pytest.raises(BadImage, match=PROMISE):
        check_image(lying_jpeg(data, *more))


@pytest.mark.parametrize("side", [8, 16])
@pytest.mark.parametrize("progressive", [False, True])
def test_images_of_one_block_that_promise_another_are_refused(side, progressive) -> None:
    rng = np.random.default_rng(side)
    image = Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8))
    data = encoded(image, "JPEG", progressive=progressive)
    check_image(data)
    for more in ((0, 16), (16, 0)):
        with pytest.raises(BadImage, match=PROMISE):
            check_image(lying_jpeg(data, *more))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("below", ["black", "white", (127, 128, 129), (128, 128, 128)])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_lack_is_seen_whatever_the_codes_of_the_file(progressive, below, mode) -> None:
    """With optimal codes bits that are left over, or any other, may be pictures again."""
    rng = np.random.default_rng(0)
    for quality, detail, height in ((5, 150, 39), (75, 1, 38), (100, 4, 46)):
        pixels = rng.integers(0, 256, (detail, detail, 3), np.uint8)
        image = Image.fromarray(pixels).resize((34, height), Image.Resampling.BICUBIC)
        image.paste(below, (0, height // 2, 34, height))
        options = {"quality": quality, "optimize": True, "progressive": progressive}
        data = encoded(image.convert(mode), "JPEG", **options)
        check_image(data)
        for more in ((0, 16), (16, 0), (0, 200)):
            with pytest.raises(BadImage, match=PROMISE):
                check_image(lying_jpeg(data, *more))


@settings(deadline=None, max_examples=60)
@given(jpegs(), st.integers(0, 1 << 30))
def test_a_jpeg_that_is_cut_anywhere_is_refused(data, place) -> None:
    """With an end or without. The last bytes of a scan may hold nothing but its padding."""
    scan = re.search(rb"\xff\xda", data).end()
    at = scan + 12 + place % (len(data) - scan - 14 - 80) if len(data) - scan > 120 else scan + 12
    with pytest.raises(BadImage):
        check_image(data[:at])
    if b"\xff\xc2" not in data[:scan] and at < len(data) - 80:
        with pytest.raises(BadImage):
            check_image(data[:at].rstrip(b"\xff") + b"\xff\xd9")


def test_lines_that_the_last_blocks_hold_anyway_are_no_lie() -> None:
    """A JPEG of 44 lines has 48: nothing in the file says that 48 were not meant."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (44, 64, 3), np.uint8))
    assert open_image(lying_jpeg(encoded(image, "JPEG"), 0, 4)).size == (64, 48)


def test_a_jpeg_that_was_cut_and_closed_is_refused() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), np.uint8))
    data = encoded(image, "JPEG")
    with pytest.raises(BadImage, match=PROMISE):
        check_image(data[: len(data) * 2 // 3] + b"\xff\xd9")


def test_pictures_within_and_behind_the_picture_do_not_count() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    first, second, small = (Image.fromarray(p) for p in pixels)
    inside = b"Exif\0\0" + encoded(small.resize((16, 16)), "JPEG")
    check_image(encoded(first, "JPEG", exif=inside))
    several = encoded(first, "MPO", save_all=True, append_images=[second])
    assert open_image(several).format == "MPO"
    with pytest.raises(BadImage, match=PROMISE):
        check_image(lying_jpeg(several, 0, 40))


def test_jpegs_that_no_browser_shows_are_refused() -> None:
    data = encoded(Image.new("RGB", (40, 40), "red"), "JPEG")
    with pytest.raises(BadImage, match="arithmetic"):  # which never runs out of data
        check_image(data.replace(b"\xff\xc0", b"\xff\xc9", 1))


def test_more_scans_than_anybody_needs_are_refused_before_they_are_decoded() -> None:
    data = encoded(Image.new("L", (500, 500), 200), "JPEG", progressive=True)
    at = data.rindex(b"\xff\xda")
    scan = data[at:-2]
    check_image(data)
    with pytest.raises(BadImage, match=f"more than {SCANS} scans"):
        check_image(data[:at] + 100_000 * scan + data[-2:])


@settings(deadline=None, max_examples=100)
@given(pictures(), st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA"]), MORE)
def test_pngs_are_whole_or_refused(image, mode, more) -> None:
    data = encoded(image.convert(mode), "PNG")
    assert open_image(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()
    with pytest.raises(BadImage):
        check_image(lying_png(data, *more))


ADAM7 = [  # first row and column, and their steps, of each pass
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 20), st.booleans())
def test_interlaced_pngs_are_whole_or_refused(width, height, more, black) -> None:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width), np.uint8)
    pixels *= not black
    passes = (pixels[y::dy, x::dx] for y, x, dy, dx in ADAM7)
    raw = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in part)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 1)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in chunks
    )
    assert np.array_equal(np.asarray(open_image(data)), pixels)
    with pytest.raises(BadImage):
        check_image(lying_png(data, 0, more))


@settings(deadline=None, max_examples=60)
@given(pictures(), st.booleans(), st.sampled_from([10, 80]))
def test_whole_webps_come_in_as_pillow_decodes_them(image, lossless, quality) -> None:
    data = encoded(image, "WEBP", lossless=lossless, quality=quality)
    assert open_image(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@settings(deadline=None, max_examples=60)
@given(st.integers(33, 150), st.integers(0, 1 << 30), st.booleans(), st.integers(16, 300))
def test_webps_that_promise_more_lines_than_they_have_are_refused(side, seed, lossless, more):
    """Of noise: where lines take no bits, as in a flat picture, their data are never missing."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    data = encoded(Image.fromarray(pixels), "WEBP", lossless=lossless)
    with pytest.raises(BadImage):
        check_image(lying_webp(data, 0, more))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize(
    ("least", "width"), [(0, 400), (100, 200), (101, 200), (50, 100), (20, 50)]
)
def test_a_jpeg_comes_out_at_a_part_of_its_size(least, width, progressive):
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)).resize((400, 303))
    data = encoded(picture, "JPEG", quality=90, progressive=progressive)
    small = open_image(data, least)
    assert small.width == width
    assert min(small.size) >= least
    near = np.asarray(picture.resize(small.size, Image.Resampling.BOX), np.float32)
    assert np.abs(np.asarray(small, np.float32) - near).mean() < 3
    with pytest.raises(BadImage):
        open_image(lying_jpeg(data, 0, 64), least)
    with pytest.raises(BadImage):
        open_image(lying_jpeg(data, 160, 0), least)
    assert open_image(encoded(picture, "PNG"), least).size == picture.size


@settings(max_examples=150)
@given(jpegs())
def test_no_good_jpeg_is_refused_at_a_part_of_its_size(data):
    for least in (8, 16, 64):
        assert min(open_image(data, least).size) >= min(least, 33)
