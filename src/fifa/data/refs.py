"""The bytes of one image from where a source says: a tar, text, a file, an archive, a URL."""

from __future__ import annotations

import binascii
import os
import re
import stat
from pathlib import Path
from typing import IO

from fifa.data.archive import member_bytes, split
from fifa.data.decode import MAX_BYTES, BadImage
from fifa.data.fetch import FetchError, fetch
from fifa.data.records import Place
from fifa.data.remote import below, fetch_file
from fifa.data.source import Root, inside
from fifa.shards.files import digest, write_bytes


def tar_bytes(stream: IO[bytes], place: Place) -> bytes | BadImage:
    """A member of the tar that ``stream`` is."""
    most = 4 * MAX_BYTES // 3 + 1000 if place.base64 else MAX_BYTES
    if place.size > most:
        return BadImage(f"more than {most:,} bytes")
    stream.seek(place.offset)
    data = stream.read(place.size)
    if len(data) < place.size:
        return BadImage("the file ends within the image")
    return text_bytes(data) if place.base64 else data


def text_bytes(text: bytes) -> bytes | BadImage:
    """The bytes that base64, or a ``data:`` URL of it, stands for; JSON may have escaped it."""
    if text.startswith(b"data:"):
        head, comma, text = text.partition(b",")
        if not comma or not head.lower().rstrip().endswith(b";base64"):
            return BadImage("a data: URL that is not base64")
    text = re.sub(rb"\\u002f|\\/", b"/", re.sub(rb"\\[nrt]|\s", b"", text), flags=re.IGNORECASE)
    text = text.translate(bytes.maketrans(b"-_", b"+/")).rstrip(b"=")
    try:
        return binascii.a2b_base64(text + b"=" * (-len(text) % 4), strict_mode=True)
    except binascii.Error as error:
        return BadImage(f"broken base64: {error}")


def url_bytes(fetched: Path | None, url: str) -> bytes | BadImage:
    """A URL's, from the folder ``fetched`` where it was kept before."""
    kept = fetched / digest(url.encode("utf-8", "surrogatepass")) if fetched else None
    if kept and kept.exists():
        data = kept.read_bytes()
        if data[:16] == digest(data[16:]).encode():  # else it is damaged, and fetched again
            return data[16:]
    try:
        data = fetch(url, max_bytes=MAX_BYTES)
    except FetchError as error:
        return BadImage(str(error))
    if kept:
        write_bytes(kept, digest(data).encode() + data)
    return data


def remote_bytes(root: Root, ref: str) -> bytes | BadImage:
    """A file by its path relative to a remote root, or a zip file, which no path leads out of."""
    if root.archive is not None:
        return _zipped(root.archive, ref)
    if split(ref)[1]:
        return BadImage("a member of a remote archive, of which nothing is read: download it")
    url = None if ref.startswith("/") else below(root.name(ref), [root.url])
    return named_bytes(url) if url else BadImage("the path leaves the data set's folder")


def named_bytes(url: str) -> bytes | BadImage:
    """A file below a URL that the user has named."""
    try:
        data = fetch_file(url, MAX_BYTES)
    except FileNotFoundError:
        return BadImage("no such file")
    return data if len(data) <= MAX_BYTES else BadImage(f"more than {MAX_BYTES:,} bytes")


def file_bytes(folder: Path, ref: str) -> bytes | BadImage:
    """A file by its path relative to a folder; no path and no link leads out of it.

    ``archive.zip::NAME`` is a member of an archive there.
    """
    ref, member = split(ref)
    try:
        path = (folder / ref).resolve(strict=True)
        if not inside(folder, path):
            return BadImage("the path leaves the data set's folder")
        if member:
            return _zipped(path, member)
        # neither a link put there meanwhile nor a pipe that never ends
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError, RuntimeError) as error:
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        return BadImage("no such file" if missing else "the path cannot be opened")
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            return BadImage("not a regular file")
        if status.st_size > MAX_BYTES:
            return BadImage(f"more than {MAX_BYTES:,} bytes")
        return file.read()


def _zipped(archive: Path, member: str) -> bytes | BadImage:
    try:
        return member_bytes(archive, member.removeprefix("./"), MAX_BYTES)
    except FileNotFoundError:
        return BadImage("no such file in the archive")
    except OSError as error:
        return BadImage(f"the archive's member cannot be read: {error}"[:200])
