"""A rater behind any OpenAI-compatible endpoint: hosted, vLLM, Ollama, llama.cpp."""

from __future__ import annotations

import asyncio
import os
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

import pyarrow as pa

from fifa.console import echo, note, progress
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.scoring.raters.answers import Answers, answer_key
from fifa.scoring.rubric import (
    Answer,
    load_rubric,
    parse_answer,
    ratings_table,
    response_format,
)
from fifa.scoring.specs import Spec

OPENAI = "https://api.openai.com/v1"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
DEAD = 3  # failures in a row, before any answer, after which the endpoint counts as down
REFUSALS = {401: "refuses the key", 403: "refuses the key", 404: "does not know the model"}
LIMIT = 200  # tokens of an answer: the JSON takes about 40


@dataclass(frozen=True)
class EndpointRater:
    """Grades prompts with a language model behind an OpenAI-compatible endpoint.

    Parameters
    ----------
    model
        The model's name there.
    url
        The endpoint's base, such as ``http://localhost:8000/v1``.
    folder
        Where answers are kept (``ratings.sqlite``); None keeps them in memory.
    in_flight
        Requests under way at once.
    timeout
        Seconds until a request counts as stalled.
    max_retries
        How often a request is sent again after 429, 5xx, a broken connection or a time-out: the
        client's own exponential back-off, which honours ``Retry-After``.
    attempts
        How often a prompt is asked until an answer parses.
    temperature
        Of the first attempt; later ones need some chance of a better answer and take 0.7.
    key_variable
        The environment variable that holds the key; loopback servers need none.
    """

    model: str
    url: str = OPENAI
    folder: Path | None = None
    in_flight: int = 16
    timeout: float = 120.0
    max_retries: int = 6
    attempts: int = 3
    temperature: float = 0.0
    key_variable: str = "OPENAI_API_KEY"

    @property
    def name(self) -> str:
        """The model's name, for people and file names."""
        return f"openai-{self.model}"

    @property
    def identity(self) -> dict[str, object]:
        """Model, endpoint, rubric and parameters: what an answer depends on."""
        return {
            "model": self.model,
            "url": public_url(self.url),
            "temperature": self.temperature,
            "max_tokens": LIMIT,
            "rubric": load_rubric().identity,
        }

    def rate(self, prompts: Sequence[str]) -> pa.Table:
        """`RATINGS` of ``prompts``; NaN and null flags for those given up on.

        Every answer is kept as it arrives, identical prompts are asked once.

        Raises
        ------
        FifaError
            Where there is no key, the endpoint is down, refuses the key or model, or no prompt
            at all could be rated.
        """
        answers = Answers(self.folder)
        try:
            keys = [answer_key(self.identity, prompt) for prompt in prompts]
            asked = dict(zip(keys, prompts, strict=True))
            known = answers.get(list(asked))
            missing = {key: prompt for key, prompt in asked.items() if key not in known}
            if known:
                note(answers_from_cache=len(known))
            if missing:
                talk = Talk(self, answers)
                with progress(f"rating prompts ({self.model})", len(missing)) as advance:
                    known |= _run(talk.ask_all(missing, advance))
                talk.tell(len(missing))
        finally:
            answers.close()
        return ratings_table([known.get(key) for key in keys])


