"""The rater behind an endpoint: ``openai:MODEL@URL``.

It asks one question after the other, or reads the batch files of OpenAI's Batch API and of
``vllm run-batch``: `write_batch` writes one, `read_batch` puts its answers where the rater looks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.config import Compute
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.endpoint import Answers, Endpoint, changed_request, endpoint_of
from fifa.scoring.replies import MAX_REPLY, NoAnswerError, text_of, tokens_of, words_of
from fifa.scoring.rubric import (
    PARSER,
    Answer,
    load_rubric,
    parse_answer,
    ratings_table,
    response_format,
)
from fifa.scoring.specs import RATERS, Spec
from fifa.shards.files import atomic_path, digest

ROUTE = "/v1/chat/completions"


@dataclass(frozen=True)
class EndpointRater(Endpoint):
    """Grades prompts with a language model behind an OpenAI-compatible endpoint."""

    answer_type = Answer

    @property
    def name(self) -> str:
        """The model's name, for people and file names."""
        return f"openai-{self.model}"

    @property
    def identity(self) -> dict[str, object]:
        """Model, endpoint, temperature, rubric and parser: what an answer depends on."""
        return {
            "model": self.model,
            "url": self.public_url,
            "temperature": self.temperature,
            "rubric": load_rubric().identity,
            "parser": PARSER,
        }

    def keys(self, prompts: Sequence[str]) -> list[str]:
        """What names each question: the identity and the prompt itself."""
        identity = self.identity
        return [digest(identity, prompt.encode("utf-8", "surrogatepass")) for prompt in prompts]

    def request(self, question: str) -> dict[str, Any]:
        """The body of a chat completion that asks for a prompt's grades."""
        return {
            "model": self.model,
            "messages": load_rubric().messages(question),
            "response_format": response_format(),
            "temperature": self.temperature,
            "max_tokens": self.max_tokens,
        }

    def read(self, text: str) -> Answer | str:
        """The grades in a model's answer, or why there are none."""
        return parse_answer(text)

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`RATINGS` of ``prompts``; NaN and null flags for those given up on.

        Identical prompts are asked once. Raises `FifaError` as `Endpoint.ask` does.
        """
        keys = self.keys(prompts)
        known = self.ask(dict(zip(keys, prompts, strict=True)))
        return ratings_table([known.get(key) for key in keys])


def make_endpoint(
    spec: Spec, folder: Path | None, in_flight: int, max_tokens: int
) -> EndpointRater:
    """The rater that a spec names; answers are kept in ``folder``."""
    return EndpointRater(*endpoint_of(spec), folder, in_flight, max_tokens)


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


def write_batch(
    pairs: Pairs,
    spec: str,
    path: Path,
    *,
    folder: Path | None = None,
    max_tokens: int = Compute.max_tokens,
    reasoning: bool = False,
) -> int:
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
    max_tokens
        Tokens that an answer may have, with the thinking before it.
    reasoning
        For models that refuse ``max_tokens`` and a temperature: ``max_completion_tokens``, none.
    """
    rater = _rater(spec, max_tokens)
    changes = ("max_completion_tokens", "no temperature") if reasoning else ()
    prompts = list(dict.fromkeys(pairs.prompts["prompt"].to_pylist()))
    missing = dict(zip(rater.keys(prompts), prompts, strict=True))
    if folder is not None:
        with closing(Answers(folder)) as answers:
            for key in answers.get(list(missing)):
                del missing[key]
    with atomic_path(Path(path)) as temporary, temporary.open("w", encoding="utf-8") as out:
        for key, prompt in missing.items():
            body = changed_request(rater.request(prompt), changes)
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
    rater = _rater(spec)
    keys = set(rater.keys(pairs.prompts["prompt"].to_pylist()))
    reasons: Counter[str] = Counter()
    spent = (0, 0)
    rated: set[str] = set()
    try:
        with (
            closing(Answers(folder)) as answers,
            Path(path).open(encoding="utf-8", errors="replace") as lines,
        ):
            # in pieces of a limited size: a longer line is no result
            for line in iter(partial(lines.readline, MAX_REPLY), ""):
                key, answer, tokens = _result(line)
                if key is None or key not in keys:
                    reasons["not one of these prompts" if key else "not a result"] += 1
                elif isinstance(answer, Answer):
                    answers.put(key, rater.model, answer.model_dump_json())
                    rated.add(key)
                else:
                    reasons[answer] += 1
                spent = spent[0] + tokens[0], spent[1] + tokens[1]
    except OSError as error:
        raise FifaError(f"cannot read the batch: {error.strerror}", where=str(path)) from error
    if not rated:
        why = "; ".join(f"{count} x {reason}" for reason, count in reasons.most_common(5))
        raise FifaError(
            f"the batch answers none of the prompts: {why or 'the file is empty'}",
            where=str(path),
            do="give the pairs and the rater that the batch was written with; if max_tokens or "
            "temperature is refused, write it with --reasoning",
        )
    return Imported(len(rated), len(keys - rated), dict(reasons), *spent)


def _rater(spec: str, max_tokens: int = Compute.max_tokens) -> EndpointRater:
    parsed = RATERS.parse(spec)
    if parsed.name != "openai":
        raise FifaError(f"the rater {spec} is not behind an endpoint", do="openai:MODEL@URL")
    return EndpointRater(*endpoint_of(parsed), max_tokens=max_tokens)


def _result(line: str) -> tuple[str | None, Answer | str, tuple[int, int]]:
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
        return key, parse_answer(text_of(body)), tokens_of(body)
    except NoAnswerError as error:
        return key, str(error), tokens_of(body)
