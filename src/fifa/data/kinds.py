"""Kinds of image files beside JPEG, PNG and WEBP, and which way up a picture is.

AVIF comes with Pillow since 11.3, HEIC with the package pillow-heif. JPEG XL is refused: Pillow
does not read it, and the plugin that does decodes all pixels before anybody can ask how many.
"""

from __future__ import annotations

import struct
import warnings
from functools import cache

from PIL import Image, features

BASIC = ("JPEG", "PNG", "WEBP")
MISSING = {
    "AVIF": "AVIF, which this Pillow does not read: pip install -U 'pillow>=11.3'",
    "HEIF": "HEIC, which takes another package: pip install 'fifa-align[heic]'",
    "JXL": "JPEG XL, which is not read: convert it to PNG",
}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"}
_BRANDS |= dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"), "HEIF")
_JXL = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")
_ORIENTED = (b"Exif\0\0", b"irot", b"imir")  # where an AVIF may have an orientation
_LONG = {bytes((0xFF, i)) for i in (*range(0xC0, 0xD0), *range(0xDB, 0xFF))}  # segments of a JPEG
SEGMENTS = 64  # of a JPEG, chunks of a PNG that are looked at before its pixels
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@cache
def readable() -> tuple[str, ...]:
    """Pillow's names of the formats that can be read here."""
    found = list(BASIC)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an older Pillow has never heard of it
        if features.check("avif"):
            from PIL import AvifImagePlugin

            AvifImagePlugin.DEFAULT_MAX_THREADS = 1  # many images are decoded side by side
            found.append("AVIF")
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return tuple(found)
    register_heif_opener(thumbnails=False)
    return (*found, "HEIF")


def kind_of(data: bytes) -> str:
    """``AVIF``, ``HEIF`` or ``JXL`` by the first bytes; "" for every other file."""
    if data.startswith(_JXL):
        return "JXL"
    if data[4:8] != b"ftyp":
        return ""
    size = min(int.from_bytes(data[:4]), 256)
    brands = (data[at : at + 4] for at in (8, *range(16, size, 4)))  # version between them
    return next((_BRANDS[brand] for brand in brands if brand in _BRANDS), "")


def may_be_turned(data: bytes) -> bool:
    """False if a file has no orientation, without opening it.

    Of JPEG and PNG only what stands before the pixels is looked at, of WEBP its flags: to search
    a whole file takes longer than to hash it.
    """
    if data.startswith(b"\xff\xd8"):
        return _jpeg_may_be_turned(data)
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return _png_may_be_turned(data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return data[12:16] == b"VP8X" and len(data) > 20 and bool(data[20] & 8)  # it has Exif
    return any(mark in data for mark in _ORIENTED)


def _jpeg_may_be_turned(data: bytes) -> bool:
    at = 2
    for _ in range(SEGMENTS):
        marker, size = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4])
        if marker == b"\xff\xda":  # the pixels
            return False
        if marker not in _LONG or size < 2 or data.startswith(b"Exif\0\0", at + 4):
            return True  # or it is odd: let Pillow see
        at += 2 + size
    return True


def _png_may_be_turned(data: bytes) -> bool:
    at = 8
    for _ in range(SEGMENTS):
        kind = data[at + 4 : at + 8]
        if kind == b"IDAT":
            return False
        if kind == b"eXIf" or len(kind) < 4:
            return True
        at += 12 + int.from_bytes(data[at : at + 4])
    return True


def orientation(image: Image.Image) -> int:
    """How an image is to be turned to be seen as people see it: 1 (not) to 8, as Exif has it.

    Of JPEG, PNG and WEBP the Exif counts, as far as it stands before the pixels; of AVIF what its
    container says, and HEIC comes turned. What is damaged counts as 1.
    """
    exif = image.info.get("exif")
    if image.format == "HEIF" or not isinstance(exif, bytes):
        return 1
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (count,) = struct.unpack_from(f"{order}H", exif, start)
        for i in range(count):  # 12 bytes an entry: tag, type, count, value
            tag, kind, many, value = struct.unpack_from(f"{order}HHIH", exif, start + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and many == 1 and value in _TURNS else 1
    except struct.error:
        pass
    return 1


def turned(image: Image.Image, how: int) -> Image.Image:
    """The image as it is seen, by its `orientation`."""
    return image.transpose(_TURNS[how]) if how in _TURNS else image
