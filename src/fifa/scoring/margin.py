"""The preference margin: how far apart reward models put a pair's two images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from fifa.config import Compute
from fifa.console import echo, note
from fifa.data.table import PAIRS, Pairs
from fifa.errors import FifaError
from fifa.scoring.table import MARGIN, score_path, scored_once

Numbers = npt.NDArray[np.float32]

READINGS = ("raw", "logodds")
SMALLEST = 1e-7  # probabilities are clipped here before the logarithm
CHUNK = 1 << 18  # pairs at a time: the temporaries stay in the processor's cache


@dataclass(frozen=True)
class CommitteeMargin:
    """How far apart a committee puts the images of every pair.

    Parameters
    ----------
    margin
        |d|, float32 [pairs]; NaN where a scorer could not score.
    signed_margin
        Positive where the committee agrees with the person, float32 [pairs]; NaN for ties too.
    agreement
        The share of the scorers that agree with the person, float32 [pairs] in [0, 1]; a scorer
        that sees no difference counts half; NaN where ``signed_margin`` is.
    spreads
        What every scorer's differences were divided by.
    """

    margin: Numbers
    signed_margin: Numbers
    agreement: Numbers
    spreads: tuple[float, ...]


def margin_scores(
    pairs: Pairs,
    spec: str,
    folder: Path | None = None,
    *,
    compute: Compute | None = None,
    allow_download: bool = False,
) -> pa.Table:
    """What one reward model gives both images of every pair.

    Parameters
    ----------
    pairs
        The pairs, with the source's score columns.
    spec
        A reward model that looks at the images (`fifa.scoring.rewards.margins.reward_scores`), or
        ``column:NAME_0,NAME_1``: two columns of the source. Where both lie in [0, 1] and sum to
        1 (within 0.001) in every finite row they are read as probabilities, and the reward is
        log p (p clipped at 1e-7), so that the difference of rewards is the log-odds. Otherwise
        they are rewards as they stand. ``column:raw:A,B`` and ``column:logodds:A,B`` decide it.
    folder
        Where scores are kept; None keeps nothing.
    compute, allow_download
        How to look at images, and whether to fetch those that are only known by URL.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``. NaN and infinite scores stay
        as they are: selection reports those pairs as ``not_scored``.

    Raises
    ------
    FifaError
        For a column that the source does not have, and for a spec that names no scorer.
    """
    if not spec.startswith("column:"):
        from fifa.scoring.rewards.margins import reward_scores

        return reward_scores(pairs, spec, folder, compute=compute, allow_download=allow_download)
    first, second, forced = _parse(pairs, spec)
    source_0, source_1 = _numbers(pairs, first), _numbers(pairs, second)
    reading = forced or ("logodds" if _are_probabilities(source_0, source_1) else "raw")
    if reading == "logodds":
        _check_probabilities(source_0, spec)
        _check_probabilities(source_1, spec)
    facts = {"scorer": spec, "reading": reading}
    content = xxhash.xxh3_128(source_0.tobytes())
    content.update(source_1.tobytes())
    path = (
        score_path(folder, "margin", spec, reading, pairs.pairs_digest, content.hexdigest())
        if folder
        else None
    )

    def make() -> pa.Table:
        rewards = [_reward(source, reading) for source in (source_0, source_1)]
        lost = int((~np.isfinite(rewards[0]) | ~np.isfinite(rewards[1])).sum())
        meaning = "log-odds of probabilities" if reading == "logodds" else "rewards as they stand"
        echo(f"margin {spec}: {meaning}" + (f"; {lost:,} pairs not finite" if lost else ""))
        note(margin_pairs=len(pairs), margin_not_finite=lost)
        return pa.table(
            [pairs.table["pair_id"].combine_chunks(), *(pa.array(r) for r in rewards)],
            schema=MARGIN,
        )

    return scored_once(path, make, facts)


def committee(
    rewards: Sequence[tuple[Numbers, Numbers]], label: npt.NDArray[Any]
) -> CommitteeMargin:
    """The margin of one or several reward models.

    With r_s the rewards of scorer s, and d_s = r_s(c, x_0) - r_s(c, x_1)::

        d = mean over s of d_s / spread_s
        margin = |d|,  signed margin = d * sign(label - 1/2)

    For one scorer this is the paper's |r(c, x_w) - r(c, x_l)| on that scorer's own scale (its
    spread is 1). In a committee, spread_s is the root mean square of its finite differences.
    Nothing is centred: a difference keeps its sign, which is the scorer's verdict. A scorer
    that never sees a difference has spread 1 and adds nothing.

    Parameters
    ----------
    rewards
        ``(reward_0, reward_1)`` a scorer, [pairs] each.
    label
        The probability that a person prefers image 0, [pairs]; 0.5 is a tie.

    Returns
    -------
    CommitteeMargin
        NaN for a pair that any scorer could not score (NaN, infinite).

    Raises
    ------
    FifaError
        For no scorer at all.
    """
    if not rewards:
        raise FifaError("a margin needs a reward model", do="--margin column:NAME_0,NAME_1")
    n = len(label)
    spreads = (1.0,) if len(rewards) == 1 else tuple(_spread(*scorer) for scorer in rewards)
    margin, signed, agreement = (np.empty(n, np.float32) for _ in range(3))
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(n):
            # sign(label - 1/2) is 1, -1 or, for a tie, NaN
            person = np.sign(label[part].astype(np.float32, copy=False) - np.float32(0.5))
            person[person == 0] = np.nan
            d = np.zeros(len(person), np.float32)
            verdicts = np.zeros(len(person), np.float32)
            for (reward_0, reward_1), spread in zip(rewards, spreads, strict=True):
                own = np.subtract(reward_0[part], reward_1[part], dtype=np.float32)
                own -= own * 0  # an infinite difference becomes NaN, the others stay
                verdicts += np.sign(own)
                # d = mean over s of d_s / spread_s
                own /= np.float32(spread * len(rewards))
                d += own
            np.abs(d, out=margin[part])
            np.multiply(d, person, out=signed[part])
            # the share that agrees, a scorer's tie as a half: (1 + mean sign(d_s) * person) / 2
            verdicts *= person / np.float32(2 * len(rewards))
            np.add(verdicts, np.float32(0.5), out=agreement[part])
    return CommitteeMargin(margin, signed, agreement, spreads)


def _spread(reward_0: Numbers, reward_1: Numbers) -> float:
    """sqrt(mean d^2) over the finite differences; 1 where there are none but zeros."""
    total, count = 0.0, 0
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(len(reward_0)):
            d = np.subtract(reward_0[part], reward_1[part], dtype=np.float32)
            squares = float(
                np.sum(d * d)
            )  # pairwise, so float32 is enough and threads play no part
            if not np.isfinite(squares):
                d = d[np.isfinite(d)]
                squares = float(np.sum(np.square(d, dtype=np.float64)))
            total += squares
            count += len(d)
    return float(np.sqrt(total / count)) if total > 0 else 1.0


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, n)) for start in range(0, n, CHUNK))


def _parse(pairs: Pairs, spec: str) -> tuple[str, str, str | None]:
    """The two columns that ``spec`` names and the reading it forces."""
    numeric = (pa.types.is_floating, pa.types.is_integer, pa.types.is_boolean)
    known = [
        field.name
        for field in pairs.table.schema
        if field.name not in PAIRS.names and any(is_kind(field.type) for is_kind in numeric)
    ]
    here = f"score columns here: {', '.join(known) or 'none'}"
    rest = spec.removeprefix("column:")
    forced, _, named = rest.partition(":")
    reading, named = (forced, named) if forced in READINGS else (None, rest)
    columns = named.split(",")
    if len(columns) != 2:
        raise FifaError(
            f"a margin takes two columns, one an image: {spec}", do=f"column:NAME_0,NAME_1; {here}"
        )
    for column in columns:
        if column not in known:
            raise FifaError(f"the source has no score column {column!r}", where=spec, do=here)
    return columns[0], columns[1], reading


def _numbers(pairs: Pairs, column: str) -> npt.NDArray[np.float64]:
    """A column as float64 [pairs], null as NaN."""
    values = pairs.table[column].cast(pa.float64()).to_numpy()
    return np.ascontiguousarray(values, np.float64)


def _are_probabilities(p_0: npt.NDArray[np.float64], p_1: npt.NDArray[np.float64]) -> bool:
    finite = np.isfinite(p_0) & np.isfinite(p_1)
    p_0, p_1 = p_0[finite], p_1[finite]
    within = (p_0 >= 0) & (p_0 <= 1) & (p_1 >= 0) & (p_1 <= 1) & (np.abs(p_0 + p_1 - 1) <= 1e-3)
    return bool(len(p_0) and within.all())


def _check_probabilities(source: npt.NDArray[np.float64], spec: str) -> None:
    wrong = source[np.isfinite(source) & ((source < 0) | (source > 1))]
    if len(wrong):
        raise FifaError(
            f"not probabilities: there is a {wrong[0]:g}", where=spec, do="column:raw:NAME_0,NAME_1"
        )


def _reward(source: npt.NDArray[np.float64], reading: str) -> Numbers:
    with np.errstate(over="ignore"):
        if reading == "raw":
            return source.astype(np.float32)
        # r = log p, so that r_0 - r_1 = log(p_0 / p_1); NaN and infinity pass through
        return np.log(np.maximum(source, SMALLEST)).astype(np.float32)