@dataclass
class Talk:
    """One conversation with an endpoint: what it was asked, and how that went."""

    rater: EndpointRater
    answers: Answers
    structured: bool = True
    answered: int = 0
    failures: int = 0  # in a row
    unrated: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)

    async def ask_all(self, prompts: dict[str, str], advance: Any) -> dict[str, Answer]:
        """Ask for every prompt, `EndpointRater.in_flight` at a time."""
        queue = iter(prompts.items())
        found: dict[str, Answer] = {}
        async with self._client() as client:
            await reach(self.rater.url)

            async def worker() -> None:
                for key, prompt in queue:
                    answer = await self._ask(client, prompt)
                    if isinstance(answer, Answer):
                        self.answers.put(key, self.rater.model, answer)
                        found[key] = answer
                    else:
                        self.unrated[answer] += 1
                    advance(1)

            workers = [
                asyncio.create_task(worker())
                for _ in range(min(self.rater.in_flight, len(prompts)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        return found

    def tell(self, asked: int) -> None:
        """Note what was spent; say what could not be rated, or raise if nothing could."""
        unrated = sum(self.unrated.values())
        note(**self.spent, unrated=unrated)
        reasons = "; ".join(f"{count} x {reason}" for reason, count in self.unrated.most_common(5))
        if unrated == asked:
            raise FifaError(
                f"the endpoint rated none of {asked} prompts: {reasons}",
                where=public_url(self.rater.url),
                do="check the model's name, or choose a model that can answer with JSON",
            )
        if unrated:
            echo(f"{unrated} of {asked} prompts could not be rated: {reasons}")

    async def _ask(self, client: Any, prompt: str) -> Answer | str:
        """The grades of one prompt, or why there are none."""
        openai = require("openai", "api")
        reason = "no answer"
        for attempt in range(self.rater.attempts):
            try:
                reply = await self._send(client, prompt, attempt)
            except openai.APITimeoutError:
                return self._failed("time-out")
            except openai.APIConnectionError:
                return self._failed("no connection")
            except openai.APIStatusError as error:
                return self._refused(error.status_code)
            except (openai.OpenAIError, ValueError, TypeError) as error:
                # A body that is no completion at all.
                reason = f"unreadable reply ({type(error).__name__})"
                self.spent["retries"] += 1
                continue
            answer = parse_answer(reply)
            if isinstance(answer, Answer):
                self.answered += 1
                self.failures = 0
                return answer
            reason = answer
            self.spent["retries"] += 1
        return reason

    async def _send(self, client: Any, prompt: str, attempt: int) -> str | None:
        """The text of one completion."""
        openai = require("openai", "api")
        request = request_body(self.rater, prompt, attempt)
        if not self.structured:
            del request["response_format"]
        self.spent["requests"] += 1
        try:
            raw = await client.chat.completions.with_raw_response.create(**request)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if self.answered or "response_format" not in request:
                raise
            # Perhaps a server without structured output; the rubric asks for JSON in words too.
            del request["response_format"]
            self.spent["requests"] += 1
            raw = await client.chat.completions.with_raw_response.create(**request)
            self.structured = False
        self.spent["retries"] += raw.retries_taken
        self.spent["requests"] += raw.retries_taken
        reply = raw.parse()
        usage = getattr(reply, "usage", None)
        self.spent["tokens_in"] += getattr(usage, "prompt_tokens", 0) or 0
        self.spent["tokens_out"] += getattr(usage, "completion_tokens", 0) or 0
        choices = getattr(reply, "choices", None)
        if not choices:
            raise ValueError("no choices")
        content = choices[0].message.content
        return content if content is None or isinstance(content, str) else str(content)

    def _failed(self, reason: str) -> str:
        """A request failed with all its retries: ``reason``, unless the endpoint seems lost."""
        self.spent["retries"] += self.rater.max_retries
        self.spent["requests"] += self.rater.max_retries
        self.failures += 1
        if self.failures >= (max(DEAD, self.rater.in_flight) if self.answered else DEAD):
            raise FifaError(
                f"the endpoint keeps failing: {reason}, {self.failures} prompts in a row",
                where=public_url(self.rater.url),
                do="mend the server and run again: what was answered is kept",
            ) from None
        return reason

    def _refused(self, status: int) -> str:
        if status in (408, 409, 429) or status >= 500:
            return self._failed(f"HTTP {status}")
        if status not in REFUSALS:
            return f"HTTP {status}"
        raise FifaError(
            f"the endpoint {REFUSALS[status]} (HTTP {status})",
            where=f"{self.rater.model} at {public_url(self.rater.url)}",
            do=f"check {self.rater.key_variable}, the model's name and the URL (it ends in /v1)",
        ) from None

    def _client(self) -> Any:
        openai = require("openai", "api")
        rater = self.rater
        return openai.AsyncOpenAI(
            api_key=endpoint_key(rater),
            base_url=rater.url,
            timeout=rater.timeout,
            max_retries=rater.max_retries,
        )


async def reach(url: str) -> None:
    """Raise `FifaError` where nothing listens at ``url``, before any prompt is spent on it."""
    parts = urlsplit(url)
    if getproxies().get(parts.scheme) and not proxy_bypass(parts.hostname or ""):
        return
    port = parts.port or {"http": 80}.get(parts.scheme, 443)
    reason = ""
    for wait in (0.3, 1.0, 0.0):
        try:
            _, writer = await asyncio.wait_for(asyncio.open_connection(parts.hostname, port), 10)
            writer.close()
            return
        except (OSError, TimeoutError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "time-out"
            await asyncio.sleep(wait)
    raise FifaError(
        f"the endpoint is down or cannot be reached: {reason}",
        where=public_url(url),
        do="start the server or correct the URL and run again: what was answered is kept",
    )


def request_body(rater: EndpointRater, prompt: str, attempt: int = 0) -> dict[str, Any]:
    """The body of a chat completion that asks for ``prompt``'s grades."""
    return {
        "model": rater.model,
        "messages": load_rubric().messages(prompt),
        "response_format": response_format(),
        "temperature": rater.temperature if attempt == 0 else 0.7,
        "max_tokens": LIMIT,
    }


def endpoint_key(rater: EndpointRater) -> str:
    """The key from the environment; servers on this machine need none."""
    key = os.environ.get(rater.key_variable, "")
    if not key and urlsplit(rater.url).hostname in LOOPBACK:
        return "none-needed"
    if not key:
        raise FifaError(
            f"the endpoint needs a key and {rater.key_variable} is not set",
            where=public_url(rater.url),
            do=f"export {rater.key_variable}=...; it is read from nowhere else and kept nowhere",
        )
    return key


def make_endpoint(spec: Spec, folder: Path | None = None, in_flight: int = 16) -> EndpointRater:
    """The rater that ``openai:MODEL@URL`` names.

    The URL is ``OPENAI_BASE_URL`` from the environment, or OpenAI's, where the spec has none.
    """
    url = spec.at or os.environ.get("OPENAI_BASE_URL") or OPENAI
    if not spec.model or not urlsplit(url).hostname:
        raise FifaError(
            f"the rater names no model or no URL: {public_url(spec.text)}",
            do="openai:MODEL@http://HOST:PORT/v1, or openai:MODEL",
        )
    return EndpointRater(model=spec.model, url=url, folder=folder, in_flight=in_flight)


def public_url(url: str) -> str:
    """``url`` without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _run(work: Any) -> Any:
    """Run a coroutine to its end, also where an event loop is running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(asyncio.run(work))
        except BaseException as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]
