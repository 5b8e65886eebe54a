"""`hf://` sources through the hub's own client, against a hub on loopback."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import commands

LIGHT = ["--margin", "column:clipscore_0,clipscore_1", "--quality", "none", "--diversity", "none"]


class Hub(BaseHTTPRequestHandler):
    """What the hub answers about one data set: that it is there, its tree, ranges of its files.

    Of the data set ``gated`` it shows the tree alone.
    """

    protocol_version = "HTTP/1.1"
    address: str
    folder: Path
    sent: list[int]  # bytes of a file in each answer
    known = r"(/api)?/datasets/someone/(feedback|gated)(/revision/main|/\w+/1{40}|$)/?"

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        known = re.match(self.known, path)
        kind = known[3].rpartition("/")[0] if known else ""
        if not known:
            self.answer(404, {}, {"X-Error-Code": "RepoNotFound"})
        elif kind in ("", "/revision"):
            self.answer(200, {"id": f"someone/{known[2]}", "sha": "1" * 40})
        elif kind == "/tree":
            at = self.folder / path[known.end() :]
            found = at.rglob("*") if "recursive=true" in self.path.lower() else at.iterdir()
            self.answer(200, [self.entry(item) for item in sorted(found)])
        elif known[2] == "gated":
            told = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted. Log in."}
            self.answer(401, {}, told)
        else:
            data = (self.folder / path[known.end() :]).read_bytes()
            first, last = map(int, re.findall(r"\d+", self.headers["Range"]))
            self.sent.append(len(data[first : last + 1]))
            self.answer(206, data[first : last + 1])

    def entry(self, path: Path) -> dict[str, object]:
        name = path.relative_to(self.folder).as_posix()
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        oid = hashlib.sha1(path.read_bytes()).hexdigest()
        return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}

    def answer(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ((headers or {}) | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[type[Hub]]:
    Hub.folder, Hub.sent = tmp_path / "hub", []
    (Hub.folder / "data").mkdir(parents=True)
    (Hub.folder / "README.md").write_text("# Feedback\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        Hub.address = f"http://127.0.0.1:{server.server_address[1]}"
        yield Hub
        server.shutdown()


def fifa(hub: type[Hub], *arguments: object) -> subprocess.CompletedProcess[str]:
    home = str(hub.folder.parent / "home")
    env = os.environ | {"HF_ENDPOINT": hub.address, "HF_HOME": home, "HF_TOKEN": ""}
    env["FIFA_CACHE"] = f"{home}/fifa"
    command = [sys.executable, "-m", "fifa", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


def test_a_data_set_of_the_hub_is_filtered_as_its_files_are(
    hub: type[Hub], shipped: Path, tmp_path: Path
) -> None:
    table = pq.read_table(shipped)
    for i in range(2):
        pq.write_table(table.slice(180 * i, 180), hub.folder / f"data/train-{i}.parquet")
    options = (*LIGHT, "--keep", "40", "--out")
    far = fifa(hub, "filter", "hf://datasets/someone/feedback", *options, tmp_path / "far")
    near = commands.fifa("filter", hub.folder, *options, tmp_path / "near")
    for done in (far, near):
        assert done.returncode == 0, done.stderr
    for table in ("selection.parquet", "subset/data"):
        far, near = (pq.read_table(tmp_path / name / table) for name in ("far", "near"))
        assert far.num_rows
        assert far.equals(near)
    files = [size for size in hub.sent if size > 1000]
    assert len(files) == 2  # either once: for its images it is still on the disk


def test_of_files_with_pixels_only_the_other_columns_are_fetched(
    hub: type[Hub], tmp_path: Path
) -> None:
    rng, n = np.random.default_rng(0), 60
    cells = {f"jpg_{side}": [rng.bytes(60_000) for _ in range(n)] for side in (0, 1)}
    labels = {"label_0": [1.0] * n, "label_1": [0.0] * n}
    rows = {"caption": [f"p{i}" for i in range(n)]}
    for name in ("a", "b"):
        table = pa.table(rows | cells | labels)
        pq.write_table(table, hub.folder / f"data/{name}.parquet", row_group_size=20)
    source = "hf://datasets/someone/feedback@main/data/[b-z].parquet"
    done = fifa(hub, "read", source, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert pq.read_table(tmp_path / "run/pairs.parquet").num_rows == n
    assert 65_536 < sum(hub.sent) < 75_000  # of 7.2 MB; a footer is looked for in 64 KiB


@pytest.mark.parametrize(
    ("name", "why"), [("missing", "repository not found"), ("gated", "Access is restricted")]
)
def test_why_the_hub_refuses_is_told(hub: type[Hub], tmp_path: Path, name: str, why: str) -> None:
    (hub.folder / "data/train.parquet").write_bytes(b"nobody gets to see this")
    done = fifa(hub, "read", f"hf://datasets/someone/{name}", "--out", tmp_path / "run")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"hf://datasets/someone/{name}" in done.stderr
    assert why in done.stderr
