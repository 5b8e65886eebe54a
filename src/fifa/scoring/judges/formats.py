"""What a vision-language judge is asked, and how its answer is read: a format a family of models.

``plain`` is for any model that follows instructions (Qwen3-VL, hosted ones). The others are what a
model was trained on:

- ``unifiedreward``: UnifiedReward 2.0's questions (github.com/CodeGoat24/UnifiedReward, MIT, (c)
  2025 Yibin Wang), from ``inference_qwen/UnifiedReward-2.0-inference``.
- ``rationalrewards``: the headings, levels and answer form of RationalRewards
  (github.com/TIGER-AI-Lab/RationalRewards, its README and ``reward_model_evaluation``); the
  explanations of the levels are our own words, as that text has no licence.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib.resources import files
from math import exp, log
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from fifa.scoring.replies import NoAnswerError, final_text, last_object
from fifa.scoring.rubric import Grade, shortened

PARSER = 1  # raised when an answer is read in another way: part of every cache key
IMAGE = "{image}"  # stands where an image goes in a format's text
TOP = 5  # tokens whose log-probabilities are asked for
LIMIT = 20.0  # largest log-odds: beyond it float32 probabilities are 0 and 1
ASPECTS = ("alignment", "coherence", "taste", "safety")
VOTES = 5  # of the winner; each aspect has one

Side = Literal["A", "B", "tie"]
VOTE = {"A": 1.0, "B": 0.0, "tie": 0.5}
TIE = ("t", "ti", "tie")  # what the token of a tie may be


class Judgement(BaseModel):
    """What a judge said of one image, or of two in one message.

    Parameters
    ----------
    value
        Of two images: how far the first is ahead. Of one: its grade.
    measured
        The value is made from log-probabilities.
    aspects
        By their names: of two images the first one's share, of one its grade.
    tokens
        That the question and the answer took, as the server reports it.
    """

    value: float = Field(allow_inf_nan=False)
    measured: bool = False
    aspects: dict[str, float] = {}
    tokens: int = 0


class Comparison(BaseModel):
    """The plain format's answer for two images."""

    model_config = ConfigDict(extra="ignore")

    alignment: Side
    coherence: Side
    taste: Side
    safety: Side
    winner: Side


class Grades(BaseModel):
    """The plain format's answer for one image."""

    model_config = ConfigDict(extra="ignore")

    alignment: Grade
    coherence: Grade
    taste: Grade
    safety: Grade


Tokens = list[tuple[str, dict[str, float]]]  # an answer's tokens, each with its alternatives


@dataclass(frozen=True)
class Format:
    """A question, and how its answer is read.

    Parameters
    ----------
    name
        Of the family of models.
    text
        The user's message: ``{prompt}`` and an ``{image}`` for each image, in their order.
    read
        From an answer's text and its tokens to a judgement, or why there is none; the text has
        its thinking.
    scale
        What a value is, in words and formula.
    schema
        The answer's JSON schema; None for an answer in the model's own form.
    """

    name: str
    text: str
    read: Callable[[str, Tokens], Judgement | str]
    scale: str
    schema: Mapping[str, Any] | None = None

    @property
    def identity(self) -> list[Any]:
        """What an answer depends on, as far as it is the format's."""
        return [self.name, self.text, self.schema, PARSER]

    def content(self, prompt: str, images: tuple[str, ...]) -> list[dict[str, Any]]:
        """The parts of the message: ``images`` are URLs (``data:image/jpeg;base64,...``)."""
        inside = shortened(prompt)
        if self.schema:  # the prompt is data: it cannot step out of its delimiters
            inside = re.sub(r"<(?=\s*/?\s*prompt\b)", "< ", inside, flags=re.IGNORECASE)
        urls = iter(images)
        parts: list[dict[str, Any]] = []
        for piece in re.split(re.escape(IMAGE), self.text):
            if parts:
                parts.append({"type": "image_url", "image_url": {"url": next(urls)}})
            parts.append({"type": "text", "text": piece.replace("{prompt}", inside).strip("\n")})
        return [part for part in parts if part.get("text") != ""]

    def request(self) -> dict[str, Any]:
        """What a request has beside its message: structured output and log-probabilities."""
        if not self.schema:
            return {}
        schema = {"name": "judgement", "strict": True, "schema": dict(self.schema)}
        form = {"type": "json_schema", "json_schema": schema}
        return {"response_format": form, "logprobs": True, "top_logprobs": TOP}


def closed_object(names: tuple[str, ...], value: dict[str, Any]) -> dict[str, Any]:
    """The JSON schema of an object with these keys, all of one kind, and no others."""
    properties = dict.fromkeys(names, value)
    required = {"required": list(names), "additionalProperties": False}
    return {"type": "object", "properties": properties, **required}


def tokens_of_reply(reply: Any) -> Tokens:
    """The tokens of a completion with their log-probabilities; empty where it has none."""
    try:
        found = [
            (str(one["token"]), {str(t["token"]): float(t["logprob"]) for t in one["top_logprobs"]})
            for one in reply["choices"][0]["logprobs"]["content"]
        ]
    except (KeyError, TypeError, ValueError, IndexError):
        return []
    return found


