"""The nearest of many vectors: exactly on the CPU by faiss or on a GPU, or nearly by an index."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import SHARE, Parts, Tensor, free_bytes
from fifa.models.transformer import Vectors
from fifa.scoring.encoders import Kept
from fifa.shards.mapped import give_back

Rows = npt.NDArray[np.int64]


class AnyVectors(Protocol):
    """Vectors in memory, or on the disk (`fifa.scoring.encoders.Kept`): float32 when taken."""

    @property
    def shape(self) -> tuple[int, ...]:
        """n and d."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Any: ...


Search = Callable[[Vectors, int], Rows]  # (queries [q, d], k) -> the rows of the k nearest [q, k]

PROBES = 128  # cells of the approximate index that a query looks into
REFINE = 20  # candidates a neighbour whose distance is then computed exactly
FEWEST = 1000  # prompts that an approximate index can be trained on
ADDED = 65_536  # vectors added to an approximate index at a time, and
EXACT_BLOCK = 65_536  # searched exactly at a time: what is taken of them is in float32
QUERY_PART = 8192  # queries of an approximate index at a time: each has 220 candidates
SAMPLE = 1000  # prompts on which an approximate index is compared with the exact search

GROUP = 32  # vectors of which only the highest score is kept at first
QUERY_BLOCK = 4096  # queries whose scores are on the device at once, and
VECTOR_BLOCK = 65_536  # with how many vectors: half a gigabyte of scores in float16
CANDIDATES = 2**28  # numbers of the vectors that are compared in float32 at once
# The error of a score of unit vectors in float16 is at most 2^-10 from rounding both vectors,
# 2^-12 from rounding |v|^2 / 2, 2^-11 from rounding the score, and d 2^-23 from the sum in float32.
HALF_ERROR = 2.0**-10 + 2.0**-12 + 2.0**-11
SUM_ERROR = 2.0**-23  # for each of the d numbers
SAME = 1e-6  # a squared distance that is rounding: nothing can be nearer


def exact_search(vectors: AnyVectors) -> Search:
    """Brute force over ``vectors`` [n, d] by faiss, `EXACT_BLOCK` of them after the other."""
    faiss = require("faiss")
    n = len(vectors)
    whole = vectors[0:n] if n <= EXACT_BLOCK else None

    def search(queries: Vectors, k: int) -> Rows:
        distances: Vectors = np.empty((len(queries), 0), np.float32)
        rows: Rows = np.empty((len(queries), 0), np.int64)
        for start in range(0, n, EXACT_BLOCK):
            part = vectors[start : start + EXACT_BLOCK] if whole is None else whole
            near, at = faiss.knn(queries, part, min(k, len(part)), metric=faiss.METRIC_L2)
            del part  # before the next one is taken
            give_back()
            distances = np.concatenate([distances, near], 1)
            rows = np.concatenate([rows, at + start], 1)
            order = np.argsort(distances, axis=1, kind="stable")[:, :k]
            distances = np.take_along_axis(distances, order, 1)
            rows = np.take_along_axis(rows, order, 1)
        return rows

    return search


