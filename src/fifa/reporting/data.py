"""The numbers on the page: plain functions from the run folder's tables to counts and curves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.data.table import FILES
from fifa.errors import FifaError
from fifa.scoring.agreement import Agreement, wilson
from fifa.shards.files import read_json_lines

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]

LEAST = 20  # labelled pairs below which a share is told as a count, not drawn as a curve


@dataclass(frozen=True)
class Columns:
    """What the page needs of ``selection.parquet`` and ``pairs.parquet``, an entry a pair.

    Numbers are float32 with NaN where there is none, `rank` is int32 with 0 where there is
    none, `reason` an index into `reasons`.
    """

    margin: Floats
    signed: Floats
    quality: Floats
    diversity: Floats
    importance: Floats
    rank: Ints
    reason: Ints
    reasons: tuple[str, ...]
    kept: Bools
    label: Floats
    prompt: Ints

    def because(self, reason: str) -> Bools:
        """Which pairs have this reason."""
        return np.asarray(self.reason == self.reasons.index(reason))


def load_columns(folder: Path) -> Columns:
    """Read the columns of a run, nothing else of it; `FifaError` if nothing is selected yet."""
    path = folder / "selection.parquet"
    if not path.exists():
        raise FifaError(
            "the run has no selection yet", where=str(folder), do="run `fifa select` on it"
        )
    floats = ["margin", "signed_margin", "quality", "diversity", "importance"]
    chosen = pq.read_table(path, columns=[*floats, "rank", "reason"])
    pairs = pq.read_table(folder / FILES["table"], columns=["label", "prompt_index"])
    if chosen.num_rows != pairs.num_rows:
        raise FifaError(
            f"the selection has {chosen.num_rows:,} rows, the pairs {pairs.num_rows:,}",
            where=str(folder),
            do="select again: `fifa select`",
        )
    margin, signed, quality, diversity, importance = (_floats(chosen[name]) for name in floats)
    reason = chosen["reason"].unify_dictionaries().combine_chunks()
    codes, reasons = reason.indices.to_numpy(), tuple(reason.dictionary.to_pylist())
    return Columns(
        margin=margin,
        signed=signed,
        quality=quality,
        diversity=diversity,
        importance=importance,
        rank=pc.fill_null(chosen["rank"], 0).to_numpy(),
        reason=codes,
        reasons=reasons,
        kept=codes == reasons.index("selected") if "selected" in reasons else codes < 0,
        label=_floats(pairs["label"]),
        prompt=pairs["prompt_index"].to_numpy(),
    )


def _floats(column: pa.ChunkedArray) -> Floats:
    values: Floats = pc.fill_null(column, float("nan")).to_numpy()
    return values


def signed_margins(path: Path, label: Floats) -> Floats:
    """One scorer's signed margins from its ``margin-*.parquet``; NaN for ties and no score."""
    table = pq.read_table(path, columns=["reward_0", "reward_1"])
    # m = r(c, x_w) - r(c, x_l): the sign of (label - 1/2) says which image won
    with np.errstate(invalid="ignore"):
        signed = (_floats(table["reward_0"]) - _floats(table["reward_1"])) * np.sign(label - 0.5)
    return np.where((label == 0.5) | ~np.isfinite(signed), np.nan, signed)


@dataclass(frozen=True)
class Curve:
    """Agreement among the pairs with the largest margins, at growing depth.

    `n` pairs are the share `top` of all labelled ones; all arrays are float64 or int64 [points].
    """

    top: Floats
    n: Ints
    share: Floats
    low: Floats
    high: Floats


def hits_by_margin(signed: Floats) -> Floats:
    """Where scorer and people agree, largest absolute margin first: float64 [labelled pairs].

    ``signed`` are signed margins, NaN where there is no label or score. 1 where they agree, 0
    where not, 1/2 where the scorer sees no difference.
    """
    known = signed[np.isfinite(signed)]
    order = np.argsort(-np.abs(known), kind="stable")
    return ((np.sign(known[order]) + 1) / 2).astype(np.float64)


