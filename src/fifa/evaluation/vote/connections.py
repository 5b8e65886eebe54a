"""Connections: how many there may be at once, and how long each may take.

uvicorn waits without end for a request that never comes whole, and for a client that does not take
its answer; a thousand of those use up a process's files, and nobody else gets in.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
from collections import Counter
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from fifa.errors import FifaError

MOST = 512  # connections; a browser takes six
FILES = 128  # beside them: of votes, images, threads
LEAST = 256  # files
REQUEST = 10.0  # seconds until a request is whole, from the connection or the answer before
ANSWER = 120.0  # seconds to make an answer and take it
GOODBYE = 2.0  # seconds to end when the server stops


def connections(
    most: int, request: float = REQUEST, answer: float = ANSWER
) -> type[asyncio.Protocol]:
    """A protocol for `uvicorn.Config` with limits.

    Parameters
    ----------
    most
        Connections at a time. For one more, the longest waiting is dropped of the network that
        has most of them, those without a whole request first: a crowd shuts nobody else out.
    request, answer
        Seconds, as `REQUEST` and `ANSWER`; who takes longer is dropped.
    """

    class Connection(H11Protocol):
        timer: asyncio.TimerHandle | None = None
        now: Any = None  # the request at hand, and whether it is whole

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.network = network(self.client[0] if self.client else "")
            self.watch((None, False))
            if len(self.connections) > most:
                drop(self)

        def handle_events(self) -> None:
            try:
                super().handle_events()
            except h11.ProtocolError:  # nonsense where no answer is possible any more
                self.transport.abort()
            self.watch(self.state())

        def send_400_response(self, msg: str) -> None:
            if self.cycle:
                self.cycle.disconnected = True  # the page's own answer would come too late
            super().send_400_response(msg)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch(self.state())

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self.timer:
                self.timer.cancel()

        def shutdown(self) -> None:
            with suppress(h11.ProtocolError):
                super().shutdown()
            self.loop.call_later(GOODBYE, self.transport.abort)

        def state(self) -> tuple[Any, bool]:
            cycle = self.cycle
            return cycle, bool(cycle) and not cycle.more_body and not cycle.response_complete

        def watch(self, state: tuple[Any, bool]) -> None:
            if state == self.now:
                return  # bytes that drip give no more time
            self.now, self.since = state, self.loop.time()
            if self.timer:
                self.timer.cancel()
            self.timer = self.loop.call_later(answer if state[1] else request, self.transport.abort)

    def drop(new: Connection) -> None:
        """Make room for one that has come."""
        others = [one for one in new.connections if one is not new and isinstance(one, Connection)]
        crowds = Counter(one.network for one in others)
        most_of = max(crowds, key=lambda name: crowds[name])
        crowd = [one for one in others if one.network == most_of]
        oldest = min(crowd, key=lambda one: (one.now[1], one.since))
        oldest.connections.discard(oldest)
        oldest.transport.abort()

    return Connection


def network(address: str) -> str:
    """What one client can choose an address from: of IPv6 a /64."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    return address if parsed.version == 4 else str(int(parsed) >> 64)


def most_connections() -> int:
    """`MOST`, or fewer where a process may open few files; `FifaError` for fewer than `LEAST`."""
    try:
        import resource
    except ImportError:
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 3 * MOST + FILES  # those that come, are there, and were dropped this moment
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return MOST
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < LEAST:
        raise FifaError(
            f"a process may open only {soft} files here, too few for voters",
            do=f"raise the limit: ulimit -n {wanted}",
        )
    return (soft - FILES) // 3


class Once(logging.Filter):
    """Of messages that are alike, the first: nobody can fill a disk with them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[object] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """True for a message whose like was not there before."""
        kind = record.msg, record.exc_info and record.exc_info[0]
        new = kind not in self.seen
        self.seen.add(kind)
        return new


def quiet() -> None:
    """Let the server's and asyncio's logs say everything once."""
    for name in ("uvicorn.error", "asyncio"):
        log = logging.getLogger(name)
        for old in [one for one in log.filters if isinstance(one, Once)]:
            log.removeFilter(old)
        log.addFilter(Once())
