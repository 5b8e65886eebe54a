"""The endpoint rater and servers that refuse, think, redirect, drip or flood."""

from __future__ import annotations

import asyncio
import gzip
import json
import socket
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from aiohttp import web
from endpoint_server import asked, completion, server
from hypothesis import given, settings
from hypothesis import strategies as st

from fifa.console import collect_facts
from fifa.errors import FifaError
from fifa.scoring.endpoint import Answers, endpoint_of
from fifa.scoring.raters.endpoint import EndpointRater
from fifa.scoring.replies import MAX_REPLY
from fifa.scoring.specs import RATERS

KEY = "sk-not-to-be-seen-4711"
GOOD = {"clarity": 4, "specificity": 3, "harmlessness": 5, "flags": []}
PROMPTS = [f"prompt {i}" for i in range(60)]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def rater(url: str, **options: Any) -> EndpointRater:
    return EndpointRater("m", url, **{"timeout": 5, "in_flight": 4, "max_retries": 0, **options})


def good() -> web.Response:
    return web.json_response(completion(json.dumps(GOOD)))


def test_what_newer_models_refuse_is_changed_once() -> None:
    refused: Counter[str] = Counter()

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        for name, words in {
            "max_tokens": "'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
            "temperature": "'temperature' does not support 0.0 with this model.",
        }.items():
            if name in body:
                refused[name] += 1
                error = {"message": f"Unsupported: {words}", "param": name}
                return web.json_response({"error": error}, status=400)
        assert body["max_completion_tokens"] == 8192
        assert "response_format" in body
        return good()

    with server(handle) as url, collect_facts() as facts:
        assert rater(url, in_flight=1).rate(PROMPTS[:20])["flags"].null_count == 0
    assert refused == {"max_tokens": 1, "temperature": 1}
    assert facts["requests"] == 20 + 2


def test_a_limit_above_the_servers_own_is_left_out() -> None:
    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        if {"max_tokens", "max_completion_tokens"} & set(body):
            words = (
                "'max_tokens' or 'max_completion_tokens' is too large: 8192. This model's "
                "maximum context length is 4096 tokens."
            )
            return web.json_response({"message": words, "object": "error"}, status=400)
        return good()

    with server(handle) as url:
        assert rater(url).rate(PROMPTS)["flags"].null_count == 0


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (400, {"error": {"message": f"no such tenant {KEY}"}}, r"HTTP 400: no such tenant \["),
        (200, {"error": {"message": "bad tenant", "code": 400}}, "error 400 inside a reply: bad"),
        (200, {"error": "no model loaded"}, "error 400 inside a reply: no model loaded"),
        (402, {"error": {"message": "no credits"}}, "HTTP 402: no credits"),
        (599, {"error": {"message": f"oh {KEY}"}}, r"HTTP 599: oh \["),
        (200, {"code": 500, "message": "oh"}, "error 500 inside a reply: oh"),
        (422, {"detail": [{"loc": ["body", "x"], "msg": "odd"}]}, "HTTP 422: body.x: odd"),
        (200, {"choices": {"0": 1}}, "no completion"),
        (200, {"choices": "text"}, "no completion"),
        (200, [], "no completion"),
        (200, {"detail": f"who is {KEY}"}, r"no completion: who is \["),
        (200, {"choices": [{"message": {}, "error": {"code": 502}}]}, "error 502 inside"),
    ],
)
def test_refusals_stop_the_run_after_a_few_and_are_quoted(
    status: int, body: Any, told: str
) -> None:
    count: Counter[str] = Counter()

    async def handle(request: web.Request, _: dict[str, Any]) -> web.Response:
        count[asked(_)] += 1
        return web.json_response(body, status=status)

    with server(handle) as url, pytest.raises(FifaError, match=f"keeps failing: {told}") as caught:
        rater(url, attempts=2).rate(PROMPTS)
    assert KEY not in str(caught.value)
    assert len(count) <= 7
    assert sum(count.values()) <= 14


@pytest.mark.parametrize("after", ["\xff", "nan", "-1", "Wed, 99 Oct 99999999 7:28 x"])
def test_odd_times_to_wait_are_none(after: str) -> None:
    times = 0

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        nonlocal times
        times += 1
        if times > 1:
            return good()
        return web.json_response({}, status=429, headers={"Retry-After": after})

    with server(handle) as url:
        assert rater(url, max_retries=1, attempts=1).rate(["a"])["flags"].to_pylist() == [""]


