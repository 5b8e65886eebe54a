"""Fetching against real loopback servers, and the addresses that are never asked."""

from __future__ import annotations

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.data.fetch import FetchError, fetch, is_public

BODY = b"image bytes" * 1000


class Handler(http.server.BaseHTTPRequestHandler):
    hosts: list[str] = []  # noqa: RUF012 - shared on purpose: what the server has been asked

    def do_GET(self) -> None:
        self.hosts.append(self.headers["Host"])
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path.removeprefix("/to/"))
            self.end_headers()
            return
        self.send_response(404 if self.path == "/missing" else 200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        try:
            if self.path == "/endless":
                for _ in range(10_000):
                    self.wfile.write(b"x" * 10_000)
            elif self.path == "/slow":
                for byte in BODY[:100]:
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                    time.sleep(0.1)
            elif self.path == "/short":
                self.wfile.write(BODY[:100])
            else:
                self.wfile.write(BODY)
        except OSError:
            pass  # the client has had enough

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Handler.hosts.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_address[1]
        running.shutdown()


def get(url: str, **options: object) -> bytes:
    """Fetch with every name at home and home allowed."""
    settings = {"resolve": lambda host, port: ["127.0.0.1"], "allowed": lambda address: True}
    return fetch(url, max_bytes=1_000_000, **(settings | options))


def test_the_bytes_come_from_the_checked_address_under_the_hosts_name(port: int) -> None:
    assert get(f"http://pictures.example:{port}/a.png") == BODY
    assert Handler.hosts == [f"pictures.example:{port}"]


def test_without_leave_nothing_on_this_machine_is_asked(port: int) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0.0.0.0", "127.1"):
        with pytest.raises(FetchError):
            fetch(f"http://{host}:{port}/a.png", max_bytes=1000)
    assert not Handler.hosts


SPELLINGS = """
    127.1 2130706433 0x7f000001 0x7f.1 0177.1 017700000001 127.0.0.1. localhost. LOCALHOST 0 0x0
    [::ffff:7f00:1] [::127.0.0.1] [::1%25lo] [fe80::1%25lo] [64:ff9b::7f00:1] [2002:7f00:1::]
    0xa9fea9fe 2852039166 0251.0376.0251.0376 10.1 192.168.257 \uff11\uff12\uff17.0.0.1
    127\u30020\u30020\u30021 \u2460\u2461\u2466.0.0.1
    x@127.0.0.1 127.0.0.1:80@8.8.8.8 127.0.0.1%00.example
"""


@pytest.mark.parametrize("host", SPELLINGS.split())
def test_however_an_address_is_spelled_it_is_checked(host: str) -> None:
    with pytest.raises(FetchError, match=r"not on the public|cannot resolve|user name"):
        fetch(f"http://{host}/a.png", max_bytes=1000, timeout=5)


def test_one_private_address_among_public_ones_is_enough_to_refuse(port: int) -> None:
    with pytest.raises(FetchError, match=r"10\.0\.0\.1"):
        fetch(
            f"http://x.example:{port}/a", max_bytes=9, resolve=lambda h, p: ["8.8.8.8", "10.0.0.1"]
        )


def test_a_name_is_resolved_once_for_check_and_use(port: int) -> None:
    asked = []

    def rebinding(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    assert get(f"http://x.example:{port}/a", resolve=rebinding) == BODY
    assert asked == ["x.example"]


def test_redirects_are_followed_and_checked_again(port: int) -> None:
    assert get(f"http://a.example:{port}/to//b.png") == BODY
    assert get(f"http://a.example:{port}/to/http://b.example:{port}/c") == BODY
    inside = {"a.example": ["127.0.0.1"], "evil.example": ["127.0.0.2"]}
    with pytest.raises(FetchError, match="not on the public internet"):
        get(
            f"http://a.example:{port}/to/http://evil.example:{port}/",
            resolve=lambda host, port: inside[host],
            allowed=lambda address: address == "127.0.0.1",
        )
    with pytest.raises(FetchError, match="only http"):
        get(f"http://a.example:{port}/to/file:///etc/passwd")
    with pytest.raises(FetchError, match="redirects"):
        get(f"http://a.example:{port}" + f"/to/http://a.example:{port}" * 7 + "/x")


@pytest.mark.parametrize(
    ("path", "reason"),
    [("/missing", "404"), ("/endless", "more than"), ("/short", "cannot fetch")],
)
def test_answers_that_do_not_do(port: int, path: str, reason: str) -> None:
    with pytest.raises(FetchError, match=reason):
        get(f"http://a.example:{port}{path}")


def test_announced_size_and_time_are_limited(port: int) -> None:
    with pytest.raises(FetchError, match="more than 100 bytes"):
        fetch(
            f"http://a.example:{port}/a", max_bytes=100, allowed=lambda a: True,
            resolve=lambda h, p: ["127.0.0.1"],
        )  # fmt: skip
    started = time.monotonic()
    with pytest.raises(FetchError):
        get(f"http://a.example:{port}/slow", timeout=0.5)
    assert time.monotonic() - started < 5


@contextmanager
def raw_server(send: Callable[[Callable[[bytes], None]], None]) -> Iterator[str]:
    """A server that answers with whatever ``send`` writes; yields an image's URL."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):
                peer, _ = listening.accept()
                with peer:
                    peer.recv(1 << 16)
                    send(peer.sendall)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://a.example:{listening.getsockname()[1]}/a.png"
    thread.join(5)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("start", "drop"),
    [
        (b"", b"H"),  # the status line
        (b"HTTP/1.1 200 OK\r\n", b"X"),  # a header
        (CHUNKED, b"0"),  # a chunk's size
        (CHUNKED, b"1\r\nx\r\n"),  # chunks
        (CHUNKED + b"5;", b"x"),  # a chunk's extension
        (CHUNKED + b"0\r\n", b"X: y\r\n"),  # trailers
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b"x"),  # the body
    ],
)
def test_whatever_is_dripped_ends_at_the_deadline(start: bytes, drop: bytes) -> None:
    def drip(send: Callable[[bytes], None]) -> None:
        send(start)
        while True:
            send(drop)
            time.sleep(0.02)

    with raw_server(drip) as url:
        started = time.monotonic()
        with pytest.raises(FetchError, match="takes too long"):
            get(url, timeout=0.2)
        assert time.monotonic() - started < 1.5


@pytest.mark.parametrize(
    ("start", "flood"),
    [
        (CHUNKED + b"0\r\n", b"X: y\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (CHUNKED, b"1\r\nx\r\n"),
    ],
)
def test_what_comes_fast_and_without_end_is_limited_by_bytes(start: bytes, flood: bytes) -> None:
    def pour(send: Callable[[bytes], None]) -> None:
        send(start)
        while True:
            send(flood * 10_000)

    with raw_server(pour) as url, pytest.raises(FetchError, match="framing"):
        fetch(
            url, max_bytes=300_000, timeout=20, allowed=lambda a: True,
            resolve=lambda h, p: ["127.0.0.1"],
        )  # fmt: skip


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 302 Found\r\nLocation: http://[\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://x:99999/\r\n\r\n",
        b"HTTP/1.1 302 Found\r\nLocation: http://\xff\xfe..x/\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort",
        b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000 + b"\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n",
        CHUNKED + b"f" * 5000 + b"\r\n",
        b"HTTP/9.9 200 OK\r\n\r\n",
        b"nonsense\r\n\r\n",
        b"",
    ],
)
def test_whatever_a_server_sends_is_that_images_trouble(answer: bytes) -> None:
    with raw_server(lambda send: send(answer)) as url, suppress(FetchError):
        get(url, timeout=2)


PARTS = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 302 x\r\n", CHUNKED,
     b"Location: ", b"http://[", b"//x", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n",
     b"\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"-1\r\n", b"7"]
)  # fmt: skip


@settings(max_examples=60, derandomize=True)
@given(st.lists(PARTS | st.binary(max_size=9), max_size=9).map(b"".join))
def test_any_bytes_are_an_image_or_a_reason(answer: bytes) -> None:
    with raw_server(lambda send: send(answer)) as url, suppress(FetchError):
        assert isinstance(get(url, timeout=0.3), bytes)


def test_a_chunked_body_is_put_together() -> None:
    pieces = b"".join(b"%x;a=b\r\n%b\r\n" % (len(BODY), BODY) for _ in range(3))
    with raw_server(lambda send: send(CHUNKED + pieces + b"0\r\nX: y\r\n\r\n")) as url:
        assert get(url) == 3 * BODY


def test_a_resolver_that_sleeps_ends_at_the_deadline() -> None:
    def sleepy(host: str, port: int) -> list[str]:
        time.sleep(0.6)
        return ["127.0.0.1"]

    started = time.monotonic()
    with pytest.raises(FetchError, match="takes too long"):
        get("http://a.example:9/", resolve=sleepy, timeout=0.1)
    assert time.monotonic() - started < 0.5


def test_paths_beyond_ascii_are_asked_for_as_browsers_do(port: int) -> None:
    assert get(f"http://a.example:{port}/ü b%20c.png?q=ä&r=[1]") == BODY


@pytest.mark.parametrize(
    "url",
    ["file:///etc/passwd", "ftp://x.example/a", "http:///a", "http://user:pw@x.example/a", "a.png",
     "http://x.example:99999/", "http://[::1/", "gopher://x.example"],
)  # fmt: skip
def test_odd_urls_are_refused(url: str) -> None:
    with pytest.raises(FetchError):
        get(url)


def test_a_host_that_does_not_resolve() -> None:
    def fails(host: str, port: int) -> list[str]:
        raise OSError("unknown")

    with pytest.raises(FetchError, match="resolve"):
        get("http://x.example/", resolve=fails)
    with pytest.raises(FetchError, match="public"):
        get("http://x.example/", resolve=lambda h, p: [])


PRIVATE = """
    0.0.0.0 10.1.2.3 100.64.0.1 127.0.0.1 169.254.169.254 172.16.0.1 192.168.1.1 192.0.2.1
    198.18.0.1 224.0.0.1 240.0.0.1 255.255.255.255 :: ::1 ::ffff:10.0.0.1 ::ffff:127.0.0.1
    fe80::1 fe80::1%eth0 fc00::1 fec0::1 ff02::1 64:ff9b::a00:1 2002:a00:1:: 2001:0:1::1
    2001:db8::1 64:ff9b:1::1 192.0.0.8 192.0.0.170 192.88.99.1 203.0.113.5 3fff::1 5f00::1 100::1
    2001:2::1 2001:20::1 ::127.0.0.1 ::ffff:0:10.0.0.1 ::ffff:100.64.0.1 64:ff9b::a9fe:a9fe 4000::1
    1.2.3 0x7f.1 127.0.0.01 nonsense
"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_private_and_reserved_addresses_are_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "::ffff:8.8.8.8"]
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl to make a certificate")
def test_https_checks_the_certificate_of_the_host_not_of_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-keyout", key,
         "-out", certificate, "-subj", "/CN=good.example", "-addext",
         "subjectAltName=DNS:good.example"],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.socket = context.wrap_socket(running.socket, server_side=True)
        threading.Thread(target=running.serve_forever, daemon=True).start()
        port = running.server_address[1]
        try:
            with pytest.raises(FetchError, match="cannot fetch"):
                get(f"https://good.example:{port}/a")  # signed by nobody we know
            monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
            assert get(f"https://good.example:{port}/a") == BODY
            assert names[-1] == "good.example"
            with pytest.raises(FetchError, match="cannot fetch"):
                get(f"https://other.example:{port}/a")
        finally:
            running.shutdown()
