"""Files that are not on this machine: read by byte ranges, asked for again, checked, kept a while.

A file is cut into pieces; the next ones are fetched while one is used. What was fetched stays on
the disk, in a folder of bounded size that all processes share (`Kept`): a data set of any size
passes through it, and what is read again soon (by the next shard, or after a kill) is still there.
Nothing of a file that has changed meanwhile is used, and what the network loses is asked for again
and then an error: it is never taken for an image that cannot be read.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import tempfile
import threading
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import xxhash

from fifa.config import Compute
from fifa.console import echo_once
from fifa.errors import FifaError
from fifa.shards.files import PREFIX, cache_folder, digest
from fifa.shards.stores import open_store, patiently, stamp_of, stamps_of, unreachable

PIECE = 8 << 20  # bytes of one request, at most
AHEAD = 8  # pieces that are fetched ahead, at the same time
SILENCE = 60.0  # seconds without one byte
LOCKS = 256
CHECK = 16  # bytes of XXH3-128 behind each piece that is kept

Range = tuple[int, int]  # of bytes, the end not included
_COMMIT = re.compile(r"@[0-9a-f]{40}(/|$)")
_room = threading.Lock()
_unseen: dict[Path, int] = {}  # bytes that this process kept in a folder since it looked at it


def pinned(url: str) -> str:
    """An ``hf://`` URL with the commit that its revision is now; any other URL as it is.

    A commit never changes, so what is read later belongs to what was read first.
    """
    if not url.startswith("hf://") or url.startswith("hf://buckets/") or _COMMIT.search(url):
        return url
    from huggingface_hub import HfApi

    system, path = open_store(url)
    try:
        at = system.resolve_path(path)
        api = HfApi(endpoint=system.endpoint, token=system.token)
        sha = api.repo_info(at.repo_id, repo_type=at.repo_type, revision=at.revision).sha
    except (OSError, ValueError, RuntimeError, NotImplementedError) as error:
        raise unreachable(url, error) from error
    prefix = "" if at.repo_type == "model" else f"{at.repo_type}s/"
    return f"hf://{prefix}{at.repo_id}@{sha}/{at.path_in_repo}".rstrip("/")


def below(url: str, prefixes: Iterable[str]) -> str | None:
    """The URL, as it is to be opened, if it lies below one of the prefixes; else None.

    Whoever wrote a table decides which URLs are in it, and they would be opened with the rights of
    whoever reads it. So a URL may be no more than another spelling of a path below a place that
    this person has named: no ``..`` in any spelling, no chain of file systems.
    """
    plain = unquote(unquote(url)).replace("\\", "/")
    if "::" in plain or ".." in plain.split("/"):
        return None
    for prefix in prefixes:
        base = prefix.rstrip("/") + "/"
        if "://" not in base:
            continue
        if url.startswith(base):
            return url
        unpinned = _COMMIT.sub("/", base)  # a revision is that which the source has
        if unpinned != base and url.startswith(unpinned):
            return base + url.removeprefix(unpinned)
    return None


class RemoteFile(io.RawIOBase):
    """A remote file, opened for reading.

    Parameters
    ----------
    url
        Where it is.
    size, stamp
        As `fifa.data.source.SourceFile` has them; unknown ones are asked for. A file with another
        stamp is another file.
    cache_gb
        As in `fifa.config.Compute`.

    Raises
    ------
    FifaError
        When it is opened or read: if it cannot be reached, is refused, or has changed.
    """

    def __init__(
        self, url: str, size: int = -1, stamp: str = "", cache_gb: float | None = None
    ) -> None:
        super().__init__()
        self._url, self._position = url, 0
        self._store = _Store(url, size, stamp)
        self.size = self._store.size
        most = int((Compute().cache_gb if cache_gb is None else cache_gb) * 1e9)
        named = self._store.stamp and most  # what has no stamp may change unnoticed
        self._kept = Kept(cache_folder() / "pieces", most) if named else None
        self._chunks: list[Range] = []
        self._next: list[Range] = []
        self._order: dict[Range, int] = {}
        self._pieces: dict[Range, Future[bytes]] = {}
        self._threads = ThreadPoolExecutor(AHEAD)
        weakref.finalize(self, _end, self._threads, self._store.stop)

    def expect(self, parts: Iterable[tuple[Sequence[Range], float]]) -> None:
        """Say what will be read, so that it is fetched ahead and nothing beside it.

        Each part is a set of ranges that are read side by side, from their beginnings, and the
        share of each that is wanted; parts are read one after another.
        """
        chunks: list[Range] = []
        wanted: list[Range] = []
        for ranges, share in parts:
            inside = [(max(0, start), min(end, self.size)) for start, end in ranges]
            joined = _joined(part for part in inside if part[0] < part[1])
            chunks += joined
            pieces = [(at, piece) for chunk in joined for at, piece in _cut(*chunk)]
            wanted += [piece for at, piece in sorted(pieces) if at <= share]
        self._expect(sorted(chunks), wanted)

    def expect_whole(self, wanted: Sequence[Range] | None = None) -> None:
        """Say that all of it will be read, or only these ranges, which cut it in the same way."""
        parts = [(0, self.size)] if wanted is None else wanted
        starts = {at for start, end in parts for at in range(start // PIECE, -(-end // PIECE))}
        pieces = [(at * PIECE, min((at + 1) * PIECE, self.size)) for at in sorted(starts)]
        self._expect([(0, self.size)], pieces)

    def _expect(self, chunks: list[Range], pieces: list[Range]) -> None:
        self._chunks, self._next = chunks, pieces
        self._order = {piece: i for i, piece in enumerate(pieces)}
        self._fetch_ahead(0)

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """True."""
        return True

    def tell(self) -> int:
        """The position."""
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        """Set the position, and return it."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """So many bytes, fewer at the end only."""
        left = self.size - self._position
        left = max(0, left if size is None or size < 0 else min(size, left))
        parts = []
        while left:
            start, end = self._piece_at(self._position, left)
            skip = self._position - start
            part = self._data((start, end))[skip : skip + left]
            parts.append(part)
            self._position += len(part)
            left -= len(part)
        return b"".join(parts)

    def readinto(self, buffer: Any, /) -> int:
        """As `io.RawIOBase.readinto`."""
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        """Stop fetching."""
        _end(self._threads, self._store.stop)
        super().close()

    def _piece_at(self, position: int, size: int) -> Range:
        """The piece at a position; outside all that is expected, exactly the bytes wanted."""
        i = bisect_right(self._chunks, (position, self.size + 1)) - 1
        if i >= 0 and position < self._chunks[i][1]:
            start, end = self._chunks[i]
            start += (position - start) // PIECE * PIECE
            return start, min(start + PIECE, end)
        after = self._chunks[i + 1][0] if i + 1 < len(self._chunks) else self.size
        return position, min(position + size, position + PIECE, after)

    def _data(self, piece: Range) -> bytes:
        if piece in self._order:
            self._fetch_ahead(self._order[piece])
        job = self._pieces.get(piece) or self._submit(piece)
        while len(self._pieces) > 2 * AHEAD:  # those that were to be read first
            self._pieces.pop(min(self._pieces, key=lambda piece: self._order.get(piece, -1)))
        return job.result()

    def _fetch_ahead(self, first: int) -> None:
        for piece in self._next[first : first + AHEAD]:
            if piece not in self._pieces:
                self._submit(piece)

    def _submit(self, piece: Range) -> Future[bytes]:
        job = self._pieces[piece] = self._threads.submit(self._fetch, piece)
        return job

    def _fetch(self, piece: Range) -> bytes:
        def fetch() -> bytes:
            return self._store.fetch(*piece)

        if self._kept is None:
            return fetch()
        return self._kept.get(digest(self._url, self._store.stamp, piece), fetch)


def fetch_file(url: str, most: int) -> bytes:
    """A small file whole, or its first ``most + 1`` bytes; `FileNotFoundError` if there is none."""
    store = _Store(url, most + 1, "")
    return store.fetch(0, most + 1, whole=True)


@dataclass(frozen=True)
class Kept:
    """Pieces on the disk, by name; those that were not used for longest make room for others.

    Parameters
    ----------
    folder
        Where they lie.
    most
        Bytes that they take at most; never more than half of what the disk has free.
    """

    folder: Path
    most: int

    def get(self, name: str, make: Callable[[], bytes]) -> bytes:
        """The piece of that name; made once, whoever else wants it at the same time."""
        path = self.folder / name
        with self._alone(name):
            data = _read_kept(path)
            if data is None:
                data = make()
                self._keep(path, data)
        return data

    def _keep(self, path: Path, data: bytes) -> None:
        try:
            with _room:
                if not self._make_room(len(data) + CHECK):
                    return
            handle, temporary = tempfile.mkstemp(prefix=PREFIX, dir=self.folder)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.write(xxhash.xxh3_128_digest(data))
            Path(temporary).replace(path)
        except OSError as error:
            echo_once(f"what is fetched is not kept in {self.folder}: {error.strerror}")

    def _make_room(self, size: int) -> bool:
        """Look at the folder, which takes its time, once a sixteenth of its bound is new."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _unseen[self.folder] = _unseen.get(self.folder, self.most) + size
        if 16 * _unseen[self.folder] < self.most:
            return True
        _unseen[self.folder] = size
        found = []
        for entry in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process made room
                if entry.is_file():
                    status = entry.stat()
                    found.append((status.st_mtime_ns, status.st_size, entry.path))
        taken = sum(own for _, own, _ in found)
        most = min(self.most, taken + shutil.disk_usage(self.folder).free // 2)
        most -= most // 16  # by the next look
        if taken + size > most:
            for _, own, path in sorted(found):
                if taken + size <= most - most // 8:
                    break
                Path(path).unlink(missing_ok=True)
                taken -= own
        return size <= most

    @contextlib.contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """Nobody else, in this process or another, is at a piece of this name meanwhile."""
        try:
            import fcntl

            folder = self.folder / "locks"
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder / str(int(name, 16) % LOCKS), os.O_RDWR | os.O_CREAT, 0o600)
        except (ImportError, OSError):
            yield
            return
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)


