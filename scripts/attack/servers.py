"""Attack fetching and endpoints: python scripts/attack/servers.py.

One row a line: what, tried, result.
Servers on loopback drip, flood, redirect, lie about lengths and answer in every wrong shape. Right
is an image or a rating, or a reason in words, in time and in little memory; anything else is marked
WRONG, and the command ends with 1.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from io import StringIO
from typing import Any

from fifa.data.fetch import FetchError, fetch
from fifa.errors import FifaError
from fifa.scoring.raters.endpoint import EndpointRater

KEY = "sk-not-to-be-seen-4711"
SECONDS, GRACE = 0.4, 2.0  # for an exchange; what starting and back-off may take beside it
MEGABYTES = 100  # more than before, at the peak
Send = Callable[[bytes], None]

SPELLINGS = """127.1 2130706433 0x7f000001 0x7f.1 0177.1 017700000001 127.0.0.1. localhost. 0
[::ffff:7f00:1] [::127.0.0.1] [::1%25lo] [fe80::1%25lo] [64:ff9b::7f00:1] [64:ff9b:1::a00:1] 10.1
[2002:7f00:1::] [2001:0:7f00:1::] [3fff::1] [5f00::1] [fc00::1] [fec0::1] [ff02::1] 0xa9fea9fe
2852039166 0251.0376.0251.0376 192.168.257 100.64.1 192.0.0.8 192.88.99.1 198.18.1 224.1 240.1
127\u30020\u30020\u30021 \u2460\u2461\u2466.0.0.1 x@127.0.0.1 127.0.0.1:80@8.8.8.8"""

OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
ENDLESS = {
    "status line": (b"", b"H"),
    "header": (OK, b"X"),
    "headers": (OK, b"X: y\r\n"),
    "100 Continue": (b"", CONTINUE),
    "chunk size": (CHUNKED, b"0"),
    "chunk extension": (CHUNKED + b"5;", b"x"),
    "chunks": (CHUNKED, b"1\r\n \r\n"),
    "trailers": (CHUNKED + b"0\r\n", b"X: y\r\n"),
    "body": (OK + b"\r\n", b" "),
    "body of a length": (OK + b"Content-Length: 99999999\r\n\r\n", b" "),
}
PLACES = ["http://[", "http://x:99999/", "//127.0.0.1/", "http://localhost/", "file:///etc/x",
          "http://[::ffff:10.0.0.1]/", "\0", "http://\xff..x/", "http://0x7f.1/", "/a"]  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--random", type=int, default=60, help="answers put together at random")
    asked = parser.parse_args()
    os.environ["OPENAI_API_KEY"] = KEY
    os.environ["NO_PROXY"] = "127.0.0.1"
    draw = random.Random(asked.seed)
    wrong = 0
    for row in [*fetching(draw, asked.random), *endpoints(draw, asked.random)]:
        wrong += "WRONG" in row
        print(row, flush=True)
    return int(wrong > 0)


@contextmanager
def serving(answer: Callable[[Send, bytes], None]) -> Iterator[int]:
    """A server that sends what ``answer`` says to every request; yields the port."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:

        def one(peer: socket.socket) -> None:
            with suppress(OSError), peer:
                peer.settimeout(20)
                request = b""
                while b"\r\n\r\n" not in request:
                    request += peer.recv(1 << 16) or b"\r\n\r\n"
                head, _, body = request.partition(b"\r\n\r\n")
                for line in head.lower().split(b"\r\n"):
                    if line.startswith(b"content-length:"):
                        while len(body) < int(line.partition(b":")[2]):
                            body += peer.recv(1 << 16)
                answer(peer.sendall, head + b"\r\n\r\n" + body)

        def serve() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=one, args=listening.accept()[:1], daemon=True).start()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield int(listening.getsockname()[1])
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)