def agreement_of(hits: Floats) -> Agreement:
    """The share of ``hits`` (as `hits_by_margin` gives them) with its interval."""
    n, agreed = len(hits), float(hits.sum())
    return Agreement(agreed / n if n else float("nan"), *wilson(agreed, n), n)


def agreement_curve(hits: Floats, points: int = 160) -> Curve | None:
    """Agreement among the first n of ``hits``, n growing by a constant factor from `LEAST`.

    None for fewer than `LEAST`.
    """
    if len(hits) < LEAST:
        return None
    n = np.unique(np.geomspace(LEAST, len(hits), points).round().astype(np.int64))
    agreed = np.cumsum(hits)[n - 1]
    band = np.array([wilson(float(a), int(m)) for a, m in zip(agreed, n, strict=True)])
    return Curve(n / len(hits), n, agreed / n, band[:, 0], band[:, 1])


def agreement_deciles(hits: Floats) -> list[Agreement]:
    """Agreement in each tenth of ``hits``, smallest margins first; empty for too few."""
    if len(hits) < LEAST:
        return []
    return [agreement_of(part) for part in np.array_split(hits[::-1], 10)]


@dataclass(frozen=True)
class Histogram:
    """One component before and after, on common bins.

    `edges` [bins + 1]; `before` and `after` are shares of their pairs [bins]. Values beyond the
    outer edges are in the outer bins.
    """

    edges: Floats
    before: Floats
    after: Floats
    median_before: float
    median_after: float


def histogram(values: Floats, kept: Bools) -> Histogram | None:
    """Bins from the 0.1th to the 99.9th percentile of all finite values; None if there is none."""
    known = np.isfinite(values)
    before, after = values[known], values[known & kept]
    if not len(before):
        return None
    low, high = (float(edge) for edge in np.percentile(before, [0.1, 99.9]))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(1.5 * np.sqrt(len(after)), 12, 40))  # no more than the kept pairs can fill
    edges = np.linspace(low, high, bins + 1)

    def shares(part: Floats) -> Floats:
        counts, _ = np.histogram(np.clip(part.astype(np.float64), low, high), edges)
        return counts / max(len(part), 1)

    return Histogram(
        edges,
        shares(before),
        shares(after),
        float(np.median(before)),
        float(np.median(after)) if len(after) else float("nan"),
    )


def count_reasons(columns: Columns) -> dict[str, int]:
    """Pairs by reason, ``selected`` among them."""
    counts = np.bincount(columns.reason, minlength=len(columns.reasons))
    return {name: int(count) for name, count in zip(columns.reasons, counts, strict=True)}


@dataclass(frozen=True)
class Rejected:
    """Rows that could not be read for one reason, with the first few of them."""

    reason: str
    count: int
    examples: tuple[str, ...]


def count_rejected(table: pa.Table, most: int = 12, examples: int = 3) -> list[Rejected]:
    """Rejected rows by their ``most`` frequent reasons; ``table`` has file, row and reason."""
    if not table.num_rows:
        return []
    reasons = table["reason"].cast(pa.string()).combine_chunks().dictionary_encode()
    codes, names = reasons.indices.to_numpy(), reasons.dictionary.to_pylist()
    counts = np.bincount(codes)
    found = []
    for code in sorted(range(len(names)), key=lambda code: (-counts[code], names[code]))[:most]:
        first = table.take(np.flatnonzero(codes == code)[:examples]).to_pylist()
        where = tuple(f"{row['file']}, row {row['row']}" for row in first)
        found.append(Rejected(names[code], int(counts[code]), where))
    return found


def first_by(rows: Ints, key: Floats | Ints, prompt: Ints, n: int) -> list[int]:
    """The ``n`` of ``rows`` with the smallest ``key`` (NaN last), one a prompt, in order."""
    near = min(len(rows), 64 * n)
    if near < len(rows):
        values = key[rows]
        cut = np.partition(values, near - 1)[near - 1]
        rows = rows[~(values > cut)] if np.isfinite(cut) else rows
    found: dict[int, int] = {}
    for row in rows[np.argsort(key[rows], kind="stable")]:
        found.setdefault(int(prompt[row]), int(row))
        if len(found) == n:
            break
    return list(found.values())


