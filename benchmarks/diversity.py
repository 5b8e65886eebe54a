"""The diversity step on real prompts against faiss's search alone, and against scikit-learn.

    python benchmarks/diversity.py [--device cuda --count 100000 --peers faiss --rounds 1]

Ours is everything after embedding: the kept embeddings are read, every prompt's k-th neighbour
found, distances, entropy terms and the set's entropy computed, the table written. The limit is
faiss's IndexFlatL2 search of the same vectors with the same threads; the peer scikit-learn's
brute-force NearestNeighbors. The three take turns.

`--device cuda` searches there; both others stay on the processor. `--count` takes random vectors,
and `--peers none` has ours alone: for numbers of prompts that take a processor hours.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.neighbors import NearestNeighbors

from common import peak_mb, report
from fifa.data.ids import prompt_id
from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.scoring.diversity import diversity_scores
from fifa.scoring.encoders import Encoder, prompt_embeddings

REAL = Path(__file__).parents[2] / "shared/data/prompts/pickapic.parquet"
PARTS = ("fifa diversity", "faiss search alone", "scikit-learn brute")
SIZE = (20_346, 384)  # of the real prompts' vectors, for a machine without them


class Drawn:
    """Random vectors: exact search takes as long for them as for prompts."""

    name = "drawn"

    @property
    def identity(self) -> dict[str, object]:
        """Nothing but the size."""
        return {"dimensions": SIZE[1]}

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """float32 [n, d], L2-normalised; other prompts have other vectors."""
        rng = np.random.default_rng(int(prompts[0]))
        vectors = rng.standard_normal((len(prompts), SIZE[1]), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def unique_prompts(path: Path | None, count: int) -> Pairs:
    texts = pq.read_table(path)["prompt"].to_pylist() if path else map(str, range(count))
    unique: dict[str, str] = {}
    for text in texts:
        unique.setdefault(prompt_id(text), text)
    columns = {"prompt_id": list(unique), "prompt": list(unique.values())}
    return Pairs(PAIRS.empty_table(), pa.table(columns, schema=PROMPTS))


def ours(pairs: Pairs, encoder: str | Encoder, k: int, folder: Path, device: str) -> None:
    for old in folder.glob("diversity-*.parquet"):
        old.unlink()
    diversity_scores(pairs, encoder, k=k, folder=folder, knn="exact", device=device)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    real = arguments.prompts if arguments.prompts.exists() and not arguments.count else None
    pairs = unique_prompts(real, arguments.count or SIZE[0])
    encoder = "minilm" if real else Drawn()
    vectors = prompt_embeddings(pairs, encoder, folder)
    k, device = arguments.k, arguments.device
    if arguments.alone:
        ours(pairs, encoder, k, folder, device)
        print(peak_mb())
        return
    runs = {"fifa diversity": lambda: ours(pairs, encoder, k, folder, device)}
    if arguments.peers != "none":
        index = faiss.IndexFlatL2(vectors.shape[1])
        index.add(vectors)
        runs["faiss search alone"] = lambda: index.search(vectors, k + 1)
    if arguments.peers == "all":
        brute = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors)
        runs["scikit-learn brute"] = lambda: brute.kneighbors()
    if device != "cpu":
        diversity_scores(pairs, encoder, k=k, knn="exact", device=device)  # CUDA starts
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    command = [sys.executable, __file__, "--alone", "--folder", str(folder), "--k", str(k)]
    command += ["--prompts", str(arguments.prompts), "--count", str(arguments.count)]
    command += ["--device", device]
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mine, limit, peer = (median(times.get(name, [math.nan])) for name in PARTS)
    what = "real prompts, MiniLM" if real else "random vectors"
    head = f"{len(vectors):,} {what}, k = {k}, {faiss.omp_get_max_threads()} threads, {device}"
    rows = [(head, "median s", "best s", "ours / it")]
    rows += [
        (n, f"{median(t):.2f}", f"{min(t):.2f}", f"{mine / median(t):.2f}")
        for n, t in times.items()
    ]
    fields = {"speedup": peer / mine, "of_limit": limit / mine, "seconds": mine}
    known = {name: value for name, value in fields.items() if not math.isnan(value)}
    report("diversity", rows, **known, peak_mb=float(peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=REAL, help="Parquet with a prompt column")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--count", type=int, default=0, help="so many random vectors")
    parser.add_argument("--peers", choices=["all", "faiss", "none"], default="all")
    parser.add_argument("--folder", type=Path, help="keep the embeddings here")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        measure(arguments, arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as folder:
            measure(arguments, Path(folder))


if __name__ == "__main__":
    main()
