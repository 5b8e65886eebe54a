"""Clients that mean ill, at a real socket: nobody else is shut out, and nothing is written down."""

from __future__ import annotations

import logging
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import httpx2
import pytest
from vote_worlds import make_run

from fifa.errors import FifaError
from fifa.evaluation.vote import connections as limits
from fifa.evaluation.vote.app import create_app
from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.connections import most_connections, network
from fifa.evaluation.vote.serve import server_of


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The page on a socket of loopback, for 32 connections that are quick."""
    ballot = Ballot(make_run(tmp_path_factory.mktemp("run"), prompts=4, seeds=1, size=8))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = server_of(create_app(ballot), most=32, request=0.4, answer=0.4)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


@pytest.fixture(autouse=True)
def silence(capfd: pytest.CaptureFixture[str]) -> Iterator[None]:
    """Whatever comes, nothing is written down, and the page serves on."""
    yield
    assert capfd.readouterr().err == ""


def ask(port: int, data: bytes, timeout: float = 5) -> bytes:
    """Everything that comes back for ``data``."""
    with socket.create_connection(("127.0.0.1", port), timeout) as peer:
        peer.sendall(data)
        got = b""
        with suppress(ConnectionError):
            while piece := peer.recv(1 << 16):
                got += piece
    return got


def vote_once(port: int) -> int:
    """A person comes, sees both pictures and votes; gives the position after it."""
    with httpx2.Client(
        base_url=f"http://127.0.0.1:{port}", follow_redirects=True, verify=False
    ) as client:
        own = re.search(r'name="token" value="(\w+)"', client.get("/").text)
        assert own
        page = client.post("/start", data={"token": own[1]}).text
        for image in re.findall(r"/image/\w+\.png", page):
            assert client.get(image).content.startswith(b"\x89PNG")
        fields = {"token": own[1], "position": "0", "answer": "left"}
        answer = client.post("/vote", data=fields, headers={"accept": "application/json"})
        return int(answer.json()["position"])


HALF = b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: "
BODY = (
    b"POST /vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n\r\ntoken="
)


@pytest.mark.parametrize("half", [b"", HALF, BODY, b"\x16\x03\x01"])
def test_a_crowd_of_half_requests_shuts_nobody_out(port: int, half: bytes) -> None:
    with ExitStack() as crowd:
        for _ in range(100):
            peer = crowd.enter_context(socket.create_connection(("127.0.0.1", port)))
            with suppress(ConnectionError):
                peer.sendall(half)
        assert vote_once(port) == 1


@pytest.mark.parametrize(
    ("start", "drop"),
    [(b"", b"G"), (HALF, b"x"), (BODY, b"a"), (b"GET / HTTP/1.1\r\n", b"X: y\r\n")],
)
def test_a_request_that_drips_is_dropped(port: int, start: bytes, drop: bytes) -> None:
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), 5) as peer:
        peer.sendall(start)
        with pytest.raises(ConnectionError):
            while True:
                peer.sendall(drop)
                time.sleep(0.03)
    assert 0.3 < time.monotonic() - begun < 3
    assert vote_once(port) == 1


def test_who_does_not_take_an_answer_is_dropped(port: int) -> None:
    begun = time.monotonic()
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.connect(("127.0.0.1", port))
        peer.settimeout(3)
        with pytest.raises((ConnectionError, TimeoutError)):
            while time.monotonic() - begun < 5:  # pipelined, never read
                peer.sendall(b"GET /vote.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 100)
    assert time.monotonic() - begun < 4
    assert vote_once(port) == 1


def test_the_network_with_most_connections_gives_way() -> None:
    assert network("1.2.3.4") == "1.2.3.4" != network("1.2.3.5")
    assert network("2001:db8::1") == network("2001:db8:0:0:ffff::2%eth0")
    assert network("2001:db8::1") != network("2001:db8:0:1::1")
    assert network("odd") == "odd"


def test_files_are_enough_for_the_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    resource = pytest.importorskip("resource")
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda kind, both: asked.append(both))
    for soft, hard, most in [
        (256, 256, 42), (1024, 1024, 298), (1024, 20_000, 512), (20_000, 20_000, 512),
        (-1, -1, 512), (256, -1, 512),
    ]:  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda kind, both=(soft, hard): both)
        assert most_connections() == most
    assert all(soft <= 3 * limits.MOST + limits.FILES for soft, _ in asked)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    with pytest.raises(FifaError, match="only 64 files"):
        most_connections()


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.mark.parametrize("name", ["uvicorn.error", "asyncio"])
def test_messages_that_are_alike_are_said_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log, heard = logging.Logger(name), Heard()
    log.addHandler(heard)
    monkeypatch.setitem(logging.Logger.manager.loggerDict, name, log)
    for _ in range(2):  # two servers in one process, each with its own
        limits.quiet()
        for error in [OSError("one"), OSError("more"), ValueError("two")] * 9:
            log.error("socket.accept() out of system resource", exc_info=error)
    assert len(heard.records) == 4
    assert len(log.filters) == 1


HEAD = b" HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
FORM = b"Content-Type: application/x-www-form-urlencoded\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /" + HEAD + b"\r\n", 200),
        (b"HEAD /" + HEAD + b"\r\n", 200),
        (b"GET / HTTP/1.0\r\n\r\n", 421),
        (b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"OPTIONS *" + HEAD + b"\r\n", 404),
        (b"TRACE /" + HEAD + b"\r\n", 405),
        (b"CONNECT evil.example:80" + HEAD + b"\r\n", 404),
        (b"GET http://evil.example/" + HEAD + b"\r\n", 404),
        (b"GET /../../etc/passwd" + HEAD + b"\r\n", 404),
        (b"GET /image/..%2f..%2fvotes.sqlite" + HEAD + b"\r\n", 404),
        (b"GET /%00%ff" + HEAD + b"\r\n", 404),
        (b"GET /\xff" + HEAD + b"\r\n", 400),
        (b"GET /?" + b"a=1&" * 50 + HEAD + b"\r\n", 200),  # nobody reads it
        (b"GET /" + b"a" * 20_000 + HEAD + b"\r\n", 404),
        (b"GET /" + HEAD + b"X: " + b"a" * 70_000, 400),
        (b"GET /" + HEAD + b"Cookie: \xff\xfe; =;;\r\n\r\n", 200),
        (b"GET /" + HEAD + b"Upgrade: websocket\r\nConnection: upgrade\r\n\r\n", 200),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 5\r\nOrigin: http://[\r\n\r\na=b&c", 403),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 5000\r\n\r\n" + b"a" * 5000, 413),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: -1\r\n\r\n", 400),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: " + b"9" * 18 + b"\r\n\r\n", 413),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: " + b"9" * 99 + b"\r\n\r\n", 400),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\na=b&c", 400),
        (b"POST /vote" + HEAD + FORM + b"Transfer-Encoding: chunked\r\n\r\n3\r\na=b\r\n0\r\n\r\n",
         411),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n"
         b"fffff\r\n" + b"a" * 0xFFFFF, 411),
        (b"POST /vote" + HEAD + FORM + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"POST /vote" + HEAD + FORM + b"Transfer-Encoding: gzip\r\n\r\n", 400),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 3\r\n\r\na=b", 403),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 3\r\n\r\na=\xff", 400),
        (b"POST /vote" + HEAD + FORM + b"Content-Length: 5\r\n\r\na=%ff", 400),
        (b"POST /vote" + HEAD + b"Content-Length: 3\r\n\r\na=b", 415),
        (b"\x00\x01\x02\r\n\r\n", 400),
        (b"POST /vote" + HEAD + FORM + b"Transfer-Encoding: chunked\r\n\r\n-1\r\n", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 421),
    ],
)  # fmt: skip
def test_odd_requests_have_an_answer_in_words(port: int, data: bytes, status: int) -> None:
    first = ask(port, data).partition(b"\r\n")[0].split(b" ")
    assert int(first[1]) == status


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    paths = (b"/vote.js", b"/nothing", b"/vote.css")
    sent = b"".join(b"GET %b HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % path for path in paths)
    got = ask(port, sent + b"GET /icon.svg" + HEAD + b"\r\n")
    assert re.findall(rb"HTTP/1\.1 (\d+)", got) == [b"200", b"404", b"200", b"200"]


def test_any_bytes_leave_the_page_as_it_was(port: int) -> None:
    draw = random.Random(4)
    parts = [b"GET / HTTP/1.1\r\n", b"POST /vote HTTP/1.1\r\n", b"Host: 127.0.0.1\r\n", FORM,
             b"Content-Length: 9\r\n", b"Transfer-Encoding: chunked\r\n", b"\r\n", b"a=b&c=%zz",
             b"5\r\nhello\r\n", b"0\r\n\r\n", b"-1\r\n", b"Expect: 100-continue\r\n", b"\xff\0",
             b"Connection: close\r\n", b"Cookie: fifa_voter=" + b"a" * 30 + b"\r\n"]  # fmt: skip
    for _ in range(120):
        data = b"".join(draw.choices(parts, k=draw.randint(1, 12)))
        with socket.create_connection(("127.0.0.1", port), 5) as peer:
            peer.sendall(data)
            if draw.random() < 0.5:
                peer.shutdown(socket.SHUT_WR)
            peer.settimeout(0.005)
            with suppress(OSError):
                got = peer.recv(1 << 16)
                assert b"HTTP/1.1 500" not in got, data
    assert ask(port, b"GET /" + HEAD + b"\r\n").startswith(b"HTTP/1.1 200")
