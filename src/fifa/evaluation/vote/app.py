"""The pages: a Starlette app around a `Ballot`."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import (
    JSONResponse,
    PlainTextResponse,
    RedirectResponse,
    Response,
    StreamingResponse,
)
from starlette.routing import Route

from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.guard import MAX_BODY, Guard, read_cookies, set_cookie
from fifa.evaluation.vote.pictures import Picture
from fifa.evaluation.vote.results import count_votes, voter_name
from fifa.evaluation.vote.store import ANSWERS
from fifa.formatting import page_templates

HERE = Path(__file__).parent
STATIC = {
    "vote.css": "text/css; charset=utf-8",
    "vote.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}
MAX_NAME = 60  # characters of a voter's name
MAX_FIELDS = 8  # of a form
PIECE = 1 << 17  # bytes of a picture that are sent at a time
MAKERS = 4  # threads that make and find pictures


@dataclass(frozen=True)
class Visitor:
    """A cookie, whether the request had it, who that is in the votes, and its forms' token."""

    cookie: str
    known: bool
    who: str
    token: str


def create_app(
    ballot: Ballot, *, tokens: dict[str, str] | None = None, hosts: tuple[str, ...] = ()
) -> Guard:
    """The ASGI app.

    Parameters
    ----------
    ballot
        What is voted on.
    tokens, hosts
        As for `Guard`; without tokens everybody may vote and see the results.
    """
    suffix = ballot.sign("cookies")[:8]
    pages = _Pages(ballot, f"fifa_voter_{suffix}", public=tokens is not None)
    routes = [
        Route("/", pages.vote_page),
        Route("/start", pages.start, methods=["POST"]),
        Route("/vote", pages.vote, methods=["POST"]),
        Route("/undo", pages.undo, methods=["POST"]),
        Route("/leave", pages.leave, methods=["POST"]),
        Route("/image/{image}.png", pages.image),
        Route("/results", pages.results),
        *(Route(f"/{name}", _static(name, media)) for name, media in STATIC.items()),
    ]
    handlers: dict[Any, Any] = {HTTPException: _http_error, FifaError: _error}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, hosts=hosts, tokens=tokens, suffix=suffix)


