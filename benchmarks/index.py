"""Indexing a million Pick-a-Pic pairs, against a bare read of the same columns and `datasets`.

    python benchmarks/index.py [--pairs 1000000] [--folder KEEP]

The input has every column of Pick-a-Pic in 21 Parquet files; two of them hold image cells of
20 kB a side (2 GB at the default size). About 17 pairs a prompt, a winner stays for its prompt's
next pair, 12 % ties, one pair in 2,000 is there twice. The peer is `datasets.load_dataset` of
the columns needed, with a cold cache, as the public trainers start.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from common import peak_mb, report
from fifa.data import read_pairs

FILES = 20
CELL = 20_000  # bytes
READ = ["caption", "image_0_uid", "image_1_uid", "label_0", "label_1", "has_label"]
NAMES = ["model_0", "model_1", "user_id"]
LINKS = ["image_0_url", "image_1_url"]
PEER = ["caption", "image_0_uid", "image_1_uid", "label_0"]
HOST = "https://example.org/images/"


def make(folder: Path, pairs: int) -> None:
    """Write the input."""
    rng = np.random.default_rng(0)
    words = np.array([f"{a}{b}" for a in "bcdfghjklm" for b in ("ardo", "ile", "ost", "une")])
    counts = rng.geometric(1 / 17, pairs)
    counts = counts[: np.searchsorted(np.cumsum(counts), pairs) + 1]
    prompts = [" ".join(rng.choice(words, rng.integers(4, 25))) for _ in counts]
    of_pair = np.repeat(np.arange(len(counts)), counts)[:pairs]
    raw = rng.bytes(16 * (pairs + len(counts) + 1)).hex()
    uids = np.array(
        ["-".join((r[:8], r[8:12], r[12:16], r[16:20], r[20:]))
         for r in (raw[i : i + 32] for i in range(0, len(raw), 32))]
    )  # fmt: skip
    first = np.arange(pairs) + of_pair  # pair i of a prompt compares its images i and i + 1
    twice = rng.choice(np.arange(1, pairs), pairs // 2000, replace=False)
    first[twice], of_pair[twice] = first[twice - 1], of_pair[twice - 1]
    label = rng.choice([1.0, 0.0, 0.5], pairs, p=[0.44, 0.44, 0.12])
    bounds = np.linspace(0, pairs, FILES + 1).astype(int)
    bounds = np.insert(bounds, 1, bounds[1] // 2)  # two half files, which have the cells
    for i, (start, stop) in enumerate(pairwise(bounds)):
        rows = slice(start, stop)
        zero, one = uids[first[rows]], uids[first[rows] + 1]
        table = _table([prompts[p] for p in of_pair[rows]], zero, one, label[rows], start)
        with pq.ParquetWriter(folder / f"train-{i:05d}.parquet", table.schema) as writer:
            for at in range(0, len(table), 5_000):
                part = table.slice(at, 5_000)
                if i < 2:
                    part = _with_cells(part, rng)
                writer.write_table(part)


def _table(
    captions: list[str], zero: np.ndarray, one: np.ndarray, label: np.ndarray, start: int
) -> pa.Table:
    n = len(captions)
    order = np.arange(start, start + n)
    return pa.table(
        {
            "are_different": np.ones(n, bool),
            "best_image_uid": np.where(label == 1.0, zero, one),
            "caption": captions,
            "created_at": pa.array([datetime.datetime(2023, 1, 1)] * n, pa.timestamp("ns")),
            "has_label": np.ones(n, bool),
            "image_0_uid": zero,
            "image_0_url": [f"{HOST}{uid}.png" for uid in zero],
            "image_1_uid": one,
            "image_1_url": [f"{HOST}{uid}.png" for uid in one],
            "jpg_0": pa.nulls(n, pa.binary()),
            "jpg_1": pa.nulls(n, pa.binary()),
            "label_0": label,
            "label_1": 1.0 - label,
            "model_0": pa.repeat("CompVis/stable-diffusion-v1-4", n),
            "model_1": pa.repeat("stabilityai/stable-diffusion-2-1", n),
            "ranking_id": order,
            "user_id": order % 4_000,
            "num_example_per_prompt": order % 30,
            "__index_level_0__": order,
        }
    )


def _with_cells(part: pa.Table, rng: np.random.Generator) -> pa.Table:
    ends = pa.py_buffer((np.arange(len(part) + 1) * CELL).astype(np.int32))
    for name in ("jpg_0", "jpg_1"):
        data = pa.py_buffer(rng.bytes(len(part) * CELL))
        cells = pa.BinaryArray.from_buffers(pa.binary(), len(part), [None, ends, data])
        part = part.set_column(part.schema.get_field_index(name), name, cells)
    return part


def bare(folder: Path) -> int:
    """The limit: pyarrow reads the columns that `read_pairs` reads, and nothing else happens."""
    files = sorted(str(path) for path in folder.glob("*.parquet"))
    rows = ds.dataset(files[:2]).to_table(columns=READ + NAMES).num_rows
    return rows + ds.dataset(files[2:]).to_table(columns=READ + NAMES + LINKS).num_rows


def ours(folder: Path) -> int:
    """Index the folder; returns the number of rows."""
    return read_pairs(folder).origin.rows


def peer(folder: Path) -> int:
    """`datasets`, cold: prompt, image keys and label of every row as one Arrow table."""
    import datasets

    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as cache:
        files = sorted(str(path) for path in folder.glob("*.parquet"))
        loaded = datasets.load_dataset(
            "parquet", data_files=files, columns=PEER, cache_dir=cache, split="train"
        )
        return loaded.with_format("arrow")[:].num_rows


def in_turn(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each function, all of them run in every round."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="keep the input here")
    parser.add_argument("--only", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        ours(args.only)
        print(json.dumps(peak_mb()))
        return
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fifa-index-"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob("*.parquet")):
            make(folder, args.pairs)
        assert bare(folder) == ours(folder) == args.pairs  # also fills the page cache
        times = in_turn({"bare": lambda: bare(folder), "ours": lambda: ours(folder)}, args.rounds)
        times |= in_turn({"peer": lambda: peer(folder)}, 1)
        command = [sys.executable, __file__, "--only", str(folder)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        size = sum(path.stat().st_size for path in folder.glob("*.parquet"))
    finally:
        if not args.folder:
            shutil.rmtree(folder, ignore_errors=True)
    rows = [["", "seconds", "times the bare read"]]
    for name, what in (
        ("bare", "pyarrow, the same columns"),
        ("ours", "fifa.read_pairs"),
        ("peer", "datasets, cold cache"),
    ):
        rows.append([what, f"{times[name]:.2f}", f"{times[name] / times['bare']:.2f}"])
    print(f"{args.pairs:,} pairs in {size / 1e9:.1f} GB of Parquet; peak {peak:,.0f} MB")
    report(
        "index",
        rows,
        speedup=times["peer"] / times["ours"],
        of_limit=times["bare"] / times["ours"],
        peak_mb=peak,
    )


if __name__ == "__main__":
    main()
