"""AVIF and HEIC under the rules of all images, and pictures that their Exif turns."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from fifa.data import decode
from fifa.data.avif import coded_pixels
from fifa.data.decode import BadImage, check_image, image_size, open_image
from fifa.data.images import file_images, look
from fifa.data.kinds import BASIC, kind_of, may_be_turned, readable

avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow reads no AVIF")
heic = pytest.mark.skipif("HEIF" not in readable(), reason="pillow-heif is not installed")
MODERN = [pytest.param("AVIF", marks=avif), pytest.param("HEIF", marks=heic)]


def picture(width: int = 24, height: int = 16, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def written(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def says(data: bytes, width: int, height: int) -> bytes:
    """The file with another size in its header (of its first picture)."""
    at = data.index(b"ispe") + 8
    return data[:at] + struct.pack(">II", width, height) + data[at + 8 :]


@pytest.mark.parametrize("kind", MODERN)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_avif_and_heic_decode_as_pillow_does(kind: str, mode: str) -> None:
    data = written(picture(mode=mode), kind)
    assert kind_of(data) == kind
    assert image_size(data) == (16, 24)
    assert open_image(data).tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("kind", MODERN)
def test_of_avif_and_heic_cut_files_and_animations_are_refused(kind: str) -> None:
    data = written(picture(64, 48), kind)
    for keep in (0.2, 0.5, 0.8, 0.99):
        with pytest.raises(BadImage):
            check_image(data[: int(len(data) * keep)])
    two = written(picture(), kind, save_all=True, append_images=[picture(24, 16)])
    with pytest.raises(BadImage, match=r"animation|sequence"):
        check_image(two)


@pytest.mark.parametrize("kind", MODERN)
def test_sizes_that_are_not_the_pictures_own_are_refused(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = written(picture(128, 128), kind)
    with pytest.raises(BadImage):
        check_image(says(data, 20_000, 20_000))
    monkeypatch.setitem(decode.MAX_OTHERS, kind, 5000)
    with pytest.raises(BadImage, match="pixels"):
        check_image(data)
    with pytest.raises(BadImage):  # says little, and holds much
        check_image(says(data, 8, 8))


@avif
def test_the_pixels_coded_in_an_avif_are_counted() -> None:
    assert coded_pixels(written(picture(64, 48), "AVIF")) == 64 * 48
    clear = picture(64, 48)
    clear.putalpha(picture(64, 48, "L"))
    assert coded_pixels(written(clear, "AVIF")) == 2 * 64 * 48
    tiled = written(picture(64, 48), "AVIF", quality=100, subsampling="4:4:4", tile_rows=1)
    assert coded_pixels(says(tiled, 8, 8)) == 64 * 48
    data = written(picture(64, 48), "AVIF")
    size = int.from_bytes(data[:4])
    many = data[:size] + 2000 * b"\0\0\0\x08free" + data[size:]
    with pytest.raises(BadImage, match="more than 1000 boxes"):  # 60 MB of them took 5 s
        check_image(many)


@pytest.mark.parametrize("kind", MODERN)
def test_flipped_bytes_end_in_a_picture_or_a_reason(kind: str) -> None:
    data, draw = written(picture(32, 32), kind), random.Random(0)
    for _ in range(150):
        raw = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        try:
            height, width = image_size(bytes(raw))
            image = open_image(bytes(raw))
        except BadImage as error:
            assert error.reason
        else:
            assert image.size == (width, height)


def test_what_cannot_be_read_here_says_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "readable", lambda: BASIC)
    heic = b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(50)
    for data, why in [
        (heic, r"fifa-align\[heic\]"),
        (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1" + bytes(50), "pillow>=11.3"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(50), "JPEG XL"),
    ]:
        with pytest.raises(BadImage, match=why):
            check_image(data)


def exif(turn: int, order: str = "II", kind: int = 3) -> bytes:
    sign = {"II": "<", "MM": ">"}[order]
    head = order.encode() + struct.pack(f"{sign}HI", 42, 8)
    return head + struct.pack(f"{sign}HHHIHHI", 1, 0x0112, kind, 1, turn, 0, 0)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", *MODERN])
def test_a_picture_comes_as_people_see_it(kind: str, turn: int) -> None:
    shown = np.zeros((32, 48, 3), np.uint8)
    shown[:16, :24] = 255  # the corner at the top left is white
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the inverse, as Pillow numbers them
    stored = Image.fromarray(shown)
    stored = stored if turn == 1 else stored.transpose(Image.Transpose(back[turn]))
    data = written(stored, kind, exif=b"Exif\0\0" + exif(turn))
    assert image_size(data) == (32, 48)
    found = np.asarray(open_image(data).convert("L"), int)
    assert found.shape == (32, 48)
    assert found[:12, :20].min() > 200
    assert max(found[20:, :].max(), found[:, 28:].max()) < 50


@pytest.mark.parametrize("order", ["II", "MM"])
def test_exif_that_makes_no_sense_turns_nothing(order: str) -> None:
    for raw in [exif(9, order), exif(0, order), exif(6, order, kind=4), exif(6, order)[:15], b"",
                order.encode(), exif(6, order)[:8] + b"\xff\xff", b"XX" + exif(6, order)[2:],
                exif(6, order)[:4] + b"\xff\xff\xff\x7f"]:  # fmt: skip
        data = written(picture(), "PNG", exif=raw or b"x")
        assert image_size(data) == (16, 24)
    assert image_size(written(picture(), "PNG", exif=exif(6, order))) == (24, 16)


def test_what_stands_before_the_pixels_says_whether_a_picture_may_be_turned() -> None:
    """No orientation is missed, whatever comes before it; what only looks like one costs little."""
    pixels = b"Exif\0\0eXIfEXIF"
    for kind in BASIC:
        turned_one = written(picture(), kind, exif=b"Exif\0\0" + exif(6))
        assert may_be_turned(turned_one)
        assert not may_be_turned(written(picture(), kind) + pixels)
        for keep in range(8, len(turned_one)):  # a cut file raises nothing
            may_be_turned(turned_one[:keep])
    jpeg, png = (written(picture(), kind, exif=b"Exif\0\0" + exif(6)) for kind in ("JPEG", "PNG"))
    for filler in (b"\xff\xda", b"\xff\xd9\xff\xda", pixels, bytes(300)):
        segment = b"\xff\xe9" + struct.pack(">H", len(filler) + 2) + filler
        chunk = b"tEXt" + b"a\0IDAT" + filler
        chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for many in (1, 100):
            longer = jpeg[:2] + segment * many + jpeg[2:]
            assert may_be_turned(longer)
            assert image_size(longer) == (24, 16)
            assert may_be_turned(png[:33] + chunk * many + png[33:])
        assert may_be_turned(jpeg[:2] + filler[:1] + jpeg[2:])  # stray bytes: Pillow is asked


def test_a_turned_picture_has_a_content_of_its_own(tmp_path: Path) -> None:
    """Scores of pictures without an orientation keep their names; those of others get new ones."""
    for name, turn in (("a", 1), ("b", 6)):
        (tmp_path / name).write_bytes(written(picture(), "JPEG", exif=b"Exif\0\0" + exif(turn)))
    plain, other = look(file_images(tmp_path, ["a", "b"])).to_pylist()
    assert len(plain["content"]) == 32
    assert other["content"].endswith("-6")
    assert (plain["height"], plain["width"], other["height"], other["width"]) == (16, 24, 24, 16)
