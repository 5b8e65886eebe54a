"""The pages: a Starlette app around a `Ballot`."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import IO, Any
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
from fifa.evaluation.vote.ballot import Ballot, Showing
from fifa.evaluation.vote.export import export_votes
from fifa.evaluation.vote.guard import INVITATION, MAX_BODY, Guard, read_cookies, set_cookie
from fifa.evaluation.vote.pictures import Picture
from fifa.evaluation.vote.results import count_votes, voter_name
from fifa.evaluation.vote.store import ANSWERS
from fifa.formatting import page_templates
from fifa.models.optional import require
from fifa.shards.files import PREFIX

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
    ballot: Ballot,
    *,
    tokens: dict[str, str] | None = None,
    hosts: tuple[str, ...] = (),
    base: str = "",
    link: str = "",
) -> Guard:
    """The ASGI app of one run.

    Parameters
    ----------
    ballot
        What is voted on.
    tokens, hosts
        As for `Guard`; without tokens everybody may vote and see the results, and there is no
        admin page.
    base, link
        What its addresses begin with, and the whole link for voters, for the admin page.
    """
    suffix = ballot.sign("cookies")[:8]
    public = tokens is not None and INVITATION in tokens
    pages = _Pages(ballot, f"fifa_voter_{suffix}", base=base, link=link, public=public)
    routes = [
        Route(f"{base}/", pages.vote_page),
        Route(f"{base}/start", pages.start, methods=["POST"]),
        Route(f"{base}/vote", pages.vote, methods=["POST"]),
        Route(f"{base}/undo", pages.undo, methods=["POST"]),
        Route(f"{base}/leave", pages.leave, methods=["POST"]),
        Route(f"{base}/image/{{image}}.png", pages.image),
        Route(f"{base}/results", pages.results),
        *static_routes(base),
    ]
    if tokens:
        routes.append(Route(f"{base}/admin", pages.admin))
        routes.append(Route(f"{base}/votes.parquet", pages.export))
    app = Starlette(routes=routes, exception_handlers=HANDLERS)
    return Guard(app, hosts=hosts, tokens=tokens, suffix=suffix, base=base)


def summary(ballot: Ballot) -> dict[str, Any]:
    """What the admin's pages say of a run."""
    voters, votes = ballot.progress()
    most, per_voter = ballot.options.votes_per_pair, ballot.options.votes_per_voter
    return {
        "voters": voters,
        "votes": sum(voter.votes for voter in voters),
        "finished": sum(0 < voter.total <= voter.votes for voter in voters),
        "per_voter": per_voter,
        "pairs": len(votes),
        "fewest": min(votes),
        "median": median(votes),
        "most": max(votes),
        "per_pair": most,
        "full": sum(most is not None and count >= most for count in votes),
        "until": ballot.until,
        "ended": ballot.ended,
    }


