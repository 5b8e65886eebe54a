"""200 people vote at once, over HTTP: python benchmarks/vote.py [--database URL] [--look SECONDS].

`fifa vote` serves a run of two models in a process of its own. Every voter opens the page, begins,
and then looks at a pair, loads the next one's pictures and votes, as the page's script does. At the
end the votes in the database are compared with those that were accepted, voter by voter.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode, urlsplit

import numpy as np
import pyarrow as pa
from PIL import Image

from common import report
from fifa.evaluation.vote.store import Snapshot, open_store
from fifa.run.folder import begin
from fifa.shards.files import write_table

PATIENCE = 60  # seconds for an answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--voters", type=int, default=200)
    parser.add_argument("--votes", type=int, default=30, help="each")
    parser.add_argument("--look", type=float, default=2.0, help="seconds at a pair, on average")
    parser.add_argument("--size", type=int, default=256, help="pixels of a picture's side")
    parser.add_argument("--database", help="a PostgreSQL URL; SQLite if not given")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        run = make_run(Path(name) / "run", asked.votes, asked.size)
        more = ["--database", asked.database] if asked.database else []
        command = [sys.executable, "-m", "fifa", "vote", str(run), "--port", "0", *more]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout
            try:
                link = server.stdout.readline().strip()
                load = Load(link, asked.look)
                asyncio.run(load.run(asked.voters))
                used = cpu_seconds(server.pid)
            finally:
                server.kill()
        said = open_store(run, asked.database).read()
    rows, facts = table(load, said, used)
    name = "vote-postgresql" if asked.database else "vote-sqlite"
    report(name, rows, voters=asked.voters, look_s=asked.look, **facts)
    if facts["lost"] or facts["accepted"] != facts["stored"]:
        raise SystemExit("votes were lost")


def table(load: Load, said: Snapshot, used: float) -> tuple[list[list[str]], dict[str, float]]:
    """The rows that are printed, and the same as numbers; ``used`` is the server's CPU seconds."""
    stored = Counter(str(said.voters[vote.voter]) for vote in said.votes)
    accepted = sum(load.accepted.values())
    facts = {
        "accepted": accepted,
        "stored": len(said.votes),
        "lost": sum(max(0, count - stored[name]) for name, count in load.accepted.items()),
        "votes_a_second": accepted / load.wall,
        "server_cores": used / load.wall,
        "p50_ms": 1000 * float(np.percentile(load.seconds["a vote"], 50)),
        "p95_ms": 1000 * float(np.percentile(load.seconds["a vote"], 95)),
    }
    rows = [["", "requests", "p50", "p95", "p99", "most"]]
    for what, seconds in load.seconds.items():
        cuts = [1000 * float(np.percentile(seconds, part)) for part in (50, 95, 99, 100)]
        rows.append([what, f"{len(seconds):,}", *(f"{cut:.1f} ms" for cut in cuts)])
    for what, name, form in (
        ("votes accepted", "accepted", ",d"),
        ("votes in the database", "stored", ",d"),
        ("votes lost", "lost", ",d"),
        ("votes a second", "votes_a_second", ".0f"),
        ("server's cores", "server_cores", ".2f"),
    ):
        rows.append([what, format(facts[name], form), *[""] * 4])
    return rows, facts


def make_run(run: Path, prompts: int, size: int) -> Path:
    """An evaluated run of two models."""
    begin(run)
    rng, rows = np.random.default_rng(0), []
    for model in ("base", "tuned"):
        for i in range(prompts):
            path = run / "evaluate" / f"images/{model}/{i:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            out = io.BytesIO()
            small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
            small.resize((size, size), Image.Resampling.BICUBIC).save(out, "PNG")
            path.write_bytes(out.getvalue())
            row = {"model": model, "prompt_id": f"p{i}", "prompt": f"number {i}", "seed": 0}
            rows.append(row | {"file": str(path.relative_to(run / "evaluate")), "category": None})
    write_table(run / "evaluate" / "images.parquet", pa.Table.from_pylist(rows))
    return run


