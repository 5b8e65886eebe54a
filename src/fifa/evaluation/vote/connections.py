"""Connections: how many there may be at once, and how long each may take.

uvicorn waits without end for a request that never comes whole, and for a client that does not take
its answer; a thousand of those use up a process's files, and nobody else gets in.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections import Counter
from contextlib import suppress
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

MOST = 512  # connections; a browser takes six
FILES = 256  # beside them: of votes, images, threads
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
    """`MOST`, or fewer where the system lets a process have too few files."""
    try:
        import resource
    except ImportError:
        return MOST
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MOST + FILES  # those that have been dropped are still there for a moment
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        return max(16, min(MOST, (soft - FILES) // 2))
    return MOST
