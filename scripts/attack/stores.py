"""Run folders in an object store: commands killed at any request, a store that fails, two at once.

A proxy stands before a real server of S3's protocol (moto's, unless --endpoint names another): it
kills the command at a request, before the store has done it or after, or lets a share of all
requests fail: 500, 503, a connection that ends before the request is done, after it, or within the
answer. Right is the bytes of a run in a local folder, but for times, under the objects' own names
and as fifa reads them in an empty cache.

    python scripts/attack/stores.py --kills 12 --runs 3 --share 0.1 --seed 2611

Needs s3fs and moto[server].
"""

from __future__ import annotations

import argparse
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

sys.path.insert(0, str(Path(__file__).parents[1]))

from kill import TIMES, contents

KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = f"fifa-attack-{uuid4().hex[:8]}"  # of a server that may keep what is written
STALE = 4.0  # seconds, that the script need not wait for minutes
# A command in a process of its own: seconds between uploads, the machine's name, a clock that jumps
CHILD = """
import random, sys, time
from fifa.cli import main
from fifa.shards import claim, lock, mirror
every, machine, stale, jumps, *words = sys.argv[1:]
mirror.EVERY, lock.STALE, lock.BEAT = float(every), float(stale), float(stale) / 10
if machine:
    claim.machine = lambda: machine
if jumps == "jumps":
    real, draw = time.time, random.Random(1)
    time.time = lambda: real() + draw.uniform(-1e6, 1e6)
sys.argv = ["fifa", *words]
main()
"""