def judged(what: str, tried: str, work: Callable[[], str], seconds: float = SECONDS) -> str:
    """One row: what ``work`` says, and whether it ended well, in time and in little memory."""
    before, begun = _peak(), time.monotonic()
    try:
        said = work() or "nothing"
    except (FetchError, FifaError) as error:
        said = str(error)
    except BaseException as error:
        said = f"WRONG {type(error).__name__}: {error}"
    took, more = time.monotonic() - begun, _peak() - before
    bad = [why for why, is_so in {
        "too slow": took > seconds + GRACE,
        f"{more} MB": more > MEGABYTES,
        "the key is told": KEY in said,
    }.items() if is_so]  # fmt: skip
    flag = f"WRONG ({', '.join(bad)}) " if bad else ""
    return f"{what} | {tried} | {flag}{said.splitlines()[0][:110]} ({took:.1f} s)"


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def sends(data: bytes) -> Callable[[Send, bytes], None]:
    """Answer with ``data``."""
    return lambda send, _: send(data)


def drip(start: bytes, drop: bytes, pause: float) -> Callable[[Send, bytes], None]:
    """Send ``start``, then ``drop`` for ever: slowly, or without pause many at once."""

    def answer(send: Send, _: bytes) -> None:
        send(start)
        while True:
            send(drop if pause else drop * 10_000)
            time.sleep(pause)

    return answer


def fetching(draw: random.Random, count: int) -> Iterator[str]:
    """What images' servers may do."""
    asked: list[str] = []
    for host in SPELLINGS.split():
        with suppress(FetchError):
            fetch(f"http://{host}:9/a.png", max_bytes=9, timeout=5)
            asked.append(host)
        with suppress(FetchError), serving(sends(OK)) as port:
            fetch(f"http://{host.partition(':80@')[0]}:{port}/", max_bytes=9, timeout=5)
            asked.append(host)
    spelled = len(SPELLINGS.split())
    yield f"fetch | {spelled} spellings of addresses that are not public | {len(asked)} asked" + (
        f" WRONG {asked}" if asked else ""
    )

    def get(port: int) -> str:
        options = {"resolve": lambda *_: ["127.0.0.1"], "allowed": lambda _: True}
        url = f"http://a.example:{port}/a.png"
        return f"{len(fetch(url, max_bytes=1 << 20, timeout=SECONDS, **options)):,} bytes"

    for pause in (0.02, 0.0):
        for name, (start, drop) in ENDLESS.items():
            with serving(drip(start, drop, pause)) as port:
                how = "dripped" if pause else "flooded"
                yield judged("fetch", f"{how} {name}", lambda port=port: get(port))
    for place in PLACES:
        head = f"HTTP/1.1 302 Found\r\nLocation: {place}\r\n\r\n".encode("latin-1")
        with serving(sends(head)) as port:
            yield judged("fetch", f"to {place!r}", lambda port=port: get_checked(port))
    parts = [OK, CHUNKED, CONTINUE, b"\r\n", b"Content-Length: ", b"5\r\nhello\r\n", b"0\r\n\r\n",
             b"HTTP/1.1 302 x\r\n", b"Location: ", b"http://[", b"-7", b"9" * 5000, b"X: y\r\n",
             b"Content-Encoding: gzip\r\n", gzip.compress(bytes(1 << 20)), b"\0\xff"]  # fmt: skip

    def some() -> str:
        for _ in range(count):
            data = b"".join(draw.choices(parts, k=draw.randint(0, 9)))
            with serving(sends(data)) as port, suppress(FetchError):
                get(port)
        return "each an image or a reason"

    yield judged("fetch", f"{count} random answers", some, count * SECONDS)


def get_checked(port: int) -> str:
    """Fetch where only the first server's name is allowed."""
    names = {"a.example": "127.0.0.1"}
    resolve: Any = lambda host, _: [names.get(host, "127.0.0.2")]  # noqa: E731
    allowed = "127.0.0.1".__eq__
    url = f"http://a.example:{port}/a.png"
    return f"{len(fetch(url, max_bytes=9, timeout=SECONDS, resolve=resolve, allowed=allowed))}"