def _read_kept(path: Path) -> bytes | None:
    """A piece that was kept; None if there is none, or not what was written."""
    try:
        raw = path.read_bytes()
        os.utime(path)
    except OSError:
        return None
    data, check = raw[:-CHECK], raw[-CHECK:]
    return data if xxhash.xxh3_128_digest(data) == check else None


class _Store:
    """One file of a store: ranges of it, and whether it is still the same."""

    def __init__(self, url: str, size: int, stamp: str) -> None:
        self.url, self.stop = url, threading.Event()
        self._system, self._path = open_store(url)
        protocol = self._system.protocol
        self._protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._pinned = "hf" in self._protocols and _COMMIT.search(url) is not None
        self.size, self.stamp = size, stamp
        if size < 0:
            info = patiently(self._info, url, self.stop)
            if info.get("size") is None:
                raise FifaError(
                    "the server does not say how large the file is",
                    where=url,
                    do="download it and name the file",
                )
            self.size, self.stamp = int(info["size"]), stamp or stamp_of(info)

    def fetch(self, start: int, end: int, *, whole: bool = False) -> bytes:
        """Bytes ``start`` to ``end``; ``whole``: all there are, up to so many, of a small file."""

        def ask() -> bytes:
            if "http" in self._protocols:
                data = self._http(start, end, whole)
            else:
                # clients that are not async ones read ahead by themselves
                more = {} if self._system.async_impl else {"cache_type": "none"}
                data = self._system.cat_file(self._path, start=start, end=end, **more)
                if self.stamp and not self._pinned and not whole:
                    self._check(self._info())
            if len(data) != end - start and not whole:
                raise OSError(f"{len(data):,} of {end - start:,} bytes came")
            return bytes(data)

        try:
            found: bytes = patiently(ask, self.url, self.stop)
        except FileNotFoundError as error:
            if whole:
                raise
            raise self._changed(str(error)) from error
        return found

    def _info(self) -> dict[str, Any]:
        self._system.invalidate_cache(self._path)
        found: dict[str, Any] = self._system.info(self._path)
        return found

    def _http(self, start: int, end: int, whole: bool) -> bytes:
        import aiohttp
        from fsspec.asyn import sync

        settings = dict(self._system.kwargs)
        headers = {**settings.pop("headers", {}), "Accept-Encoding": "identity"}
        if not whole and (start, end) != (0, self.size):
            headers["Range"] = f"bytes={start}-{end - 1}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
        settings = {"timeout": timeout, **settings, "headers": headers}

        async def ask() -> bytes:
            session = await self._system.set_session()
            async with session.get(self._system.encode_url(self._path), **settings) as answer:
                answer.raise_for_status()
                if not whole:
                    self._check(answer.headers)
                if "Range" in headers:
                    self._check_range(answer, start, end)
                parts, size = [], 0
                async for part in answer.content.iter_chunked(1 << 18):
                    parts.append(part)
                    size += len(part)
                    if size >= end - start:
                        break
                return b"".join(parts)[: end - start]

        data: bytes = sync(self._system.loop, ask)
        return data

    def _check_range(self, answer: Any, start: int, end: int) -> None:
        if answer.status != 206:
            raise FifaError(
                "the server sends whole files only, no ranges of bytes",
                where=self.url,
                do="download the data set and name its folder",
            )
        wanted = f"bytes {start}-{end - 1}"
        told, _, size = answer.headers.get("Content-Range", f"{wanted}/*").partition("/")
        if size not in (str(self.size), "*"):
            raise self._changed(f"{self.size:,} bytes are now {size}")
        if told != wanted or answer.content_length not in (None, end - start):
            raise OSError(f"{answer.content_length} bytes ({told}) came, not {wanted}")

    def _check(self, info: Mapping[str, Any]) -> None:
        now = list(stamps_of(info))
        if self.stamp and now and self.stamp not in now:
            raise self._changed(f"{self.stamp} is now {now[0]}")

    def _changed(self, how: str) -> FifaError:
        return FifaError(
            f"the source has changed since its pairs were read: {how}",
            where=self.url,
            do="start again with another --out; a copy or a fixed revision does not change",
        )


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges that touch, as one, while it is no more than a piece."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1] and end - found[-1][0] <= PIECE:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return found


def _cut(start: int, end: int) -> Iterator[tuple[float, Range]]:
    """The pieces of a range, and at which share of it each begins."""
    for at in range(start, end, PIECE):
        yield (at - start) / (end - start), (at, min(at + PIECE, end))


def _end(threads: ThreadPoolExecutor, stop: threading.Event) -> None:
    stop.set()
    threads.shutdown(wait=False, cancel_futures=True)
