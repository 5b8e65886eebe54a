"""The quality term: every unique prompt rated by the rubric, once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from fifa.config import Compute
from fifa.console import echo
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.encoders import Kept, embed_prompts, prompts_identity
from fifa.scoring.raters.endpoint import EndpointRater
from fifa.scoring.raters.local import DefaultRater
from fifa.scoring.rubric import RATINGS
from fifa.scoring.specs import RATERS
from fifa.scoring.table import NUMERIC, QUALITY, score_path, scored_once, source_columns
from fifa.shards.files import digest, read_table
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, Shard, map_shards, store_of
from fifa.shards.sealed import DamagedError

SHARD = 1024  # prompts rated here between two points where a run can be resumed


class Rater(Protocol):
    """Anything that grades prompts."""

    @property
    def name(self) -> str:
        """A short name for people and file names."""

    @property
    def identity(self) -> dict[str, object]:
        """JSON that changes whenever the ratings could: part of every fingerprint."""

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`RATINGS`, row by row with ``prompts``."""


def make_rater(
    spec: str,
    folder: Path | None = None,
    *,
    in_flight: int = Compute.in_flight,
    max_tokens: int = Compute.max_tokens,
    device: str | None = None,
) -> Rater:
    """The rater that ``spec`` names; nothing heavy is loaded before its first prompt.

    Parameters
    ----------
    spec
        ``local``, ``local:MODEL`` (a folder, hub id or GGUF file) or ``openai:MODEL@URL``.
    folder
        Where an endpoint's answers are kept; None keeps them in memory.
    in_flight
        Requests to an endpoint under way at once.
    max_tokens
        Tokens that an endpoint's answer may have, with the thinking before it.
    device
        Where a local model computes; None: a GPU if there is one.

    Raises `FifaError` for an unknown spec.
    """
    parsed = RATERS.parse(spec)
    if not parsed.entry.maker:
        raise RATERS.error(spec)
    rater: Rater = parsed.make(folder, in_flight, max_tokens, device=device)
    return rater


def quality_scores(
    pairs: Pairs,
    spec: str,
    *,
    folder: Path | None = None,
    in_flight: int = Compute.in_flight,
    max_tokens: int = Compute.max_tokens,
    device: str | None = None,
    executor: Executor | None = None,
) -> pa.Table:
    """Rate every unique prompt of ``pairs``.

    Parameters
    ----------
    pairs
        The pairs; ``prompts`` is read, and for ``column:NAME`` that column of ``table``.
    spec
        The rater: see `make_rater`, or ``column:NAME``, a numeric column of the pairs.
    folder
        Where finished tables, unfinished shards and an endpoint's answers are kept, so that
        nothing is rated twice; None keeps nothing.
    in_flight
        Requests to an endpoint under way at once.
    max_tokens
        Tokens that an endpoint's answer may have, with the thinking before it.
    device
        Where a rater's own model computes; None: a GPU if there is one.
    executor
        Who runs a rater's own model; by default this process.

    Returns
    -------
    pyarrow.Table
        `QUALITY`, row by row with ``pairs.prompts``; ``rating`` in [1, 5] (a column: its own
        scale), NaN and null flags where a prompt could not be rated. Raters that grade by the
        rubric add ``clarity``, ``specificity`` and ``harmlessness``, float32 in [1, 5].

    Raises
    ------
    FifaError
        For a spec that names nothing, a missing column, an endpoint that is down.
    """
    parsed = RATERS.parse(spec)
    if parsed.is_column:
        name = parsed.model
        ratings = column_ratings(pairs, name)
        numbers = np.ascontiguousarray(ratings["rating"].to_numpy()).tobytes()
        content = (digest(numbers), *prompts_identity(pairs.prompts))
        path = folder and score_path(folder, "quality", f"column-{name}", *content)
        return scored_once(path, lambda ledger: ratings, {"rater": name})
    return prompt_quality(
        pairs.prompts,
        spec,
        folder=folder,
        in_flight=in_flight,
        max_tokens=max_tokens,
        device=device,
        executor=executor,
    )


