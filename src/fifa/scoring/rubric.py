"""The rubric that raters follow, and the shape of an answer."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from fifa.scoring.replies import last_object
from fifa.shards.files import digest

QUALITIES = ("clarity", "specificity", "harmlessness")
FLAGS = ("hate", "minors", "nonsense", "self-harm", "sexual", "violence")
# What a rater gives back, row by row with the prompts it was given: QUALITY without its key.
# flags: null where a prompt could not be rated.
RATINGS = pa.schema(
    [("rating", pa.float32()), ("flags", pa.string())] + [(q, pa.float32()) for q in QUALITIES]
)
LONGEST = 4_000  # characters of a prompt that a rater reads: no image model reads more
PARSER = 2  # raised when an answer is read in another way: part of every cache key

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


def parse_answer(text: str) -> Answer | str:
    """The grades in a model's answer, or why there are none.

    Thinking is dropped, and the last valid JSON object counts, also within prose or a code fence;
    4.0 or "4" for 4, flags in any case and with any dash. Grades out of range or missing are not
    repaired: nobody gave them.
    """
    return last_object(text, lambda plain: Answer.model_validate(_tidy(plain)), QUALITIES)


_GRADES = {f"{grade}{rest}" for grade in range(1, 6) for rest in ("", ".0")}


def _tidy(plain: dict[str, Any]) -> dict[str, Any]:
    """Harmless liberties of language models, undone."""
    tidy = {str(key).strip().lower(): value for key, value in plain.items()}
    for quality in QUALITIES:
        value = tidy.get(quality)
        if isinstance(value, str) and value.strip() in _GRADES:
            value = float(value)
        if isinstance(value, float) and value.is_integer():
            tidy[quality] = int(value)
    flags = tidy.get("flags", [])
    if flags is None or flags == "none" or flags == "":
        flags = []
    if isinstance(flags, str):
        flags = flags.split(",")
    if isinstance(flags, list):
        texts = [flag.strip().lower() if isinstance(flag, str) else "?" for flag in flags]
        names = [text.replace("_", "-").replace(" ", "-") for text in texts]
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
