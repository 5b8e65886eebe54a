"""What is left of an image file once it is a picture on the page: its pixels."""

from __future__ import annotations

import io
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms
from vote_worlds import draw

from fifa.errors import FifaError
from fifa.evaluation.vote.pictures import Pictures, canonical_png, scrambled_png

DATA = draw("teal", "circle", shaky=False, seed=1)


def as_format(data: bytes, name: str, orientation: int = 1, **options: object) -> bytes:
    out = io.BytesIO()
    exif = Image.Exif()
    exif[0x010E] = "model: tuned-secret"  # ImageDescription
    exif[0x0112] = orientation
    Image.open(io.BytesIO(data)).save(out, name, exif=exif, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def chunks(data: bytes) -> list[bytes]:
    found, at = [], 8
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        found.append(data[at + 4 : at + 8])
        at += 12 + size
    return found


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def with_chunks(data: bytes, *more: bytes) -> bytes:
    """``more`` behind the header."""
    return data[:33] + b"".join(more) + data[33:]


def test_the_pixels_are_those_of_the_file() -> None:
    assert b"secret" in DATA
    for original in (DATA, as_format(DATA, "WEBP"), as_format(DATA, "JPEG")):
        assert b"secret" in original
        got = canonical_png(original)
        assert b"secret" not in got
        assert set(chunks(got)) == {b"IHDR", b"IDAT", b"IEND"}
        assert (pixels(original) == pixels(got)).all()
    with pytest.raises(FifaError, match="cannot be shown"):
        canonical_png(b"no image")


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
KINDS = {
    "tEXt": chunk(b"tEXt", b"parameters\0model: tuned-secret"),
    "zTXt": chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"tuned-secret")),
    "iTXt": chunk(b"iTXt", b"a\0\0\0\0\0tuned-secret"),
    "eXIf": chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0\0\0\0\0"),
    "gAMA": chunk(b"gAMA", struct.pack(">I", 45455)),
    "cHRM": chunk(b"cHRM", struct.pack(">8I", *range(31270, 31278))),
    "sRGB": chunk(b"sRGB", b"\0"),
    "sBIT": chunk(b"sBIT", b"\x08\x08\x08"),
    "iCCP": chunk(b"iCCP", b"tuned-secret\0\0" + zlib.compress(SRGB)),
    "cICP": chunk(b"cICP", b"\x01\x0d\0\x01"),
    "bKGD": chunk(b"bKGD", b"\0\1\0\2\0\3"),
    "tRNS": chunk(b"tRNS", b"\0\1\0\2\0\3"),
    "PLTE": chunk(b"PLTE", bytes(range(96))),
    "hIST": chunk(b"PLTE", bytes(6)) + chunk(b"hIST", bytes(4)),
    "sPLT": chunk(b"sPLT", b"tuned-secret\0\x08"),
    "pHYs": chunk(b"pHYs", struct.pack(">IIB", 2835, 2835, 1)),
    "oFFs": chunk(b"oFFs", struct.pack(">iiB", 3, 5, 1)),
    "tIME": chunk(b"tIME", struct.pack(">HBBBBB", 2026, 1, 2, 3, 4, 5)),
    "vpAg": chunk(b"vpAg", bytes(9)),
    "caBX": chunk(b"caBX", b"tuned-secret"),
    "private": chunk(b"prVt", b"tuned-secret"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_png_keeps_nothing_that_could_name_its_maker(kind: str) -> None:
    assert canonical_png(with_chunks(DATA, KINDS[kind])) == canonical_png(DATA)


def test_how_a_file_was_packed_is_lost() -> None:
    image = Image.open(io.BytesIO(DATA))
    forms = [DATA + b"tuned-secret"]
    for options in ({"compress_level": 0}, {"compress_level": 9}, {"optimize": True}):
        out = io.BytesIO()
        image.save(out, "PNG", **options)
        forms.append(out.getvalue())
    for lossless in (image.convert("RGBA"), image.quantize(256)):
        out = io.BytesIO()
        lossless.save(out, "PNG")
        forms.append(out.getvalue())
    forms.append(as_format(DATA, "WEBP", lossless=True))
    for data in forms:
        assert (pixels(data) == pixels(DATA)).all()
        assert canonical_png(data) == canonical_png(DATA)


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP"])
def test_a_picture_is_turned_as_its_exif_says(name: str, orientation: int) -> None:
    data = as_format(DATA, name, orientation)
    plain = as_format(DATA, name)
    turns = {2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
             5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1),
             7: lambda x: np.rot90(x, 2).swapaxes(0, 1), 8: np.rot90}  # fmt: skip
    assert (pixels(canonical_png(data)) == turns.get(orientation, lambda x: x)(pixels(plain))).all()


