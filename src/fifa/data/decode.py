"""Decoding and header checks: images are hostile until they are decoded."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageFile

FORMATS = ("JPEG", "PNG", "WEBP")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
MAX_PIXELS = 64_000_000
MAX_BYTES = 64 << 20


class BadImage(Exception):  # noqa: N818 - it is passed on as a finding more than it is raised
    """An image that does not come in, and why.

    Parameters
    ----------
    reason
        One short sentence.
    """

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)


def open_image(data: bytes) -> Image.Image:
    """Decode an image completely.

    JPEG, PNG and WEBP of at most `MAX_PIXELS` pixels and `MAX_BYTES` bytes. Refused as well:
    truncated files and headers that promise more pixels than there are data for
    (`fifa.data.truncation`), animations (nobody knows which frame a person judged), 16-bit grey,
    and JPEGs that no browser shows (arithmetic coding). Rotation by EXIF and conversion to RGB are
    left to whoever looks at the image.

    Raises `BadImage`.
    """
    from fifa.data.truncation import lacks_data

    try:
        image = _header(data)
        image.load()
        if image.format != "WEBP" and lacks_data(image, data):
            raise BadImage("its header promises more pixels than it has data for")
    except BadImage:
        raise
    except Exception as error:  # a decoder fed with hostile bytes may raise anything
        raise _undecodable(error) from error
    return image


def image_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as its header says; raises `BadImage` as `open_image` does.

    What follows the header is not decoded: a truncated file passes.
    """
    try:
        with _header(data) as image:
            return image.height, image.width
    except BadImage:
        raise
    except Exception as error:
        raise _undecodable(error) from error


def _header(data: bytes) -> ImageFile.ImageFile:
    """The image, opened and looked at, not decoded."""
    from PIL import Image

    from fifa.data.truncation import HUFFMAN, SCANS, frame, many_scans

    if len(data) > MAX_BYTES:
        raise BadImage(f"more than {MAX_BYTES:,} bytes")
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise BadImage(f"more than {MAX_PIXELS:,} pixels")
    # an MPO is a JPEG with further pictures behind the one that everybody sees
    if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
        raise BadImage("an animation")
    if image.mode not in MODES:
        raise BadImage(f"mode {image.mode} is not supported")
    if image.format in ("JPEG", "MPO"):
        if frame(data) not in HUFFMAN:
            raise BadImage("a JPEG with arithmetic or lossless coding is not supported")
        if many_scans(data):
            raise BadImage(f"a JPEG with more than {SCANS} scans")
    return image


def _undecodable(error: Exception) -> BadImage:
    brief = str(error).partition("\n")[0][:100] or type(error).__name__
    if "<_io.BytesIO" in brief:
        brief = "no JPEG, PNG or WEBP"
    return BadImage(f"cannot be decoded: {brief}")


def check_image(data: bytes) -> None:
    """Decode an image completely and forget it; raises `BadImage`."""
    open_image(data).close()
