"""A folder in an object store, worked on as a local copy.

Everything reads files by path and by memory map, and replaces them by renaming, which no object
store has. So a command works in a copy below `cache_folder`, and what it finishes is uploaded while
it runs: every few seconds the files are pinned as they are at one moment (by hard links), uploaded,
and the store's index is replaced by one that names them, on the condition that it is still the one
that this process wrote last. Whoever comes later takes the files of the index, so it finds what
the folder held at one moment: what a kill at that moment leaves in a local folder.

An object is overwritten in two steps, as its new content must not come before the index and the
others: it is uploaded under another name, the index says so, then it is copied to its own name.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path, PurePosixPath
from tempfile import mkdtemp
from typing import Any
from uuid import uuid4

from fifa.console import echo, known_as
from fifa.errors import FifaError
from fifa.shards.claim import Claim
from fifa.shards.files import (
    LOCK,
    PREFIX,
    cache_folder,
    cannot_write,
    content_digest,
    digest,
    make_folder,
    read_json,
    sealed_line,
    sweep,
    write_json,
)
from fifa.shards.lock import holder, only_writer
from fifa.shards.sealed import SEAL
from fifa.shards.stores import open_store, patiently, read_object, stamp_of, write_object

INDEX = ".fifa-index"  # the object that names the files of a folder
SHARDS = ".fifa-shards"  # where workers on other machines keep theirs
COMING = ".fifa-coming"  # where new content of files waits until the index names it
EVERY = 10.0  # seconds between two uploads
AT_ONCE = 16  # files that are transferred at the same time
TRIES = 50  # to see a folder at rest
_SQLITE = (".sqlite-wal", ".sqlite-shm", ".sqlite-journal")
_STAMP = "stamp:"  # instead of a digest
_HERE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the trouble is this machine's
_WRITES = "writes"  # a file beside the copy while a command of this machine writes there

Content = tuple[int, str]  # bytes and digest of a file
Look = tuple[int, ...]  # what changes when a file is replaced or written

_open: dict[str, Mirror] = {}  # those that this process writes, by URL


def is_url(place: str | Path) -> bool:
    """Whether a folder is named by the URL of a store."""
    return "://" in str(place)


@contextmanager
def mirrored(url: str, *, writes: bool = True) -> Iterator[Path]:
    """A local copy of a folder, or file, in an object store, for the time of the block.

    Parameters
    ----------
    url
        ``s3://bucket/folder`` or ``gs://bucket/folder``. If it lies in a folder that fifa has
        written to the store, that folder is copied as a whole.
    writes
        Nobody else may write there meanwhile, and what the block changes is uploaded, also while
        it runs. Without it nothing is.

    Raises
    ------
    FifaError
        Where another process writes there, naming it; where the store refuses or does not answer;
        where another process has taken the folder over because nothing was heard of this one.
    """
    url = url.rstrip("/")
    root, index = _root(url)
    inside = url.removeprefix(root).strip("/")
    if root in _open:  # a command that names a folder twice
        yield _open[root].copy / inside
        return
    mirror = Mirror(root)
    if not writes:
        mirror.look(index)
        yield mirror.copy / inside
        return
    with mirror.written():
        yield mirror.copy / inside


def local(place: str | Path) -> Path:
    """A folder or file to read: a path as it is, and for a URL its copy as it is now."""
    if not is_url(place):
        return Path(place).expanduser()
    with mirrored(str(place), writes=False) as folder:
        return folder


def shards_place() -> str | None:
    """Where every machine can keep shards, while this process writes into a store; else None."""
    return next((f"{url}/{SHARDS}" for url in _open), None)


def is_written(folder: Path) -> bool:
    """Whether a folder is in the copy of one that this process writes into an object store."""
    return any(Path(folder).is_relative_to(one.copy) for one in _open.values())


def has_object(url: str, name: str) -> bool:
    """Whether there is an object of this name in a folder of a store."""
    return read_object(f"{url.rstrip('/')}/{name}") is not None


def _root(url: str) -> tuple[str, bytes | None]:
    """The innermost folder at or above a URL that has an index, and that; the URL if none has."""
    at, least = url, url.index("://") + 3
    while "/" in at[least:] or at == url:
        try:
            found = read_object(f"{at}/{INDEX}")
        except FifaError:
            if at == url:
                raise
            found = None  # above there may be nothing that we may see
        if found is not None:
            return at, found[0]
        if "/" not in at[least:]:
            break
        at = at.rpartition("/")[0]
    return url, None


class Mirror:
    """The copy of a folder ``url``, and what is known of both."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._place = cache_folder() / "stores" / digest(url)
        self.copy = self._place / (PurePosixPath(url).name or "folder")
        known_as(str(self.copy), url)
        self._system, self._path = open_store(url)
        self._batch, self._version = "", ""  # of the index
        self._files: dict[str, Content] = {}  # in the store
        self._times: dict[str, int] = {}  # when they were written, in ns
        self._coming: dict[str, str] = {}  # names under which their content is to be read
        self._seen: dict[str, tuple[Look, Content]] = {}  # in the copy
        self._claim: Claim | None = None
        self._error: FifaError | None = None
        self._ended = threading.Event()

    def look(self, index: bytes | None) -> None:
        """Fetch what is not here yet, to read it.

        If a command of this machine writes there, its copy is taken as it is.
        """
        while True:
            if holder(self._place) and (self._place / _WRITES).exists():
                return
            try:
                with only_writer(self._place):
                    self._fetch()
                return
            except FifaError:
                if holder(self._place) is None:
                    raise
            time.sleep(0.2)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Hold the lock and upload what changes, until the block ends and for a last time then."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise FifaError(
                "several processes cannot write into an object store together",
                where=self.url,
                do="give --out a folder that all of them share, and copy it there afterwards",
            )
        try:
            with only_writer(self._place):
                yield from self._written()
        except FifaError as error:
            if error.where != str(self._place):
                raise
            raise FifaError(error.what, where=self.url, do=error.do) from error

    def _written(self) -> Iterator[None]:
        self._claim = Claim(self.url)
        _open[self.url] = self
        try:
            self._fetch()
            self._commit(self._files, self._coming)  # nobody else's index fits from now on
            self._settle()
            self._remember()
            (self._place / _WRITES).touch()
            thread = threading.Thread(target=self._keep_uploading, daemon=True)
            thread.start()
            try:
                yield
            except BaseException as error:
                self._stop(thread)
                if self._error is not None:
                    raise self._error from error
                try:
                    self._upload()  # what was done until then
                except FifaError as other:
                    echo(f"not everything is in the store: {other}")
                raise
            self._stop(thread)
            if self._error is not None:
                raise self._error
            self._upload()
        finally:
            (self._place / _WRITES).unlink(missing_ok=True)
            del _open[self.url]
            self._claim.release()

    def _stop(self, thread: threading.Thread) -> None:
        self._ended.set()
        thread.join()

    def _keep_uploading(self) -> None:
        told = False
        while not self._ended.wait(EVERY):
            try:
                self._upload(self._ended)
                told = False
            except FifaError as error:
                if self._ended.is_set():
                    return
                if self._claim is not None and self._claim.lost:
                    self._error = error
                    main = threading.main_thread().ident or 0
                    signal.pthread_kill(main, signal.SIGINT)  # nothing that it does would be kept
                    return
                if not told:
                    echo(f"{error}; goes on here, and is tried again")
                told = True

    def _fetch(self) -> None:
        """Make the copy what the index says.

        Where the copy was made from this very index, what was done here since is kept: it is what
        a killed command has not uploaded.
        """
        known = self._known()
        sweep(self._place)
        for attempt in range(5):
            self._read_index()
            mine = bool(self._batch) and known.get("batch") == self._batch
            there = scan(self.copy)
            wanted, files = [], known.get("files", {})
            for path, content in self._files.items():
                look = there.get(path)
                seen = files.get(path)
                if look is not None and mine:
                    if seen and tuple(seen[0]) == look:
                        self._seen[path] = look, (seen[1][0], seen[1][1])
                elif look is not None and seen and tuple(seen[0]) == look:
                    found = seen[1][0], seen[1][1]
                    self._seen[path] = look, found
                    if found != content or (self._claim and found[1].startswith(_STAMP)):
                        wanted.append(path)
                elif look is not None and content_of(self._local(path)) == content:
                    self._seen[path] = look, content
                else:
                    wanted.append(path)
            if not mine:
                for path in there.keys() - self._files.keys():
                    self._local(path).unlink()
            other = self._all(self._download, wanted)
            damaged = [path for path, same in zip(wanted, other, strict=True) if not same]
            if not damaged:
                break
            if attempt < 4 and self._claim is None:
                time.sleep(1)  # somebody writes there, and the index has others now
                continue
            for path in damaged:
                echo(f"{self.url}/{path} is not what fifa wrote there")
                del self._files[path]  # for the next index: whoever writes uploads it again
            break
        self._remember()

    def _read_index(self) -> None:
        found = read_object(f"{self.url}/{INDEX}")
        if found is None:
            self._batch, self._version, self._times, self._coming = "", "", {}, {}
            self._files = self._listed()
            return
        try:
            index = json.loads(found[0])
            if index.pop(SEAL) != digest(index):
                raise ValueError(index)
            self._files = {path: (size, name) for path, (size, name) in index["files"].items()}
            self._times = {path: int(time) for path, time in index["times"].items()}
            self._batch, self._coming = index["batch"], index["coming"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FifaError(
                "the index of the folder is damaged",
                where=f"{self.url}/{INDEX}",
                do="remove that object: what lies there is then taken as it is",
            ) from error
        for path in self._files:
            if path.startswith("/") or ".." in path.split("/"):
                raise FifaError("a file lies outside of its folder", where=f"{self.url}/{path}")
        self._version = found[1]

    def _listed(self) -> dict[str, Content]:
        """What lies in a folder that fifa has not written to the store: stamps, no digests."""

        found = self._find("")
        own = [path.rpartition("/")[0] for path in found if path.endswith(f"/{INDEX}")]
        return {
            path: (int(facts["size"]), f"{_STAMP}{stamp_of(facts)}")
            for path, facts in found.items()
            if not PurePosixPath(path).name.startswith((LOCK, INDEX, PREFIX))
            and not {COMING, SHARDS} & set(path.split("/"))
            and not any(path.startswith(f"{folder}/") for folder in own)
        }

    def _find(self, below: str) -> dict[str, Any]:
        """What the store says of every object below a name, by their paths in the folder."""

        def ask() -> dict[str, Any]:
            self._system.invalidate_cache()
            found: dict[str, Any] = self._system.find(self._remote(below), detail=True)
            return found

        try:
            found = patiently(ask, self.url)
        except FileNotFoundError:
            return {}
        root = self._path.rstrip("/")
        there = {name.removeprefix(root).lstrip("/"): facts for name, facts in found.items()}
        return {path: facts for path, facts in there.items() if not path.endswith("/")}

    def _local(self, path: str) -> Path:
        return self.copy / path if path else self.copy

    def _remote(self, path: str) -> str:
        return f"{self._path}/{path}" if path else self._path

    def _all(self, do: Callable[[str], Any], paths: Iterable[str]) -> list[Any]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(do, paths))

    def _download(self, path: str) -> bool:
        """Fetch a file; whether it is there, and what the index says."""
        content, target = self._files[path], self._local(path)
        source = self._remote(self._coming.get(path, path))
        temporary = self._place / f"{PREFIX}{uuid4().hex}"

        def ask() -> None:
            try:
                self._system.get_file(source, str(temporary))
            except OSError as error:
                if error.errno in _HERE:
                    raise cannot_write(target, error) from error
                raise

        try:
            patiently(ask, f"{self.url}/{path}")
            found = content_of(temporary)
            if path in self._times:
                os.utime(temporary, ns=(self._times[path],) * 2)
            make_folder(target.parent)
            temporary.replace(target)
        except FileNotFoundError:
            target.unlink(missing_ok=True)
            return False
        finally:
            temporary.unlink(missing_ok=True)
        if content[1].startswith(_STAMP) and self._claim is None:
            found = content
        elif content[1].startswith(_STAMP):
            self._files[path] = found  # for the index that will be
        self._seen[path] = look_at(target), found
        return self._files[path] == found

    def _upload(self, stop: threading.Event | None = None) -> None:
        """Bring the store to what the copy is at this moment."""
        with self._pinned() as (there, pins):
            if there is None:
                return  # it is never at rest: at the next time
            looks = {path: look_at(pin) for path, pin in pins.items()}
            found = {path: content_of(pin) for path, pin in pins.items()}
            new = {path: one for path, one in found.items() if self._files.get(path) != one}
            gone = self._files.keys() - there.keys()
            if new or gone:
                assert self._claim is not None
                self._claim.check()
                coming = {path: f"{COMING}/{new[path][1]}" for path in new if path in self._files}

                def put(path: str) -> None:
                    self._put(pins[path], coming.get(path, path), looks[path], stop)

                self._all(put, sorted(new))
                kept = {path: one for path, one in self._files.items() if path in there}
                self._times = {path: there[path][1] for path in kept | new}
                self._commit(kept | new, coming)
                if coming:
                    self._settle()
                self._all(self._remove, sorted(gone))
            self._seen |= {path: (there[path], one) for path, one in found.items()}
        if new or gone:
            self._remember()

    def _put(self, pin: Path, path: str, look: Look, stop: threading.Event | None) -> None:
        def ask() -> None:
            self._system.put_file(str(pin), self._remote(path))

        try:
            patiently(ask, f"{self.url}/{path}", stop)
        except FileNotFoundError as error:
            raise FifaError(f"cannot write: {error}", where=self.url) from error
        if look_at(pin) != look:
            raise FifaError("the file was written while it was uploaded", where=str(pin))

    def _commit(self, files: dict[str, Content], coming: dict[str, str]) -> None:
        batch = uuid4().hex
        index = {"batch": batch, "files": files, "times": self._times, "coming": coming}
        data = sealed_line(index).encode("utf-8", "surrogatepass")
        version = write_object(f"{self.url}/{INDEX}", data, self._version)
        if version is None:
            assert self._claim is not None
            self._claim.lost = True
            raise self._claim.taken()
        self._batch, self._version = batch, version
        self._files, self._coming = files, coming

    def _settle(self) -> None:
        """Give files whose content waits under another name their own; nothing waits then."""
        coming = self._coming

        def copy(path: str) -> None:
            source, target = self._remote(coming[path]), self._remote(path)
            patiently(lambda: self._system.cp_file(source, target), f"{self.url}/{path}")

        if coming:
            self._all(copy, sorted(coming))
            self._commit(self._files, {})
        self._all(self._remove, sorted(self._find(COMING)))

    def _remove(self, path: str) -> None:
        with suppress(FileNotFoundError):
            patiently(lambda: self._system.rm_file(self._remote(path)), f"{self.url}/{path}")

    @contextmanager
    def _pinned(self) -> Iterator[tuple[dict[str, Look] | None, dict[str, Path]]]:
        """All files at one moment, and links to those that are new or were written since.

        There is such a moment if nothing has changed between two looks. None where there was none.
        """
        try:
            for _ in range(TRIES):
                links = Path(mkdtemp(prefix=PREFIX, dir=self._place))
                try:
                    there = scan(self.copy)
                    changed = [path for path in there if not self._is_seen(path, there[path])]
                    pins = {path: links / str(number) for number, path in enumerate(changed)}
                    try:
                        for path, pin in pins.items():
                            _pin(self._local(path), pin)
                    except FileNotFoundError:
                        continue
                    if _same(there, scan(self.copy)):
                        yield there, pins
                        return
                finally:
                    shutil.rmtree(links, ignore_errors=True)
                time.sleep(0.1)
        except OSError as error:
            raise cannot_write(self._place, error) from error
        yield None, {}

    def _is_seen(self, path: str, look: Look) -> bool:
        return path in self._seen and self._seen[path][0] == look

    def _known(self) -> dict[str, Any]:
        make_folder(self._place)
        try:
            known: dict[str, Any] = read_json(
                self._place / "known.json", "what the copy is", missing={}, sealed=True
            )
        except FifaError:
            known = {}
        return known

    def _remember(self) -> None:
        files = {path: seen for path, seen in self._seen.items() if path in self._files}
        write_json(self._place / "known.json", {"batch": self._batch, "files": files}, sealed=True)


