"""The server: uvicorn on one address, until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fifa.config import Vote
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.results import count_votes
from fifa.models.optional import require
from fifa.shards.lock import only_writer


def serve_votes(
    runs: Sequence[str | Path],
    options: Vote | None = None,
    *,
    new_invitation: bool = False,
    show_link: Callable[[str], None] = print,
) -> None:
    """Serve the voting page of one run, or of several, until it is stopped.

    Parameters
    ----------
    runs, options
        As for `Ballot`. Beyond loopback, and behind a proxy, visitors need the invitation in the
        link that is shown; the admin page always needs its own.
    new_invitation
        Make new tokens: the links given out so far end.
    show_link
        Gets the links, one at a time: of one run, the voters' and the admin's; of several, the
        start page's and the voters' of each.

    Raises
    ------
    FifaError
        As `Ballot` does, where a run is given twice, and where the address cannot be listened on.
    """
    for module in ("starlette", "uvicorn", "segno"):
        require(module, "vote")
    options = options or Vote()
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise FifaError("a run is given twice", do="name every run once")
    with ExitStack() as stack:
        for run in runs:
            folder = Path(run) / FOLDER
            if folder.is_dir() and options.database is None:
                stack.enter_context(only_writer(folder))
        _serve([Ballot(run, options) for run in runs], options, new_invitation, show_link)


def _serve(
    ballots: Sequence[Ballot],
    options: Vote,
    new_invitation: bool,
    show_link: Callable[[str], None],
) -> None:
    from fifa.evaluation.vote.app import create_app
    from fifa.evaluation.vote.guard import INVITATION, OWNER, is_loopback
    from fifa.evaluation.vote.site import Site, run_name, voters_link

    host, given = options.host, options.allow_hosts
    names = tuple(urlsplit(name).hostname or name for name in given)
    needed = (INVITATION, OWNER) if names or not is_loopback(host) else (OWNER,)
    tokens = [
        {name: ballot.store.secret(name, renew=new_invitation) for name in needed}
        for ballot in ballots
    ]
    listening = _listen(host, options.port)
    origin = _origin(host, given, listening.getsockname()[1])
    app: Any
    if len(ballots) == 1:
        link = voters_link(origin, tokens[0])
        app = create_app(ballots[0], tokens=tokens[0], hosts=(*names, host), link=link)
        links, owner = [link, f"{origin}/admin?{OWNER}={tokens[0][OWNER]}"], []
    else:
        by_name = {run_name(ballot): ballot for ballot in ballots}
        secrets = dict(zip(by_name, tokens, strict=True))
        app = Site(by_name, secrets, hosts=(*names, host), origin=origin)
        links, owner = list(map(app.link, by_name)), [f"{origin}/?{OWNER}={app.owner}"]
    for one in owner + links:
        show_link(one)
    asked = " + ".join(f"{len(ballot.asked):,}" for ballot in ballots)
    until, ended = ballots[0].until, ballots[0].ended
    end = f" {'until' if not ended else 'ended'} {until:%Y-%m-%d %H:%M %Z}" if until else ""
    echo(f"{asked} comparisons to vote on{end}; stop with Ctrl-C, votes are kept")
    with listening, suppress(KeyboardInterrupt):  # which is how it is meant to end
        server_of(app).run(sockets=[listening])
    more = " --database ..." if options.database else ""
    for ballot in ballots:
        found = count_votes(ballot.store.read())
        echo(
            f"{found.votes:,} votes of {found.counted:,} voters; "
            f"fifa vote results {ballot.run}{more}"
        )


def server_of(app: Any, most: int | None = None, **limits: float) -> Any:
    """uvicorn with limits on connections: `fifa.evaluation.vote.connections`.

    ``most`` is found from the system if it is not given; ``limits`` go to `connections`.
    """
    import uvicorn

    from fifa.evaluation.vote.connections import connections, most_connections, quiet

    most = most or most_connections()
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            log_level="error",  # a warning a bad request would fill disks
            access_log=False,  # it would write the invitation down
            server_header=False,
            proxy_headers=False,
            lifespan="off",
            ws="none",
            http=connections(most, **limits),
            backlog=min(128, most),  # so many come in at once, before any is dropped
            h11_max_incomplete_event_size=16_384,
        )
    )
    quiet()
    return server


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise FifaError(
            f"cannot listen: {error.strerror or error}",
            where=f"{host}:{port}",
            do="choose another --port or --host",
        ) from error


def _origin(host: str, names: tuple[str, ...], port: int) -> str:
    """What the links begin with."""
    if names and "://" in names[0]:
        return names[0].rstrip("/")
    if names:
        host = names[0]
    elif host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