def reply(body: bytes, status: int = 200, headers: str = "") -> bytes:
    """A whole answer of HTTP."""
    head = (
        f"HTTP/1.1 {status} x\r\nContent-Length: {len(body)}\r\n{headers}Connection: close\r\n\r\n"
    )
    return head.encode("latin-1") + body


def completion(finish: Any = "stop", **message: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "finish_reason": finish, "message": message}]}


GRADES = json.dumps({"clarity": 4, "specificity": 3, "harmlessness": 5, "flags": []})
SHAPES: dict[str, Any] = {
    "good": completion(content=GRADES),
    **{f"choices {json.dumps(one)[:40]}": {"choices": one} for one in (
        {"0": {}}, "text", 7, None, True, [], [None], [[]], [{}], [7], [{"message": []}],
        [{"message": None}], [{"text": GRADES}], [{"delta": {"content": GRADES}}])},
    **{f"content {json.dumps(one)[:40]}": completion(content=one) for one in (
        None, "", 7, {"text": GRADES}, [GRADES], [{"type": "text", "text": {"value": GRADES}}],
        [{"type": "thinking", "text": GRADES}], [[]], "<think>" + GRADES, "\ud800", GRADES[:30],
        "[THINK]" + GRADES, "{" * 100_000, '{"clarity": ' + "9" * 5000 + "}")},
    "content of two texts": completion(content=[{"type": "text", "text": GRADES[:9]},
                                                {"type": "text", "text": GRADES[9:]}]),
    **{f"finish_reason {one!r}": completion(one, content=GRADES) for one in (
        "length", "max_tokens", "content_filter", "SAFETY", 7, [], None)},
    "refusal": completion(content=None, refusal="I can't."),
    "tool call": completion("tool_calls", content=None, tool_calls=[{"id": "1"}]),
    "reasoning_content": completion(content=None, reasoning_content=GRADES),
    "odd usage": completion(content=GRADES) | {"usage": {"prompt_tokens": 1e999}},
    **{f"body {json.dumps(one)[:30]}": one for one in ([], "text", 7, None, [[]], {})},
    **{f"error {json.dumps(one)[:50]}": {"error": one} for one in (
        "text", {"code": 500}, {"code": "429"}, {"code": 429, "message": KEY}, {"code": -1}, [1],
        {"code": 1e999}, {"type": "overloaded_error"}, {"code": [], "message": {"a": 1}}, 7)},
    "error in a choice": {"choices": [{"message": {}, "error": {"code": 502, "message": "bad"}}]},
}  # fmt: skip
BODIES = {
    "empty": b"",
    "a page": b"<html><b>Welcome " + KEY.encode(),
    "events": b"data: " + json.dumps(completion(content=GRADES)).encode() + b"\n\ndata: [DONE]\n",
    "two lines": b'{"a": 1}\n{"b": 2}\n',
    "BOM": b"\xef\xbb\xbf" + json.dumps(completion(content=GRADES)).encode(),
    "UTF-16": json.dumps(completion(content=GRADES)).encode("utf-16"),
    "not UTF-8": b'{"choices": "\xff\xfe"}',
    "deep": b'{"choices":' + b"[" * 200_000,
    "long number": b'{"choices": ' + b"9" * 100_000 + b"}",
}
RETRY = ["nan", "-1", "1e999", "9" * 400, "Wed, 21 Oct 99999999 07:28:00 GMT", "\xff",
         "Wed, 99 Oct 2026 07:28:00 +9999999999"]  # fmt: skip


