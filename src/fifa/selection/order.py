"""Orders that depend on the pairs alone, never on the order of the rows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Rows = npt.NDArray[np.int32]
BLOCK = 1 << 20


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


def ascending(
    key: npt.NDArray[np.float32], ids: npt.NDArray[np.bytes_], rows: Rows | None = None
) -> Rows:
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


def midranks(values: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Ranks from 1 in ascending order; equal values share the mean of their ranks."""
    value, position = _sorted(values)
    starts = np.flatnonzero(np.concatenate([[True], value[1:] != value[:-1]]))
    sizes = np.diff(np.append(starts, len(value)))
    ranks = np.empty(len(value), np.float64)
    ranks[position] = np.repeat(starts + (sizes + 1) / 2, sizes)
    return ranks


def occurrence(groups: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """How many earlier elements have the same (non-negative) group: 0 for a group's first."""
    packed = (groups.astype(np.uint64) << np.uint64(32)) | np.arange(len(groups), dtype=np.uint64)
    packed.sort()
    group, position = packed >> np.uint64(32), packed & np.uint64(0xFFFFFFFF)
    starts = np.concatenate([[True], group[1:] != group[:-1]])
    index = np.arange(len(groups), dtype=np.int32)
    counts = np.empty(len(groups), np.int32)
    counts[position.astype(np.intp)] = index - np.maximum.accumulate(np.where(starts, index, 0))
    return counts


def draws(ids: npt.NDArray[np.bytes_], rows: Rows, seed: int) -> npt.NDArray[np.float32]:
    """A uniform draw in [0, 1) for every row, from its id and the seed and nothing else.

    SplitMix64's finaliser (Steele, Lea and Flood 2014) chained over the id's 64-bit words.
    """
    out = np.empty(len(rows), np.float32)
    words = -(-ids.dtype.itemsize // 8)
    for start in range(0, len(rows), BLOCK):
        part = ids[rows[start : start + BLOCK]].astype(f"S{8 * words}")
        mixed = np.full(len(part), seed & 0xFFFFFFFFFFFFFFFF, np.uint64)
        for word in part.view("<u8").reshape(-1, words).T:
            mixed = _mix(mixed ^ word)
        # 24 bits: what float32 holds exactly
        out[start : start + BLOCK] = (mixed >> np.uint64(40)) * np.float32(2.0**-24)
    return out


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _sorted(
    values: npt.NDArray[np.float32],
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
