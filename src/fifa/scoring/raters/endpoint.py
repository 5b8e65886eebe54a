"""The rater behind an endpoint: ``openai:MODEL@URL``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.scoring.endpoint import Endpoint, endpoint_of
from fifa.scoring.rubric import Answer, load_rubric, parse_answer, ratings_table, response_format
from fifa.scoring.specs import Spec
from fifa.shards.files import digest

LIMIT = 200  # tokens of an answer: the JSON takes about 40


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
        """Model, endpoint, rubric and parameters: what an answer depends on."""
        return {
            "model": self.model,
            "url": self.public_url,
            "temperature": self.temperature,
            "max_tokens": LIMIT,
            "rubric": load_rubric().identity,
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
            "max_tokens": LIMIT,
        }

    def read(self, text: str | None) -> Answer | str:
        """The grades in a model's answer, or why there are none."""
        return parse_answer(text)

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`RATINGS` of ``prompts``; NaN and null flags for those given up on.

        Identical prompts are asked once. Raises `FifaError` as `Endpoint.ask` does.
        """
        keys = self.keys(prompts)
        known = self.ask(dict(zip(keys, prompts, strict=True)))
        return ratings_table([known.get(key) for key in keys])


def make_endpoint(spec: Spec, folder: Path | None, in_flight: int) -> EndpointRater:
    """The rater that a spec names; answers are kept in ``folder``."""
    return EndpointRater(*endpoint_of(spec), folder, in_flight)
