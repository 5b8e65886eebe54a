"""The rater behind an endpoint: ``openai:MODEL@URL``.

It asks one question after the other, or through batch files: `write_batch` writes one,
`read_batch` puts its answers where the rater looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.config import Compute
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.batch import Imported, read_answers, write_requests
from fifa.scoring.endpoint import Endpoint, endpoint_of
from fifa.scoring.rubric import (
    PARSER,
    Answer,
    load_rubric,
    parse_answer,
    ratings_table,
    response_format,
)
from fifa.scoring.specs import RATERS, Spec
from fifa.shards.files import digest


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


def write_batch(
    pairs: Pairs,
    spec: str,
    path: Path,
    *,
    folder: Path | None = None,
    max_tokens: int = Compute.max_tokens,
    reasoning: bool = False,
) -> int:
    """Write a request a unique prompt to ``path``: see `fifa.scoring.batch.write_requests`.

    Parameters
    ----------
    pairs
        The pairs whose prompts are to be rated.
    spec
        The rater, ``openai:MODEL@URL``: the same that `quality_scores` will be given.
    path, folder, reasoning
        As there.
    max_tokens
        Tokens that an answer may have, with the thinking before it.
    """
    rater = _rater(spec, max_tokens)
    prompts = list(dict.fromkeys(pairs.prompts["prompt"].to_pylist()))
    questions = dict(zip(rater.keys(prompts), prompts, strict=True))
    return write_requests(rater, questions, path, folder=folder, reasoning=reasoning)


def read_batch(pairs: Pairs, spec: str, path: Path, *, folder: Path) -> Imported:
    """Put the answers of a finished batch into the cache that `quality_scores` reads.

    ``pairs`` and ``spec`` as they were given to `write_batch`; the rest, and what is raised, as
    for `fifa.scoring.batch.read_answers`.
    """
    rater = _rater(spec)
    keys = rater.keys(pairs.prompts["prompt"].to_pylist())
    return read_answers(rater, keys, path, folder=folder)


def _rater(spec: str, max_tokens: int = Compute.max_tokens) -> EndpointRater:
    parsed = RATERS.parse(spec)
    if parsed.name != "openai":
        raise FifaError(f"the rater {spec} is not behind an endpoint", do="openai:MODEL@URL")
    return EndpointRater(*endpoint_of(parsed), max_tokens=max_tokens)
