"""A remote data set is scored without ever being on the disk: what is fetched, kept and waited for.

A server on loopback sends byte ranges after a delay, as a store would, and counts them. FiFA reads
the pairs and scores them with a model that only waits, once with the cache and once with one that
is a tenth of the data; beside it a loop over `datasets` in streaming mode, with the same model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from common import report

OURS = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
from common import peak_mb
from fifa import read_pairs
from fifa.config import Compute
from fifa.scoring.rewards.engine import score_pairs

class Waits:
    name, scale, identity = "waits", "nothing", {"model": "waits"}
    def preprocess(self, image):
        return np.asarray(image.convert("RGB").resize((32, 32))).transpose(2, 0, 1).copy()
    def image_features(self, pixels):
        time.sleep(float(sys.argv[2]) * len(pixels))
        return torch.zeros(len(pixels), 1)
    def prompt_features(self, prompts):
        return torch.zeros(len(prompts), 1)
    def rewards(self, prompts, images):
        return images[:, 0]

pairs = read_pairs(sys.argv[1])
start = time.time()
score_pairs(pairs, Waits(), folder=Path(sys.argv[3]), compute=Compute(cache_gb=float(sys.argv[4])))
print(json.dumps({"seconds": time.time() - start, "peak": peak_mb()}))
"""
PEER = """
import io, json, sys, time
from datasets import load_dataset
from PIL import Image
from common import peak_mb

start = time.time()
files = {"train": [sys.argv[1]]}
rows = load_dataset("parquet", data_files=files, split="train", streaming=True)
for row in rows.select_columns(["caption", "jpg_0", "jpg_1"]):
    for side in (0, 1):
        Image.open(io.BytesIO(row[f"jpg_{side}"])).convert("RGB").resize((32, 32))
    time.sleep(2 * float(sys.argv[2]))
print(json.dumps({"seconds": time.time() - start, "peak": peak_mb()}))
"""


class Ranges(BaseHTTPRequestHandler):
    """Sends ranges of the files in a folder, and counts."""

    protocol_version = "HTTP/1.1"
    folder: Path
    delay: float
    asked: ClassVar[Counter[str]] = Counter()

    def do_HEAD(self) -> None:
        """The headers alone."""
        self.do_GET()

    def do_GET(self) -> None:
        """The bytes asked for."""
        time.sleep(self.delay)
        size = (self.folder / self.path.strip("/")).stat().st_size
        match = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first = int(match[1]) if match else 0
        last = min(int(match[2]) if match and match[2] else size, size - 1)
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(last + 1 - first))
        self.send_header("ETag", f'"{size}"')
        self.send_header("Accept-Ranges", "bytes")
        if match:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        if self.command == "HEAD":
            return
        self.asked["requests"] += 1
        with (self.folder / self.path.strip("/")).open("rb") as file:
            file.seek(first)
            try:
                self.wfile.write(file.read(last + 1 - first))
            except OSError:
                return  # hung up: what is already on its way is not counted
        self.asked["bytes"] += last + 1 - first

    def log_message(self, *args: object) -> None:
        """Nothing."""


def make(path: Path, rows: int) -> int:
    """Pairs with JPEGs in row groups of 100, and a column that nobody needs; the images' bytes."""
    draw = np.random.default_rng(0)

    def jpeg() -> bytes:
        out = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (192, 192, 3), np.uint8)).save(out, "JPEG")
        return out.getvalue()

    table = {
        "caption": [f"prompt {i}" for i in range(rows)],
        "jpg_0": [jpeg() for _ in range(rows)],
        "other": [draw.bytes(20_000) for _ in range(rows)],
        "jpg_1": [jpeg() for _ in range(rows)],
        "label_0": [1.0] * rows,
        "label_1": [0.0] * rows,
    }
    pq.write_table(pa.table(table), path, row_group_size=100)
    metadata = pq.ParquetFile(path).metadata
    groups = map(metadata.row_group, range(metadata.num_row_groups))
    columns = (group.column(i) for group in groups for i in range(metadata.num_columns))
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.startswith("jpg"))


def kept(folder: Path, most: list[int], done: threading.Event) -> None:
    """The most bytes that the cache ever has."""
    while not done.wait(0.02):
        files = [entry for entry in folder.glob("pieces/*") if entry.is_file()]
        most[0] = max(most[0], sum(f.stat().st_size for f in files if f.exists()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--delay", type=float, default=0.05, help="seconds before an answer")
    parser.add_argument("--model", type=float, default=0.002, help="seconds an image")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        home, Ranges.folder, Ranges.delay = Path(name), Path(name) / "far", options.delay
        Ranges.folder.mkdir()
        needed = make(Ranges.folder / "set.parquet", options.rows)
        server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/set.parquet"
        rows: list[list[object]] = [
            ["", "bytes / needed", "requests", "seconds", "of it waiting", "peak MB", "disk MB"]
        ]
        computing = 2 * options.rows * options.model
        found = {}
        for what, code, gb in [
            ("FiFA", OURS, 10.0),
            ("FiFA, a small cache", OURS, needed / 1e10),
            ("datasets, streaming", PEER, 0.0),
        ]:
            Ranges.asked.clear()
            cache, most, done = home / what, [0], threading.Event()
            threading.Thread(target=kept, args=(cache, most, done), daemon=True).start()
            path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
            env = {"FIFA_CACHE": str(cache), "HF_HOME": str(cache / "hf"), "PYTHONPATH": path}
            arguments = [url, str(options.model), str(home / f"{what}-scores"), str(gb)]
            command = [sys.executable, "-c", code, *arguments]
            run = subprocess.run(
                command, env=os.environ | env, check=True, stdout=subprocess.PIPE, text=True
            )
            done.set()
            told = json.loads(run.stdout.splitlines()[-1])
            share, waited = Ranges.asked["bytes"] / needed, told["seconds"] - computing
            numbers = [f"{share:.3f}", Ranges.asked["requests"], f"{told['seconds']:.1f}"]
            numbers += [f"{waited:.1f}", f"{told['peak']:.0f}", f"{most[0] / 1e6:.0f}"]
            rows.append([what, *numbers])
            found[what] = (share, told["seconds"])
        server.shutdown()
    report(
        "stream",
        [[f"{needed / 1e6:.0f} MB of images", *[""] * 6], *rows],
        fetched_share=found["FiFA"][0],
        small_cache_share=found["FiFA, a small cache"][0],
        seconds=found["FiFA"][1],
        peer_share=found["datasets, streaming"][0],
        peer_seconds=found["datasets, streaming"][1],
    )


if __name__ == "__main__":
    main()
