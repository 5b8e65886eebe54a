"""Judging pairs through an endpoint, beside the loop people write.

Ours with 16 requests in flight, against a loopback server that takes 50 ms an answer: images told
apart, decoded, resized and encoded once, both orders asked. The peer does the same work one
question after the other with the same client: both images opened, resized, encoded and sent.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

import fifa
from common import peak_mb, report
from fifa.config import Compute
from fifa.scoring.judges.formats import load_format
from rate import slow_server

ANSWER = {"alignment": "A", "coherence": "tie", "taste": "B", "safety": "tie", "winner": "A"}


def write_pairs(path: Path, count: int, side: int) -> None:
    """Pairs of drawn images in diffusers' schema; every image stands in two pairs."""
    rng = np.random.default_rng(0)
    images = []
    for _ in range(count):
        out, small = io.BytesIO(), rng.integers(0, 256, (16, 16, 3), np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG")
        images.append(out.getvalue())
    columns = {
        "caption": [f"prompt {i // 2}" for i in range(count)],
        "jpg_0": images,
        "jpg_1": images[1:] + images[:1],
        "label_0": [float(i % 2) for i in range(count)],
    }
    pq.write_table(pa.table(columns), path)


def one_by_one(path: Path, url: str, pairs: int) -> None:
    """Both orders of some pairs, a question at a time."""
    import openai

    asked, side = load_format("plain", 2), Compute.judge_side
    client = openai.OpenAI(api_key="none", base_url=url)

    def encode(data: bytes) -> str:
        image, out = Image.open(io.BytesIO(data)).convert("RGB"), io.BytesIO()
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(out, "JPEG", quality=90)
        return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()

    for row in pq.read_table(path).slice(0, pairs).to_pylist():
        for names in (("jpg_0", "jpg_1"), ("jpg_1", "jpg_0")):
            urls = tuple(encode(row[name]) for name in names)
            content: Any = asked.content(row["caption"], urls)
            messages: Any = [{"role": "user", "content": content}]
            reply = client.chat.completions.create(model="m", messages=messages, **asked.request())
            json.loads(reply.choices[0].message.content or "")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--peer-pairs", type=int, default=20)
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    ours, peer = [], []
    with tempfile.TemporaryDirectory() as folder, slow_server(ANSWER) as url:
        path = Path(folder) / "pairs.parquet"
        write_pairs(path, options.pairs, options.side)
        for _ in range(options.rounds):
            pairs = fifa.read_pairs(path)
            started = time.perf_counter()
            fifa.score(pairs, margin=f"vlm:m@{url}", quality="none", diversity="none")
            ours.append((time.perf_counter() - started) / options.pairs)
            started = time.perf_counter()
            one_by_one(path, url, options.peer_pairs)
            peer.append((time.perf_counter() - started) / options.peer_pairs)
    together, apart = median(ours), median(peer)
    report(
        "judge",
        [
            (f"pairs of {options.side} px, 50 ms an answer", "ms a pair", "against ours"),
            ("ours: 16 in flight, both orders", f"{1000 * together:.1f}", "1.00 x"),
            ("peer: one after another", f"{1000 * apart:.1f}", f"{apart / together:.2f} x"),
        ],
        speedup=apart / together,
        peak_mb=peak_mb(),
    )


if __name__ == "__main__":
    main()
