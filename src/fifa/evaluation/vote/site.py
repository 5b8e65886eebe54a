"""Several runs on one server, each below its own name."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fifa.evaluation.vote.app import HANDLERS, create_app, render, static_routes, summary
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.guard import INVITATION, OWNER, Guard


class Site:
    """The ASGI app of several runs, each below its own name, and a start page that lists them.

    Parameters
    ----------
    ballots
        By the name that a run's addresses begin with.
    tokens
        Of each of them, as for `create_app`.
    hosts
        As for `Guard`.
    origin
        What links begin with, ``http://host:port``.
    """

    def __init__(
        self,
        ballots: Mapping[str, Ballot],
        tokens: Mapping[str, dict[str, str]],
        *,
        hosts: tuple[str, ...] = (),
        origin: str = "",
    ) -> None:
        self.ballots, self.tokens, self.origin = ballots, tokens, origin
        self.apps = {
            name: create_app(
                ballot, tokens=tokens[name], hosts=hosts, base=f"/{name}", link=self.link(name)
            )
            for name, ballot in ballots.items()
        }
        owners = "\n".join(sorted(one[OWNER] for one in tokens.values()))
        secret = hashlib.sha256(owners.encode()).hexdigest()
        self.owner = secret[:32]  # who has one run's link gets nowhere else
        routes = [Route("/", self.start), *static_routes()]
        app = Starlette(routes=routes, exception_handlers=HANDLERS)
        self.start_page: ASGIApp = Guard(
            app, hosts=hosts, tokens={OWNER: self.owner}, suffix=secret[-8:], for_voters=()
        )

    def link(self, name: str) -> str:
        """The link of a run for its voters."""
        return voters_link(f"{self.origin}/{name}", self.tokens[name])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        name = scope.get("path", "").partition("/")[2].partition("/")[0]
        await self.apps.get(name, self.start_page)(scope, receive, send)

    async def start(self, request: Request) -> Response:
        """Every run, how far it is, and its links."""
        found = await run_in_threadpool(
            lambda: {name: summary(ballot) for name, ballot in self.ballots.items()}
        )
        rows = [
            {
                "name": ballot.run.resolve().name,
                "admin": f"/{name}/admin?{OWNER}={self.tokens[name][OWNER]}",
                "link": self.link(name),
                **found[name],
            }
            for name, ballot in self.ballots.items()
        ]
        return render("start", base="", runs=rows)


def voters_link(address: str, tokens: Mapping[str, str]) -> str:
    """The link that voters are given."""
    return f"{address}/" + (f"?{INVITATION}={tokens[INVITATION]}" if INVITATION in tokens else "")


def run_name(ballot: Ballot) -> str:
    """What a run's addresses begin with on a server of several: the same after a restart."""
    name = re.sub("[^a-z0-9]+", "-", ballot.run.resolve().name.lower()).strip("-")[:40]
    return f"{name or 'run'}-{ballot.sign('run')[:6]}"
