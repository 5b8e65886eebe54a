"""Fetching an image by its URL, from public addresses only.

The host is resolved once, every address it has is checked, and the connection goes to the checked
address: a name that changes its mind between check and use (DNS rebinding) gains nothing. One
deadline and one budget of bytes hold for all that a server sends, headers and framing included.
"""

from __future__ import annotations

import io
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from http.client import HTTPConnection, HTTPException
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

MAX_REDIRECTS = 5
TIMEOUT = 30.0  # seconds for one image, redirects and all
CHUNK = 1 << 16
FRAMING = 1 << 20  # bytes that headers may take, beside as many for chunks as the image has

UNICAST = ipaddress.ip_network("2000::/3")  # of IPv6
# IANA's special-purpose registries beyond what every Python's `is_global` knows
SPECIAL = [
    ipaddress.ip_network(network)
    for network in ("192.0.0.0/24", "192.88.99.0/24", "2001::/23", "2002::/16", "3fff::/20")
]

Resolve = Callable[[str, int], Sequence[str]]
Allowed = Callable[[str], bool]


class FetchError(Exception):
    """Why a URL was not fetched."""


def addresses(host: str, port: int) -> list[str]:
    """Every address of a host, as text."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


def is_public(address: str) -> bool:
    """True for an address on the public internet.

    False for private, loopback, link-local, shared, reserved, documentation and multicast ranges,
    for the same ranges inside an IPv4-mapped IPv6 address, for all of IPv6 that is not assigned as
    global unicast, and for what tunnels to an IPv4 address (6to4, Teredo, NAT64).
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        if parsed not in UNICAST:
            return False
    special = any(parsed in network for network in SPECIAL)
    return parsed.is_global and not (special or parsed.is_multicast or parsed.is_reserved)


def fetch(
    url: str,
    *,
    max_bytes: int,
    timeout: float = TIMEOUT,
    resolve: Resolve = addresses,
    allowed: Allowed = is_public,
) -> bytes:
    """The bytes behind an http(s) URL.

    Parameters
    ----------
    url
        Where they are.
    max_bytes
        More than this is refused.
    timeout
        Seconds for everything together.
    resolve, allowed
        From a host and port to its addresses; from an address to whether it may be asked.

    Raises
    ------
    FetchError
        For another scheme, an address that is not allowed, too many redirects or bytes, an
        answer other than 200, and everything that goes wrong on the way.
    """
    deadline = time.monotonic() + timeout
    try:
        for _ in range(MAX_REDIRECTS + 1):
            target, address = _checked(url, resolve, allowed, deadline)
            answer = _ask(target, address, max_bytes, deadline)
            if isinstance(answer, bytes):
                return answer
            url = urljoin(url, answer)
    except TimeoutError as error:
        raise FetchError("it takes too long") from error
    except (OSError, ValueError, HTTPException) as error:
        raise FetchError(f"cannot fetch: {type(error).__name__}") from error
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _checked(
    url: str, resolve: Resolve, allowed: Allowed, deadline: float
) -> tuple[SplitResult, str]:
    """The parts of a URL and the address to ask; every address of its host must be allowed."""
    try:
        target = urlsplit(url)
        host, port = target.hostname, target.port or (443 if target.scheme == "https" else 80)
        if target.scheme not in ("http", "https") or not host:
            raise FetchError("only http and https URLs are fetched")
        if target.username is not None or target.password is not None:
            raise FetchError("URLs with a user name are not fetched")
        found = _in_time(lambda: resolve(host, port), deadline)
    except TimeoutError:
        raise
    except (OSError, ValueError) as error:
        raise FetchError(f"cannot resolve the host: {error}") from error
    refused = [address for address in found if not allowed(address)]
    if refused or not found:
        raise FetchError(f"the host is not on the public internet ({', '.join(refused)})")
    return target, found[0]


def _in_time(call: Callable[[], Any], deadline: float) -> Any:
    """What ``call`` returns; `TimeoutError` once the deadline is over, for what has none itself."""
    answer: SimpleQueue[Any] = SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except Exception as error:
            answer.put((None, error))

    Thread(target=run, daemon=True).start()
    try:
        found, error = answer.get(timeout=_left(deadline))
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return found


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Wire(io.RawIOBase):
    """A socket for `http.client`, whose every byte counts and which ends at the deadline."""

    def __init__(self, sock: socket.socket, deadline: float, budget: int) -> None:
        self.sock, self.deadline, self.budget = sock, deadline, budget

    def sendall(self, data: bytes) -> None:
        self.sock.settimeout(_left(self.deadline))
        self.sock.sendall(data)

    def makefile(self, mode: str) -> io.BufferedReader:
        # its own, because http.client closes what it was given before the body is read
        return io.BufferedReader(_Wire(self.sock, self.deadline, self.budget))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.sock.settimeout(_left(self.deadline))
        count = self.sock.recv_into(buffer)
        self.budget -= count
        if self.budget < 0:
            raise FetchError("far more headers and framing than image")
        return count


def _ask(target: SplitResult, address: str, max_bytes: int, deadline: float) -> bytes | str:
    """The bytes, or where a redirect leads."""
    secure, host = target.scheme == "https", str(target.hostname)
    port = target.port or (443 if secure else 80)
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    name = host if ":" in host else host.encode("idna").decode("ascii")
    headers = {
        "Host": (f"[{name}]" if ":" in name else name) + (f":{target.port}" if target.port else ""),
        "User-Agent": "fifa-align",
        "Accept": "image/*",
        "Connection": "close",
    }
    sock = socket.create_connection((address, port), _left(deadline))
    try:
        if secure:
            # the connection goes to the address; certificate and SNI are the host's
            sock.settimeout(_left(deadline))
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=name)
        connection: Any = HTTPConnection(address, port)
        connection.sock = _Wire(sock, deadline, 2 * max_bytes + FRAMING)
        connection.request("GET", quote(path, "/%:=&?~+!$,;'@()*[]|"), headers=headers)
        answer = connection.getresponse()
        where: str | None = answer.headers.get("Location")
        if answer.status in (301, 302, 303, 307, 308) and where:
            return where
        if answer.status != 200:
            raise FetchError(f"the server answers {answer.status}")
        return _body(answer, max_bytes)
    finally:
        sock.close()


def _body(answer: Any, max_bytes: int) -> bytes:
    """All bytes, read in pieces so that they do not get out of hand."""
    length = answer.length
    if length is not None and length > max_bytes:
        raise FetchError(f"more than {max_bytes:,} bytes")
    pieces, size = [], 0
    while piece := answer.read1(CHUNK):
        size += len(piece)
        pieces.append(piece)
        if size > max_bytes:
            raise FetchError(f"more than {max_bytes:,} bytes")
    if length is not None and size < length:
        raise FetchError(f"cannot fetch: {size:,} of {length:,} bytes came")
    return b"".join(pieces)
