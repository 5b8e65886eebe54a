"""Which pairs are kept, and why each of the others is not.

Scores become terms pair by pair, gates stop pairs, importance weighs the rest, and a strategy
takes the best.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Select
from fifa.console import echo
from fifa.data.names import label_columns, labels_by_aspect
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.margin import committee, pair_rewards
from fifa.scoring.table import SIGMAS, Scores
from fifa.selection.strategies import (
    STRATEGIES,
    Candidates,
    id_bytes,
    midranks,
    occurrence,
    soft_weights,
)
from fifa.selection.table import (
    BELOW_CUTOFF,
    PROMPT_CAP,
    REASONS,
    SELECTED,
    code_counts,
    selection_table,
)

Floats = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Terms:
    """Scores by pair; None where there is no such score at all.

    Parameters
    ----------
    margin, signed_margin, agreement
        float32 [pairs], of the committee; NaN where a reward is missing or infinite.
    quality, diversity
        float32 [pairs], the prompt's rating and entropy term; NaN where missing.
    unsafe, nonsense
        bool [pairs]: the rater flagged the prompt with one of ``unsafe_flags``, or as nonsense.
    unrated
        bool [pairs]: the rater gave the prompt no flags, not even none.
    """

    margin: Floats | None = None
    signed_margin: Floats | None = None
    agreement: Floats | None = None
    quality: Floats | None = None
    diversity: Floats | None = None
    unsafe: Mask | None = None
    nonsense: Mask | None = None
    unrated: Mask | None = None


def gather_terms(pairs: Pairs, scores: Scores, knobs: Select) -> Terms:
    """Bring pair and prompt scores together, a value a pair.

    Tables whose ids are in another order, or cover more or fewer pairs, are aligned by id;
    what they lack is NaN. Raises `FifaError` for a strategy or gate without the score it needs.
    """
    _check(scores, knobs)
    found: dict[str, npt.NDArray[np.generic]] = {}
    if scores.margins:
        label = _floats(pairs.table["label"])
        rewards = aligned_rewards(pairs, scores, knobs.margin_unit)
        result = committee(list(rewards.values()), label)
        found["margin"] = _finite(result.margin)
        found["signed_margin"] = _finite(result.signed_margin)
        found["agreement"] = result.agreement
    prompt = pairs.table["prompt_index"].to_numpy()
    prompt_id = pairs.prompts["prompt_id"]
    if scores.quality is not None:
        columns = [name for name in ("rating", "flags") if name in scores.quality.column_names]
        quality = _aligned(scores.quality, "prompt_id", prompt_id, columns)
        found["quality"] = _finite(_floats(quality["rating"]))[prompt]
        if "flags" in columns:
            flags = quality["flags"]
            found["unsafe"] = _flagged(flags, knobs.unsafe_flags)[prompt]
            found["nonsense"] = _flagged(flags, ("nonsense",))[prompt]
            found["unrated"] = flags.is_null().to_numpy()[prompt]
    if scores.diversity is not None:
        diversity = _aligned(scores.diversity, "prompt_id", prompt_id, ["entropy"])
        found["diversity"] = _finite(_floats(diversity["entropy"]))[prompt]
    return Terms(**found)  # type: ignore[arg-type]


def _check(scores: Scores, knobs: Select) -> None:
    if scores.margins:
        sure = any(SIGMAS.names[0] in table.column_names for table in scores.margins.values())
        if knobs.margin_unit == "sigma" and not sure:
            raise FifaError(
                f"no reward model here says how sure it is: {', '.join(scores.margins)}",
                do="leave --margin-unit out, or score with --margin hpsv3",
            )
        return
    weighed = (scores.quality is not None and knobs.alpha > 0) or (
        scores.diversity is not None and knobs.gamma > 0
    )
    needs, of_strategy = None, STRATEGIES[knobs.strategy].needs
    if of_strategy == "margin":
        needs = f"the strategy {knobs.strategy!r}"
    elif of_strategy == "importance" and not weighed:
        needs = f"the strategy {knobs.strategy!r} without a weighed quality or diversity score"
    elif knobs.min_agreement is not None:
        needs = "min_agreement"
    elif knobs.margin_window != (None, None) or knobs.margin_percentiles != (0.0, 100.0):
        needs = "a margin window"
    if needs:
        raise FifaError(
            f"no margin scorer, and {needs} needs one",
            do="name one with --margin, for example --margin column:NAME_0,NAME_1",
        )


def aligned_rewards(
    pairs: Pairs, scores: Scores, unit: str = Select.margin_unit, *, blind: bool = False
) -> dict[str, tuple[Floats, Floats]]:
    """By scorer: `fifa.scoring.margin.pair_rewards`, aligned by id."""
    ids, found = pairs.table["pair_id"], {}
    for name, table in scores.margins.items():
        columns = [column for column in table.column_names if column != "pair_id"]
        aligned = _aligned(table, "pair_id", ids, columns)
        found[name] = pair_rewards(aligned, unit, blind=blind)
    return found


def _aligned(table: pa.Table, key: str, ids: pa.ChunkedArray, columns: list[str]) -> pa.Table:
    wanted = table.select(columns)
    if key not in table.column_names or table[key].equals(ids):
        return wanted
    return wanted.take(pc.index_in(ids, value_set=table[key].combine_chunks()))


def _flagged(flags: pa.ChunkedArray, names: Collection[str]) -> Mask:
    # few distinct sets of flags over many prompts: decide once for each
    encoded = flags.combine_chunks().dictionary_encode()
    hit = [bool(set(names) & set(text.split(","))) for text in encoded.dictionary.to_pylist()]
    decided: Mask = np.array([*hit, False])[encoded.indices.fill_null(len(hit)).to_numpy()]
    return decided


def _floats(column: pa.ChunkedArray) -> Floats:
    values: Floats = column.to_numpy().astype(np.float32, copy=False)  # nulls are NaN
    return values


def _finite(values: Floats) -> Floats:
    wrong = ~np.isfinite(values)
    return np.where(wrong, np.float32(np.nan), values) if wrong.any() else values


def reason_codes(
    table: pa.Table,
    terms: Terms,
    knobs: Select,
    unreadable: Collection[str],
    same: Collection[str] = (),
) -> npt.NDArray[np.uint8]:
    """Ask every gate, in the order of `fifa.selection.table.GATES`.

    Parameters
    ----------
    table
        ``pair_id``, ``label`` and ``repeat`` of `Pairs.table`, and the columns that
        `columns_needed` names.
    terms
        The scores by pair.
    knobs
        Which gates are closed.
    unreadable
        Ids of the pairs with an image that cannot be decoded.
    same
        Ids of the pairs of an image with itself, beside those that ``repeat`` knows.

    Returns
    -------
    uint8 [pairs], index into `REASONS`: the first gate that stops the pair, or ``below_cutoff``
    for one that is eligible and so far not selected.

    Raises `FifaError` for a generator that made none of the images, and for a gate whose columns
    the pairs do not have.
    """
    codes = np.full(table.num_rows, BELOW_CUTOFF, np.uint8)
    for reason, stopped in _gates(table, terms, knobs, unreadable, same):
        codes[stopped & (codes == BELOW_CUTOFF)] = REASONS.index(reason)
    eligible = codes == BELOW_CUTOFF
    if terms.margin is not None and knobs.margin_percentiles != (0.0, 100.0) and eligible.any():
        ordered = np.sort(terms.margin[eligible]).astype(np.float64)
        low, high = np.percentile(ordered, knobs.margin_percentiles)
        outside = eligible & ((terms.margin < low) | (terms.margin > high))
        codes[outside] = REASONS.index("outside_margin_window")
    return codes


def _gates(
    table: pa.Table,
    terms: Terms,
    knobs: Select,
    unreadable: Collection[str],
    same: Collection[str],
) -> Iterator[tuple[str, Mask]]:
    """Every gate that is closed, and which pairs it stops."""
    label = table["label"].to_numpy()
    yield "tie", (label == 0.5) | np.isnan(label)  # no number names no winner either
    if knobs.drop_duplicates:
        yield "duplicate", _mask(table["repeat"])
        if len(same):
            yield "duplicate", _listed(table, same)
    if knobs.generators or knobs.not_generators:
        yield "other_generator", _other_generator(table, knobs)
    if knobs.drop_disagreeing:
        yield "aspects_disagree", aspects_disagree(table)
    if len(unreadable):
        yield "unreadable_image", _listed(table, unreadable)
    if terms.unsafe is not None:
        yield "unsafe_prompt", terms.unsafe
    if terms.nonsense is not None and knobs.drop_nonsense:
        yield "low_quality_prompt", terms.nonsense
    if terms.quality is not None and knobs.min_quality is not None:
        yield "low_quality_prompt", terms.quality < np.float32(knobs.min_quality)
    yield "not_scored", _not_scored(terms, knobs, table.num_rows)
    share = 1.0 if STRATEGIES[knobs.strategy].unanimous else knobs.min_agreement
    if terms.agreement is not None and share is not None:
        # in float32, as agreement is: 7 scorers of 10 are not below 0.7
        yield "contradicts_label", terms.agreement < np.float32(share)
    low, high = knobs.margin_window
    if terms.margin is not None and low is not None:
        yield "outside_margin_window", terms.margin < np.float32(low)
    if terms.margin is not None and high is not None:
        yield "outside_margin_window", terms.margin > np.float32(high)


def columns_needed(knobs: Select, there: Iterable[str]) -> list[str]:
    """The columns that gates ask for, of those that are ``there`` beyond the labels and ids."""
    wanted = ["model_0", "model_1"] if knobs.generators or knobs.not_generators else []
    wanted += label_columns(there) if knobs.drop_disagreeing else []
    return [name for name in wanted if name in there]


def _other_generator(table: pa.Table, knobs: Select) -> Mask:
    """Pairs with an image whose generator is not to be kept, or is not known to be."""
    if "model_0" not in table.column_names:
        raise FifaError(
            "the source does not say which generator made an image",
            do="leave --generators and --not-generators out, or name the columns with --columns "
            "model_0=...,model_1=...",
        )
    sides = [_encoded(table[name]) for name in ("model_0", "model_1")]
    there = sorted({name for side in sides for name in side.dictionary.to_pylist() if name})
    unknown = [name for name in (*knobs.generators, *knobs.not_generators) if name not in there]
    if unknown:
        raise FifaError(
            f"no generator is named {', '.join(map(repr, unknown))}",
            do=f"take some of {', '.join(there[:50])}{', ...' if len(there) > 50 else ''}",
        )
    stopped = np.zeros(len(table), bool)
    for side in sides:
        names = side.dictionary.to_pylist()
        other = [
            (bool(knobs.generators) and name not in knobs.generators)
            or name in knobs.not_generators
            for name in [*names, None]
        ]
        stopped |= np.array(other)[side.indices.fill_null(len(names)).to_numpy()]
    return stopped


def aspects_disagree(table: pa.Table) -> Mask:
    """Pairs with one winner by the label or by one aspect, and the other one by another aspect.

    A tie is nobody's win. Raises `FifaError` for a table without labels by aspect.
    """
    names = labels_by_aspect(table)
    if not names:
        raise FifaError(
            "the source has no labels by aspect",
            do="leave --drop-disagreeing out, or name their columns with --columns "
            "label_ASPECT=COLUMN",
        )
    first, second = np.zeros(len(table), bool), np.zeros(len(table), bool)
    for name in ("label", *names):
        label = table[name].to_numpy()
        first |= label > 0.5
        second |= label < 0.5
    return first & second


def _encoded(column: pa.ChunkedArray) -> pa.DictionaryArray:
    return column.unify_dictionaries().combine_chunks()


def _not_scored(terms: Terms, knobs: Select, n: int) -> Mask:
    missing = np.zeros(n, bool)
    if terms.margin is not None:
        missing |= np.isnan(terms.margin)
    if terms.quality is not None and (knobs.alpha > 0 or knobs.min_quality is not None):
        missing |= np.isnan(terms.quality)
    if terms.unrated is not None and (knobs.unsafe_flags or knobs.drop_nonsense):
        missing |= terms.unrated  # a prompt that nobody rated is not known to be safe
    if terms.diversity is not None and knobs.gamma > 0:
        missing |= np.isnan(terms.diversity)
    return missing


def _listed(table: pa.Table, ids: Collection[str]) -> Mask:
    return _mask(pc.is_in(table["pair_id"], value_set=pa.array(sorted(ids), pa.string())))


def _mask(column: pa.ChunkedArray) -> Mask:
    return np.asarray(column.to_numpy(), bool)


BLOCK = 1 << 18  # pairs at a time: the temporaries stay in the processor's cache
LARGEST = float(np.finfo(np.float32).max)


def importance(
    margin: Floats | None, quality: Floats | None, diversity: Floats | None, knobs: Select, n: int
) -> Floats:
    """The importance of every eligible pair (arXiv 2410.10166).

    Parameters
    ----------
    margin, quality, diversity
        float32 [n], finite; a prompt's value counts once for each of its pairs. None where there is
        no such score, which is then absent from the sum; so is one that is the same for all pairs,
        unless ``normalize`` is ``none``.
    knobs
        ``alpha``, ``gamma`` and ``normalize``.
    n
        How many pairs are eligible.

    Returns
    -------
    float32 [n], finite; zeros where there is no score at all.
    """
    terms = [(1.0, margin), (knobs.alpha, quality), (knobs.gamma, diversity)]
    result = np.zeros(n, np.float32)
    scaled = [
        (weight, *_scale(term, knobs.normalize))
        for weight, term in terms
        if term is not None and weight > 0
    ]
    for start in range(0, len(result), BLOCK):
        part = slice(start, start + BLOCK)
        # I_i = m^_i + alpha * q^_c + gamma * h^_c
        total = np.zeros(len(result[part]), np.float64)
        for weight, values, centre, unit in scaled:
            total += weight * ((values[part].astype(np.float64) - centre) / unit)
        # a spread that is next to nothing makes more of a value than float32 holds
        result[part] = np.clip(total, -LARGEST, LARGEST)
    return result


def _scale(values: Floats, how: str) -> tuple[npt.NDArray[np.floating[Any]], float, float]:
    """``(values, centre, unit)``, so that ``(values - centre) / unit`` is the normalised term."""
    if how == "none":
        return values, 0.0, 1.0
    ordered = np.sort(values)  # what is computed from it does not depend on the rows' order
    if ordered[0] == ordered[-1]:
        return values, float(ordered[0]), 1.0
    if how == "rank":
        # x^ = (midrank(x) - 1/2) / n, in (0, 1)
        return midranks(values), 0.5, float(len(values))
    if how == "robust":
        # x^ = (x - median) / (IQR / 1.349): 1.349 is the IQR of a standard normal, so that the
        # unit is a standard deviation again.
        low, median, high = (_quantile(ordered, share) for share in (0.25, 0.5, 0.75))
        if high > low:
            return values, median, (high - low) / 1.349
    # x^ = (x - mean) / standard deviation
    mean = float(ordered.mean(dtype=np.float64))
    deviation = float(np.sqrt(np.mean(np.subtract(ordered, mean, dtype=np.float64) ** 2)))
    # Half the values equal can make the IQR 0: then the unit is the standard deviation.
    return values, median if how == "robust" else mean, deviation


def _quantile(ordered: Floats, share: float) -> float:
    place, beyond = divmod(share * (len(ordered) - 1), 1)
    first = float(ordered[int(place)])
    return first + beyond * (float(ordered[min(int(place) + 1, len(ordered) - 1)]) - first)


Embeddings: TypeAlias = Floats | Callable[[], Floats]


def select(
    pairs: Pairs,
    scores: Scores,
    knobs: Select | None = None,
    *,
    unreadable: Collection[str] = (),
    same: Collection[str] = (),
    embeddings: Embeddings | None = None,
    **changes: Any,
) -> pa.Table:
    """Keep the most important pairs, and give every pair a reason.

    Parameters
    ----------
    pairs, scores
        What `fifa.read_pairs` and `fifa.score` gave. ``pairs.table`` may hold ``pair_id``,
        ``prompt_index``, ``label``, ``repeat`` and the `columns_needed` only, and
        ``pairs.prompts`` the ``prompt_id`` only; score tables in another order are aligned by id.
    knobs
        Strategy, weights and gates; None is the default recipe's.
    unreadable
        Ids of pairs with an image that cannot be decoded: never selected.
    same
        Ids of pairs of an image with itself: duplicates.
    embeddings
        float32 [prompts, d], L2-normalised, row by row with ``pairs.prompts``, or a function
        that gives them: for the strategies ``facility`` and ``farthest``.
    **changes
        Knobs of `fifa.config.Select` to change: ``keep=0.1``, ``alpha=0``, ``per_prompt=3``.

    Returns
    -------
    pyarrow.Table
        A `fifa.selection.table.SELECTION`, row by row with ``pairs.table``: every pair, kept or
        dropped, with its reason.

    Raises
    ------
    FifaError
        If nothing is eligible, a knob is wrong, or the strategy or a gate lacks its score.
    """
    knobs = replace(knobs or Select(), **changes)
    n = len(pairs)
    if n == 0:
        raise FifaError("there are no pairs to select from", where=pairs.origin.source or None)
    terms = gather_terms(pairs, scores, knobs)
    codes = reason_codes(pairs.table, terms, knobs, unreadable, same)
    rows = np.flatnonzero(codes == BELOW_CUTOFF).astype(np.int32)
    if len(rows) == 0:
        raise _nothing_eligible(codes)
    strategy = STRATEGIES[knobs.strategy]
    candidates = _candidates(pairs, terms, rows, knobs, embeddings)
    count, order = candidates.count, strategy.order(candidates)
    rank = np.zeros(n, np.int32)
    rank[order] = np.arange(1, len(order) + 1, dtype=np.int32)
    if knobs.per_prompt is not None:
        prompts = pairs.table["prompt_index"].to_numpy()
        below = occurrence(prompts[order]) < knobs.per_prompt
        codes[order[~below]] = PROMPT_CAP
        order = order[below]
    kept = order if strategy.soft else order[:count]
    if len(kept) < count and not strategy.soft:
        echo(f"keep asks for {count:,} of {n:,} pairs; only {len(kept):,} are eligible, all kept")
    codes[kept] = SELECTED
    every = np.full(n, np.nan, np.float32)
    every[rows] = candidates.importance
    weight = np.zeros(n, np.float32)
    weight[kept] = soft_weights(every[kept]) if strategy.soft else 1.0
    columns = {
        **vars(terms),
        "importance": every,
        "rank": rank,
        "weight": weight,
    }
    table = selection_table(pairs.table["pair_id"], codes, columns)
    return table.replace_schema_metadata({"fifa.select": json.dumps({"select": asdict(knobs)})})


def _candidates(
    pairs: Pairs,
    terms: Terms,
    rows: npt.NDArray[np.int32],
    knobs: Select,
    embeddings: Embeddings | None,
) -> Candidates:
    """The pairs in ``rows``, which passed every gate, with their importance."""
    margin, quality, diversity = (
        None if term is None else term[rows]
        for term in (terms.margin, terms.quality, terms.diversity)
    )
    part = isinstance(knobs.keep, float)
    return Candidates(
        rows=rows,
        ids=id_bytes(pairs.table["pair_id"]),
        importance=importance(margin, quality, diversity, knobs, len(rows)),
        margin=margin,
        prompt=pairs.table["prompt_index"].to_numpy()[rows],
        count=max(1, round(knobs.keep * len(pairs))) if part else int(knobs.keep),
        seed=knobs.seed,
        embeddings=_embeddings(embeddings, pairs, knobs),
    )


def _embeddings(embeddings: Embeddings | None, pairs: Pairs, knobs: Select) -> Callable[[], Floats]:
    if STRATEGIES[knobs.strategy].needs == "embeddings" and embeddings is None:
        raise FifaError(
            f"the strategy {knobs.strategy!r} works on prompt embeddings, and there are none",
            do="name an encoder with --diversity, or give select() the embeddings",
        )

    def vectors() -> Floats:
        found = embeddings() if callable(embeddings) else embeddings
        assert found is not None
        if found.ndim != 2 or len(found) != pairs.prompts.num_rows:
            raise FifaError(
                f"embeddings of shape {found.shape} for {pairs.prompts.num_rows:,} prompts",
                do="give one vector per prompt, in the order of pairs.prompts",
            )
        return np.ascontiguousarray(found, np.float32)

    return vectors


def _nothing_eligible(codes: npt.NDArray[np.uint8]) -> FifaError:
    counts = "; ".join(f"{reason}: {n:,}" for reason, n in code_counts(codes).items())
    return FifaError(
        "no pair is eligible",
        where=counts,
        do="relax a gate (docs/select.md), or check the scores and labels",
    )
