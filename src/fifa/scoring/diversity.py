"""Text diversity: how far every prompt is from its neighbours, and the set's entropy."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from fifa.config import Score
from fifa.console import echo, note
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.runtime import make_runtime
from fifa.models.transformer import Vectors
from fifa.scoring.encoders import Encoder, Kept, kept_embeddings, make_encoder, prompts_identity
from fifa.scoring.neighbours import (
    FEWEST,
    AnyVectors,
    Rows,
    Search,
    approximate_index,
    approximate_search,
    device_search,
    exact_search,
    read_index,
    sampled_recall,
    write_index,
)
from fifa.scoring.specs import ENCODERS
from fifa.scoring.table import DIVERSITY, map_array, score_path, scored_once
from fifa.shards.ledger import Ledger
from fifa.shards.mapped import give_back
from fifa.shards.pool import Executor, Shard, is_elsewhere, map_shards, store_of

FLOOR = 1e-3  # distances below it are rounding (float32 search 5e-4, float16 storage 6e-5)
EXACT_UP_TO = 120_000  # prompts without CUDA; docs/diversity.md has the times it comes from
ON_CUDA_FROM = 50_000  # prompts: fewer are searched here before CUDA has started
BLOCK = 1024  # prompts whose vectors stay in the processor's cache
MAPPED = 4 * BLOCK  # whose neighbours' pages of the file stay in memory
VECTORS, INDEX = "vectors.npy", "index.faiss"  # what a ledger lends to the workers
QUERIES = 32_768  # prompts searched between two points where a run can be resumed


def diversity_scores(
    pairs: Pairs,
    spec: str | Encoder,
    *,
    k: int = Score.k,
    folder: Path | None = None,
    knn: Literal["auto", "exact", "approx"] = "auto",
    device: str | None = None,
    executor: Executor | None = None,
) -> pa.Table:
    """How much every unique prompt adds to the diversity of all of them.

    With z_c the L2-normalised embedding of prompt c and z_c^(k) its k-th nearest neighbour among
    the other unique prompts: distance = ||z_c - z_c^(k)||, entropy = h_c = log(max(distance,
    0.001)), in nats. The mean of h_c is, up to constants, the set's entropy
    (`entropy_estimate`), which is put into the table's facts.

    Parameters
    ----------
    pairs
        The pairs; ``prompts`` holds each prompt once, so that no pair counts twice.
    spec
        The encoder: ``minilm``, ``text:MODEL``, ``clip:MODEL``, ``column:NAME``, or one of yours.
    k
        The neighbour. More than there are other prompts: the farthest of them, with a message.
    folder
        Where scores and embeddings are kept; None keeps nothing.
    knn
        ``exact``; ``approx`` (an inverted file of product codes, candidates compared exactly;
        its recall on a sample is shown and kept beside the result); ``auto`` is exact on CUDA,
        and elsewhere up to 120,000 prompts.
    device
        Where a built-in encoder computes, and where 50,000 prompts or more are searched exactly
        if it is CUDA (fewer are searched on the CPU); None: the fastest device. Distances are
        the same up to rounding, so the score file is too.
    executor
        Who embeds and searches; by default this process. Workers elsewhere read all vectors, and an
        approximate index that was built here, from the ledger; they search on what they have.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.DIVERSITY`, row by row with ``pairs.prompts``. A single prompt has no
        neighbour: distance NaN, entropy 0.

    Raises
    ------
    FifaError
        For an unknown encoder, and where the ``local`` extra is missing.
    """
    n = pairs.prompts.num_rows
    if k < 1 or knn not in ("auto", "exact", "approx"):
        raise FifaError(f"no such neighbours: k={k}, knn={knn}", do="k >= 1; auto, exact, approx")
    place = _search_device(n, device)
    few = n <= EXACT_UP_TO or place != "cpu"
    method = ("exact" if few else "approx") if knn == "auto" else knn
    nearest = min(k, n - 1)
    if 0 < nearest < k:
        echo(f"diversity: {n:,} prompts have no {k}-th neighbours; k is {nearest}")

    given: Kept | None = None
    if isinstance(spec, str) and ENCODERS.parse(spec).is_column:
        given = kept_embeddings(pairs, spec, folder)
        name = spec
        identity: dict[str, object] = {"encoder": spec, "content": given.digest}
    else:
        encoder = make_encoder(spec, device=device or "auto") if isinstance(spec, str) else spec
        name, identity = encoder.name, encoder.identity
    content = (identity, *prompts_identity(pairs.prompts), method)
    path = folder and score_path(folder, "diversity", f"{name}-k{k}", *content)

    def make(ledger: Ledger) -> pa.Table:
        found = kept_embeddings(pairs, encoder, folder, executor) if given is None else given
        distance, facts = _distances(found, nearest, method, place, ledger, executor)
        # h_c = log ||z_c - z_c^(k)||, bounded below
        entropy = np.log(np.maximum(distance, np.float32(FLOOR)))
        if n == 1:
            entropy = np.zeros(1, np.float32)
        elif n > 1:
            facts["mean_log_distance"] = float(np.mean(entropy, dtype=np.float64))
            facts["entropy"] = entropy_estimate(entropy, nearest, found.shape[1])
            note(**{f"diversity_{fact}": value for fact, value in facts.items()})
        columns = [pairs.prompts["prompt_id"].combine_chunks(), pa.array(distance)]
        metadata = {"fifa.score": json.dumps(facts)}
        return pa.table([*columns, pa.array(entropy)], schema=DIVERSITY.with_metadata(metadata))

    facts = {"encoder": identity, "k": k, "floor": FLOOR}
    return scored_once(path, make, facts, store_of(executor))


def entropy_estimate(log_distances: Vectors, k: int, dimensions: int) -> float:
    """The Kozachenko-Leonenko estimate of a sample's differential entropy, in nats::

        H = psi(n) - psi(k) + log V_d + d * mean_c log ||z_c - z_c^(k)||

    V_d = pi^(d/2) / Gamma(d/2 + 1) is the volume of the unit ball, psi the digamma function.
    d is the encoder's dimension. Prompts fill far fewer, so the number is comparable between
    sets seen through one encoder with one k, and says nothing across encoders.

    Parameters
    ----------
    log_distances
        log ||z_c - z_c^(k)||, [n], n >= 2.
    k
        The neighbour.
    dimensions
        d.

    References
    ----------
    Kozachenko, Leonenko, "Sample estimate of the entropy of a random vector", Problems of
    Information Transmission 23 (1987), for k = 1; this form for any k: Kraskov, Stoegbauer,
    Grassberger, Physical Review E 69 (2004), equation 20.
    """
    n, d = len(log_distances), dimensions
    # psi(n) - psi(k) = sum of 1/i for k <= i < n
    digammas = float(np.sum(1 / np.arange(k, n, dtype=np.float64)))
    log_ball = d / 2 * math.log(math.pi) - math.lgamma(d / 2 + 1)
    return digammas + log_ball + d * float(np.mean(log_distances, dtype=np.float64))


def kth_distances(vectors: AnyVectors, rows: Rows, found: Rows) -> Vectors:
    """||z_c - z_c^(k)|| for the prompts ``rows``, float32 [q].

    The nearest of a prompt is itself, unless duplicates at distance 0 push it down or off the
    list; the k-th neighbour is the last but itself.

    Parameters
    ----------
    vectors
        All prompts, [n, d].
    rows
        The prompts searched, [q].
    found
        Their k + 1 nearest, nearest first, [q, k + 1].
    """
    itself = (found[:, :-1] == rows[:, None]).any(axis=1)
    kth = np.where(itself, found[:, -1], found[:, -2])
    distances = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), BLOCK):
        block = slice(start, start + BLOCK)
        # From the difference and not from 2 - 2 <z, z'>: near 0 that has no digits left.
        apart = vectors[rows[block]] - vectors[kth[block]]
        distances[block] = np.sqrt(np.einsum("ij,ij->i", apart, apart))
        if start % MAPPED == 0:
            give_back()
    return distances


def _search_device(n: int, device: str | None) -> str:
    """Where ``n`` prompts are searched exactly: ``cpu``, or a CUDA device."""
    if n < ON_CUDA_FROM or device == "cpu":
        return "cpu"
    found = make_runtime(device).device
    return found if found.startswith("cuda") else "cpu"


@dataclass(frozen=True, eq=False)  # vectors are not compared
class Nearest:
    """Finds the distances of a block of prompts to their k-th neighbours.

    Parameters
    ----------
    vectors
        All prompts, [n, d].
    k
        The neighbour.
    device
        Where to search exactly, with a torch device or (``cpu``) faiss; None: with the index.
    index
        As `fifa.scoring.neighbours.approximate_index` gave it.
    ledger
        What lends vectors and index to other workers.
    """

    vectors: Kept
    k: int
    device: str | None
    index: Any
    ledger: Ledger

    def __reduce__(self) -> tuple[Any, ...]:
        """Another worker has another device, and may not have the file of the vectors."""
        return _nearest, (self.k, self.device is None, self.ledger)

    def __call__(self, part: slice) -> pa.Table:
        """``distance`` of a part of the prompts, float32."""
        rows = np.arange(part.start, part.stop)
        found = self.search(self.vectors[part], self.k + 1)
        table = pa.table({"distance": kth_distances(self.vectors, rows, found)})
        give_back()
        return table

    @cached_property
    def search(self) -> Search:
        """The search, made once."""
        if self.device is None:
            return approximate_search(self.vectors, self.index)
        if self.device == "cpu":
            return exact_search(self.vectors)
        return device_search(self.vectors, self.device)


def _nearest(k: int, approximate: bool, ledger: Ledger) -> Nearest:
    """`Nearest` in a worker."""
    with ledger.borrowed(VECTORS) as path:
        vectors = Kept(map_array(path))
    device = None if approximate else _search_device(len(vectors), None)
    return Nearest(vectors, k, device, _index(vectors, ledger) if approximate else None, ledger)


def _index(vectors: Kept, ledger: Ledger) -> Any:
    """The index of the approximate search, from the ledger's disk where it has one.

    It is the largest part of this process's memory, and takes minutes to make.
    """
    if ledger.place is None or len(vectors) < FEWEST:
        return approximate_index(vectors)
    ledger.lend(INDEX, lambda path: write_index(approximate_index(vectors), path))
    give_back()
    with ledger.borrowed(INDEX) as path:
        return read_index(path)


def _distances(
    vectors: Kept,
    k: int,
    method: str,
    device: str,
    ledger: Ledger,
    executor: Executor | None,
) -> tuple[Vectors, dict[str, Any]]:
    """The distance to the k-th neighbour of every prompt, and how it was found."""
    n = len(vectors)
    if k < 1:  # one prompt, or none
        return np.full(n, np.nan, np.float32), {"prompts": n, "knn": "none"}
    approximate = method == "approx"
    parts = [slice(i, min(i + QUERIES, n)) for i in range(0, n, QUERIES)]
    shards = [Shard(f"from-{part.start}", part.stop - part.start, part) for part in parts]
    kept = ledger if len(shards) > 1 else Ledger()
    index = _index(vectors, kept) if approximate else None
    nearest = Nearest(vectors, k, None if approximate else device, index, kept)
    if is_elsewhere(executor, kept):
        kept.lend(VECTORS, vectors.write)
    table = map_shards(f"{k} nearest neighbours ({method})", nearest, shards, kept, executor)
    facts: dict[str, Any] = {"prompts": n, "knn": method, "neighbour": k}
    facts["device"] = "cpu" if approximate else device
    if approximate:
        facts["recall"] = sampled_recall(vectors, nearest.search, k)
        echo(f"diversity: approximate neighbours, recall@{k} {facts['recall']:.3f} on a sample")
    return table["distance"].to_numpy(), facts