class _Pages:
    def __init__(self, ballot: Ballot, cookie: str, *, public: bool) -> None:
        self.ballot, self.cookie, self.public = ballot, cookie, public
        self.templates = page_templates(HERE / "templates")
        self.templates.filters["voter"] = voter_name
        self.makers = asyncio.Semaphore(MAKERS)

    async def vote_page(self, request: Request) -> Response:
        """The next pair, the welcome before the first or the thanks after the last."""
        visitor = self._visitor(request)
        showing = await run_in_threadpool(self.ballot.showing, visitor.who)
        name = "welcome" if showing is None else "thanks" if showing.done else "vote"
        options = self.ballot.options
        response = self._page(
            name,
            token=visitor.token,
            showing=showing,
            question=options.question,
            pairs=round(len(self.ballot.asked) * (1 + options.repeats + options.checks)),
            about=options.repeats + options.checks > 0,
            public=self.public,
        )
        if not visitor.known:
            set_cookie(response, self.cookie, visitor.cookie)
        return response

    async def start(self, request: Request) -> Response:
        """Draw the trials of this visitor."""
        visitor, fields = await self._form(request)
        name = " ".join(fields.get("name", "").split())[:MAX_NAME] or None
        await run_in_threadpool(self.ballot.register, visitor.who, name)
        return RedirectResponse("/", 303)

    async def vote(self, request: Request) -> Response:
        """Commit a vote; then, and only then, say what comes next."""
        visitor, fields = await self._form(request)
        if fields.get("answer") not in ANSWERS:
            raise HTTPException(400, "no such answer")
        taken = await run_in_threadpool(
            self.ballot.store.vote, visitor.who, _position(fields), fields["answer"]
        )
        return await self._next(request, visitor, taken)

    async def undo(self, request: Request) -> Response:
        """Take the last vote back."""
        visitor, fields = await self._form(request)
        taken = await run_in_threadpool(self.ballot.store.undo, visitor.who, _position(fields))
        return await self._next(request, visitor, taken)

    async def leave(self, request: Request) -> Response:
        """Forget this visitor, so that somebody else can vote here."""
        await self._form(request)
        response = RedirectResponse("/", 303)
        response.delete_cookie(self.cookie, httponly=True, samesite="lax")
        return response

    async def image(self, request: Request) -> Response:
        """A picture that this visitor votes on; there is none for anybody else."""
        who, image = self._visitor(request).who, request.path_params["image"]
        try:
            async with self.makers:  # waiting for pictures takes no thread from votes
                picture = await run_in_threadpool(self.ballot.image, who, image)
        except KeyError:
            raise HTTPException(404, "no such image") from None
        # The name belongs to these bytes for ever: a changed image is refused
        headers = {
            "Cache-Control": "private, max-age=86400, immutable",
            "Vary": "Cookie",
            "Content-Length": str(picture.size),
        }
        return StreamingResponse(_pieces(picture), media_type="image/png", headers=headers)

    async def results(self, request: Request) -> Response:
        """What the votes say so far."""
        found = await run_in_threadpool(lambda: count_votes(self.ballot.store.read()))
        return self._page("results", results=found, question=self.ballot.options.question)

    def _visitor(self, request: Request) -> Visitor:
        cookie = read_cookies(request.headers).get(self.cookie, "")
        known = 20 <= len(cookie) <= 64
        cookie = cookie if known else secrets.token_urlsafe(24)
        sign = self.ballot.sign  # the file of votes is no key to anybody's cookie
        return Visitor(cookie, known, sign("voter", cookie), sign("form", cookie))

    async def _form(self, request: Request) -> tuple[Visitor, dict[str, str]]:
        """The fields of a form that a page of ours made for this visitor; 403 otherwise."""
        body = b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_BODY:  # whatever its headers say
                raise HTTPException(413, "This is too long.")
        fields, visitor = _fields(body), self._visitor(request)
        if not (
            visitor.known
            and secrets.compare_digest(fields.get("token", "").encode(), visitor.token.encode())
        ):
            raise HTTPException(403, "this form is out of date: load the page again")
        return visitor, fields

    async def _next(self, request: Request, visitor: Visitor, taken: bool) -> Response:
        """What is shown now: as JSON for the script, as the page itself without one."""
        if request.headers.get("accept") != "application/json":
            return RedirectResponse("/", 303)
        showing = await run_in_threadpool(self.ballot.showing, visitor.who)
        if showing is None:
            raise HTTPException(403, "nobody votes here yet: load the page again")
        return JSONResponse({**asdict(showing), "done": showing.done}, 200 if taken else 409)

    def _page(self, name: str, **values: Any) -> Response:
        text = self.templates.get_template(f"{name}.html.j2").render(values)
        return Response(text, media_type="text/html")


async def _pieces(picture: Picture) -> AsyncIterator[bytes]:
    """A picture's bytes, `PIECE` at a time: who reads slowly holds no more of them."""
    for at in range(0, picture.size, PIECE):
        yield picture.read(at, PIECE)


def _fields(body: bytes) -> dict[str, str]:
    """The fields of a form, each named once."""
    try:
        found = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_FIELDS
        )
    except ValueError as error:
        raise HTTPException(400, f"this is no form of {MAX_FIELDS} fields in UTF-8") from error
    if len(dict(found)) < len(found):
        raise HTTPException(400, "a field comes twice")
    return dict(found)


def _position(fields: dict[str, str]) -> int:
    text = fields.get("position", "")
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise HTTPException(400, "no such position")
    return int(text)


def _static(name: str, media: str) -> Any:
    data = (HERE / "static" / name).read_bytes()

    async def send(request: Request) -> Response:
        return Response(data, headers={"Content-Type": media, "Cache-Control": "no-cache"})

    return send


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return PlainTextResponse(f"{error.detail}\n", error.status_code, error.headers)


async def _error(request: Request, error: Exception) -> Response:
    """A mistake of this machine's: its owner reads the details, voters do not."""
    echo(f"error: {error}")
    return PlainTextResponse("The vote could not be kept or shown; tell who invited you.\n", 503)
