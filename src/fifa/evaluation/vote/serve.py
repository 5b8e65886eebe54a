"""The server: uvicorn on one address, until it is stopped."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.vote.ballot import Ballot, VoteOptions
from fifa.evaluation.vote.results import count_votes
from fifa.models.optional import require

PORT = 8750


def serve_votes(
    run: str | Path,
    options: VoteOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = PORT,
    allow_hosts: tuple[str, ...] = (),
    new_invitation: bool = False,
    tell: Callable[[str], None] = print,
) -> None:
    """Serve the voting page of a run until it is stopped.

    Parameters
    ----------
    run, options
        As for `Ballot`.
    host
        The address to listen on. Beyond loopback, and behind a proxy, visitors need the
        invitation in the link that is told, and results another one.
    port
        0 takes any free one.
    allow_hosts
        Further names that the server goes by, say behind a proxy.
    new_invitation
        Make a new token: the links given out so far end.
    tell
        Is told the links, a line each.

    Raises
    ------
    FifaError
        As `Ballot` does, and where the address cannot be listened on.
    """
    for module in ("starlette", "uvicorn", "python_multipart"):
        require(module, "vote")
    import uvicorn

    from fifa.evaluation.vote.app import create_app
    from fifa.evaluation.vote.guard import INVITATION, OWNER, is_loopback

    ballot = Ballot(run, options)
    tokens = None
    if allow_hosts or not is_loopback(host):
        tokens = {
            name: ballot.store.secret(name, renew=new_invitation) for name in (INVITATION, OWNER)
        }
    app = create_app(ballot, tokens=tokens, hosts=(*allow_hosts, host))
    listening = _listen(host, port)
    port = listening.getsockname()[1]
    base = f"http://{_address(host, allow_hosts)}:{port}"
    tell(f"{base}/" + (f"?{INVITATION}={tokens[INVITATION]}" if tokens else ""))
    tell(f"{base}/results" + (f"?{OWNER}={tokens[OWNER]}" if tokens else ""))
    echo(f"{len(ballot.asked):,} comparisons to vote on; stop with Ctrl-C, votes are kept")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # it would write the invitation down
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        h11_max_incomplete_event_size=16_384,
    )
    with listening, suppress(KeyboardInterrupt):  # which is how it is meant to end
        uvicorn.Server(config).run(sockets=[listening])
    found = count_votes(ballot.store)
    echo(f"{found.votes:,} votes of {found.counted:,} voters; fifa vote results {run}")


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