def alternatives(tokens: Tokens, name: str) -> dict[str, float]:
    """The probabilities of what the value of ``name`` might begin with, letters and digits only.

    Tokens that begin alike ("A" and " A") are added up. Empty where the place is not found.
    """
    starts = np.cumsum([0, *(len(token) for token, _ in tokens)])
    text = "".join(token for token, _ in tokens)
    places = list(re.finditer(rf'"{name}"\s*:\s*"?(?=[A-Za-z0-9])', text))
    if not places:
        return {}
    at = places[-1].end()
    number = int(np.searchsorted(starts, at, side="right")) - 1
    before = tokens[number][0][: at - int(starts[number])]  # such as ' "' in the same token
    found: dict[str, float] = {}
    for token, logprob in tokens[number][1].items():
        value = token[len(before) :] if token.startswith(before) else token
        value = re.sub(r"[^A-Za-z0-9]", "", value)
        found[value] = found.get(value, 0.0) + exp(max(-LIMIT, min(logprob, 0.0)))
    return found


def _log_odds(tokens: Tokens) -> float | None:
    """log((P(A) + P(tie) / 2) / (P(B) + P(tie) / 2)) at the winner; None without probabilities.

    A side that is not among the `TOP` tokens has no more than the last of them: it is given that.
    """
    p = alternatives(tokens, "winner")
    if not {"A", "B"} & set(p):
        return None
    least, tie = min(p.values()), sum(p.get(name, 0.0) for name in TIE)
    odds = log((p.get("A", least) + tie / 2) / (p.get("B", least) + tie / 2))
    return max(-LIMIT, min(LIMIT, odds))


def _voted(answer: Comparison) -> float:
    """The log-odds where there are no log-probabilities: as if nine people had voted.

    The winner has `VOTES` votes and each aspect one, ties are half a vote for either; and half a
    vote is added to each side::

        log((v + 1/2) / (n - v + 1/2)),    n = VOTES + 4
    """
    v = VOTES * VOTE[answer.winner] + sum(VOTE[getattr(answer, name)] for name in ASPECTS)
    return log((v + 0.5) / (VOTES + len(ASPECTS) - v + 0.5))


_SIDES = {"a": "A", "b": "B", "tie": "tie", "image a": "A", "image b": "B", "none": "tie"}


def _compared(plain: dict[str, Any]) -> Comparison:
    tidy = {str(key).strip().lower(): value for key, value in plain.items()}
    for name, value in tidy.items():
        if isinstance(value, str):
            tidy[name] = _SIDES.get(value.strip().lower(), value)
    return Comparison.model_validate(tidy)


def _graded(plain: dict[str, Any]) -> Grades:
    tidy = {str(key).strip().lower(): value for key, value in plain.items()}
    for name, value in tidy.items():
        if isinstance(value, str) and re.fullmatch(r"\s*[1-5](\.0)?\s*", value):
            value = float(value)
        if isinstance(value, float) and value.is_integer():
            tidy[name] = int(value)
    return Grades.model_validate(tidy)


def _read_comparison(text: str, tokens: Tokens) -> Judgement | str:
    answer = last_object(text, _compared, Comparison.model_fields)
    if isinstance(answer, str):
        return answer
    odds = _log_odds(tokens)
    return Judgement(
        value=_voted(answer) if odds is None else odds,
        measured=odds is not None,
        aspects={name: VOTE[getattr(answer, name)] for name in ASPECTS},
    )


def _read_grades(text: str, tokens: Tokens) -> Judgement | str:
    """A grade is its expected value over the log-probabilities of the digits, where there are any.

    As in G-Eval (arXiv 2303.16634): sum over g of g P(g) / sum over g of P(g).
    """
    answer = last_object(text, _graded, Grades.model_fields)
    if isinstance(answer, str):
        return answer
    grades, measured = {}, bool(tokens)
    for name in ASPECTS:
        p = {g: alternatives(tokens, name).get(str(g), 0.0) for g in range(1, 6)}
        total = sum(p.values())
        measured = measured and total > 0
        expected = sum(g * p[g] for g in p) / total if total > 0 else getattr(answer, name)
        grades[name] = float(expected)
    return Judgement(value=float(np.mean(list(grades.values()))), measured=measured, aspects=grades)


_NUMBER = r"\**\s*:?\s*\**\s*\[?\s*(\d+(?:\.\d+)?)"
_UNIFIED = {"alignment": "Alignment", "coherence": "Coherence", "taste": "Style"}
_RATIONAL = {
    "alignment": "Text Faithfulness",
    "coherence": "Physical and Visual Quality",
    "text": "Text Rendering",
}


def _answered(read: Callable[[str], Judgement | str]) -> Callable[[str, Tokens], Judgement | str]:
    """A parser of the text behind the thinking, which looks at no log-probabilities."""

    def parse(text: str, tokens: Tokens) -> Judgement | str:
        try:
            return read(final_text(text))
        except NoAnswerError as error:
            return str(error)

    return parse