def endpoints(draw: random.Random, count: int) -> Iterator[str]:
    """What endpoints may answer."""

    def rate(port: int, prompts: int = 3) -> str:
        mine = EndpointRater(
            "m",
            f"http://127.0.0.1:{port}/v1",
            timeout=SECONDS,
            in_flight=2,
            attempts=1,
            max_retries=1,
        )
        with redirect_stderr(StringIO()) as told:
            table = mine.rate([f"prompt {i}" for i in range(prompts)])
        return (
            f"{prompts - table['clarity'].null_count} of {prompts} rated {told.getvalue().strip()}"
        )

    def row(tried: str, answer: Callable[[Send, bytes], None], seconds: float = 4) -> str:
        with serving(answer) as port:
            return judged("endpoint", tried, lambda: rate(port), seconds)

    for name, shape in SHAPES.items():
        body = json.dumps(shape).encode()
        yield row(name, sends(reply(body)))
    for name, body in BODIES.items():
        yield row(name, sends(reply(body)))
    for code in ("gzip", "GZIP, identity", "br", "deflate", "x"):
        bomb, head = gzip.compress(bytes(60 << 20)), f"Content-Encoding: {code}\r\n"
        yield row(f"encoded {code}", sends(reply(bomb, 200, head)))
    for pause in (0.02, 0.0):
        for name, (start, drop) in ENDLESS.items():
            yield row(f"{'dripped' if pause else 'flooded'} {name}", drip(start, drop, pause), 6)
    refused = json.dumps({"error": {"message": f"no {KEY} here"}}).encode()
    for status in (300, 400, 401, 403, 404, 413, 418, 422, 429, 500, 503, 599, 204, 101, 999):
        data = reply(refused if status != 204 else b"", status, "Retry-After-Ms: 1\r\n")
        yield row(f"HTTP {status}", sends(data))
    for after in RETRY:
        data = reply(refused, 429).replace(b"Connection", f"Retry-After: {after}\r\nC".encode(
            "latin-1") + b"onnection")  # fmt: skip
        yield row(f"Retry-After: {after[:40]!r}", sends(data))
    there: list[bytes] = []
    with serving(lambda send, request: there.append(request)) as elsewhere:
        for status in (301, 302, 303, 307, 308):
            secret = f"//u:{KEY}@localhost:{elsewhere}/{KEY}?{KEY}"
            for place in (f"http://127.0.0.1:{elsewhere}/", secret, "http://[", "http://\xff/"):
                data = reply(b"", status, f"Location: {place}\r\n")
                yield row(f"HTTP {status} to {place[:24]}", sends(data))
    yield f"endpoint | requests where redirects lead | {len(there)}" + (" WRONG" if there else "")
    yield row("refuses max_tokens, then its other name, temperature, format", picky, 6)
    parts = [OK, CHUNKED, CONTINUE, b"\r\n", b"Content-Length: ", b"Content-Type: x\r\n",
             b"5\r\nhello\r\n", b"0\r\n\r\n", b"HTTP/1.1 429 x\r\n", b"HTTP/1.1 307 x\r\n", b"7",
             b"Location: http://[\r\n", b"Retry-After: 1e999\r\n", refused, b"\0\xff",
             json.dumps(SHAPES["good"]).encode()]  # fmt: skip

    def some() -> str:
        for _ in range(count // 3):
            data = b"".join(draw.choices(parts, k=draw.randint(0, 9)))
            with serving(sends(data)) as port, suppress(FifaError):
                rate(port, 1)
        return "each a rating or a reason"

    yield judged("endpoint", f"{count // 3} random answers", some, count * (SECONDS + 1))


def picky(send: Send, request: bytes) -> None:
    """A server that takes nothing but the messages."""
    if not request.startswith(b"POST"):
        return None  # whether somebody listens
    body = json.loads(request.partition(b"\r\n\r\n")[2])
    for name, words in {
        "max_tokens": "max_tokens is not supported, use max_completion_tokens",
        "max_completion_tokens": "max_completion_tokens is too large",
        "temperature": "temperature does not support 0.0",
        "response_format": "response_format is unknown",
    }.items():
        if name in body:
            return send(
                reply(json.dumps({"error": {"message": words, "param": name}}).encode(), 400)
            )
    return send(reply(json.dumps(SHAPES["good"]).encode()))


if __name__ == "__main__":
    sys.exit(main())
