"""One writer a folder: a lock of the system's, which ends with the process that holds it.

`flock` reaches every machine that has the folder on NFS. The file ``.fifa-lock`` says who holds it,
and goes with the last writer; where a killed process has left it, it locks nothing.

Where a file system has no such locks, the file itself is the lock: made by one process only, and
touched while that one lives. It counts for nothing once its process is gone, or nobody has touched
it for `STALE` seconds by the file system's own clock.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fifa.errors import FifaError
from fifa.shards.files import LOCK, PREFIX, cannot_write, lock

BEAT = 15.0  # seconds between two touches of a lock that is a file
STALE = 300.0  # seconds without one, after which its holder is taken for dead

_URL = re.compile(r"\w{2,}:/")  # `Path` leaves one slash of two
_held: set[tuple[int, str]] = set()  # thread and the lock's path


@contextmanager
def only_writer(folder: str | Path, *, beside: bool = False) -> Iterator[None]:
    """Nobody else writes into ``folder`` while the block lasts; the folder is made if need be.

    A thread may take its own folder again. ``beside``: it is a file, or a folder that is replaced
    as a whole, and its lock lies beside it. Raises `FifaError`, which names the other process,
    where there is one, and where the folder cannot be written.
    """
    folder = Path(folder)
    if _URL.match(str(folder)):
        raise FifaError(
            "this is the URL of a store, and not a folder",
            where=str(folder),
            do="work in a copy of it: with fifa.shards.mirror.mirrored(URL) as folder",
        )
    place = folder.parent if beside else folder
    path = place / (f"{LOCK}-{folder.name}" if beside else LOCK)
    key = threading.get_ident(), os.path.realpath(path)
    there = place.exists()
    if key in _held or (there and not place.is_dir()):
        yield  # whoever writes says what is wrong with a file
        return
    try:
        place.mkdir(parents=True, exist_ok=True)
        release = _lock(path, folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):
            release()
        if not there:
            with suppress(OSError):
                place.rmdir()  # where nothing came of it


def _lock(path: Path, folder: Path) -> Callable[[], None]:
    """Lock the file; what is returned lets it go."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        locked = lock(handle)
        if locked is None:
            os.close(handle)
            return _lease(path, folder)
        if not locked:
            holder = os.read(handle, 4096)
            os.close(handle)
            raise _taken(folder, holder)
        if _is_at(handle, path):
            break
        os.close(handle)  # its holder removed it between the opening and the lock
    with suppress(OSError):  # on a full disk it locks all the same, and has no name
        os.ftruncate(handle, 0)
        os.write(handle, whoami())

    def release() -> None:
        try:
            if _is_at(handle, path):
                path.unlink()
        finally:
            os.close(handle)

    return release


def _lease(path: Path, folder: Path) -> Callable[[], None]:
    """As `_lock`, by a file that only one process can make."""
    mine = path.with_name(f"{path.name}-{os.getpid()}-{threading.get_ident()}")
    mine.write_bytes(whoami())
    try:
        while not _made(mine, path):
            seen = _see(path)
            if seen.state and not seen.holder:
                time.sleep(0.2)  # for the content of a file that was just made
                seen = _see(path)
            if not seen.state:
                continue
            if seen.holder and not _is_dead(path, seen.holder):
                raise _taken(folder, seen.holder)
            _remove(path, seen, folder)
    finally:
        mine.unlink(missing_ok=True)
    state = path.stat()
    ended = threading.Event()

    def is_mine() -> bool:
        return os.path.samestat(state, path.stat())

    def beat() -> None:
        while not ended.wait(BEAT):
            with suppress(OSError):
                if is_mine():
                    os.utime(path)

    threading.Thread(target=beat, daemon=True).start()

    def release() -> None:
        ended.set()
        if is_mine():  # not after a sleep of `STALE` seconds, in which somebody else took it
            path.unlink()

    return release


def _made(mine: Path, path: Path) -> bool:
    try:
        os.link(mine, path)  # with its content or not at all, on network file systems too
    except FileExistsError:
        return False
    except OSError:  # a file system without links either
        try:
            with path.open("xb") as file:
                file.write(mine.read_bytes())
        except FileExistsError:
            return False
    return True


def _is_dead(path: Path, holder: bytes) -> bool:
    """Whether the process that made a lock's file has ended."""
    try:
        who = json.loads(holder)
        if os.name == "posix" and who["host"] == socket.gethostname():
            os.kill(int(who["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, TypeError, KeyError, RecursionError, OSError, OverflowError):
        pass  # another user's, or no name: its age decides
    with tempfile.NamedTemporaryFile(prefix=PREFIX, dir=path.parent) as now:
        try:
            return Path(now.name).stat().st_mtime - path.stat().st_mtime > STALE
        except FileNotFoundError:
            return True


def _remove(path: Path, dead: _Seen, folder: Path) -> None:
    """Remove a dead process's lock.

    Of all that have seen it dead, only the one that holds a lock with this one's name may do so:
    whoever comes later finds another file in its place, and leaves that alone.
    """
    name = hashlib.sha256(repr(dead).encode()).hexdigest()[:16]
    release = _lease(path.with_name(f"{path.name}-{name}"), folder)
    try:
        if _see(path) == dead:
            path.unlink()
    finally:
        release()


@dataclass(frozen=True)
class _Seen:
    """A lock's file as it was at one moment; ``state`` is empty where there was none."""

    holder: bytes = b""
    state: tuple[int, ...] = ()


def _see(path: Path) -> _Seen:
    try:
        with path.open("rb") as file:
            state = os.fstat(file.fileno())
            return _Seen(file.read(4096), (state.st_dev, state.st_ino, state.st_mtime_ns))
    except FileNotFoundError:
        return _Seen()


def whoami() -> bytes:
    """This process, its machine and its command, as `named` reads them."""
    command = " ".join([Path(sys.argv[0]).name.removesuffix(".py"), *sys.argv[1:2]])[:100]
    since = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
    return json.dumps(who).encode("utf-8", "backslashreplace")


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def holder(folder: str | Path) -> str | None:
    """Who writes into ``folder`` just now; None for nobody."""
    path = Path(folder) / LOCK
    try:
        with path.open("rb") as file:
            who = file.read(4096)
            locked = lock(file.fileno())
    except OSError:
        return None
    free = locked or (locked is None and _is_dead(path, who))
    return None if free else named(who)


def named(holder: bytes) -> str:
    """Who wrote `whoami`, for people."""
    try:
        who = json.loads(holder)
        return f"process {who['pid']} on {who['host']} ({who['command']}, since {who['since']})"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has just begun
        return "another process"


def _taken(folder: Path, holder: bytes) -> FifaError:
    return FifaError(
        f"{named(holder)} is writing here",
        where=str(folder),
        do="wait for its end, or choose another folder",
    )
