"""Strategies: the order in which eligible pairs are taken.

Orders depend on the pairs alone, never on the order of the rows. The greedy strategies are
quadratic in the number of distinct prompts, so they refuse more than `MAX_PROMPTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.console import progress
from fifa.errors import FifaError

Floats = npt.NDArray[np.float32]
Rows = npt.NDArray[np.int32]
DRAWS = 1 << 20  # made at once


def id_bytes(pair_id: pa.ChunkedArray) -> npt.NDArray[np.bytes_]:
    """The ids as an array of fixed-width bytes, without a copy where they have one width.

    NumPy compares such bytes as Arrow compares strings: by UTF-8, shorter first.
    """
    ids = pair_id.chunk(0) if pair_id.num_chunks == 1 else pair_id.combine_chunks()
    _, offset_buffer, data_buffer = ids.buffers()
    kind = np.int64 if pa.types.is_large_string(ids.type) else np.int32
    offsets = np.frombuffer(offset_buffer, kind)[ids.offset : ids.offset + len(ids) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    lengths = np.diff(offsets)
    width = int(lengths.max(initial=1))
    if (lengths == width).all():
        return data.view(f"S{width}")
    padded = np.zeros((len(ids), width), np.uint8)
    padded[np.arange(width) < lengths[:, None]] = data
    return padded.reshape(-1).view(f"S{width}")


def ascending(key: Floats, ids: npt.NDArray[np.bytes_], rows: Rows | None = None) -> Rows:
    """The order of ``rows`` by ascending ``key``, equal keys by ascending id, exactly.

    Parameters
    ----------
    key
        float32 [rows], finite.
    ids
        `id_bytes` of the whole table.
    rows
        int32, rows of the table to order; None for all.
    """
    if rows is None:
        rows = np.arange(len(key), dtype=np.int32)
    value, position = _sorted(key)
    order = rows[position]
    same = value[1:] == value[:-1]
    if not same.any():
        return order
    # Equal keys: their rows again, by (run of equal keys, id).
    places, run = _runs(same)
    order[places] = order[places][_by_run_and_id(run, ids[order[places]])]
    return order


def midranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks from 1 in ascending order; equal values share the mean of their ranks."""
    value, position = _sorted(values)
    starts = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
    sizes = np.diff(np.append(starts, len(value)))
    ranks = np.empty(len(value), np.float64)
    ranks[position] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return ranks


def occurrence(groups: Rows) -> Rows:
    """How many earlier elements have the same (non-negative) group: 0 for a group's first."""
    packed = (groups.astype(np.uint64) << np.uint64(32)) | np.arange(len(groups), dtype=np.uint64)
    packed.sort()
    group, position = packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)
    starts = np.concatenate([[True], group[1:] != group[:-1]])
    index = np.arange(len(groups), dtype=np.int32)
    counts = np.empty(len(groups), np.int32)
    counts[position.astype(np.intp)] = index - np.maximum.accumulate(np.where(starts, index, 0))
    return counts


