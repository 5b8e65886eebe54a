"""Fetching an image by its URL, from public addresses only.

The host is resolved once, every address it has is checked, and the connection goes to the checked
address: a name that changes its mind between check and use (DNS rebinding) gains nothing.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, urljoin, urlsplit

from fifa.errors import FifaError

if TYPE_CHECKING:
    import urllib3

MAX_REDIRECTS = 5
TIMEOUT = 30.0  # seconds for one image, redirects and all
CHUNK = 1 << 16

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

    False for private, loopback, link-local, shared, reserved and multicast ranges, for the same
    ranges inside an IPv4-mapped IPv6 address, and for addresses that tunnel to an IPv4 address
    (6to4, Teredo, NAT64).
    """
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return is_public(str(parsed.ipv4_mapped))
        nat64 = parsed in ipaddress.ip_network("64:ff9b::/32")
        if parsed.sixtofour or parsed.teredo or nat64 or parsed.is_site_local:
            return False
    return parsed.is_global and not (
        parsed.is_multicast or parsed.is_reserved or parsed.is_unspecified
    )


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
    for _ in range(MAX_REDIRECTS + 1):
        target, address = _checked(url, resolve, allowed)
        answer = _ask(target, address, max_bytes, deadline)
        if isinstance(answer, bytes):
            return answer
        url = urljoin(url, answer)
    raise FetchError(f"more than {MAX_REDIRECTS} redirects")


def _checked(url: str, resolve: Resolve, allowed: Allowed) -> tuple[SplitResult, str]:
    """The parts of a URL and the address to ask; every address of its host must be allowed."""
    try:
        target = urlsplit(url)
        host, port = target.hostname, target.port or (443 if target.scheme == "https" else 80)
        if target.scheme not in ("http", "https") or not host:
            raise FetchError("only http and https URLs are fetched")
        if target.username is not None or target.password is not None:
            raise FetchError("URLs with a user name are not fetched")
        found = resolve(host, port)
    except (OSError, ValueError) as error:
        raise FetchError(f"cannot resolve the host: {error}") from error
    refused = [address for address in found if not allowed(address)]
    if refused or not found:
        raise FetchError(f"the host is not on the public internet ({', '.join(refused)})")
    return target, found[0]


def _ask(target: SplitResult, address: str, max_bytes: int, deadline: float) -> bytes | str:
    """The bytes, or where a redirect leads."""
    try:
        import urllib3
    except ImportError as error:
        raise FifaError(
            "images are fetched with urllib3, which is not installed", do="pip install urllib3"
        ) from error
    port, host = target.port, str(target.hostname)
    left = deadline - time.monotonic()
    timeout = urllib3.Timeout(total=max(left, 0.001))
    pool: urllib3.HTTPConnectionPool
    if target.scheme == "https":
        # the connection goes to the address; certificate and SNI are the host's
        pool = urllib3.HTTPSConnectionPool(
            address,
            port or 443,
            cert_reqs="CERT_REQUIRED",
            server_hostname=host,
            assert_hostname=host,
        )
    else:
        pool = urllib3.HTTPConnectionPool(address, port or 80)
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    headers = {"Host": target.netloc, "User-Agent": "fifa-align", "Accept": "image/*"}
    try:
        with pool:
            answer = pool.urlopen(
                "GET",
                path,
                headers=headers,
                retries=False,
                redirect=False,
                timeout=timeout,
                preload_content=False,
                assert_same_host=False,
            )
            where = answer.headers.get("Location")
            if answer.status in (301, 302, 303, 307, 308) and where:
                return where
            if answer.status != 200:
                raise FetchError(f"the server answers {answer.status}")
            return _body(answer, max_bytes, deadline)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        raise FetchError(f"cannot fetch: {type(error).__name__}") from error


def _body(answer: urllib3.BaseHTTPResponse, max_bytes: int, deadline: float) -> bytes:
    """All bytes, read in pieces so that neither size nor time gets out of hand."""
    length = answer.headers.get("Content-Length", "")
    if length.isdigit() and int(length) > max_bytes:
        raise FetchError(f"more than {max_bytes:,} bytes")
    pieces, size = [], 0
    # read1 returns what has come, so a server that drips is cut off in time
    while piece := answer.read1(CHUNK, decode_content=False):
        size += len(piece)
        pieces.append(piece)
        if size > max_bytes:
            raise FetchError(f"more than {max_bytes:,} bytes")
        if time.monotonic() > deadline:
            raise FetchError("it takes too long")
    return b"".join(pieces)