def column_ratings(pairs: Pairs, name: str) -> pa.Table:
    """`QUALITY` from a numeric column of ``pairs.table``, on that column's own scale.

    A prompt's rating is the mean over those of its pairs that have a finite number; a prompt
    without any has NaN and null flags, the others have no flags.

    Raises `FifaError` for a column that is missing or not numeric.
    """
    table = pairs.table
    numeric = source_columns(pairs, *NUMERIC)
    if name not in numeric:
        raise FifaError(
            f"the pairs have no numeric column {name!r} to rate prompts by",
            do=f"one of: {', '.join(numeric) or 'none here, choose another rater'}",
        )
    values = table[name].cast(pa.float64(), safe=False).to_numpy()
    rows = table["prompt_index"].to_numpy()
    finite = np.isfinite(values)
    n = pairs.prompts.num_rows
    count = np.bincount(rows[finite], minlength=n)
    # q_c = mean of the column over the pairs of prompt c
    total = np.bincount(rows[finite], weights=values[finite], minlength=n)
    with np.errstate(invalid="ignore", divide="ignore"):
        rating = (total / count).astype(np.float32)
    flags = pa.array(["" if some else None for some in count], pa.string())
    ids = pairs.prompts["prompt_id"].combine_chunks()
    return pa.table([ids, pa.array(rating), flags], schema=QUALITY)


def prompt_quality(
    prompts: pa.Table,
    spec: str,
    *,
    folder: Path | None,
    in_flight: int,
    max_tokens: int,
    device: str | None = None,
    executor: Executor | None = None,
) -> pa.Table:
    """`quality_scores` of a table of `fifa.data.table.PROMPTS`; ``spec`` is no column."""
    limits = {"in_flight": in_flight, "max_tokens": max_tokens}
    rater = make_rater(spec, folder, **limits, device=device)
    identity = (rater.identity, *prompts_identity(prompts))
    path = folder and score_path(folder, "quality", rater.name, *identity)
    if path is not None and path.exists():
        unrated = 0
        with suppress(DamagedError):  # then it is made again as a whole
            unrated = read_table(path, ["flags"])["flags"].null_count
        if unrated:  # the others' answers are kept, so only these are asked for
            echo(f"asking again for {unrated:,} prompts that could not be rated before")
            path.unlink()
    facts, store = {"rater": rater.identity}, store_of(executor)
    options = (folder, executor)
    return scored_once(path, lambda ledger: _rated(prompts, rater, ledger, *options), facts, store)


def _rated(
    table: pa.Table, rater: Rater, ledger: Ledger, folder: Path | None, executor: Executor | None
) -> pa.Table:
    prompts: list[str] = table["prompt"].to_pylist()
    vectors: Kept | None = None
    if prompts and isinstance(rater, DefaultRater):
        # Of the same encoder as the diversity step's default: embedded once for both.
        vectors = embed_prompts(table, rater.encoder, folder, executor)

    def given(part: slice) -> tuple[Any, ...]:
        return (prompts[part],) if vectors is None else (prompts[part], vectors[part])

    if not prompts:
        ratings = RATINGS.empty_table()
    elif isinstance(rater, EndpointRater):
        ratings = rater.rate(prompts, ledger, executor)
    else:  # a shard's batches are its own, so resuming changes no byte
        parts = [slice(i, min(i + SHARD, len(prompts))) for i in range(0, len(prompts), SHARD)]
        shards = [
            Shard(digest(rater.identity, prompts[part]), part.stop - part.start, part)
            for part in parts
        ]
        what, rate = f"rating prompts ({rater.name})", partial(_rate, rater)
        ratings = map_shards(what, rate, shards, ledger, executor, given)
    ids = table["prompt_id"].combine_chunks()
    return pa.table([ids, *ratings.columns], schema=pa.schema([QUALITY.field(0), *RATINGS]))


def _rate(rater: Rater, given: tuple[Any, ...]) -> pa.Table:
    return rater.rate(*given)