def draws(ids: npt.NDArray[np.bytes_], rows: Rows, seed: int) -> Floats:
    """A uniform draw in [0, 1) for every row, from its id and the seed and nothing else.

    SplitMix64's finaliser (Steele, Lea and Flood 2014) chained over the id's 64-bit words.
    """
    out = np.empty(len(rows), np.float32)
    words = -(-ids.dtype.itemsize // 8)
    for start in range(0, len(rows), DRAWS):
        part = ids[rows[start : start + DRAWS]].astype(f"S{8 * words}")
        mixed = np.full(len(part), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
        for word in part.view("<u8").reshape(-1, words).T:
            mixed = _mix(mixed ^ word)
        # 24 bits: what float32 holds exactly
        out[start : start + DRAWS] = (mixed >> np.uint64(40)) * np.float32(2.0**-24)
    return out


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sorted(
    values: Floats,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    # Sorting one array of 64-bit integers (value above, position below) is far quicker than an
    # argsort. A float's bits order as integers once negatives have all their bits flipped and
    # the others their sign bit; adding 0 makes -0 and 0 equal.
    bits = (values + np.float32(0)).view(np.int32)
    packed = np.empty(len(values), "<u8")
    halves = packed.view("<u4").reshape(-1, 2)
    halves[:, 0] = np.arange(len(values), dtype=np.uint32)
    halves[:, 1] = (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)
    packed.sort()
    return halves[:, 1].copy(), halves[:, 0].copy()


def _by_run_and_id(run: npt.NDArray[np.intp], ids: npt.NDArray[np.bytes_]) -> npt.NDArray[np.intp]:
    # Runs are short and ids differ early: a 64-bit key of the run and the first four bytes
    # leaves few equal, and only those are compared whole.
    width = ids.dtype.itemsize
    head = ids.astype("S4") if width != 4 else ids
    key = (run.astype(np.uint64) << np.uint64(32)) | head.view(">u4").astype(np.uint64)
    order = np.argsort(key)
    key = key[order]
    places, again = _runs(key[1:] == key[:-1])
    again = np.lexsort((ids[order[places]], again))
    order[places] = order[places][again]
    return order


def _runs(same: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Places whose value another place shares, given ``value[1:] == value[:-1]``; their run."""
    as_before = np.concatenate([[False], same])
    tied = as_before.copy()
    tied[:-1] |= same
    places = np.flatnonzero(tied)
    return places, np.cumsum(~as_before[places])


Picks = npt.NDArray[np.intp]
Greedy = Callable[[Floats, int], Picks]

MAX_PROMPTS = 100_000
DECIMALS = 4  # of gains and similarities: what is equal but for rounding errors is a tie
BATCH = 16  # candidates whose gain is computed at once, to begin with
BLOCK = 512  # rows of the similarity matrix held at once


def spread(prompts: Rows, embeddings: Callable[[], Floats], greedy: Greedy, count: int) -> Picks:
    """Take pairs in turns: one of every prompt in greedy order, then a second one of each.

    Parameters
    ----------
    prompts
        int32 [pairs], the prompt of every pair; most important pair first.
    embeddings
        Gives float32 [all prompts, d], L2-normalised.
    greedy
        `facility_location` or `farthest_point`.
    count
        Prompts beyond the first ``count`` are left in the order of their best pair.

    Returns
    -------
    int [pairs], the order, as positions in ``prompts``.
    """
    distinct, first, inverse = np.unique(prompts, return_index=True, return_inverse=True)
    if len(distinct) > MAX_PROMPTS:
        raise FifaError(
            f"{len(distinct):,} eligible prompts are too many for a greedy strategy, whose cost "
            f"is quadratic (at most {MAX_PROMPTS:,})",
            do="narrow the candidates first (--min-quality, --margin-percentiles), or use the "
            "strategy 'fifa' with --per-prompt, whose diversity term is already computed",
        )
    # By their best pair: an order, and so a result, that the rows' order does not touch.
    canonical = np.argsort(first)
    picks = greedy(embeddings()[distinct[canonical]], min(count, len(distinct)))
    place = np.full(len(distinct), len(distinct), np.int64)
    place[canonical[picks]] = np.arange(len(picks))
    turn = occurrence(prompts)
    return np.lexsort((first[inverse], place[inverse], turn))


def facility_location(vectors: Floats, count: int) -> Picks:
    """The prompts that greedily maximise how well all prompts are represented.

    ``f(S) = sum_i max(0, max_{j in S} z_i . z_j)`` is monotone submodular, so greedy reaches
    1 - 1/e of the best (Nemhauser, Wolsey and Fisher 1978), and a gain computed earlier bounds
    a later one (the lazy greedy of Minoux 1978).

    Parameters
    ----------
    vectors
        float32 [n, d], L2-normalised.
    count
        How many to pick, at most n. ``O(n^2 d)`` for the first gains, then ``O(n d)`` for every
        gain computed again; memory ``O(n (d + 512))``.

    Returns
    -------
    int [count], in the order of picking; equal gains go to the lower position.
    """
    n = len(vectors)
    covered = np.zeros(n, np.float32)

    def gains(candidates: Picks) -> npt.NDArray[np.float64]:
        # gain_j = sum_i max(0, z_i . z_j - covered_i)
        similarity = vectors[candidates] @ vectors.T
        similarity -= covered
        np.maximum(similarity, 0, out=similarity)
        return np.asarray(np.round(similarity.sum(axis=1, dtype=np.float64), DECIMALS))

    with progress("facility location", n + count) as advance:
        bound = np.empty(n, np.float64)
        for start in range(0, n, BLOCK):
            block = np.arange(start, min(start + BLOCK, n))
            bound[block] = gains(block)
            advance(len(block))
        picks = np.empty(count, np.intp)
        for step in range(count):
            picks[step] = best = _best(bound, gains, fresh_at_first=step == 0)
            bound[best] = -np.inf
            np.maximum(covered, vectors @ vectors[best], out=covered)
            advance(1)
    return picks


def _best(
    bound: npt.NDArray[np.float64],
    gains: Callable[[Picks], npt.NDArray[np.float64]],
    *,
    fresh_at_first: bool,
) -> int:
    # Tightens `bound` in place, the loosest first, until the largest is a gain of this step.
    fresh = np.full(len(bound), fresh_at_first)
    size = BATCH
    while True:
        best = int(np.argmax(bound))
        if fresh[best] or bound[best] <= 0:  # nothing left to gain: the first is as good as any
            return best
        size = min(size, len(bound))
        batch = np.argpartition(bound, -size)[-size:]
        batch = np.union1d(batch[~fresh[batch]], [best])
        batch = batch[bound[batch] > -np.inf]
        bound[batch] = gains(batch)
        fresh[batch] = True
        size = min(2 * size, BLOCK)  # bounds that are this loose: many products at once are cheaper


def farthest_point(vectors: Floats, count: int) -> Picks:
    """The first prompt, then always the one farthest from all picked (Gonzalez 1985).

    Parameters
    ----------
    vectors
        float32 [n, d], L2-normalised.
    count
        How many to pick, at most n: ``O(n d)`` each.

    Returns
    -------
    int [count], in the order of picking; equal distances go to the lower position.
    """
    picks = np.zeros(count, np.intp)
    nearest = np.full(len(vectors), -np.inf, np.float32)  # similarity to the nearest pick
    with progress("farthest point", count) as advance:
        for step in range(count):
            # the farthest has the smallest similarity to its nearest pick
            picks[step] = best = int(np.argmin(nearest)) if step else 0
            np.maximum(nearest, np.round(vectors @ vectors[best], DECIMALS), out=nearest)
            nearest[picks[: step + 1]] = np.inf
            advance(1)
    return picks


@dataclass(frozen=True)
class Candidates:
    """The eligible pairs, as a strategy sees them.

    Parameters
    ----------
    rows
        int32 [eligible], their rows in the table, ascending.
    ids
        `fifa.selection.strategies.id_bytes` of the whole table.
    importance
        float32 [eligible].
    margin
        float32 [eligible], absolute; None without a scorer.
    prompt
        int32 [eligible], the prompt's row in `Pairs.prompts`.
    count
        How many pairs are to be kept.
    seed
        For the strategies that draw.
    embeddings
        Gives float32 [prompts, d], L2-normalised, for the strategies over prompts.
    """

    rows: Rows
    ids: npt.NDArray[np.bytes_]
    importance: Floats
    margin: Floats | None
    prompt: Rows
    count: int
    seed: int
    embeddings: Callable[[], Floats]


@dataclass(frozen=True)
class Strategy:
    """How pairs are taken.

    Parameters
    ----------
    order
        From the candidates to their rows, first taken first.
    needs
        Without which it has nothing to go by: ``margin``; ``importance`` (any score with a
        weight); ``embeddings``; or nothing.
    unanimous
        Only pairs are eligible on which every scorer agrees with the person.
    soft
        There is no cut: every eligible pair is kept, with `soft_weights`.
    """

    order: Callable[[Candidates], Rows]
    needs: Literal["margin", "importance", "embeddings", ""] = "importance"
    unanimous: bool = False
    soft: bool = False


def by_importance(pairs: Candidates) -> Rows:
    """FiFA's top-K: most important first."""
    return ascending(-pairs.importance, pairs.ids, pairs.rows)


def by_chance(pairs: Candidates) -> Rows:
    """A seeded draw that depends on the pairs' ids, not on their rows."""
    return ascending(draws(pairs.ids, pairs.rows, pairs.seed), pairs.ids, pairs.rows)


def by_margin(pairs: Candidates, key: Callable[[Floats], Floats]) -> Rows:
    """By a key of the absolute margin, smallest first."""
    assert pairs.margin is not None  # `gather_terms` has refused the strategy otherwise
    return ascending(key(pairs.margin), pairs.ids, pairs.rows)


def over_prompts(pairs: Candidates, greedy: Greedy) -> Rows:
    """A pair of every prompt in turn, prompts as `fifa.selection.strategies` takes them."""
    best = by_importance(pairs)
    prompts = pairs.prompt[np.searchsorted(pairs.rows, best)]  # rows are ascending
    return best[spread(prompts, pairs.embeddings, greedy, pairs.count)]


def from_median(margin: Floats) -> Floats:
    """The distance to the median, float32."""
    return np.asarray(np.abs(margin - np.float32(np.median(margin))))


# A row for every name in `fifa.config.STRATEGIES`, which says in words what it does.
STRATEGIES = {
    "fifa": Strategy(by_importance),
    "random": Strategy(by_chance, needs=""),
    "low": Strategy(partial(by_margin, key=np.positive), needs="margin"),
    "middle": Strategy(partial(by_margin, key=from_median), needs="margin"),
    "high": Strategy(partial(by_margin, key=np.negative), needs="margin"),
    "consensus": Strategy(by_importance, needs="margin", unanimous=True),
    "facility": Strategy(partial(over_prompts, greedy=facility_location), needs="embeddings"),
    "farthest": Strategy(partial(over_prompts, greedy=farthest_point), needs="embeddings"),
    "weights": Strategy(by_importance, soft=True),
}


def soft_weights(importance: Floats) -> Floats:
    """Weights for the loss in place of a cut: float32 [kept pairs], mean 1.

    The logistic function squeezes importance, as SmPO's soft labels squeeze reward margins:
    an outlier weighs at most twice as much as an average pair before the normalisation.
    """
    # w_i = s(I_i) / mean_j s(I_j),  s(x) = 1 / (1 + exp(-x)) = (1 + tanh(x / 2)) / 2
    soft = 0.5 * (1.0 + np.tanh(0.5 * importance.astype(np.float64)))
    total = np.sort(soft).mean()  # sorted: a sum that does not depend on the rows' order
    return (soft / total).astype(np.float32) if total > 0 else np.ones_like(importance)