def test_a_colour_profile_is_taken_to_srgb() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    same = pixels(canonical_png(as_format(DATA, "PNG", icc_profile=SRGB)))
    assert np.abs(same - pixels(DATA)).max() <= 1
    for broken in (b"tuned-secret", SRGB[:200], b"", SRGB[:128] + b"\xff" * 400, lab[:-9]):
        got = canonical_png(as_format(DATA, "PNG", icc_profile=broken))
        assert b"secret" not in got
    swapped = bytearray(SRGB)  # red's and blue's colours change places
    red, blue = swapped.find(b"rXYZ"), swapped.find(b"bXYZ")
    swapped[red : red + 4], swapped[blue : blue + 4] = b"bXYZ", b"rXYZ"
    got = pixels(canonical_png(as_format(DATA, "PNG", icc_profile=bytes(swapped))))
    assert np.abs(got - pixels(DATA)).max() > 30
    for mode in ("L", "LA", "1", "P", "RGBA", "CMYK"):
        out = io.BytesIO()
        name = "JPEG" if mode == "CMYK" else "PNG"
        Image.open(io.BytesIO(DATA)).convert(mode).save(out, name, icc_profile=SRGB)
        assert pixels(canonical_png(out.getvalue())).shape == (64, 64, 3)


@settings(max_examples=40, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SRGB) - 1), st.integers(0, 255)), max_size=9))
def test_any_profile_gives_a_picture(flips: list[tuple[int, int]]) -> None:
    profile = bytearray(SRGB)
    for at, value in flips:
        profile[at] = value
    data = as_format(DATA, "PNG", icc_profile=bytes(profile))
    assert pixels(canonical_png(data)).shape == (64, 64, 3)


@pytest.mark.parametrize("size", [(64, 64), (200, 90), (5, 3)])
def test_a_destroyed_image_is_far_from_the_intact_one(size: tuple[int, int]) -> None:
    out = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(out, "PNG")
    data = out.getvalue()
    got = scrambled_png(data)
    assert got == scrambled_png(data)
    assert set(chunks(got)) == {b"IHDR", b"IDAT", b"IEND"}
    broken, intact = pixels(got), pixels(data)
    assert broken.shape == intact.shape
    assert np.abs(broken - intact).mean() > 30


def test_a_picture_is_made_once_and_leaves_no_file(tmp_path: Path) -> None:
    made = []

    def make(name: str) -> bytes:
        made.append(name)
        time.sleep(0.01)
        return name.encode() * 1000

    pictures = Pictures(tmp_path)
    names = [f"{i:03d}" for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda name: pictures.get(name, lambda: make(name)), names * 4))
        whole = list(pool.map(lambda one: one.read(0, one.size + 9), got))
    assert sorted(made) == names
    assert whole == [name.encode() * 1000 for name in names * 4]
    assert [got[1].read(2999, 5), got[1].read(3000, 5)] == [b"1", b""]
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_could_not_be_made_is_tried_again(tmp_path: Path) -> None:
    pictures, barrier = Pictures(tmp_path), threading.Event()

    def fail() -> bytes:
        barrier.set()
        raise FifaError("no")

    with pytest.raises(FifaError, match="no"):
        pictures.get("a", fail)
    assert pictures.get("a", lambda: b"yes").read(0, 9) == b"yes"