class Proxy(ThreadingHTTPServer):
    """Stands before a server: ``before(n)`` and ``after(n)`` are called around the nth write.

    ``share`` of all requests fail, as ``draw`` has it.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, endpoint: str, share: float = 0.0, seed: int = 0) -> None:
        self.target = urlsplit(endpoint).netloc
        self.share, self.draw = share, random.Random(seed)
        self.before: Callable[[int], None] = lambda n: None
        self.after: Callable[[int], None] = lambda n: None
        self.writes, self.seen = 0, Counter[str]()
        self.one = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self) -> str:
        """What goes wrong with the next request; "" for nothing."""
        with self.one:
            self.seen["requests"] += 1
            fails = self.draw.random() < self.share
            found = self.draw.choice(["500", "503", "reset", "lost", "cut"]) if fails else ""
            self.seen[found or "passed"] += 1
        return found

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A command that was killed hears no answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault, number = self.server.fault(), 0
        if self.command in ("PUT", "POST", "DELETE"):
            with self.server.one:
                self.server.writes += 1
                number = self.server.writes
            self.server.before(number)
        if fault in ("500", "503"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault != "reset":
            link = http.client.HTTPConnection(self.server.target, timeout=60)
            given = {k: v for k, v in self.headers.items() if k.lower() not in ("expect",)}
            link.request(self.command, self.path, body, given)
            got = link.getresponse()
            data = got.read()
            link.close()
            if number:
                self.server.after(number)
        if fault in ("reset", "lost"):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        self.send_response(got.status)
        kept = {"content-length", "transfer-encoding", "connection", "server", "date"}
        for key, value in got.getheaders():
            if key.lower() not in kept:
                self.send_header(key, value)
        size = got.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", size or "0")
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault == "cut":
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer  # noqa: N815 - http.server's names


class World:
    """A bucket, a run of the same options in a local folder, and commands on it."""

    def __init__(self, folder: Path, endpoint: str, options: list[str]) -> None:
        self.folder, self.endpoint, self.options = folder, endpoint, options
        import s3fs

        self.store = s3fs.S3FileSystem(endpoint_url=endpoint)
        if not self.store.exists(BUCKET):
            self.store.mkdir(BUCKET)
        self.finish(self.start(endpoint, str(folder / "local"), "none"))
        self.expected = contents(folder / "local")

    def start(
        self, endpoint: str, out: str, cache: str, *, every=0.3, machine="", jumps="", words=()
    ) -> subprocess.Popen[str]:
        """Begin a command, which is `filter` unless ``words`` say another."""
        given = [str(every), machine, str(STALE), jumps]
        words = list(words) or ["filter", *self.options, "--out", out]
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *given, *words],
            env={
                **os.environ,
                **KEYS,
                "AWS_ENDPOINT_URL": endpoint,
                "FIFA_CACHE": str(self.folder / cache),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str]) -> str:
        """Wait for a command that has to end well; what it said."""
        said = process.communicate(timeout=900)[0]
        if process.returncode:
            raise SystemExit(f"a run failed with {process.returncode}:\n{said}")
        return said

    def differing(self, name: str) -> list[str]:
        """Files that are not those of the local run: as objects, and as fifa reads them."""
        from fifa.shards.mirror import local

        self.store.invalidate_cache()
        os.environ["FIFA_CACHE"] = tempfile.mkdtemp(dir=self.folder)
        found = contents(local(f"s3://{BUCKET}/{name}"))
        root = f"{BUCKET}/{name}/"
        plain = {
            path.removeprefix(root): self.store.cat_file(path)
            for path in self.store.find(root)
            if not any(Path(path).match(one) for one in (*TIMES, ".fifa-*"))
        }
        return [
            path
            for path in sorted({*self.expected, *found, *plain})
            if not self.expected.get(path) == found.get(path) == plain.get(path)
        ]


def kills(world: World, count: int, draw: random.Random) -> list[str]:
    """Kill a run at a request that writes; finish it on this machine or another."""
    counter = Proxy(world.endpoint)
    world.finish(world.start(counter.url, f"s3://{BUCKET}/counted", "none"))
    told = [f"a run makes {counter.writes} requests that write"]
    for number in range(count):
        proxy, nth = Proxy(world.endpoint), draw.randint(1, counter.writes)
        name, after = f"killed-{number}", bool(number % 2)
        process = world.start(proxy.url, f"s3://{BUCKET}/{name}", f"cache-{number}", machine="a")

        def kill(n: int, nth: int = nth, process: subprocess.Popen[str] = process) -> None:
            if n == nth:
                process.send_signal(signal.SIGKILL)
                process.wait()

        setattr(proxy, "after" if after else "before", kill)
        process.communicate()
        elsewhere = bool(number % 3)
        cache, machine = (f"elsewhere-{number}", "b") if elsewhere else (f"cache-{number}", "a")
        began = time.monotonic()
        world.finish(
            world.start(world.endpoint, f"s3://{BUCKET}/{name}", cache, machine=machine, every=10)
        )
        differ = world.differing(name)
        told.append(
            f"killed {'after' if after else 'before'} request {nth} (exit {process.returncode}), "
            f"went on {'elsewhere' if elsewhere else 'here'} in {time.monotonic() - began:.0f} s: "
            + (", ".join(differ) or "the same bytes")
        )
        proxy.shutdown()
        proxy.server_close()
    return told


def faults(world: World, count: int, share: float, seed: int) -> list[str]:
    """Whole runs against a store of which a share of all requests fails."""
    told = []
    for number in range(count):
        proxy = Proxy(world.endpoint, share, seed + number)
        began = time.monotonic()
        world.finish(world.start(proxy.url, f"s3://{BUCKET}/faults-{number}", f"faults-{number}"))
        seconds = time.monotonic() - began
        differ = world.differing(f"faults-{number}")
        seen = ", ".join(f"{n} {what}" for what, n in sorted(proxy.seen.items()))
        told.append(f"{seen} in {seconds:.0f} s: " + (", ".join(differ) or "the same bytes"))
        proxy.shutdown()
        proxy.server_close()
    return told


def together(world: World, count: int, jumps: str) -> list[str]:
    """Two commands at once, of two machines; with ``jumps``, under clocks that are anywhere."""
    told = []
    for number in range(count):
        name = f"both-{jumps}-{number}"
        both = [
            world.start(
                world.endpoint, f"s3://{BUCKET}/{name}", f"{name}-{m}", machine=m, jumps=jumps
            )
            for m in "ab"
        ]
        said = [process.communicate(timeout=900)[0] for process in both]
        codes = sorted(process.returncode for process in both)
        refused = sum("is writing here" in one for one in said)
        differ = world.differing(name)
        right = (codes == [0, 1] and refused == 1) or codes == [0, 0]
        told.append(
            f"exits {codes}, {refused} refused by name: "
            + ("" if right else "WRONG " + "\n".join(said))
            + (", ".join(differ) or "the same bytes")
        )
    return told


def race(world: World, rounds: int, writers: int = 8) -> list[str]:
    """Several write one object over the same version at one instant: one of them may."""
    from fifa.shards.stores import read_object, write_object

    name, version, wrong = f"s3://{BUCKET}/race", "", 0
    with ThreadPoolExecutor(writers) as pool:
        for number in range(rounds):
            data = [f"{number} {writer}".encode() for writer in range(writers)]
            new = list(pool.map(write_object, [name] * writers, data, [version] * writers))
            won = [pair for pair in zip(data, new, strict=True) if pair[1]]
            wrong += won != [read_object(name)]
            version = next(iter(won), (b"", version))[1]
    return [f"{rounds - wrong} of {rounds} rounds of {writers} writers had one winner"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=2611)
    parser.add_argument("--endpoint", help="of a server that is there; its keys are in AWS_...")
    asked = parser.parse_args()
    os.environ.update({key: value for key, value in KEYS.items() if key not in os.environ})

    import pyarrow.parquet as pq

    from fifa.moji.family import FEEDBACK

    server = None
    if not asked.endpoint:
        import logging

        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        server = ThreadedMotoServer(port=0, verbose=False)
        server.start()
        asked.endpoint = "http://{}:{}".format(*server.get_host_and_port())
    os.environ["AWS_ENDPOINT_URL"] = asked.endpoint
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = folder / "feedback.parquet"
        pq.write_table(pq.read_table(FEEDBACK).slice(0, 360), source)
        options = [str(source), "--margin", "column:clipscore_0,clipscore_1", "--keep", "0.2"]
        options += ["--quality", "column:proxy_0", "--diversity", "none"]
        world = World(folder, asked.endpoint, options)
        parts = [
            ("killed", lambda: kills(world, asked.kills, random.Random(asked.seed))),
            ("failing", lambda: faults(world, asked.runs, asked.share, asked.seed)),
            ("two at once", lambda: together(world, asked.runs, "")),
            ("two at once, clocks that jump", lambda: together(world, asked.runs, "jumps")),
        ]
        if not server:  # moto looks at a condition and writes in two steps
            parts.append(("writers at one instant", lambda: race(world, 100)))
        for title, told in parts:
            print(title, flush=True)
            for line in told():
                print(f"  {line}", flush=True)
    if server:
        with suppress(Exception):
            server.stop()


if __name__ == "__main__":
    main()