class _Pages:
    def __init__(self, ballot: Ballot, cookie: str, *, base: str, link: str, public: bool) -> None:
        self.ballot, self.cookie, self.public = ballot, cookie, public
        self.base, self.link = base, link
        self.makers, self.exporting = asyncio.Semaphore(MAKERS), asyncio.Lock()

    async def vote_page(self, request: Request) -> Response:
        """The next pair, the welcome before the first or the thanks after the last."""
        visitor = self._visitor(request)
        showing = await run_in_threadpool(self.ballot.showing, visitor.who)
        name = "welcome" if showing is None else "thanks" if showing.done else "vote"
        if self.ballot.ended:
            name = "ended"
        options = self.ballot.options
        pairs = round(len(self.ballot.asked) * (1 + options.repeats + options.checks))
        response = self._page(
            name,
            token=visitor.token,
            showing=showing,
            question=options.question,
            pairs=min(pairs, options.votes_per_voter or pairs),
            about=options.repeats + options.checks > 0,
            up_to=options.votes_per_pair is not None,
            until=self.ballot.until,
            public=self.public,
        )
        if not visitor.known:
            set_cookie(response, self.cookie, visitor.cookie, self.base)
        return response

    async def start(self, request: Request) -> Response:
        """Draw the trials of this visitor."""
        visitor, fields = await self._form(request)
        name = " ".join(fields.get("name", "").replace("\0", "").split())[:MAX_NAME] or None
        if not self.ballot.ended:
            await run_in_threadpool(self.ballot.register, visitor.who, name)
        return self._back()

    async def vote(self, request: Request) -> Response:
        """Commit a vote; then, and only then, say what comes next."""
        visitor, fields = await self._form(request)
        if fields.get("answer") not in ANSWERS:
            raise HTTPException(400, "no such answer")
        position, answer = _position(fields), fields["answer"]
        return await self._next(
            request, visitor, lambda: self.ballot.store.vote(visitor.who, position, answer)
        )

    async def undo(self, request: Request) -> Response:
        """Take the last vote back."""
        visitor, fields = await self._form(request)
        position = _position(fields)
        return await self._next(
            request, visitor, lambda: self.ballot.store.undo(visitor.who, position)
        )

    async def leave(self, request: Request) -> Response:
        """Forget this visitor, so that somebody else can vote here."""
        await self._form(request)
        response = self._back()
        response.delete_cookie(self.cookie, self.base or "/", httponly=True, samesite="lax")
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

    async def admin(self, request: Request) -> Response:
        """How far voters are, and what whoever runs the vote needs."""
        said = await run_in_threadpool(summary, self.ballot)
        results = await run_in_threadpool(lambda: count_votes(self.ballot.store.read()))
        code = require("segno", "vote").make(self.link, error="m", micro=False)
        return self._page(
            "admin",
            **said,
            name=self.ballot.run.resolve().name,
            question=self.ballot.options.question,
            results=results,
            results_of={voter.number: voter for voter in results.voters},
            link=self.link,
            invited=self.public,
            code=code.svg_inline(border=3, light="#ffffff", omitsize=True, svgclass="qr"),
        )

    async def export(self, request: Request) -> Response:
        """The votes so far as `fifa vote export` writes them, of one moment."""
        async with self.exporting:
            try:
                file = await run_in_threadpool(self._exported)
            except FifaError as error:
                return PlainTextResponse(f"{error}\n", 409)
        size = file.seek(0, 2)
        headers = {
            "Content-Disposition": 'attachment; filename="votes.parquet"',
            "Content-Length": str(size),
        }
        media = "application/vnd.apache.parquet"
        return StreamingResponse(_file_pieces(file), media_type=media, headers=headers)

    def _exported(self) -> IO[bytes]:
        ballot = self.ballot
        with tempfile.TemporaryDirectory(prefix=PREFIX, dir=ballot.folder) as folder:
            path = Path(folder) / "votes.parquet"
            export_votes(ballot.run, path, database=ballot.options.database)
            file = tempfile.TemporaryFile(dir=ballot.folder)  # noqa: SIM115
            with path.open("rb") as made:
                shutil.copyfileobj(made, file)
        return file

    def _back(self) -> Response:
        return RedirectResponse(f"{self.base}/", 303)

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

    async def _next(
        self, request: Request, visitor: Visitor, change: Callable[[], bool]
    ) -> Response:
        """What is shown after a change: as JSON for the script, as the page itself without one."""
        json = request.headers.get("accept") == "application/json"

        def work() -> tuple[bool, Showing | None]:
            taken = not self.ballot.ended and change()
            return taken, self.ballot.showing(visitor.who) if json else None

        taken, showing = await run_in_threadpool(work)
        if not json:
            return self._back()
        if showing is None:
            raise HTTPException(403, "nobody votes here yet: load the page again")
        return JSONResponse({**asdict(showing), "done": showing.done}, 200 if taken else 409)

    def _page(self, template: str, /, **values: Any) -> Response:
        return render(template, base=self.base, **values)


def render(template: str, /, **values: Any) -> Response:
    """A page from one of the templates."""
    templates = page_templates(HERE / "templates")
    templates.filters |= {"voter": voter_name, "day": _day}
    text = templates.get_template(f"{template}.html.j2").render(values)
    return Response(text, media_type="text/html")


def _day(moment: datetime | str) -> str:
    """``24 December 2026, 18:00 CET``, in this machine's time."""
    if isinstance(moment, str):
        moment = datetime.fromisoformat(moment).astimezone()
    return f"{moment.day} {moment:%B %Y, %H:%M %Z}"


async def _file_pieces(file: IO[bytes]) -> AsyncIterator[bytes]:
    with file:
        file.seek(0)
        while piece := await run_in_threadpool(file.read, PIECE):
            yield piece


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


def static_routes(base: str = "") -> Sequence[Route]:
    """What all pages load."""
    return [Route(f"{base}/{name}", _static(name, media)) for name, media in STATIC.items()]


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


HANDLERS: dict[Any, Any] = {HTTPException: _http_error, FifaError: _error}
