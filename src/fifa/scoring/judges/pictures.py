"""Images as a request has them: resized and encoded once, when a question first needs them."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from threading import Lock
from typing import IO, Any

from PIL import Image

from fifa.config import Compute
from fifa.data.decode import BadImage
from fifa.data.images import Images, read
from fifa.data.prefetch import decode_images
from fifa.errors import FifaError
from fifa.scoring.replies import NoAnswerError

QUALITY = 90  # of a JPEG


class Pictures:
    """Some images as ``data:`` URLs.

    They are read in the order of their files, ahead of who asks, and kept in a file without a
    name: an image is decoded and encoded once, however many questions show it.

    Parameters
    ----------
    images, rows
        Where they are, and which of them may be asked for.
    compute
        Its ``judge_side`` and ``judge_images`` say how large and in which format.
    folder
        Where there is room for the file; None: where temporary files are.
    allow_download
        Fetch images that the source only names by URL.

    Attributes
    ----------
    bad
        The reason of every image that could not be read, by its row; those asked for so far.
    """

    def __init__(
        self,
        images: Images,
        rows: Sequence[int],
        compute: Compute,
        folder: Path | None = None,
        allow_download: bool = False,
    ) -> None:
        self.bad: dict[int, str] = {}
        self._places: dict[int, tuple[int, int]] = {}
        self._lock, self._type = Lock(), compute.judge_images
        self._file: IO[bytes] = TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        how: Any = {"allow_download": allow_download, "cache_gb": compute.cache_gb}
        encode = partial(encoded, side=compute.judge_side, kind=compute.judge_images)
        self._stream: Iterator[tuple[int, bytes | BadImage]] = decode_images(
            read(images, rows, **how), encode
        )

    def urls(self, rows: Sequence[int]) -> tuple[str, ...]:
        """The images' URLs; may wait. Raises `NoAnswerError` where one cannot be read."""
        with self._lock:
            return tuple(self._url(row) for row in rows)

    def close(self) -> None:
        """Stop reading and forget the images."""
        with self._lock:
            self._stream.close()  # type: ignore[attr-defined]
            self._file.close()

    def _url(self, row: int) -> str:
        broken = row, BadImage("reading was broken off")
        while row not in self._places and row not in self.bad:
            number, found = next(self._stream, broken)
            if isinstance(found, BadImage):
                self.bad[number] = found.reason
            else:
                self._places[number] = self._keep(found), len(found)
        if row in self.bad:
            raise NoAnswerError(f"an image that cannot be read: {self.bad[row]}")
        at, size = self._places[row]
        self._file.seek(at)
        data = base64.b64encode(self._file.read(size)).decode("ascii")
        return f"data:image/{self._type};base64,{data}"

    def _keep(self, data: bytes) -> int:
        """Where in the file an image now is."""
        try:
            at = self._file.seek(0, io.SEEK_END)
            self._file.write(data)
            self._file.flush()
        except OSError as error:
            raise FifaError(f"no room for images on their way to a judge: {error}") from error
        return at


def encoded(image: Image.Image, row: int, *, side: int, kind: str) -> bytes:
    """An image as a JPEG or PNG whose longest side is at most ``side``; smaller ones stay so."""
    rgb, out = image.convert("RGB"), io.BytesIO()
    rgb.thumbnail((side, side), Image.Resampling.LANCZOS)
    rgb.save(out, kind, quality=QUALITY)
    return out.getvalue()
