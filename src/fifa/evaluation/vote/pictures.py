"""Images as voters get them: the same pixels, and nothing that says where they are from."""

from __future__ import annotations

import io
import struct

import numpy as np
import xxhash

from fifa.data.decode import BadImage, open_image
from fifa.errors import FifaError

SIGNATURE = b"\x89PNG\r\n\x1a\n"
# What a viewer needs; texts, EXIF and times stay out
CHUNKS = {b"IHDR", b"PLTE", b"tRNS", b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"sBIT", b"IDAT", b"IEND"}
TILES = 8  # a side


def anonymous_png(data: bytes) -> bytes:
    """The image as PNG without metadata: a generator may write its model's name into it.

    A PNG keeps its compressed pixels as they are; others are decoded. Raises `FifaError` where
    the bytes are no image that `fifa.data.decode.open_image` lets in.
    """
    pixels = _pixels(data)
    return _without_metadata(data) if data.startswith(SIGNATURE) else _png(pixels)


def scrambled_png(data: bytes) -> bytes:
    """The image with its tiles shuffled under heavy noise: nobody who looks prefers it.

    The same bytes give the same image. PNG, of the same size. Raises as `anonymous_png` does.
    """
    pixels = _pixels(data)
    rng = np.random.default_rng(xxhash.xxh3_64_intdigest(data))
    high, wide = max(1, pixels.shape[0] // TILES), max(1, pixels.shape[1] // TILES)
    down, across = pixels.shape[0] // high, pixels.shape[1] // wide
    covered = pixels[: down * high, : across * wide]
    tiles = covered.reshape(down, high, across, wide, 3).swapaxes(1, 2).reshape(-1, high, wide, 3)
    mixed = rng.permutation(tiles).reshape(down, across, high, wide, 3).swapaxes(1, 2)
    pixels[: down * high, : across * wide] = mixed.reshape(down * high, across * wide, 3)
    noise = rng.integers(0, 256, pixels.shape, np.uint8)
    return _png(np.where(rng.random((*pixels.shape[:2], 1)) < 0.5, noise, pixels))


def _pixels(data: bytes) -> np.ndarray:
    try:
        return np.array(open_image(data).convert("RGB"))
    except BadImage as error:
        raise FifaError(f"an image cannot be shown: {error}") from error


def _without_metadata(data: bytes) -> bytes:
    kept, at = [SIGNATURE], len(SIGNATURE)
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        chunk, end = data[at + 4 : at + 8], at + 12 + size  # length, name, data, checksum
        if chunk in CHUNKS:
            kept.append(data[at:end])
        at = end
        if chunk == b"IEND":
            break
    return b"".join(kept)


def _png(pixels: np.ndarray) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=1)
    return out.getvalue()
