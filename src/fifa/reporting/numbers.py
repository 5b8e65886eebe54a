"""The numbers on the page: plain functions from a run's tables to counts, curves and maps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.names import labels_by_aspect
from fifa.evaluation.measure import pairwise_distance
from fifa.scoring.rewards.metrics import (
    Agreement,
    Noise,
    agreement,
    agreement_by_margin,
    dissent,
    draw_rows,
    likely_mislabelled,
    wilson,
    wrong_labels,
)
from fifa.scoring.trust import MOST

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
Bools = npt.NDArray[np.bool_]

LEAST = 20  # labelled pairs below which a share is given as a count, not drawn as a curve


@dataclass(frozen=True)
class Columns:
    """What the page needs of the selection and the pairs, an entry a pair.

    Numbers are float32 with NaN where there is none, `rank` is int32 with 0 where there is
    none, `reason` an index into `reasons`, `prompt` the row of the prompt.
    """

    margin: Floats
    signed_margin: Floats
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


def columns_of(pairs: pa.Table, selection: pa.Table) -> Columns:
    """The `Columns` of a table of pairs and of its selection, row by row."""
    numbers = ["margin", "signed_margin", "quality", "diversity", "importance"]
    reason = selection["reason"].unify_dictionaries().combine_chunks()
    codes, reasons = reason.indices.to_numpy(), tuple(reason.dictionary.to_pylist())
    return Columns(
        **{name: pc.fill_null(selection[name], float("nan")).to_numpy() for name in numbers},
        rank=pc.fill_null(selection["rank"], 0).to_numpy(),
        reason=codes,
        reasons=reasons,
        kept=codes == reasons.index("selected") if "selected" in reasons else codes < 0,
        label=pairs["label"].to_numpy(),
        prompt=pairs["prompt_index"].to_numpy(),
    )


def agreement_curve(signed_margin: Floats, points: int = 160) -> pa.Table | None:
    """`agreement_by_margin` at depths that grow by a constant factor from `LEAST` pairs to all.

    None for fewer than `LEAST` pairs with a label and a margin.
    """
    n = int(np.count_nonzero(~np.isnan(signed_margin)))
    if n < LEAST:
        return None
    depths = np.unique(np.geomspace(LEAST, n, points).round())
    return agreement_by_margin(signed_margin, depths / n)


@dataclass(frozen=True)
class Histogram:
    """One component before and after the selection, on common bins.

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
    finite = np.isfinite(values)
    before, after = values[finite], values[finite & kept]
    if not len(before):
        return None
    low, high = (float(edge) for edge in np.percentile(before, [0.1, 99.9]))
    if not high > low:
        low, high = low - 0.5, high + 0.5
    bins = int(np.clip(1.5 * np.sqrt(len(after)), 12, 40))  # no more than the kept pairs can fill
    edges = np.linspace(low, high, bins + 1)
    shares, medians = [], []
    for part in (before, after):
        counts, _ = np.histogram(np.clip(part.astype(np.float64), low, high), edges)
        shares.append(counts / max(len(part), 1))
        medians.append(float(np.median(part)) if len(part) else float("nan"))
    return Histogram(edges, shares[0], shares[1], medians[0], medians[1])


class Rejected(NamedTuple):
    """How many rows were rejected for one reason, and where the first few of them are."""

    reason: str
    number: int
    examples: tuple[str, ...]


def count_rejected(table: pa.Table, most: int = 12, examples: int = 3) -> list[Rejected]:
    """Rejected rows by their ``most`` frequent reasons; ``table`` has file, row and reason.

    With ``examples`` 0 it needs no file and no row.
    """
    reasons = table["reason"].cast(pa.string())
    counts = Counter(reasons.drop_null().to_pylist())
    found = []
    for reason, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:most]:
        first = table.filter(pc.equal(reasons, reason))[:examples].to_pylist()
        places = tuple(f"{row['file']}, row {row['row']}" for row in first)
        found.append(Rejected(reason, number, places))
    return found


