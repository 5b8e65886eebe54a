"""The batch files of OpenAI's Batch API and of ``vllm run-batch``: written, and read back."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.raters.answers import Answers, answer_key
from fifa.scoring.raters.endpoint import make_endpoint, request_body
from fifa.scoring.rubric import Answer, parse_answer
from fifa.scoring.specs import RATERS
from fifa.shards.files import atomic_path

ROUTE = "/v1/chat/completions"


@dataclass(frozen=True)
class Imported:
    """What `read_batch` found.

    Parameters
    ----------
    rated
        Answers that went into the cache.
    missing
        Prompts of the pairs that the files did not answer.
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


def write_batch(pairs: Pairs, spec: str, path: Path, *, folder: Path | None = None) -> int:
    """Write a request a unique prompt to ``path`` (JSONL); how many were written.

    Parameters
    ----------
    pairs
        The pairs whose prompts are to be rated.
    spec
        The rater, ``openai:MODEL@URL``: the same that `quality_scores` will be given.
    path
        The file to write.
    folder
        The scores folder: prompts whose answers are there already are left out.
    """
    rater = make_endpoint(RATERS.parse(spec))
    prompts = list(dict.fromkeys(pairs.prompts["prompt"].to_pylist()))
    keys = [answer_key(rater.identity, prompt) for prompt in prompts]
    known: dict[str, Answer] = {}
    if folder is not None:
        answers = Answers(folder)
        known = answers.get(keys)
        answers.close()
    missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in known}
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as out:
        for key, prompt in missing.items():
            body = request_body(rater, prompt)
            request = {"custom_id": key, "method": "POST", "url": ROUTE, "body": body}
            out.write(json.dumps(request, ensure_ascii=False) + "\n")
    return len(missing)


def read_batch(pairs: Pairs, spec: str, path: Path, *, folder: Path) -> Imported:
    """Put the answers of a finished batch into the cache that `quality_scores` reads.

    Parameters
    ----------
    pairs, spec
        As they were given to `write_batch`.
    path
        The result file (JSONL) of the Batch API or of ``vllm run-batch``.
    folder
        The scores folder.

    Raises `FifaError` for a file that cannot be read and one that answers none of the prompts.
    """
    rater = make_endpoint(RATERS.parse(spec))
    keys = {answer_key(rater.identity, p) for p in pairs.prompts["prompt"].to_pylist()}
    reasons: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    answers = Answers(folder)
    rated: set[str] = set()
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, answer, usage = _result(line)
                if key is None or key not in keys:
                    reasons["not one of these prompts" if key else "not a result"] += 1
                elif isinstance(answer, Answer):
                    answers.put(key, rater.model, answer)
                    rated.add(key)
                else:
                    reasons[answer] += 1
                for name in ("prompt_tokens", "completion_tokens"):
                    spent[name] += int(usage.get(name) or 0)
    except OSError as error:
        raise FifaError(f"cannot read the batch: {error.strerror}", where=str(path)) from error
    finally:
        answers.close()
    if not rated:
        told = "; ".join(f"{count} x {why}" for why, count in reasons.most_common(5))
        raise FifaError(
            f"the batch answers none of the prompts: {told or 'the file is empty'}",
            where=str(path),
            do="give the pairs and the rater that the batch was written with",
        )
    tokens = spent["prompt_tokens"], spent["completion_tokens"]
    return Imported(len(rated), len(keys - rated), dict(reasons), *tokens)


def _result(line: str) -> tuple[str | None, Answer | str, dict[str, Any]]:
    """Key, answer (or why there is none) and token counts of a line of results."""
    try:
        plain = json.loads(line)
        key = str(plain["custom_id"])
    except (ValueError, KeyError, TypeError):
        return None, "not a result", {}
    response = plain.get("response") or {}
    status = response.get("status_code", 200)
    if plain.get("error") or status != 200:
        return key, f"HTTP {status}" if status != 200 else "error", {}
    try:
        body = response["body"]
        text = body["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return key, "no completion", {}
    return key, parse_answer(text), body.get("usage") or {}
