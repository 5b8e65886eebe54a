"""One writer a folder: a lock of the system's, which ends with the process that holds it.

`flock` reaches every machine that has the folder on NFS. The file ``.fifa-lock`` says who holds it,
and goes with the last writer; where a killed process has left it, it locks nothing.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fifa.errors import FifaError
from fifa.shards.files import LOCK, cannot_write, lock

_held: set[tuple[int, str]] = set()  # thread and folder


@contextmanager
def only_writer(folder: str | Path) -> Iterator[None]:
    """Nobody else writes into ``folder`` while the block lasts; the folder is made if need be.

    A thread may take its own folder again. Raises `FifaError`, which names the other process,
    where there is one, and where the folder cannot be written.
    """
    folder = Path(folder)
    key = threading.get_ident(), os.path.realpath(folder)
    there = folder.exists()
    if key in _held or (there and not folder.is_dir()):
        yield  # whoever writes says what is wrong with a file
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _lock(folder)
    except OSError as error:
        raise cannot_write(folder, error) from error
    _held.add(key)
    try:
        yield
    finally:
        _held.discard(key)
        with suppress(OSError):
            if _is_at(handle, folder / LOCK):
                (folder / LOCK).unlink()
        os.close(handle)
        if not there:
            with suppress(OSError):
                folder.rmdir()  # where nothing came of it


def _lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not lock(handle):
            holder = os.read(handle, 4096)
            os.close(handle)
            raise _taken(folder, holder)
        if _is_at(handle, path):
            break
        os.close(handle)  # its holder removed it between the opening and the lock
    command = " ".join([Path(sys.argv[0]).name.removesuffix(".py"), *sys.argv[1:2]])[:100]
    since = datetime.now(UTC).isoformat(timespec="seconds")
    who = {"pid": os.getpid(), "host": socket.gethostname(), "command": command, "since": since}
    with suppress(OSError):  # on a full disk it locks all the same, and has no name
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps(who).encode("utf-8", "backslashreplace"))
    return handle


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _taken(folder: Path, holder: bytes) -> FifaError:
    try:
        who = json.loads(holder)
        named = f"process {who['pid']} on {who['host']} ({who['command']}, since {who['since']})"
    except (ValueError, TypeError, KeyError, RecursionError):  # it has just begun
        named = "another process"
    return FifaError(
        f"{named} is writing here",
        where=str(folder),
        do="wait for its end, or choose another folder",
    )
