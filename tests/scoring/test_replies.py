"""Replies of endpoints: what counts as an answer, and what servers say of errors."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.scoring.replies import (
    NoAnswerError,
    hint_of,
    text_of,
    tokens_of,
    without_thinking,
    words_of,
)
from fifa.scoring.rubric import FLAGS, QUALITIES, Answer, parse_answer

GOOD = {"clarity": 4, "specificity": 3, "harmlessness": 5, "flags": []}
DRAFT = {"clarity": 1, "specificity": 1, "harmlessness": 1, "flags": ["nonsense"]}
good, draft = json.dumps(GOOD), json.dumps(DRAFT)


def message(finish: str | None = "stop", **fields: Any) -> dict[str, Any]:
    return {"choices": [{"finish_reason": finish, "message": {"role": "assistant", **fields}}]}


@pytest.mark.parametrize(
    "text",
    [
        f"<think>perhaps {draft}</think>{good}",
        f"perhaps {draft}</think>\n{good}",  # the template began the thinking
        f"<think>I write </think> after {draft}</think> {good}",
        f"<think>a</think>{good}<think>was it {draft}?</think>",
        f"<Thinking>{draft}</Thinking>{good}",
        f"<seed:think>{draft}</seed:think>{good}",
        f"[THINK]{draft}[/THINK]{good}",
        f"◁think▷{draft}◁/think▷{good}",
        f"<|channel|>analysis<|message|>{draft}<|end|><|start|>assistant"
        f"<|channel|>final <|constrain|>json<|message|>{good}<|return|>",
        f"Draft: {draft}\nOn second thoughts:\n```json\n{good}\n```",
        f'{{"grades": {good}}}',
        f'{{"clarity": 4, "specificity": 3, "harmlessness": 5, "flags": [], "draft": {draft}}}',
        good + ' {"clarity": 9}',  # the last valid one
    ],
)
def test_the_answer_is_what_follows_the_thinking(text: str) -> None:
    assert parse_answer(text) == Answer(**GOOD)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"<think>perhaps {draft}", "the thinking has no end"),
        (f"<think>a</think>{good}<think>or {draft}", "the thinking has no end"),
        (f"<|channel|>analysis<|message|>{draft}", "the thinking has no end"),
        (f"<think>perhaps {draft}</think>", "thinking without an answer"),
        (f"{draft}</think>  ", "thinking without an answer"),
        ('{"clarity": ' + "9" * 5000 + "}", "no JSON object"),
        ('{"a":' * 100_000, "no JSON object"),
    ],
)
def test_thinking_is_no_answer(text: str, reason: str) -> None:
    assert parse_answer(text) == reason


def test_only_text_counts() -> None:
    parts = [{"type": "thinking", "thinking": [{"type": "text", "text": draft}]}]
    parts += [{"type": "reasoning", "text": draft}, {"type": "text", "text": good}, 7, None]
    assert text_of(message(content=parts)) == good
    assert text_of(message(content=good, reasoning_content=draft, refusal=None)) == good
    assert text_of(message(None, content=good)) == good


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (message("length", content=good), "cut off at max_tokens"),
        (message("MAX_TOKENS", content=""), "cut off at max_tokens"),
        (message("content_filter", content=None), "stopped by a content filter"),
        (message(content=None, refusal="I can't  rate that."), "the model refuses: I can't rate"),
        (message("tool_calls", content=None, tool_calls=[{"id": "1"}]), "a call of a tool"),
        (message(content=None, reasoning_content=draft), "reasoning without an answer"),
        (message(content="", reasoning=draft), "reasoning without an answer"),
        (message(content=[{"type": "thinking", "thinking": draft}]), "reasoning without an answer"),
        (message(content=None), "empty answer"),
        (message(content=7), "content that is no text"),
        (message(content={"text": good}), "content that is no text"),
        (message(content=[good]), "content that is no text"),
        (message(content=[{"type": "text", "text": {"value": good}}]), "content that is no text"),
        (message(content=[{"type": "text", "text": " "}]), "empty answer"),
        (message("eos", content=""), "empty answer (eos)"),
        ({"choices": {"0": {}}}, "no completion"),
        ({"choices": "text"}, "no completion"),
        ({"choices": ["text"]}, "no completion"),
        ({"choices": [{"message": "text"}]}, "no completion"),
        ({"choices": []}, "no completion"),
        ([], "no completion"),
        (None, "no completion"),
    ],
)
def test_why_there_is_no_answer(reply: Any, reason: str) -> None:
    with pytest.raises(NoAnswerError) as caught:
        text_of(reply)
    assert str(caught.value).startswith(reason)
    assert caught.value.unreadable == (reason == "no completion")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"error": {"message": "no such\nmodel", "code": 1}}, "no such model"),
        ({"error": "json_schema unsupported"}, "json_schema unsupported"),
        ({"detail": "not found"}, "not found"),
        ({"detail": [{"loc": ["body", "n"], "msg": "too big", "input": 9}]}, "body.n: too big"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"error": {"message": "key sk-1 is bad"}}, "key [secret] is bad"),
        ({"a": 1}, ""),
        ([[[]]], ""),
    ],
)
def test_a_servers_own_words(body: Any, words: str) -> None:
    assert words_of(json.dumps(body).encode(), ["sk-1", ""]) == words


def test_words_are_one_short_line() -> None:
    page = b"<html><style>p{}</style><h1>502 Bad\x1b[31m Gateway</h1>\xff</html>"
    assert words_of(page) == "502 Bad [31m Gateway \ufffd"
    assert len(words_of(b"x" * 100_000)) == 300
    assert "sk" not in words_of(b" " * 2395 + b"sk-secret-4711", ["sk-secret-4711"])


def test_a_hint_names_the_parameter() -> None:
    error = {"message": "Unsupported value", "param": "temperature", "code": "unsupported_value"}
    assert hint_of(json.dumps({"error": error}).encode()).split()[-2:] == [
        "temperature",
        "unsupported_value",
    ]


@pytest.mark.parametrize("usage", [None, 7, {"prompt_tokens": "x"}, {"prompt_tokens": -1}])
def test_odd_counts_of_tokens_are_none(usage: Any) -> None:
    assert tokens_of({"usage": usage}) == (0, 0)


SCRAPS = st.sampled_from(
    [good, draft, good[:20], "<think>", "</think>", "[THINK]", "<|channel|>final<|message|>", "{",
     "}", '"', "\\", "```json\n", "\ud800", '{"clarity": NaN}', '{"clarity": 1e999}', " "]
)  # fmt: skip
NAMES = "choices message content finish_reason refusal type text error usage detail code flags"
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
KEYS = st.sampled_from([*NAMES.split(), *QUALITIES])
PLAIN = st.recursive(
    LEAF, lambda one: st.lists(one, max_size=3) | st.dictionaries(KEYS, one, max_size=4)
)


@settings(max_examples=80, derandomize=True)
@given(st.lists(SCRAPS | st.text(max_size=9), max_size=9).map("".join))
def test_any_text_is_an_answer_or_a_reason(text: str) -> None:
    answer = parse_answer(text)
    assert isinstance(answer, Answer | str)
    if without_thinking(text) is None:
        assert isinstance(answer, str)
    # a whole answer after the end of all thinking is the answer
    assert parse_answer(text + "</think>" + good) == Answer(**GOOD)


@settings(max_examples=80, derandomize=True)
@given(PLAIN)
def test_any_json_is_an_answer_or_a_reason(plain: Any) -> None:
    body = json.dumps(plain).encode()
    assert isinstance(parse_answer(body.decode()), Answer | str)
    assert len(words_of(body)) <= 300
    assert min(tokens_of(plain)) >= 0
    hint_of(body)
    for reply in (plain, {"choices": [plain]}, {"choices": [{"message": plain}]}):
        try:
            assert text_of(reply).strip()
        except NoAnswerError as error:
            assert str(error)


@pytest.mark.parametrize(
    "text", ["{" * 1_000_000, '{"a":' * 200_000, "<think" * 200_000, "<" * 1_000_000,
             '{"x' * 300_000, "<|channel|> " * 100_000, "<think></think>" * 60_000]
)  # fmt: skip
def test_hostile_answers_take_no_time(text: str) -> None:
    started = time.process_time()
    parse_answer(text)
    words_of(text.encode())
    assert time.process_time() - started < 1


def test_flags_that_are_no_text_are_refused() -> None:
    assert parse_answer(json.dumps(GOOD | {"flags": [{}, 3]})) == "wrong JSON: flags"
    flagged = GOOD | {"flags": list(FLAGS)}
    assert parse_answer(json.dumps(flagged)) == Answer(**flagged)