def test_an_error_inside_a_reply_is_backed_off_from() -> None:
    times = 0

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        nonlocal times
        times += 1
        if times <= 3:
            error = {"code": [429, "rate_limit_exceeded", 429][times - 1], "message": "slow down"}
            plain = error if times == 3 else {"error": error}
            return web.json_response(plain, headers={"retry-after-ms": "1"})
        return good()

    with server(handle) as url, collect_facts() as facts:
        assert rater(url, max_retries=3, attempts=1).rate(["a"])["flags"].to_pylist() == [""]
    assert times == 4
    assert facts["retries"] == 3


def test_what_one_prompt_is_refused_for_does_not_stop_the_others(
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        if int(asked(body).split()[1]) < 10:
            error = {"message": "the content management policy", "code": "content_filter"}
            return web.json_response({"error": error}, status=400)
        return good()

    with server(handle) as url:
        assert rater(url).rate(PROMPTS)["flags"].null_count == 10
    assert "10 x HTTP 400: the content management policy" in capfd.readouterr().err


def test_thinking_and_answers_cut_off_are_told_and_no_grades(
    capfd: pytest.CaptureFixture[str],
) -> None:
    draft = json.dumps(GOOD | {"clarity": 1})
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("length", {"content": draft}),
        ("stop", {"content": f"<think>{draft}"}),
        ("stop", {"content": None, "refusal": "No."}),
        ("stop", {"content": None, "reasoning_content": draft}),
        ("tool_calls", {"content": None, "tool_calls": [{}]}),
        ("stop", {"content": f"<think>{draft}</think>{json.dumps(GOOD)}"}),
    ]

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        finish, said = kinds[int(asked(body).split()[1])]
        choice = {"index": 0, "finish_reason": finish, "message": {"role": "assistant", **said}}
        return web.json_response({"choices": [choice]})

    with server(handle) as url:
        table = rater(url, attempts=1).rate(PROMPTS[:6])
    assert table["clarity"].to_pylist()[5] == 4
    assert table["flags"].null_count == 5
    told = capfd.readouterr().err
    for reason in ("cut off at max_tokens", "the thinking has no end", "the model refuses: No.",
                   "reasoning without an answer", "a call of a tool"):  # fmt: skip
        assert f"1 x {reason}" in told


def test_a_model_that_never_answers_is_given_up() -> None:
    count = [0]

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        count[0] += 1
        reply = completion("<think>hmm")
        reply["choices"][0]["finish_reason"] = "length"
        return web.json_response(reply)

    with server(handle) as url, pytest.raises(FifaError, match="none of the first 20") as caught:
        rater(url, attempts=1).rate(PROMPTS)
    assert count[0] <= 24
    assert "20 x cut off at max_tokens" in str(caught.value)
    assert "--max-tokens" in str(caught.value)


def test_a_page_instead_of_a_reply_is_quoted() -> None:
    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(text=f"<html><b>Welcome</b> {KEY}", content_type="text/html")

    with server(handle) as url, pytest.raises(FifaError, match="no JSON: Welcome") as caught:
        rater(url, attempts=1).rate(PROMPTS)
    assert KEY not in str(caught.value)


def test_a_second_run_of_refused_prompts_is_no_error(tmp_path: Path) -> None:
    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        if int(asked(body).split()[1]) % 5 == 4:
            return web.json_response({"error": "not this one"}, status=400)
        return good()

    with server(handle) as url:
        for _ in range(2):
            assert rater(url, folder=tmp_path).rate(PROMPTS[:15])["flags"].null_count == 3


def test_a_second_run_with_nothing_new_is_no_error(tmp_path: Path) -> None:
    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        return good() if asked(body) == "a" else web.json_response(completion("no"))

    with server(handle) as url:
        for _ in range(2):
            table = rater(url, folder=tmp_path, attempts=1).rate(["a", "b"])
            assert table["flags"].to_pylist() == ["", None]


def test_a_redirect_is_refused_and_nothing_is_sent_there() -> None:
    there: list[str] = []

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        there.append(asked(body))
        return good()

    with server(handle) as target:

        async def redirect(request: web.Request, body: dict[str, Any]) -> web.Response:
            where = target.replace("127.0.0.1", "me:hush@localhost") + f"/{KEY}/chat?k=hush"
            return web.Response(status=307, headers={"Location": where})

        with server(redirect) as url, pytest.raises(FifaError, match="elsewhere") as caught:
            rater(url).rate(PROMPTS)
    assert not there
    assert "http://localhost:" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("kind", ["long", "gzip", "drip", "drip error"])
