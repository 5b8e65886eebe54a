"""Small pictures for the page, encoded anew: nothing of a file but its pixels gets there."""

from __future__ import annotations

import base64
import io

from PIL import Image

from fifa.data.decode import BadImage, open_image
from fifa.data.images import Images, read
from fifa.formatting import shorten

SIDE = 224  # pixels of the longer side: sharp enough at the 150 or so that a phone gives it
QUALITY = 70  # JPEG; about 8 kB a picture


def thumbnails(images: Images, *, exact: int = 0) -> list[str]:
    """`thumbnail` of each image, or why there is none; nothing is fetched for it."""
    found = [""] * len(images)
    for row, data in read(images):
        try:
            if isinstance(data, BadImage):
                raise data
            found[row] = thumbnail(data, exact=exact)
        except BadImage as bad:
            found[row] = shorten(bad.reason, 80)
    return found


def thumbnail(data: bytes, *, exact: int = 0) -> str:
    """A data URI of an image, at most `SIDE` pixels long, white where it is transparent.

    An image of at most ``exact`` pixels a side keeps every pixel, as a PNG; others are JPEGs.
    Raises `fifa.data.decode.BadImage`.
    """
    with open_image(data) as image:
        transparent = "A" in image.getbands() or "transparency" in image.info
        pixels = image.convert("RGBA" if transparent else "RGB")
    if transparent:
        white = Image.new("RGBA", pixels.size, "white")
        pixels = Image.alpha_composite(white, pixels).convert("RGB")
    pixels.info = {}  # Pillow would write comments and profiles out again
    encoded, format = io.BytesIO(), "PNG" if max(pixels.size) <= exact else "JPEG"
    if format == "JPEG":
        pixels.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels.save(encoded, format, quality=QUALITY, optimize=True)
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
