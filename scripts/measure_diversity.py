"""What k does, where nonsense ranks, and what neighbours cost: the tables of docs/diversity.md.

    python scripts/measure_diversity.py ../shared/data/prompts/pickapic.parquet

Embedding 20,000 prompts takes minutes on a CPU; ``--folder`` keeps it for the next time.
"""

from __future__ import annotations

import argparse
import random
import string
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.data.ids import prompt_id
from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.models.transformer import normalised
from fifa.scoring.diversity import FLOOR, kth_distances
from fifa.scoring.encoders import make_encoder, prompt_embeddings
from fifa.scoring.neighbours import (
    approximate_index,
    approximate_search,
    exact_search,
    sampled_recall,
)

KS = (1, 2, 3, 5, 10, 20, 50)


def unique_prompts(path: Path) -> Pairs:
    unique: dict[str, str] = {}
    for text in pq.read_table(path)["prompt"].to_pylist():
        unique.setdefault(prompt_id(text), text)
    columns = {"prompt_id": list(unique), "prompt": list(unique.values())}
    return Pairs(PAIRS.empty_table(), pa.table(columns, schema=PROMPTS))


def ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values, kind="stable"), kind="stable").astype(float)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's."""
    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def all_distances(vectors: np.ndarray, k: int) -> np.ndarray:
    """Distances to the 1st to k-th neighbour, [n, k]."""
    found = exact_search(vectors)(vectors, k + 1)
    rows = np.arange(len(vectors))
    return np.stack([kth_distances(vectors, rows, found[:, : j + 1]) for j in range(1, k + 1)], 1)


def measure_k(vectors: np.ndarray) -> None:
    """Does the term depend on which half of the prompts was collected?"""
    n = len(vectors)
    distances = all_distances(vectors, max(KS))
    order = np.random.default_rng(0).permutation(n)
    looked = order[: n // 10]
    halves = np.array_split(order[n // 10 :], 2)
    found = []
    for half in halves:
        near = exact_search(vectors[half])(vectors[looked], max(KS))
        apart = vectors[looked][:, None] - vectors[half][near]
        found.append(np.linalg.norm(apart, axis=2))
    print(f"\nunique prompts: {n:,}")
    print("| k | halves agree | median distance | below 0.2 | spread of h | with k = 10 |")
    print("|---|---|---|---|---|---|")
    for k in KS:
        own = distances[:, k - 1]
        h = np.log(np.maximum(own, FLOOR))
        print(
            f"| {k} | {correlation(found[0][:, k - 1], found[1][:, k - 1]):.2f} "
            f"| {np.median(own):.2f} | {100 * np.mean(own < 0.2):.1f} % | {h.std():.2f} "
            f"| {correlation(own, distances[:, 9]):.2f} |"
        )


def measure_storage(prompts: list[str], k: int) -> None:
    """What keeping embeddings in float16 does to the term."""
    full = make_encoder("minilm").embed(prompts)
    kept = normalised(full.astype(np.float16).astype(np.float32))
    terms = [np.log(np.maximum(all_distances(z, k)[:, -1], FLOOR)) for z in (full, kept)]
    error = np.abs(terms[0] - terms[1]).max()
    print(f"\nfloat16: h of {len(prompts):,} prompts moves by {error:.1e} at most, k = {k}")


def nonsense(prompts: list[str], rng: random.Random) -> dict[str, list[str]]:
    def shuffled(parts: list[str], joiner: str) -> str:
        return joiner.join(rng.sample(parts, len(parts)))

    def keys(prompt: str) -> str:
        letters = string.ascii_lowercase + "  "
        return "".join(rng.choice(letters) for _ in prompt) or "x"

    return {
        "shuffled words": [shuffled(p.split(), " ") for p in prompts],
        "shuffled characters": [shuffled(list(p), "") for p in prompts],
        "keyboard noise": [keys(p) for p in prompts],
    }


def measure_nonsense(prompts: list[str], vectors: np.ndarray, k: int) -> None:
    """Where nonsense made of real prompts ranks among the real ones."""
    encoder = make_encoder("minilm")
    rng = random.Random(0)
    rows = rng.sample([i for i, p in enumerate(prompts) if len(p.split()) > 3], 300)
    real = all_distances(vectors, k)[:, k - 1]
    in_order = np.sort(real)
    search = exact_search(vectors)
    chosen = [prompts[i] for i in rows]
    kinds = {"the same prompts as they are": real[rows]}
    for kind, texts in nonsense(chosen, rng).items():
        own = encoder.embed(texts)
        kinds[kind] = np.linalg.norm(own - vectors[search(own, k)[:, -1]], axis=1)
    print(f"\n| 300 prompts, k = {k} | median distance | median percentile | in the top tenth |")
    print("|---|---|---|---|")
    for kind, distance in kinds.items():
        percentile = 100 * np.searchsorted(in_order, distance) / len(in_order)
        top = 100 * np.mean(percentile >= 90)
        print(f"| {kind} | {np.median(distance):.2f} | {np.median(percentile):.0f} | {top:.0f} % |")
    print("\nfarthest real prompts:")
    for row in np.argsort(-real)[:8]:
        print(f"  {real[row]:.2f}  {prompts[row][:90]}")


def measure_search(vectors: np.ndarray, sizes: list[int], k: int) -> None:
    """Exact against approximate, on mixtures of two real prompts' embeddings each."""
    print(f"\n| prompts, k = {k} | exact | approximate | recall | error of h |")
    print("|---|---|---|---|---|")
    for n in sizes:
        rng = np.random.default_rng(n)
        one, other = rng.integers(0, len(vectors), (2, n))
        mixed = vectors[one] + rng.uniform(0.2, 0.8, (n, 1)).astype(np.float32) * vectors[other]
        mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
        rows = np.arange(0, n, max(1, n // 4096))
        start = time.perf_counter()
        truth = exact_search(mixed)(mixed[rows], k + 1)
        exact = (time.perf_counter() - start) * n / len(rows)  # n queries cost n / len(rows) of it
        start = time.perf_counter()
        search = approximate_search(mixed, approximate_index(mixed))
        search(mixed, k + 1)
        approximate = time.perf_counter() - start
        terms = [np.log(kth_distances(mixed, rows, f)) for f in (truth, search(mixed[rows], k + 1))]
        print(
            f"| {n:,} | {exact:.0f} s | {approximate:.0f} s "
            f"| {sampled_recall(mixed, search, k):.3f} | {np.abs(terms[0] - terms[1]).mean():.4f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path, help="Parquet with a prompt column")
    parser.add_argument("--folder", type=Path, help="keep the embeddings here")
    parser.add_argument(
        "--sizes", default="50000,100000,200000", help="sets to search; '' for none"
    )
    arguments = parser.parse_args()
    pairs = unique_prompts(arguments.prompts)
    vectors = prompt_embeddings(pairs, "minilm", arguments.folder)
    measure_k(vectors)
    prompts = pairs.prompts["prompt"].to_pylist()
    measure_storage(prompts[:1000], 10)
    measure_nonsense(prompts, vectors, 10)
    measure_search(vectors, [int(n) for n in arguments.sizes.split(",") if n], 10)


if __name__ == "__main__":
    main()