def count_harm(flags: pa.ChunkedArray, kinds: Sequence[str]) -> list[Rejected]:
    """``unsafe: KIND`` by the flags of unsafe pairs; a pair of two ``kinds`` counts for both."""
    counts: Counter[str] = Counter()
    for row in pc.value_counts(flags).to_pylist():
        found = set((row["values"] or "").split(",")) & set(kinds)
        counts.update(dict.fromkeys(found, row["counts"]))
    return [
        Rejected(f"unsafe: {kind}", number, ())
        for kind, number in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


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


@dataclass(frozen=True)
class PromptMap:
    """Prompts in the plane of their two main directions.

    `before` and `after` are float64 [points, 2], samples of all and of the kept prompts;
    `explained` is the share of the variance the plane shows; `distance_before` and
    `distance_after` are the mean cosine distances between two different prompts of all and of
    the kept.
    """

    before: Floats
    after: Floats
    explained: float
    distance_before: float
    distance_after: float


def prompt_map(
    before: Floats, after: Floats, most: tuple[int, int] = (5000, 2500)
) -> PromptMap | None:
    """Principal components of prompt embeddings, by hand and deterministic.

    Parameters
    ----------
    before, after
        float32 [n, d], L2-normalised: (samples of) all prompts, which the components are fitted
        on, and of those of the kept pairs.
    most
        Points at most of either.

    Returns
    -------
    PromptMap
        None for fewer than three prompts or two dimensions.
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
    return PromptMap(
        before=((before[draw_rows(len(before), most[0])] - centre) @ plane).round(4),
        after=((after[draw_rows(len(after), most[1])] - centre) @ plane).round(4),
        explained=float(spread[-2:].sum() / max(spread.sum(), 1e-12)),
        distance_before=pairwise_distance(before),
        distance_after=pairwise_distance(after),
    )


@dataclass(frozen=True)
class LabelNoise:
    """The committee's section.

    Parameters
    ----------
    dissent
        Rows of `fifa.scoring.rewards.metrics.DISSENT`.
    rows
        Rows of the pairs that all members contradict, the most doubtful first.
    sampled
        How many pairs members were judged on; 0 for all.
    wrong
        The share of the labels that are wrong; None where the committee cannot tell.
    """

    dissent: list[dict[str, Any]]
    rows: list[int]
    sampled: int
    wrong: Noise | None

    @property
    def excess(self) -> float:
        """Share of pairs that all contradict, beyond what independent errors explain."""
        last = self.dissent[-1]
        return float(last["share"] - last["expected"])


def label_noise(columns: Columns, rewards: dict[str, tuple[Floats, Floats]]) -> LabelNoise | None:
    """The committee's section; None for fewer than two scorers or too few labelled pairs.

    ``rewards`` are ``(reward_0, reward_1)``, [pairs] each, by the scorer's name.
    """
    rows = draw_rows(len(columns.label), MOST)
    label = columns.label[rows]
    if len(rewards) < 2 or np.count_nonzero(label != 0.5) < 2:
        return None
    judged = {name: (first[rows], second[rows]) for name, (first, second) in rewards.items()}
    contradicted = likely_mislabelled(judged, label)["row"].to_numpy()
    return LabelNoise(
        dissent=dissent(judged, label).to_pylist(),
        rows=rows[contradicted].tolist(),
        sampled=len(rows) if len(rows) < len(columns.label) else 0,
        wrong=wrong_labels(judged, label, columns.prompt[rows]),
    )


class Group(NamedTuple):
    """What became of the pairs of one generator, of two of them, or of one category.

    `wins` is how often people prefer the first generator's image, a tie counting half, in pairs
    with another generator's; `agrees` how often the margin agrees with the people.
    """

    name: str
    other: str
    pairs: int
    kept: int
    wins: Agreement
    agrees: Agreement


def by_generator(pairs: pa.Table, columns: Columns) -> tuple[list[Group], list[Group]]:
    """The pairs of each generator, and those of each two; most pairs first.

    Empty for ``pairs`` without ``model_0`` and ``model_1``. Images of unknown generators are in
    no group, and a pair of one generator's images is one pair of it.
    """
    if not {"model_0", "model_1"} <= set(pairs.column_names):
        return [], []
    (zero, one), names = _codes(pairs, ("model_0", "model_1"))
    known = (zero >= 0) & (one >= 0)
    first = np.sign(columns.label - 0.5) / 2 + 0.5  # won by image 0, a tie half
    won = np.where(known & (zero != one), first, np.nan)
    once = np.where(zero == one, -1, one)
    single = _groups(names, [zero, once], columns, [won, 1 - won])
    n = max(len(names), 1)
    low, high = np.minimum(zero, one), np.maximum(zero, one)
    both = np.where(known, low.astype(np.int64) * n + high, -1)
    used, place = np.unique(both, return_inverse=True)
    place = place.reshape(-1) - int(len(used) > 0 and used[0] < 0)
    titles = [(names[key // n], names[key % n]) for key in used[used >= 0].tolist()]
    double = _groups(titles, [place], columns, [np.where(zero <= one, won, 1 - won)])
    return single, double


def by_category(pairs: pa.Table, columns: Columns) -> list[Group]:
    """The pairs of each category, most pairs first; empty without ``category``."""
    if "category" not in pairs.column_names:
        return []
    codes, names = _codes(pairs, ("category",))
    return _groups(names, codes, columns, [np.full(len(columns.label), np.nan)])


def _codes(pairs: pa.Table, names: Sequence[str]) -> tuple[list[Ints], list[str]]:
    """Columns of names as numbers, -1 for none, and what each number stands for."""
    parts = [pairs[name].unify_dictionaries().combine_chunks() for name in names]
    both = pa.chunked_array(parts).unify_dictionaries().chunks
    return [part.indices.fill_null(-1).to_numpy() for part in both], both[0].dictionary.to_pylist()


def _groups(
    names: Sequence[str | tuple[str, str]],
    codes: Sequence[Ints],
    columns: Columns,
    won: Sequence[Floats],
) -> list[Group]:
    """A group for each name that some of the codes stand for; what is ``won`` beside each code."""

    def sums(values: Sequence[Floats | Bools]) -> Floats:
        parts = [
            np.bincount(code[code >= 0], value[code >= 0], len(names))
            for code, value in zip(codes, values, strict=True)
        ]
        return np.asarray(sum(parts), np.float64)

    def shares(values: Sequence[Floats]) -> list[Agreement]:
        counts = sums([~np.isnan(value) for value in values])
        totals = sums([np.nan_to_num(value) for value in values])
        return [
            Agreement(total / n if n else float("nan"), *wilson(total, int(n)), int(n))
            for total, n in zip(totals.tolist(), counts.tolist(), strict=True)
        ]

    agreed = np.sign(columns.signed_margin) / 2 + 0.5
    everything = sums([np.ones(len(code), bool) for code in codes]).astype(int).tolist()
    kept = sums([columns.kept] * len(codes)).astype(int).tolist()
    rows = zip(names, everything, kept, shares(won), shares([agreed] * len(codes)), strict=True)
    found = [
        Group(*(name if isinstance(name, tuple) else (name, "")), *rest)
        for name, *rest in rows
        if rest[0]
    ]
    return sorted(found, key=lambda group: (-group.pairs, group.name, group.other))


class Aspect(NamedTuple):
    """One aspect's labels: `labels` that name a winner, how often that is the label's too."""

    name: str
    labels: int
    same: Agreement
    agrees: Agreement


def by_aspects(pairs: pa.Table, columns: Columns) -> list[Aspect]:
    """Each of the labels by aspect, beside the label and the margin."""
    found = []
    # as the margin is measured: positive if the people prefer image 0
    person = np.sign(columns.label - 0.5)
    margin = np.sign(columns.signed_margin) * np.where(person == 0, np.nan, person)
    for name in labels_by_aspect(pairs):
        won = np.sign(pairs[name].to_numpy() - 0.5)
        won = np.where(won == 0, np.nan, won)
        same = np.where(person == 0, np.nan, won * person)
        labels = int(np.count_nonzero(~np.isnan(won)))
        found.append(
            Aspect(name.removeprefix("label_"), labels, agreement(same), agreement(won * margin))
        )
    return found
