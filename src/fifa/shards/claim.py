"""One writer of a folder in an object store: a lock that is an object, written on conditions.

Its holder writes it again every `BEAT` seconds with another number. Whoever waits watches the
object, not a date in it: what has not changed for `STALE` seconds of the waiter's own monotonic
clock has no living holder, and is replaced on the condition that it still is what was watched. So
no clock that is set, and no difference between two machines' clocks, takes a lock from a living
process or keeps a dead one's. A holder that ends leaves the object, marked as free.
"""

from __future__ import annotations

import json
import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from fifa.console import echo
from fifa.errors import FifaError
from fifa.shards import lock
from fifa.shards.files import LOCK
from fifa.shards.stores import read_object, write_object

LOOK = 1.0  # seconds between two looks at another one's lock


class Claim:
    """The lock of ``url``, taken by `__init__` and held until `release`.

    Raises `FifaError`, which names the other process, where there is one, and for a store that
    does not keep conditions.
    """

    def __init__(self, url: str) -> None:
        self.url, self._path = url, f"{url}/{LOCK}"
        self._state: dict[str, Any] = {
            "owner": uuid4().hex,
            "who": json.loads(lock.whoami()),
            "machine": machine(),
            "beat": 0,
        }
        self.lost, self._ended = False, threading.Event()
        while not (version := write_object(self._path, self._bytes(), self._free_version())):
            pass  # somebody else was faster
        self._version = version
        self._check_store()
        self._beats = threading.Thread(target=self._beat, daemon=True)
        self._beats.start()

    def check(self) -> None:
        """Raise `FifaError` unless the lock is still this one's."""
        found = None if self.lost else read_object(self._path)
        if found is None or _parsed(found[0]).get("owner") != self._state["owner"]:
            self.lost = True
            raise self.taken()

    def taken(self) -> FifaError:
        """The error for a process that was taken for dead."""
        found = read_object(self._path)
        return FifaError(
            f"{_who(_parsed(found[0] if found else b''))} has taken this folder over, since "
            f"nothing was heard of this process for {lock.STALE:.0f} s",
            where=self.url,
            do="wait for its end, then run the command again: it goes on from there",
        )

    def release(self) -> None:
        """Let it go."""
        self._ended.set()
        self._beats.join()
        with suppress(FifaError):  # it is then taken over like a dead one's
            if not self.lost:
                write_object(self._path, self._bytes(free=True), self._version)

    def _bytes(self, **more: Any) -> bytes:
        return json.dumps({**self._state, **more}, sort_keys=True).encode()

    def _beat(self) -> None:
        while not self._ended.wait(lock.BEAT):
            self._state["beat"] += 1
            with suppress(FifaError):  # a store that does not answer is asked at the next beat
                version = write_object(self._path, self._bytes(), self._version)
                if version is None:
                    self.lost = True
                    return
                self._version = version

    def _free_version(self) -> str:
        """The version of a lock that nobody holds, "" for none; waits where it has to."""
        found = read_object(self._path)
        told, since, first = False, time.monotonic(), found
        while found is not None:
            state = _parsed(found[0])
            if state.get("free") or _has_died(state):
                return found[1]
            if found != first:
                raise FifaError(
                    f"{_who(state)} is writing here",
                    where=self.url,
                    do="wait for its end, or choose another folder",
                )
            waited = time.monotonic() - since
            if waited > lock.STALE:
                echo(f"{_who(state)} is taken for dead: its lock of {self.url} is taken over")
                return found[1]
            if waited > lock.BEAT + LOOK and not told:
                told = True
                echo(
                    f"{_who(state)} has a lock of {self.url} and says nothing; it is taken over "
                    f"in {lock.STALE - waited:.0f} s unless it does"
                )
            time.sleep(LOOK)
            found = read_object(self._path)
        return ""

    def _check_store(self) -> None:
        """See that the store refuses what it has to refuse, and takes what it has to take."""
        never = '"' + "0" * 32 + '"' if '"' in self._version else "1"
        for number, version in enumerate(("", never)):
            if write_object(self._path, self._bytes(trial=number), version) is not None:
                raise self._unfit("ignores conditions")
        written = write_object(self._path, self._bytes(trial=2), self._version)
        if written is None:
            raise self._unfit("refuses a write whose condition holds")
        self._version = written

    def _unfit(self, what: str) -> FifaError:
        return FifaError(
            f"this store {what}, so nothing would keep a second command out",
            where=self.url,
            do="use one with conditional writes (S3, Google Cloud Storage, MinIO, Ceph), or a "
            "local folder",
        )


def machine() -> str:
    """What two processes have in common that see each other's numbers; "" where not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _has_died(state: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine which is no more."""
    if not state.get("machine") or state["machine"] != machine():
        return False
    try:
        os.kill(int(state["who"]["pid"]), 0)
    except ProcessLookupError:
        return True
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return False
    return False


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}


def _who(state: dict[str, Any]) -> str:
    return lock.named(json.dumps(state.get("who")).encode())