def _read_shares(text: str) -> Judgement | str:
    """UnifiedReward's relative scores: p = mean over dimensions of s_1 / (s_1 + s_2)."""
    shares = {}
    for name, title in _UNIFIED.items():
        both = rf"{title} Score\**\s*:?\s*\**\s*Image 1{_NUMBER}\s*Image 2{_NUMBER}"
        found = re.findall(both, text)
        if not found:
            return f"no {title} Score for both images"
        one, two = map(float, found[-1])
        if not 0 < one + two <= 10:
            return f"scores out of range: {one:g} and {two:g}"
        shares[name] = one / (one + two)
    p = min(max(float(np.mean(list(shares.values()))), exp(-LIMIT)), 1 - exp(-LIMIT))
    # d = log(p / (1 - p))
    return Judgement(value=log(p / (1 - p)), aspects=shares)


def _read_scores(text: str) -> Judgement | str:
    """UnifiedReward's scores of one image, 1 to 5."""
    grades = {}
    for name, title in _UNIFIED.items():
        found = re.findall(rf"{title} Score\s*(?:\(1-5\))?{_NUMBER}", text)
        if not found or not 1 <= float(found[-1]) <= 5:
            return f"no {title} Score from 1 to 5"
        grades[name] = float(found[-1])
    return Judgement(value=float(np.mean(list(grades.values()))), aspects=grades)


def _sections(text: str) -> dict[str, str]:
    """The parts of a RationalRewards answer, by aspect; its summary is in none of them."""
    body = text.rpartition("Detailed Judgement")[2]
    body = re.split(r"#\s*\**Summary", body)[0]
    places = [(name, body.find(title)) for name, title in _RATIONAL.items()]
    ends = [at for _, at in places[1:]] + [len(body)]
    return {
        name: body[at : end if end > at else len(body)]
        for (name, at), end in zip(places, ends, strict=True)
        if at >= 0
    }


def _read_critique(text: str, labels: tuple[str, ...]) -> Judgement | str:
    """RationalRewards' scores, 1 to 4: the mean over the aspects that apply.

    Of two images the first one's mean less the second one's.
    """
    points: dict[str, list[float]] = {}
    for name, section in _sections(text).items():
        found = [re.findall(rf"Score{label}{_NUMBER}", section) for label in labels]
        if all(found):
            points[name] = [min(max(float(one[-1]), 1.0), 4.0) for one in found]
    missing = {"alignment", "coherence"} - set(points)  # text is only there where it was asked for
    if missing:
        return f"no score for {', '.join(_RATIONAL[name] for name in sorted(missing))}"
    means = np.mean(list(points.values()), axis=0)
    if len(labels) == 1:
        aspects = {name: own[0] for name, own in points.items()}
    else:
        aspects = {name: 0.5 * (1 + np.sign(a - b)) for name, (a, b) in points.items()}
    value = float(means[0] - means[1]) if len(labels) == 2 else float(means[0])
    return Judgement(value=value, aspects={name: float(own) for name, own in aspects.items()})


_SIDE = {"type": "string", "enum": ["A", "B", "tie"]}
_GRADE = {"type": "integer", "enum": [1, 2, 3, 4, 5]}
_MEAN = "the mean of its grades"
_CRITIQUE = f"{_MEAN}, 1 to 4"
# How an answer is read, the scale, and the schema: for two images in one message, and for one.
_KINDS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "plain": (
        (
            _read_comparison,
            "log-odds that the judge prefers the image",
            (*ASPECTS, "winner"),
            _SIDE,
        ),
        (_read_grades, f"{_MEAN}, 1 to 5", ASPECTS, _GRADE),
    ),
    "unifiedreward": (
        (_answered(_read_shares), "log(p / (1 - p)), p the mean of its relative scores"),
        (_answered(_read_scores), f"{_MEAN}, 1 to 5"),
    ),
    "rationalrewards": (
        (_answered(partial(_read_critique, labels=(" A", " B"))), _CRITIQUE),
        (_answered(partial(_read_critique, labels=("",))), _CRITIQUE),
    ),
}


@cache
def load_text(family: str, kind: str) -> str:
    """A text of ``formats.toml``."""
    plain = files("fifa.scoring.judges").joinpath("formats.toml").read_text("utf-8")
    text: str = tomllib.loads(plain)[family][kind]
    return text


@cache
def load_format(name: str, images: int) -> Format:
    """The format called ``name`` for a message with so many images, 1 or 2."""
    read, scale, *schema = _KINDS[name][2 - images]
    made = closed_object(*schema) if schema else None
    return Format(name, load_text(name, "pair" if images == 2 else "image"), read, scale, made)


def format_of(model: str) -> str:
    """The name of the format that a model was trained on, by the model's own name."""
    plain = re.sub(r"[^a-z]", "", model.lower())
    return next((name for name in _KINDS if name in plain), "plain")
