"""Questions that an executor's workers ask, of an endpoint or of a model of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import pyarrow as pa

from fifa.scoring.endpoint import Answers, Endpoint
from fifa.shards.files import digest
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, Shard, each_shard

SHARD = 512  # questions between two points where a run can be resumed
ANSWERED = pa.schema([("key", pa.string()), ("answer", pa.large_string())])


def ask_elsewhere(
    endpoint: Endpoint,
    keys: Sequence[str],
    ask: Callable[[tuple[int, Any]], pa.Table],
    prepare: Callable[[list[str]], Any],
    ledger: Ledger,
    executor: Executor,
) -> tuple[set[str], list[pa.Table]]:
    """Have what has no answer yet asked by workers, and keep the answers where `ask` looks.

    Parameters
    ----------
    endpoint
        Who is asked; it has a folder.
    keys
        Of the questions.
    ask
        Asks in a worker: from how many answers there are already, and a shard, to a table that
        begins with `ANSWERED`. Workers read the endpoint's key from their own environment, and
        each has ``in_flight`` requests under way. Where the next call's is equal to it, they stay,
        with the model that they have loaded.
    prepare
        From the keys of some questions to what ``ask`` is given.

    Returns
    -------
    set of str, list of pyarrow.Table
        The keys that have an answer now, and what ``ask`` returned, a table a shard.
    """
    with closing(Answers(endpoint.folder)) as answers:
        known = set(answers.get(keys))
        left = [key for key in keys if key not in known]
        parts = [left[start : start + SHARD] for start in range(0, len(left), SHARD)]
        shards = [Shard(digest(part), len(part), part) for part in parts]
        tables = []

        def given(part: list[str]) -> tuple[int, Any]:
            return len(known), prepare(part)

        for table in each_shard(endpoint.what, ask, shards, ledger, executor, given):
            for key, answer in zip(*table.columns[:2], strict=True):
                answers.put(key.as_py(), endpoint.model, answer.as_py())
                known.add(key.as_py())
            tables.append(table)
    return known, tables


def answered(endpoint: Endpoint, asked: tuple[int, dict[str, Any]]) -> pa.Table:
    """`ANSWERED` of questions by their keys, asked here; answers are kept nowhere else.

    ``asked`` is how many answers there are already, and the questions.
    """
    known, questions = asked
    found = replace(endpoint, folder=None).ask(questions, known)
    texts = [answer.model_dump_json() for answer in found.values()]
    return pa.table(
        [pa.array(list(found), pa.string()), pa.array(texts, pa.large_string())], ANSWERED
    )