def approximate_index(vectors: AnyVectors) -> Any | None:
    """An inverted file with 4-bit product codes over ``vectors`` [n, d]; None for few of them.

    About 2 sqrt(n) cells, and codes of 1 bit a number. It holds the vectors too, in float16. The
    same vectors give the same index.
    """
    faiss = require("faiss")
    n, d = vectors.shape
    if n < FEWEST:
        return None
    cells = max(1, min(2 ** round(math.log2(2 * math.sqrt(n))), n // 39))
    width = next(w for w in (4, 3, 2, 1) if d % w == 0)
    index = faiss.index_factory(d, f"IVF{cells},PQ{d // width}x4fs,Refine(SQfp16)", faiss.METRIC_L2)
    index.train(vectors[:: max(1, n // (64 * cells))])
    give_back()
    kept = faiss.downcast_index(index.refine_index)
    kept.codes.resize(n * kept.code_size)  # reserved: a vector that grows is there twice
    kept.codes.clear()
    for start in range(0, n, ADDED):
        index.add(vectors[start : start + ADDED])
        give_back()
    return index


def write_index(index: Any, path: Path) -> None:
    """Write an `approximate_index`; raises `FifaError` where there is no room."""
    try:
        require("faiss").write_index(index, str(path))
    except RuntimeError as error:
        raise FifaError(
            "cannot write the index of the neighbours", where=str(path), do="make room on the disk"
        ) from error


def read_index(path: Path) -> Any:
    """What `write_index` wrote. Its vectors, nine tenths of it, are mapped where faiss can."""
    faiss = require("faiss")
    return faiss.read_index(str(path), getattr(faiss, "IO_FLAG_MMAP_IFC", 0))  # since 1.11


def approximate_search(vectors: AnyVectors, index: Any | None) -> Search:
    """The search of ``vectors`` [n, d] with their `approximate_index`; exact where that is None.

    `PROBES` cells are read, and `REFINE` candidates a neighbour compared by their float16 vectors.
    A prompt for which it finds too few is searched exactly.
    """
    exact = exact_search(vectors)
    if index is None:
        return exact
    faiss = require("faiss")
    index.k_factor = REFINE
    probes = min(PROBES, faiss.extract_index_ivf(index).nlist)
    faiss.ParameterSpace().set_index_parameter(index, "nprobe", probes)

    def search(queries: Vectors, k: int) -> Rows:
        parts = range(0, max(1, len(queries)), QUERY_PART)
        found: Rows = np.concatenate(
            [index.search(queries[start : start + QUERY_PART], k)[1] for start in parts]
        )
        short = (found < 0).any(axis=1)
        if short.any():
            found[short] = exact(queries[short], k)
        return found

    return search


def sampled_recall(vectors: AnyVectors, search: Search, k: int) -> float:
    """The share of `SAMPLE` prompts' k nearest neighbours that ``search`` finds too."""
    rows = np.linspace(0, len(vectors) - 1, min(SAMPLE, len(vectors))).astype(np.int64)
    truth, found = (s(vectors[rows], k + 1) for s in (exact_search(vectors), search))
    shared = sum(len(np.intersect1d(*both)) - 1 for both in zip(truth, found, strict=True))
    return max(0, shared) / (len(rows) * k)


def device_search(vectors: AnyVectors, device: str) -> Search:
    """Brute force over ``vectors`` [n, d] on a torch device, for one with fast products of halves.

    A vector scores <q, v> - |v|^2 / 2 with a query, which is highest where ||q - v|| is smallest.
    All scores are computed in float16, and of every `GROUP` vectors the highest is kept. The k
    highest scores lie in the k highest groups, so the vectors of the 2k highest are compared
    again, in float32. No vector is missed if the k-th of these is better than the best of all
    other groups by more than the error of a score in float16; a query for which it is not is
    searched again with products in float32. So the neighbours are those of `exact_search`, except
    where two are equally near up to the rounding of float32: either may be taken then, as the
    distance is what counts.

    What does not fit into the device's memory is searched a part of the vectors after the other,
    and fewer queries at a time once memory has run out.

    Parameters
    ----------
    vectors
        float32, L2-normalised or zero: the bound of the error holds for no others. Queries too.
    device
        A torch device.
    """
    torch = require("torch")
    place, n = torch.device(device), len(vectors)
    free = free_bytes(place)
    # float32 and float16, in half of the memory: the other half is for scores
    most = n if free is None else int(SHARE * free / 2 / (6 * _width(vectors)))
    step = max(GROUP, min(n, most))
    starts = range(0, n, step)
    whole = _load(vectors, slice(0, n), place) if len(starts) == 1 else None
    parts = Parts("prompt")

    def search(queries: Vectors, k: int) -> Rows:
        there = torch.from_numpy(queries).to(place)
        scores = torch.empty((len(queries), 0), device=place)
        rows = torch.empty((len(queries), 0), dtype=torch.int64, device=place)
        with torch.inference_mode(), _plain_products():
            for start in starts:
                part = whole or _load(vectors, slice(start, start + step), place)
                more, at = _search_part(part, there, k, parts)
                scores, rows = torch.cat([scores, more], 1), torch.cat([rows, at + start], 1)
                scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
                rows = rows.gather(1, order)
        found: Rows = rows.cpu().numpy()
        return found

    return search


@dataclass(frozen=True)
class _Loaded:
    """Vectors on a device.

    Parameters
    ----------
    vectors
        float32 [n, d].
    halves
        |v|^2 / 2, float32 [n].
    blocks
        `_extended` with -|v|^2 / 2, float16, of `VECTOR_BLOCK` vectors each.
    """

    vectors: Tensor
    halves: Tensor
    blocks: list[Tensor]


def _load(vectors: AnyVectors, rows: slice, place: Any) -> _Loaded:
    torch = require("torch")
    if isinstance(vectors, Kept):  # half as much to copy; the device widens them, as `Kept` does
        there = torch.from_numpy(np.array(vectors.half[rows])).to(place).float()
        norms = torch.linalg.vector_norm(there, dim=1, keepdim=True)
        there /= norms.clamp(min=torch.finfo(torch.float32).tiny)
    else:
        there = torch.from_numpy(vectors[rows]).to(place)
    halves = torch.linalg.vector_norm(there, dim=1).square() / 2
    blocks = _blocks(there, halves)
    return _Loaded(there, halves, [_extended(v, -half, torch.float16) for v, half in blocks])


def _extended(vectors: Tensor, last: Tensor, dtype: Any) -> Tensor:
    """Rows (v, last, 0, ...): the product of (v, -|v|^2 / 2) and (q, 1) is the score.

    Their width is a multiple of 8, as fast products want it, and their number one of `GROUP`:
    the rows beyond the vectors score -inf.
    """
    torch = require("torch")
    n, d = vectors.shape
    shape = (-(-n // GROUP) * GROUP, _width(vectors))
    rows: Tensor = torch.zeros(shape, dtype=dtype, device=vectors.device)
    rows[:n, :d] = vectors
    rows[:n, d] = last
    rows[n:, d] = -torch.inf
    return rows


def _blocks(vectors: Tensor, halves: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    split = require("torch").split
    return zip(split(vectors, VECTOR_BLOCK), split(halves, VECTOR_BLOCK), strict=True)


def _width(vectors: AnyVectors | Tensor) -> int:
    return -(-(int(vectors.shape[1]) + 1) // 8) * 8


def _search_part(part: _Loaded, queries: Tensor, k: int, parts: Parts) -> tuple[Tensor, Tensor]:
    """The scores [q, k] and rows [q, k] of the k best; -inf where there are fewer than k."""
    torch = require("torch")

    def run(some: Tensor, half: bool) -> tuple[Tensor, Tensor, Tensor]:
        most = QUERY_BLOCK if half else QUERY_BLOCK // 2  # scores of float32 are twice as large
        found = parts.run(lambda rows: _nearest(part, some[rows], k, half), len(some), most)
        scores, rows, sure = (torch.cat(column) for column in zip(*found, strict=True))
        return scores, rows, sure

    scores, rows, sure = run(queries, half=True)
    again = (~sure).nonzero().squeeze(1)
    if len(again):
        scores[again], rows[again], _ = run(queries[again], half=False)
    return scores, rows


def _nearest(part: _Loaded, queries: Tensor, k: int, half: bool) -> tuple[Tensor, Tensor, Tensor]:
    """As `_search_part`, and whether no better one can have been missed, bool [q]."""
    torch = require("torch")
    n = len(part.vectors)
    highest = _group_scores(part, queries, half)
    best, groups = highest.topk(min(2 * k, highest.shape[1]), dim=1)
    inside = torch.arange(GROUP, device=queries.device)
    found = []
    size = max(1, CANDIDATES // (groups.shape[1] * GROUP * queries.shape[1]))
    for query, near in zip(torch.split(queries, size), torch.split(groups, size), strict=True):
        rows = (near[:, :, None] * GROUP + inside).flatten(1)
        known = rows.clamp(max=n - 1)
        vectors = torch.nn.functional.embedding(known, part.vectors)
        scores = (vectors @ query[:, :, None]).squeeze(2) - part.halves[known]
        scores[rows >= n] = -torch.inf
        scores, order = scores.topk(min(k, scores.shape[1]), dim=1)
        found.append((scores, known.gather(1, order)))
    scores, rows = (torch.cat(column) for column in zip(*found, strict=True))
    kth = scores[:, -1]
    sure = kth >= best[:, -1].float() + HALF_ERROR + SUM_ERROR * queries.shape[1]
    # |q - v|^2 = |q|^2 - 2 (<q, v> - |v|^2 / 2)
    sure |= queries.square().sum(1) - 2 * kth <= SAME
    if groups.shape[1] == highest.shape[1]:
        sure[:] = True
    return scores, rows, sure


def _group_scores(part: _Loaded, queries: Tensor, half: bool) -> Tensor:
    """The highest score in every `GROUP` vectors, in float16 or float32, [q, groups]."""
    torch = require("torch")
    dtype = torch.float16 if half else torch.float32
    wanted = _extended(queries, torch.ones_like(queries[:, 0]), dtype)[: len(queries)].T
    blocks: Iterable[Tensor] = part.blocks
    if not half:
        rows = _blocks(part.vectors, part.halves)
        blocks = (_extended(vectors, -halves, dtype) for vectors, halves in rows)
    # Vectors lie along the rows: maxima over rows read memory in order.
    highest = [(block @ wanted).view(-1, GROUP, len(queries)).amax(1) for block in blocks]
    together: Tensor = torch.cat(highest).T.contiguous()
    return together


@contextmanager
def _plain_products() -> Iterator[None]:
    """Products of float32 in float32, and sums of products of float16 in float32."""
    torch = require("torch")
    products, before = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    reduced = products.allow_fp16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    products.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        products.allow_fp16_reduced_precision_reduction = reduced
