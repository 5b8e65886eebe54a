"""The pictures that voters get: made anew from pixels, each once, in one form.

A file says more than its pixels: texts, times, colour chunks, the program that packed it, bytes
behind its end. Nothing of that goes out: pixels are decoded, turned as their Exif says, taken from
their colour profile to sRGB, and written by one encoder with the same settings.
"""

from __future__ import annotations

import io
import tempfile
import threading
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from PIL import Image, ImageCms

from fifa.data.decode import BadImage, open_image
from fifa.errors import FifaError
from fifa.evaluation.generate import png
from fifa.shards.files import PREFIX, cannot_write

TILES = 8  # a side


def canonical_png(data: bytes) -> bytes:
    """The image as a PNG of 8-bit RGB with nothing but pixels in it.

    The same pixels give the same bytes. Transparency is dropped, as scorers drop it. Raises
    `FifaError` where the bytes are no image that `fifa.data.decode.open_image` lets in.
    """
    return png(_pixels(data), 1)


def scrambled_png(data: bytes) -> bytes:
    """The image with its tiles shuffled under heavy noise: nobody who looks prefers it.

    The same bytes give the same image. PNG, of the same size. Raises as `canonical_png` does.
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
    return png(np.where(rng.random((*pixels.shape[:2], 1)) < 0.5, noise, pixels), 1)


def _pixels(data: bytes) -> np.ndarray:
    try:
        image = open_image(data)
    except BadImage as error:
        raise FifaError(f"an image cannot be shown: {error}") from error
    return np.array(_in_srgb(image))


def _in_srgb(image: Image.Image) -> Image.Image:
    """RGB as a screen is to show it; without a profile the numbers are sRGB's."""
    profile = image.info.get("icc_profile")
    if profile:
        plain = image.convert({"P": "RGB", "PA": "RGB", "RGBA": "RGB"}.get(image.mode, image.mode))
        plain = plain.convert("L") if plain.mode in ("1", "LA") else plain
        try:
            own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            turned = ImageCms.profileToProfile(
                plain, own, ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except Exception:  # no profile of such an image: browsers take sRGB as well
            turned = None
        if turned is not None:
            return turned
    return image.convert("RGB")


@dataclass(frozen=True)
class Picture:
    """A picture that is ready to be sent."""

    size: int
    read: Callable[[int, int], bytes]  # from where, how many bytes: fewer at the end


class Pictures:
    """Pictures that are made once, one at a time, in a file that has no name.

    Parameters
    ----------
    folder
        On the disk of the file, which ends with this process.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._making, self._using = threading.Lock(), threading.Lock()
        self._made: dict[Hashable, Picture] = {}
        self._file: IO[bytes] | None = None

    def get(self, key: Hashable, make: Callable[[], bytes]) -> Picture:
        """The picture that ``make`` makes the first time that ``key`` is asked for."""
        if key not in self._made:
            with self._making:
                if key not in self._made:
                    self._made[key] = self._keep(make())
        return self._made[key]

    def _keep(self, data: bytes) -> Picture:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix=PREFIX, dir=self.folder)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            with self._using:
                start = self._file.seek(0, io.SEEK_END)
                self._file.write(data)
                self._file.flush()
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        size = len(data)
        return Picture(size, lambda at, most: self._read(start + at, min(most, size - at)))

    def _read(self, at: int, most: int) -> bytes:
        assert self._file is not None
        with self._using:
            self._file.seek(at)
            return self._file.read(most)
