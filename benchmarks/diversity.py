"""The diversity step on real prompts against faiss's search alone, and against scikit-learn.

Ours is everything after embedding: the kept embeddings are read, every prompt's k-th neighbour
found, distances, entropy terms and the set's entropy computed, the table written. The limit is
faiss's IndexFlatL2 search of the same vectors with the same threads; the peer scikit-learn's
brute-force NearestNeighbors. The three take turns.
"""

from __future__ import annotations

import argparse
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
SIZE = (20_346, 384)  # of the real prompts' vectors, for a machine without them


class Drawn:
    """Random vectors: exact search takes as long for them as for prompts."""

    name = "drawn"

    @property
    def identity(self) -> dict[str, object]:
        """Nothing but the size."""
        return {"dimensions": SIZE[1]}

    def embed(self, prompts: Sequence[str]) -> np.ndarray:
        """float32 [n, d], L2-normalised."""
        rng = np.random.default_rng(len(prompts))
        vectors = rng.standard_normal((len(prompts), SIZE[1]), dtype=np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def unique_prompts(path: Path) -> Pairs:
    texts = pq.read_table(path)["prompt"].to_pylist() if path.exists() else map(str, range(SIZE[0]))
    unique: dict[str, str] = {}
    for text in texts:
        unique.setdefault(prompt_id(text), text)
    columns = {"prompt_id": list(unique), "prompt": list(unique.values())}
    return Pairs(PAIRS.empty_table(), pa.table(columns, schema=PROMPTS))


def ours(pairs: Pairs, encoder: str | Encoder, k: int, folder: Path) -> None:
    for old in folder.glob("diversity-*.parquet"):
        old.unlink()
    diversity_scores(pairs, encoder, k=k, folder=folder)


def measure(arguments: argparse.Namespace, folder: Path) -> None:
    pairs = unique_prompts(arguments.prompts)
    encoder = "minilm" if arguments.prompts.exists() else Drawn()
    vectors = prompt_embeddings(pairs, encoder, folder)
    k = arguments.k
    if arguments.alone:
        ours(pairs, encoder, k, folder)
        print(peak_mb())
        return
    index = faiss.IndexFlatL2(vectors.shape[1])
    index.add(vectors)
    brute = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(vectors)
    runs = {
        "fifa diversity": lambda: ours(pairs, encoder, k, folder),
        "faiss search alone": lambda: index.search(vectors, k + 1),
        "scikit-learn brute": lambda: brute.kneighbors(),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    command = [sys.executable, __file__, "--alone", "--folder", str(folder), "--k", str(k)]
    command += ["--prompts", str(arguments.prompts)]
    peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mine, limit, peer = (median(times[name]) for name in runs)
    what = "real prompts, MiniLM" if arguments.prompts.exists() else "random vectors"
    head = f"{len(vectors):,} {what}, k = {k}, {faiss.omp_get_max_threads()} threads"
    rows = [(head, "median s", "best s", "ours / it")]
    rows += [
        (n, f"{median(t):.2f}", f"{min(t):.2f}", f"{mine / median(t):.2f}")
        for n, t in times.items()
    ]
    report("diversity", rows, speedup=peer / mine, of_limit=limit / mine, peak_mb=float(peak))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=Path, default=REAL, help="Parquet with a prompt column")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
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