def cpu_seconds(pid: int) -> float:
    """The processor time of a process so far."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


@dataclass
class Load:
    """What voters sent and how long they waited."""

    link: str
    look: float
    accepted: dict[str, int] = field(default_factory=dict)  # by the voter's name
    seconds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    wall: float = 0.0

    async def run(self, voters: int) -> None:
        """Let so many vote to the end."""
        begun = time.monotonic()
        await asyncio.gather(*(self._votes(f"voter {i}") for i in range(voters)))
        self.wall = time.monotonic() - begun

    async def _votes(self, name: str) -> None:
        rng, line = random.Random(name), Line(self.link, self.seconds)
        await asyncio.sleep(rng.uniform(0, self.look))  # nobody opens a link in the same moment
        page = await line.ask("the first page", "GET", "/")
        token = re.search(r'name="token" value="(\w+)"', page)
        assert token, page
        await line.ask("begin", "POST", "/start", token=token[1], name=name)
        page = await line.ask("a page", "GET", "/")
        position = re.search(r'name="position" value="(\d+)"', page)
        assert position, page
        images = re.findall(r"/image/(\w+)\.png", page)
        ahead = re.search(r'data-upcoming="([\w ]*)"', page)
        state = {"position": int(position[1]), "done": False, "images": images,
                 "upcoming": ahead[1].split() if ahead else []}  # fmt: skip
        self.accepted[name] = 0
        for image in state["images"]:
            await line.ask("a picture", "GET", f"/image/{image}.png")
        while not state["done"]:
            for image in state["upcoming"]:
                await line.ask("a picture", "GET", f"/image/{image}.png")
            await asyncio.sleep(self.look * rng.uniform(0.5, 1.5))
            state = await line.ask(
                "a vote", "POST", "/vote", token=token[1], position=str(state["position"]),
                answer=rng.choice(("left", "right", "tie")),
            )  # fmt: skip
            self.accepted[name] += line.status == 200
        line.close()


class Line:
    """A connection that is kept, as a browser keeps it, and the voter's cookie."""

    def __init__(self, link: str, seconds: dict[str, list[float]]) -> None:
        parts = urlsplit(link)
        self.host, self.port, self.seconds = str(parts.hostname), int(parts.port or 80), seconds
        self.cookie, self.status = "", 0
        self.open: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, what: str, method: str, path: str, **fields: str):
        """The answer's text, or its JSON; how long it took counts as ``what``."""
        body = urlencode(fields).encode() if fields else b""
        kind = "Content-Type: application/x-www-form-urlencoded\r\n" if fields else ""
        wanted = "application/json" if path == "/vote" else "*/*"
        head = (
            f"{method} {path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\n{kind}"
            f"Accept: {wanted}\r\nContent-Length: {len(body)}\r\n{self.cookie}\r\n"
        )
        begun = time.monotonic()
        for _ in range(3):  # the server closes a line that nobody used for some seconds
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                answer = await asyncio.wait_for(self._send(head.encode() + body), PATIENCE)
                break
            self.close()
        else:
            raise SystemExit("the server is gone")
        self.seconds[what].append(time.monotonic() - begun)
        return answer

    async def _send(self, request: bytes):
        if self.open is None:
            self.open = await asyncio.open_connection(self.host, self.port)
        reader, writer = self.open
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        self.status = int(head.split(" ", 2)[1])
        size = re.search(r"(?i)^content-length: (\d+)", head, re.M)
        body = await reader.readexactly(int(size[1])) if size else b""
        given = re.search(r"(?i)^set-cookie: ([^;]+)", head, re.M)
        if given:
            self.cookie = f"Cookie: {given[1]}\r\n"
        if "application/json" in head:
            return json.loads(body)
        return body.decode("latin-1") if "text/html" in head else ""

    def close(self) -> None:
        """Give the connection up."""
        if self.open:
            self.open[1].close()
        self.open = None


if __name__ == "__main__":
    main()
