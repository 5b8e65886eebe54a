"""Attack the voting page: python scripts/attack/voters.py. One row a line: what, tried, result.

A hundred voters post votes and nonsense while the server is killed; crowds of half requests hold
its connections; a voter with two sessions works out which model is where.
"""

from __future__ import annotations

import argparse
import http.client
import io
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.evaluation.vote.ballot import Ballot
from fifa.evaluation.vote.comparisons import draw_trials
from fifa.evaluation.vote.store import FILE, VoteStore
from fifa.run.folder import begin
from fifa.shards.files import write_table

FORM = {"Content-Type": "application/x-www-form-urlencoded", "Accept": "application/json"}
HALVES = (
    b"",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
    b"POST /vote HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n"
    b"Content-Type: application/x-www-form-urlencoded\r\n\r\ntoken=",
    b"GET /vote.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 50,  # and nothing is read
    b"POST /vote HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 900,
    b"\x16\x03\x01\x02",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--voters", type=int, default=100)
    parser.add_argument("--votes", type=int, default=20, help="each")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--crowd", type=int, default=1100, help="half requests")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = make_run(folder / "load", asked.votes)
        print(load(run, asked.voters, asked.kills, asked.seed).text(asked.kills))
        print(crowd(make_run(folder / "crowd", 4), asked.crowd))
        print(deck(make_run(folder / "deck", 16)))


def make_run(run: Path, prompts: int) -> Path:
    """An evaluated run of two models with images of noise."""
    begin(run)
    rng, rows = np.random.default_rng(prompts), []
    for model in ("base", "tuned"):
        for i in range(prompts):
            name = f"images/{model}/{i:04d}.png"
            path = run / "evaluate" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            out = io.BytesIO()
            Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(out, "PNG")
            path.write_bytes(out.getvalue())
            row = {"model": model, "prompt_id": f"p{i}", "prompt": f"number {i}", "seed": 0}
            rows.append(row | {"file": name, "category": None})
    write_table(run / "evaluate" / "images.parquet", pa.Table.from_pylist(rows))
    return run


@contextmanager
def served(run: Path, port: int, files: int = 1024) -> Iterator[subprocess.Popen[bytes]]:
    """`fifa vote` on ``port``, with so many files; what it says is in said.txt beside ``run``."""
    with run.with_name("said.txt").open("ab") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "fifa", "vote", str(run), "--port", str(port)],
            stdout=said, stderr=said,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files)),
        )  # fmt: skip
    try:
        _until(lambda: _listens(port) or process.poll() is not None, 120)
        if process.poll() is not None:
            raise SystemExit(run.with_name("said.txt").read_text())
        yield process
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _until(happened: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > end:
            raise SystemExit("the server does not start")
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


@dataclass
class Load:
    """What voters sent and heard, and what the file of votes says."""

    posts: int = 0
    refused: int = 0
    unheard: int = 0  # votes without an answer: the server was killed
    lost: int = 0  # nonsense without an answer
    accepted: set[tuple[str, int]] = field(default_factory=set)  # voter's name, position
    taken: int = 0  # nonsense that was accepted
    redealt: int = 0  # pairs that were others after a restart
    seconds: list[float] = field(default_factory=list)
    stored: set[tuple[str, int]] = field(default_factory=set)

    def read(self, run: Path) -> None:
        """Read what the file of votes holds by now."""
        said = VoteStore(run / "evaluate" / FILE).read()
        self.stored = {(str(said.voters[vote.voter]), vote.position) for vote in said.votes}

    def text(self, kills: int) -> str:
        """One row."""
        p50, p95 = (1000 * float(np.percentile(self.seconds, part)) for part in (50, 95))
        return (
            f"{len({name for name, _ in self.stored})} voters, {kills} SIGKILL | "
            f"{self.posts:,} posts, {self.refused:,} refused, {self.taken} nonsense taken | "
            f"{len(self.accepted):,} accepted, {len(self.accepted & self.stored):,} of them and "
            f"{len(self.stored - self.accepted)} unheard ones in SQLite, {self.redealt} redealt; "
            f"p50 {p50:.0f} ms, p95 {p95:.0f} ms"
        )


class Person:
    """A voter with a cookie, who comes back after every kill."""

    def __init__(self, name: str, port: int, seed: int, into: Load, lock: threading.Lock) -> None:
        self.name, self.port, self.into, self.lock = name, port, into, lock
        self.rng, self.cookie, self.shown = random.Random(f"{seed} {name}"), "", ("", "")

    def run(self) -> None:
        """Vote to the end, whatever the server does."""
        while True:
            line = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            with closing(line), suppress(OSError, http.client.HTTPException):
                if self._votes(line):
                    return
            time.sleep(0.05)

    def _ask(self, line: http.client.HTTPConnection, method: str, path: str, **more: str) -> str:
        headers = FORM | {"Cookie": self.cookie} | ({"Origin": more.pop("origin")}
                                                    if "origin" in more else {})  # fmt: skip
        line.request(method, path, urlencode(more) if method == "POST" else None, headers)
        answer = line.getresponse()
        said = answer.read().decode("utf-8", "replace")
        self.status = answer.status
        if not self.cookie and (given := answer.headers.get("Set-Cookie")):
            self.cookie = given.partition(";")[0]
        return said

    def _votes(self, line: http.client.HTTPConnection) -> bool:
        page = self._ask(line, "GET", "/")
        own = re.search(r'name="token" value="(\w+)"', page)
        assert own
        if 'action="/start"' in page:
            self._ask(line, "POST", "/start", token=own[1], name=self.name)
            page = self._ask(line, "GET", "/")
        while found := re.search(r'name="position" value="(\d+)"', page):
            if 'id="vote"' not in page:
                return True
            position, images = found[1], re.findall(r"/image/\w+\.png", page)
            if self.shown[0] == position and self.shown[1] != str(images):
                self.into.redealt += 1
            self.shown = position, str(images)
            self._ask(line, "GET", images[self.rng.randrange(2)])
            self._post(line, position, own[1])
            page = self._ask(line, "GET", "/")
        return False

    def _post(self, line: http.client.HTTPConnection, position: str, token: str) -> None:
        fields = {"token": token, "position": position, "answer": self.rng.choice(("left", "tie"))}
        nonsense = self.rng.choice(
            [{"token": "0" * 32}, {"origin": "http://["}, {"position": "-1"}, {"answer": "both"},
             {"position": str(int(position) + 1)}, {"more": "x" * 5000}, {"position": "9" * 40},
             {"answer": "left\0"}]
        )  # fmt: skip
        for wrong in (nonsense, {}):
            begun = time.monotonic()
            try:
                self._ask(line, "POST", "/vote", **(fields | wrong))
            except (OSError, http.client.HTTPException):
                with self.lock:
                    self.into.posts += 1
                    self.into.unheard += not wrong
                    self.into.lost += bool(wrong)
                raise
            with self.lock:
                self.into.posts += 1
                self.into.seconds.append(time.monotonic() - begun)
                if self.status != 200:
                    self.into.refused += 1
                elif wrong:
                    self.into.taken += 1
                else:
                    self.into.accepted.add((self.name, int(position)))


def load(run: Path, voters: int, kills: int, seed: int) -> Load:
    """Let ``voters`` vote on all that ``run`` has, and kill the server now and then."""
    into, lock, port = Load(), threading.Lock(), free_port()
    people = [Person(f"voter {i}", port, seed, into, lock) for i in range(voters)]
    threads = [threading.Thread(target=one.run, daemon=True) for one in people]
    prompts = len(list((run / "evaluate" / "images" / "base").iterdir()))
    for kill in range(kills + 1):
        with served(run, port) as process:
            if not kill:
                for thread in threads:
                    thread.start()
            if kill < kills:
                enough = voters * prompts * (kill + 1) // (kills + 1)
                _until(lambda enough=enough: len(into.accepted) >= enough, 600)  # type: ignore[misc]
                process.send_signal(signal.SIGKILL)
            else:
                for thread in threads:
                    thread.join(600)
    into.read(run)
    return into


def crowd(run: Path, count: int) -> str:
    """Half requests hold connections; somebody votes all the same."""
    port = free_port()
    said = run.with_name("said.txt")
    said.unlink(missing_ok=True)
    with served(run, port), ExitStack() as stack:
        before = said.stat().st_size
        for i in range(count):
            peer = stack.enter_context(socket.create_connection(("127.0.0.1", port), 20))
            with suppress(OSError):
                peer.sendall(HALVES[i % len(HALVES)])
        begun, into = time.monotonic(), Load()
        Person("somebody", port, 0, into, threading.Lock()).run()
        seconds = time.monotonic() - begun
        written = said.stat().st_size - before
    return (
        f"half requests, unread answers, nonsense; 1,024 files | {count:,} connections | "
        f"{len(into.accepted)} votes of somebody else in {seconds:.1f} s, "
        f"{written:,} bytes of messages"
    )


def deck(run: Path) -> str:
    """Guess models from the deck of every seed and number that an earlier version dealt by."""
    ballot = Ballot(run)
    dealt = []
    for who in ("one", "two"):
        ballot.register(who, None)
        trials = [ballot.store.trial(who, i) for i in range(len(ballot.asked))]
        dealt.append([(one.comparison, one.left) for one in trials if one])
    orders = [[key for key, _ in deal] for deal in dealt]
    guesses = Counter[int]()
    for seed in range(20):
        for voter in range(200):
            rng = np.random.default_rng([seed, voter])
            guess = [(one.comparison, one.left) for one in draw_trials(ballot.asked, rng)]
            if [key for key, _ in guess] in orders:
                guesses[voter] += 1
    ids = [set(ballot.showing(who).images) for who in ("one", "two")]  # type: ignore[union-attr]
    same = sum(
        a == b for a, b in zip(*[[left for _, left in sorted(d)] for d in dealt], strict=True)
    )
    return (
        f"blindness | 4,000 seeds and numbers, {len(ballot.asked)} pairs of two sessions | "
        f"{len(guesses)} decks guessed, {same} sides alike, {len(ids[0] & ids[1])} ids shared"
    )


if __name__ == "__main__":
    main()
