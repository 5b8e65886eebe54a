"""What stands before the pages: who may come in, from where, and with how much."""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Collection
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 4096  # bytes of a request; a vote has about 200
MAX_QUERY = 8  # fields of an address; a link has one
YEAR = 365 * 24 * 3600
INVITATION = "invitation"  # of the address that voters are given
OWNER = "owner"  # of the address of whoever runs the vote
# What voters may ask for beside pictures; everything else is the owner's
FOR_VOTERS = {"/", "/start", "/vote", "/undo", "/leave", "/vote.css", "/vote.js", "/icon.svg"}

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self'; style-src 'self'; "
    "script-src 'self'; connect-src 'self'; form-action 'self'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=(), payment=(), usb=()",
    "X-Robots-Tag": "noindex, nofollow",
}


class Guard:
    """ASGI middleware: refuses what is not meant for this page, and adds `HEADERS` to all.

    - The Host header has to be an IP address, localhost, this machine's name, or one of
      ``hosts``: a name that somebody else resolves to this machine does not get in (DNS
      rebinding).
    - A POST comes from a page of this server (Origin, Sec-Fetch-Site) and is a small form.
    - With ``tokens``, a visitor needs a cookie that an address with ``?invitation=TOKEN`` sets
      once, and may ask for what is ``for_voters`` and pictures; all else needs ``?owner=TOKEN``.

    Parameters
    ----------
    app
        The pages.
    hosts
        Further names that the server goes by.
    tokens
        `OWNER`, and `INVITATION` unless everybody may vote and see the results, as on loopback;
        None lets everybody in everywhere.
    suffix
        Of the cookies' names: ports share cookies, servers must not.
    base
        What the pages' addresses begin with, where several runs are on one server.
    for_voters
        Addresses that are not the owner's alone.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        hosts: Collection[str] = (),
        tokens: dict[str, str] | None = None,
        suffix: str = "",
        base: str = "",
        for_voters: Collection[str] = FOR_VOTERS,
    ) -> None:
        self.app = app
        self.hosts = {"localhost", socket.gethostname().lower(), *map(str.lower, hosts)}
        self.tokens = tokens
        self.suffix, self.base, self.for_voters = suffix, base, for_voters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)

        async def sealed(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Cache-Control", "no-store")
                for name, value in HEADERS.items():
                    headers[name] = value
            await send(message)

        with suppress(ClientDisconnect):  # then nobody waits for an answer
            await (refusal or self.app)(scope, receive, sealed)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if not self._known_host(headers.get("host", "")):
            return _refuse(
                421, "This server does not go by that name; start it with --allow-host NAME."
            )
        if scope["method"] == "POST":
            refusal = _bad_post(headers)
            if refusal:
                return refusal
        return self._uninvited(scope, headers)

    def _known_host(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name in self.hosts or is_address(name)

    def _uninvited(self, scope: Scope, headers: Headers) -> Response | None:
        """None for who may come in; sets the cookie and takes the token out of the address."""
        if self.tokens is None:
            return None
        try:
            query = parse_qs(scope["query_string"].decode("latin-1"), max_num_fields=MAX_QUERY)
        except ValueError:
            return _refuse(400, f"An address has at most {MAX_QUERY} fields here.")
        given = {name: query.pop(name)[0] for name in (OWNER, INVITATION) if name in query}
        if given and scope["method"] in ("GET", "HEAD"):
            for name, token in given.items():
                if self._matches(name, token):
                    rest = urlencode(query, doseq=True)
                    path = "/" + scope["path"].lstrip("/")  # "//name" would be another host
                    to = RedirectResponse(path + ("?" + rest if rest else ""), 303)
                    set_cookie(to, f"fifa_{name}_{self.suffix}", token, self.base)
                    return to
        cookies = read_cookies(headers)
        may = {
            name: self._matches(name, cookies.get(f"fifa_{name}_{self.suffix}", ""))
            for name in (OWNER, INVITATION)
        }
        path = scope["path"].removeprefix(self.base) or "/"
        known = path in self.for_voters or path.startswith("/image/")
        if INVITATION not in self.tokens:
            may[INVITATION], known = True, known or path == "/results"
        if may[OWNER] or (may[INVITATION] and known):
            return None
        return _refuse(403, "This page is for people who were invited: ask for the whole link.")

    def _matches(self, name: str, token: str) -> bool:
        own = (self.tokens or {}).get(name)
        return own is not None and hmac.compare_digest(own.encode(), token.encode())


def is_address(name: str) -> bool:
    """True for an IPv4 or IPv6 address, which nobody can point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """True if only this machine can reach a server that listens there."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def read_cookies(headers: Headers) -> dict[str, str]:
    """The request's cookies; none where they are malformed."""
    try:
        return {name: morsel.value for name, morsel in SimpleCookie(headers.get("cookie")).items()}
    except CookieError:
        return {}


def set_cookie(response: Response, name: str, value: str, base: str = "") -> None:
    """A cookie below ``base`` that scripts do not see and other sites' requests do not carry."""
    response.set_cookie(name, value, max_age=YEAR, path=base or "/", httponly=True, samesite="lax")


def _bad_post(headers: Headers) -> Response | None:
    """Why a POST is refused.

    A form's Origin is "null" under the referrer policy; then the form's own token has to do,
    which the pages check in any case.
    """
    foreign = _foreign(headers.get("origin", "null"), headers.get("host"))
    if foreign or headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        return _refuse(403, "This came from another site.")
    length = headers.get("content-length", "")
    if not re.fullmatch("[0-9]+", length) or "transfer-encoding" in headers:
        return _refuse(411, "The length is missing.")
    if len(length) > 9 or int(length) > MAX_BODY:
        return _refuse(413, "This is too long.")
    if headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        return _refuse(415, "Only forms are read.")
    return None


def _foreign(origin: str, host: str | None) -> bool:
    try:
        return origin != "null" and urlsplit(origin).netloc != host
    except ValueError:
        return True


def _refuse(status: int, text: str) -> Response:
    return PlainTextResponse(text + "\n", status)
