"""The rubric that raters follow, and the shape of an answer."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fifa.shards.files import digest

QUALITIES = ("clarity", "specificity", "harmlessness")
FLAGS = ("hate", "minors", "nonsense", "self-harm", "sexual", "violence")
# What a rater gives back, row by row with the prompts it was given: QUALITY without its key.
# flags: null where a prompt could not be rated.
RATINGS = pa.schema(
    [("rating", pa.float32()), ("flags", pa.string())] + [(q, pa.float32()) for q in QUALITIES]
)
LONGEST = 4_000  # characters of a prompt that a rater reads: no image model reads more

Grade = Annotated[int, Field(ge=1, le=5, strict=True)]


class Answer(BaseModel):
    """One prompt's grades, as the rubric asks for them."""

    model_config = ConfigDict(extra="ignore")

    clarity: Grade
    specificity: Grade
    harmlessness: Grade
    flags: list[Literal["hate", "minors", "nonsense", "self-harm", "sexual", "violence"]]

    @property
    def rating(self) -> float:
        """The mean of the three grades, in [1, 5]."""
        return (self.clarity + self.specificity + self.harmlessness) / 3


@dataclass(frozen=True)
class Rubric:
    """The rubric's text.

    Parameters
    ----------
    version
        Raised with every change.
    instructions, question
        System message, and what goes around the prompt, for an endpoint.
    completion
        ``start``, ``end`` and the three questions for a local language model.
    hash
        16 hex characters that name all of the text.
    """

    version: str
    instructions: str
    question: str
    completion: dict[str, str]
    hash: str

    @property
    def identity(self) -> dict[str, str]:
        """What goes into fingerprints and cache keys."""
        return {"version": self.version, "hash": self.hash}

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The chat that asks for ``prompt``'s grades: the rubric first, the prompt last."""
        # Whatever looks like our delimiter is broken up, so a prompt cannot step out of it.
        inside = re.sub(r"<(?=\s*/?\s*prompt\b)", "< ", shortened(prompt), flags=re.IGNORECASE)
        return [
            {"role": "system", "content": self.instructions},
            {"role": "user", "content": self.question.replace("{prompt}", inside)},
        ]


@cache
def load_rubric() -> Rubric:
    """The rubric that the package ships (``rubric.toml``)."""
    raw = files("fifa.scoring").joinpath("rubric.toml").read_bytes()
    plain = tomllib.loads(raw.decode("utf-8"))
    text = (plain["instructions"].strip(), plain["question"], plain["completion"])
    return Rubric(plain["version"], *text, hash=digest(plain["version"], *text))


def shortened(prompt: str) -> str:
    """What a rater reads of a prompt: its first `LONGEST` characters, no broken surrogates."""
    return prompt[:LONGEST].encode("utf-8", "replace").decode("utf-8")


def response_format() -> dict[str, Any]:
    """The structured-output request: a strict JSON schema of `Answer`."""
    grade = {"type": "integer", "enum": [1, 2, 3, 4, 5]}
    # Bounded: a small model under a grammar may otherwise repeat a flag until it is cut off.
    flags: dict[str, Any] = {"type": "array", "maxItems": len(FLAGS)}
    flags["items"] = {"type": "string", "enum": list(FLAGS)}
    schema = {
        "type": "object",
        "properties": {**dict.fromkeys(QUALITIES, grade), "flags": flags},
        "required": [*QUALITIES, "flags"],
        "additionalProperties": False,
    }
    return {
        "type": "json_schema",
        "json_schema": {"name": "grades", "strict": True, "schema": schema},
    }


def parse_answer(text: str | None) -> Answer | str:
    """The grades in a model's answer, or why there are none.

    Takes the JSON object out of prose or a code fence, 4.0 or "4" for 4, flags in any case and
    with any dash. Grades out of range or missing are not repaired: nobody gave them.
    """
    if not text:
        return "empty answer"
    decoder, reason = json.JSONDecoder(), "no JSON object"
    for brace in list(re.finditer(r"\{", text))[:50]:
        try:
            plain, _ = decoder.raw_decode(text, brace.start())
        except (json.JSONDecodeError, RecursionError):
            continue
        try:
            return Answer.model_validate(_tidy(plain))
        except ValidationError as error:
            reason = f"wrong JSON: {', '.join(sorted({str(e['loc'][0]) for e in error.errors()}))}"
    return reason


def _tidy(plain: dict[str, Any]) -> dict[str, Any]:
    """Harmless liberties of language models, undone."""
    tidy = {str(key).strip().lower(): value for key, value in plain.items()}
    for quality in QUALITIES:
        value = tidy.get(quality)
        if str(value).strip() in {*"12345", "1.0", "2.0", "3.0", "4.0", "5.0"}:
            value = float(str(value))
        if isinstance(value, float) and value.is_integer():
            tidy[quality] = int(value)
    flags = tidy.get("flags", [])
    if flags is None or flags == "none" or flags == "":
        flags = []
    if isinstance(flags, str):
        flags = flags.split(",")
    if isinstance(flags, list):
        names = [str(flag).strip().lower().replace("_", "-").replace(" ", "-") for flag in flags]
        tidy["flags"] = [name for name in names if name not in ("", "none")]
    return tidy


def ratings_table(answers: list[Answer | None]) -> pa.Table:
    """`RATINGS` of the answers; NaN and null flags where there is none."""
    grades = {
        q: np.array([np.nan if a is None else getattr(a, q) for a in answers], np.float32)
        for q in QUALITIES
    }
    rating = np.array([np.nan if a is None else a.rating for a in answers], np.float32)
    flags = [None if a is None else ",".join(sorted(set(a.flags))) for a in answers]
    columns = [pa.array(rating), pa.array(flags, pa.string()), *map(pa.array, grades.values())]
    return pa.table(columns, schema=RATINGS)
