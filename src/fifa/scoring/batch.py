"""Batch files: those of OpenAI's Batch API and of ``vllm run-batch``, for raters and judges.

A file has a request a line under the key of its question; the answers go into the cache in which
an `Endpoint` looks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from fifa.console import echo
from fifa.errors import FifaError
from fifa.scoring.endpoint import Answers, Endpoint, changed_request
from fifa.scoring.replies import MAX_REPLY, NoAnswerError, tokens_of, words_of
from fifa.shards.files import atomic_path

ROUTE = "/v1/chat/completions"
REASONING = ("max_completion_tokens", "no temperature", "no logprobs")


@dataclass(frozen=True)
class Imported:
    """What `read_batch` found.

    Parameters
    ----------
    rated
        Answers that went into the cache.
    missing
        Questions that the file did not answer.
    reasons
        How many answers were no use, by why.
    tokens_in, tokens_out
        As the files report them.
    """

    rated: int
    missing: int
    reasons: dict[str, int]
    tokens_in: int
    tokens_out: int


def write_requests(
    endpoint: Endpoint,
    questions: Mapping[str, Any],
    path: Path,
    *,
    folder: Path | None = None,
    reasoning: bool = False,
) -> int:
    """Write a request a question to ``path`` (JSONL); how many were written.

    Parameters
    ----------
    endpoint
        Who will be asked.
    questions
        By their keys.
    path
        The file to write.
    folder
        The scores folder: questions whose answers are there already are left out.
    reasoning
        For models that refuse ``max_tokens``, a temperature and log-probabilities.
    """
    changes, missing = REASONING if reasoning else (), dict(questions)
    lost: Counter[str] = Counter()
    if folder is not None:
        with closing(Answers(folder)) as answers:
            for key in answers.get(list(missing)):
                del missing[key]
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as out:
        for key, question in missing.items():
            try:
                body = changed_request(endpoint.request(question), changes)
            except NoAnswerError as error:
                lost[str(error)] += 1
                continue
            request = {"custom_id": key, "method": "POST", "url": ROUTE, "body": body}
            out.write(json.dumps(request, ensure_ascii=False) + "\n")
    for reason, count in lost.most_common(5):
        echo(f"not written: {count:,} x {reason}")
    return len(missing) - lost.total()


def read_answers(
    endpoint: Endpoint, keys: Collection[str], path: Path, *, folder: Path
) -> Imported:
    """Put the answers of a finished batch into the cache in ``folder``.

    Parameters
    ----------
    endpoint, keys
        Who was asked, and the keys of what.
    path
        The result file (JSONL) of the Batch API or of ``vllm run-batch``.
    folder
        The scores folder.

    Raises `FifaError` for a file that cannot be read and one that answers none of the questions.
    """
    reasons: Counter[str] = Counter()
    spent = (0, 0)
    rated: set[str] = set()
    things, wanted = endpoint.words[1], set(keys)
    try:
        with (
            closing(Answers(folder)) as answers,
            Path(path).open(encoding="utf-8", errors="replace") as lines,
        ):
            # in pieces of a limited size: a longer line is no result
            for line in iter(partial(lines.readline, MAX_REPLY), ""):
                key, answer, tokens = _result(endpoint, line)
                if key is None or key not in wanted:
                    reasons[f"not one of these {things}" if key else "not a result"] += 1
                elif isinstance(answer, str):
                    reasons[answer] += 1
                else:
                    answers.put(key, endpoint.model, answer.model_dump_json())
                    rated.add(key)
                spent = spent[0] + tokens[0], spent[1] + tokens[1]
    except OSError as error:
        raise FifaError(f"cannot read the batch: {error.strerror}", where=str(path)) from error
    if not rated:
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise FifaError(
            f"the batch answers none of the {things}: {why or 'the file is empty'}",
            where=str(path),
            do="give the pairs and the model that the batch was written with; if max_tokens or "
            "temperature is refused, write it with --reasoning",
        )
    return Imported(len(rated), len(wanted - rated), dict(reasons), *spent)


def _result(endpoint: Endpoint, line: str) -> tuple[str | None, BaseModel | str, tuple[int, int]]:
    """Key, answer (or why there is none) and token counts of a line of results."""
    none = (0, 0)
    try:
        plain = json.loads(line)
        key = str(plain["custom_id"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None, "not a result", none
    found = plain.get("response")
    response = found if isinstance(found, dict) else {}
    status, body = response.get("status_code", 200), response.get("body")
    if plain.get("error") or status != 200:
        words = words_of(json.dumps(plain.get("error") or body or "").encode())
        told = "error" if status == 200 else f"HTTP {str(status)[:9]}"
        return key, f"{told}: {words}" if words else told, none
    try:
        return key, endpoint.read_reply(body), tokens_of(body)
    except NoAnswerError as error:
        return key, str(error), tokens_of(body)