def take_rows(path: Path, rows: Sequence[int] | Ints, columns: list[str] | None = None) -> pa.Table:
    """Rows of a Parquet file, in the order asked; only the row groups they are in are read."""
    file = pq.ParquetFile(path)
    starts = np.cumsum(
        [0] + [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
    )
    wanted = np.unique(np.asarray(rows, dtype=np.int64))
    groups = np.searchsorted(starts, wanted, side="right") - 1
    parts = [
        file.read_row_group(int(g), columns=columns).take(wanted[groups == g] - starts[g])
        for g in np.unique(groups)
    ]
    if not parts:
        return file.schema_arrow.empty_table().select(columns or file.schema_arrow.names)
    table = pa.concat_tables(parts).unify_dictionaries()
    return table.take(np.searchsorted(wanted, np.asarray(rows, dtype=np.int64)))


@dataclass(frozen=True)
class Plane:
    """Prompts in the plane of their two main directions.

    `before` and `after` are float64 [points, 2], samples of all and of the kept prompts;
    `explained` is the share of the variance the plane shows; `apart_before` and `apart_after`
    the mean cosine distance of two prompts drawn at random.
    """

    before: Floats
    after: Floats
    explained: float
    apart_before: float
    apart_after: float


def prompt_plane(
    before: Floats, after: Floats, *, drawn: tuple[int, int] = (5000, 2500)
) -> Plane | None:
    """Principal components of prompt embeddings, by hand and deterministic.

    Parameters
    ----------
    before, after
        float32 [n, d], L2-normalised: (samples of) all prompts, which the components are fitted
        on, and of those of the kept pairs.
    drawn
        Points at most of either.
    """
    if len(before) < 3 or before.shape[1] < 2:
        return None
    centre = before.mean(axis=0, dtype=np.float64)
    centred = before.astype(np.float64) - centre
    # C = X^T X / n; the plane is spanned by the eigenvectors of its two largest eigenvalues
    spread, axes = np.linalg.eigh(centred.T @ centred / len(before))
    plane = axes[:, [-1, -2]]
    # An eigenvector's sign is free: the largest entry is made positive
    plane = plane * np.where(plane[np.abs(plane).argmax(axis=0), [0, 1]] < 0, -1.0, 1.0)
    return Plane(
        before=((before[draw_rows(len(before), drawn[0])] - centre) @ plane).round(4),
        after=((after[draw_rows(len(after), drawn[1])] - centre) @ plane).round(4),
        explained=float(spread[-2:].sum() / max(spread.sum(), 1e-12)),
        apart_before=_apart(before.astype(np.float64)),
        apart_after=_apart(after.astype(np.float64)),
    )


def draw_rows(count: int, most: int) -> Ints:
    """At most ``most`` of ``count`` rows, ascending, always the same ones."""
    if count <= most:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, most, replace=False))


def _apart(z: Floats) -> float:
    """Mean cosine distance over all pairs of different rows of L2-normalised ``z``."""
    n = len(z)
    if n < 2:
        return float("nan")
    total = z.sum(axis=0)
    # sum over i != j of z_i . z_j = |sum z|^2 - sum |z_i|^2
    return float(1 - (total @ total - (z * z).sum()) / (n * (n - 1)))


@dataclass(frozen=True)
class Log:
    """The steps of ``log.jsonl`` in order, and how many lines could not be read."""

    steps: tuple[dict[str, Any], ...]
    broken: int


def read_log(path: Path) -> Log:
    """Read a run's log; a line that a kill cut short is counted, not shown.

    Lines of the report step itself are left out, so that writing the page again does not
    change it.
    """
    steps = []
    entries, broken = read_json_lines(path)
    for entry in entries:
        if not isinstance(entry.get("seconds"), int | float):
            broken += 1
        elif entry.get("step") != "report":
            steps.append(entry)
    return Log(tuple(steps), broken)
