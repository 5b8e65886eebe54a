"""The rater behind an endpoint: ``openai:MODEL@URL``.

It asks one question after the other, or through batch files: `write_batch` writes one,
`read_batch` puts its answers where the rater looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.config import Compute
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.batch import Imported, read_answers, write_requests
from fifa.scoring.elsewhere import answered, ask_elsewhere
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
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, is_elsewhere


@dataclass(frozen=True)
class EndpointRater(Endpoint):
    """Grades prompts with a language model behind an OpenAI-compatible endpoint."""

    answer_type = Answer

    @property
    def name(self) -> str:
        """The model's name, for people and file names."""
        return f"vllm-{Path(self.model).name}" if self.is_offline else f"openai-{self.model}"

    @property
    def identity(self) -> dict[str, object]:
        """Model, endpoint, temperature, rubric and parser: what an answer depends on."""
        return {
            **self.source,
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

    def rate(
        self, prompts: Sequence[str], ledger: Ledger | None = None, executor: Executor | None = None
    ) -> pa.Table:
        """`RATINGS` of ``prompts``; NaN and null flags for those given up on.

        Identical prompts are asked once. A model of vLLM's is loaded by the executor's workers;
        requests to a server are sent from here, as they take no time worth sharing out. Raises
        `FifaError` as `Endpoint.ask` does.
        """
        keys = self.keys(prompts)
        questions = dict(zip(keys, prompts, strict=True))
        if self.is_offline and ledger is not None and is_elsewhere(executor, ledger):

            def prepare(part: list[str]) -> dict[str, str]:
                return {key: questions[key] for key in part}

            ask = partial(answered, self)
            known, _ = ask_elsewhere(self, list(questions), ask, prepare, ledger, executor)
            questions = prepare([key for key in questions if key in known])
        found = self.ask(questions)
        return ratings_table([found.get(key) for key in keys])


def make_endpoint(
    spec: Spec, folder: Path | None, in_flight: int, max_tokens: int, **_: object
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