def scan(folder: Path) -> dict[str, Look]:
    """Every file of a folder, or the file ``""``, but for what is temporary.

    A link to a folder within is left out: its files are there under names of their own.
    """
    found: dict[str, Look] = {}
    if folder.is_file():
        return {"": look_at(folder)}
    left, whole = [""], folder.resolve()
    while left:
        below = left.pop()
        try:
            entries = list(os.scandir(folder / below))
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in entries:
            if entry.name.startswith((PREFIX, LOCK)) or entry.name.endswith(_SQLITE):
                continue
            path = f"{below}/{entry.name}" if below else entry.name
            with suppress(FileNotFoundError):
                if entry.is_dir():
                    link = entry.is_symlink()
                    if not (link and Path(entry.path).resolve().is_relative_to(whole)):
                        left.append(path)
                else:
                    found[path] = look_at(Path(entry.path))
    return found


def look_at(path: Path) -> Look:
    """Size, time of the last change and number of a file; of a SQLite database, of its log too."""
    status = path.stat()
    look = status.st_size, status.st_mtime_ns, status.st_ino
    with suppress(FileNotFoundError):
        if path.suffix == ".sqlite":
            log = path.with_name(f"{path.name}-wal").stat()
            return *look, log.st_size, log.st_mtime_ns
    return look


def content_of(path: Path) -> Content:
    """Bytes and digest of a file."""
    return path.stat().st_size, content_digest(path)


def _pin(path: Path, pin: Path) -> None:
    """Keep a file as it is: what replaces it has another inode, but logs grow where they are."""
    if path.suffix == ".sqlite":
        # closing: a connection's own block commits and leaves it open
        with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(pin)) as target:
            source.backup(target)
    elif path.suffix == ".jsonl" or path.is_symlink():
        shutil.copyfile(path, pin)
    else:
        try:
            os.link(path, pin)
        except FileNotFoundError:
            raise
        except OSError:  # a file system without links
            shutil.copyfile(path, pin)


def _same(before: dict[str, Look], after: dict[str, Look]) -> bool:
    def fixed(there: dict[str, Look]) -> dict[str, Look | None]:
        return {p: None if p.endswith((".jsonl", ".sqlite")) else look for p, look in there.items()}

    return fixed(before) == fixed(after)
