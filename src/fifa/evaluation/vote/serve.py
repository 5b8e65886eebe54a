"""The server: uvicorn on one address, until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from fifa.config import Vote
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.results import count_votes
from fifa.models.optional import require
from fifa.shards.lock import only_writer


def serve_votes(
    run: str | Path,
    options: Vote | None = None,
    *,
    new_invitation: bool = False,
    show_link: Callable[[str], None] = print,
) -> None:
    """Serve the voting page of a run until it is stopped.

    Parameters
    ----------
    run, options
        As for `Ballot`. Beyond loopback, and behind a proxy, visitors need the invitation in the
        link that is shown, and results another one.
    new_invitation
        Make a new token: the links given out so far end.
    show_link
        Gets the links, one at a time.

    Raises
    ------
    FifaError
        As `Ballot` does, and where the address cannot be listened on.
    """
    for module in ("starlette", "uvicorn"):
        require(module, "vote")
    options = options or Vote()
    folder = Path(run) / FOLDER
    with only_writer(folder) if folder.is_dir() else nullcontext():
        _serve(run, options, new_invitation, show_link)


def _serve(
    run: str | Path, options: Vote, new_invitation: bool, show_link: Callable[[str], None]
) -> None:
    from fifa.evaluation.vote.app import create_app
    from fifa.evaluation.vote.guard import INVITATION, OWNER, is_loopback

    host, names = options.host, options.allow_hosts
    ballot = Ballot(run, options)
    tokens = None
    if names or not is_loopback(host):
        tokens = {
            name: ballot.store.secret(name, renew=new_invitation) for name in (INVITATION, OWNER)
        }
    app = create_app(ballot, tokens=tokens, hosts=(*names, host))
    listening = _listen(host, options.port)
    port = listening.getsockname()[1]
    base = f"http://{_address(host, names)}:{port}"
    show_link(f"{base}/" + (f"?{INVITATION}={tokens[INVITATION]}" if tokens else ""))
    show_link(f"{base}/results" + (f"?{OWNER}={tokens[OWNER]}" if tokens else ""))
    echo(f"{len(ballot.asked):,} comparisons to vote on; stop with Ctrl-C, votes are kept")
    with listening, suppress(KeyboardInterrupt):  # which is how it is meant to end
        server_of(app).run(sockets=[listening])
    found = count_votes(ballot.store.read())
    echo(f"{found.votes:,} votes of {found.counted:,} voters; fifa vote results {run}")


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


def _address(host: str, names: tuple[str, ...]) -> str:
    if names:
        return names[0]
    if host in ("0.0.0.0", "::"):
        return socket.gethostname()
    return f"[{host}]" if ":" in host else host