def test_bodies_have_limits_in_size_and_time(kind: str) -> None:
    bomb = gzip.compress(b" " * (30 << 20))
    sent: Counter[str] = Counter()

    async def handle(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        assert request.headers["Accept-Encoding"] == "identity"
        sent["requests"] += 1
        if kind == "gzip":
            return web.Response(body=bomb, headers={"Content-Encoding": "gzip"})
        reply = web.StreamResponse(status=500 if kind == "drip error" else 200)
        await reply.prepare(request)
        try:
            while True:
                await reply.write(b" " if kind.startswith("drip") else b" " * (1 << 18))
                sent["bytes"] += 1 if kind.startswith("drip") else 1 << 18
                await asyncio.sleep(0.02 if kind.startswith("drip") else 0)
        except ConnectionError:
            return reply

    told = {"long": "more than", "gzip": "compressed"}.get(kind, "no whole reply in 0.2 seconds")
    started = time.monotonic()
    with server(handle) as url, pytest.raises(FifaError, match=told):
        rater(url, timeout=0.2 if kind.startswith("drip") else 5, attempts=1, max_retries=6).rate(
            PROMPTS
        )
    assert time.monotonic() - started < 3
    assert sent["requests"] <= 8
    assert sent["bytes"] <= 8 * (MAX_REPLY + (4 << 20))


@pytest.mark.parametrize(
    ("start", "drop"),
    [(b"", b"H"), (b"HTTP/1.1 200 OK\r\n", b"X"), (b"", b"HTTP/1.1 100 Continue\r\n\r\n")],
)
def test_dripped_headers_have_an_end(start: bytes, drop: bytes) -> None:
    def drip(peer: socket.socket) -> None:
        with suppress(OSError), peer:
            peer.sendall(start)
            while True:
                peer.sendall(drop)
                time.sleep(0.02)

    def serve(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                Thread(target=drip, args=(listening.accept()[0],), daemon=True).start()

    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        Thread(target=serve, args=(listening,), daemon=True).start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        with pytest.raises(FifaError, match=r"no whole reply in 0\.2 seconds"):
            rater(url, timeout=0.2, attempts=1).rate(PROMPTS)
        listening.shutdown(socket.SHUT_RDWR)
    assert time.monotonic() - started < 3


LEAF = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9)
KEYS = st.sampled_from(
    ["choices", "message", "content", "finish_reason", "error", "code", "usage", "detail"]
)
PLAIN = st.recursive(LEAF, lambda one: st.lists(one) | st.dictionaries(KEYS, one), max_leaves=9)
BODY = PLAIN.map(lambda plain: json.dumps(plain).encode()) | st.binary(max_size=30)
TYPE = st.sampled_from(["application/json", "text/html", "text/plain; charset=zip", "x"])


def test_any_reply_is_a_rating_or_an_error_for_people() -> None:
    now: dict[str, Any] = {}

    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        return web.Response(**now)

    @settings(max_examples=12, derandomize=True, deadline=None)
    @given(BODY, st.sampled_from([200, 200, 200, 201, 400, 403, 418, 422, 503, 599]), TYPE)
    def ask(body: bytes, status: int, kind: str) -> None:
        now.update(body=body, status=status, headers={"Content-Type": kind})
        with suppress(FifaError):
            rater(url, attempts=1, in_flight=1).rate(["a", "b"])

    with server(handle) as url:
        ask()


@pytest.mark.parametrize("url", ["http://[", "http://h:99999/v1", "http://me:hush@/v1"])
def test_a_url_that_is_none_is_told_without_secrets(url: str) -> None:
    with pytest.raises(FifaError, match="no model or no URL") as caught:
        endpoint_of(RATERS.parse(f"openai:m@{url}"))
    assert "hush" not in str(caught.value)


def test_a_damaged_answer_is_asked_for_again(tmp_path: Path) -> None:
    async def handle(request: web.Request, body: dict[str, Any]) -> web.Response:
        return good()

    with server(handle) as url:
        mine = rater(url, folder=tmp_path)
        mine.rate(["a", "b"])
        answers = Answers(tmp_path)
        answers.put(mine.keys(["a"])[0], "m", '{"clarity": 7')
        answers.close()
        with collect_facts() as facts:
            assert mine.rate(["a", "b"])["flags"].null_count == 0
    assert facts["requests"] == 1
