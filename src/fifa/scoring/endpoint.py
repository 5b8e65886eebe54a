"""One client for models behind OpenAI-compatible endpoints: hosted, vLLM, Ollama, llama.cpp.

A rater or a judge derives from `Endpoint` and says how a question becomes a request and how an
answer is read. The client asks many at once, again where that helps, and keeps every answer the
moment it arrives.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit, urlunsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import BaseModel

from fifa.config import Compute
from fifa.console import echo, note, progress
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.scoring.specs import Spec

ANSWERS = "ratings.sqlite"
OPENAI = "https://api.openai.com/v1"
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
DEAD = 3  # failures in a row, before any answer, after which the endpoint counts as down
REFUSALS = {401: "refuses the key", 403: "refuses the key", 404: "does not know the model"}
RETRY_TEMPERATURE = 0.7  # of later attempts, which need some chance of a better answer


class Answers:
    """What was asked and answered, as JSON.

    Parameters
    ----------
    folder
        Where ``ratings.sqlite`` is kept; None keeps answers in memory.

    Raises `FifaError`, here and in `put`, where the file is damaged or there is no room for it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / ANSWERS if folder else None
        with self._failing("cannot open the cache of ratings", "delete the file if it is damaged"):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            # One thread at a time uses it, but not always the one that opened it (a notebook).
            self.base = sqlite3.connect(
                self.path or ":memory:", isolation_level=None, timeout=60, check_same_thread=False
            )
            # WAL: a kill loses at most the answer being written, and readers never wait.
            self.base.execute("PRAGMA journal_mode = WAL")
            self.base.execute("PRAGMA synchronous = NORMAL")
            self.base.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, model TEXT, answer TEXT) WITHOUT ROWID"
            )

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """The answers known for ``keys``."""
        query = "SELECT key, answer FROM answers WHERE key IN (SELECT value FROM json_each(?))"
        return dict(self.base.execute(query, [json.dumps(list(keys))]).fetchall())

    def put(self, key: str, model: str, answer: str) -> None:
        """Keep an answer."""
        with self._failing("cannot keep a rating", "free space; what was answered before is kept"):
            row = (key, model, answer)
            self.base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self.base.close()

    @contextmanager
    def _failing(self, what: str, do: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise FifaError(f"{what}: {error}", where=str(self.path), do=do) from error


@dataclass(frozen=True)
class Endpoint(ABC):
    """A model behind an OpenAI-compatible endpoint, and how it is asked.

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
        How often a question is asked until an answer parses.
    temperature
        Of the first attempt.
    key_variable
        The environment variable that holds the key; loopback servers need none.
    """

    model: str
    url: str = OPENAI
    folder: Path | None = None
    in_flight: int = Compute.in_flight
    timeout: float = 120.0
    max_retries: int = 6
    attempts: int = 3
    temperature: float = 0.0
    key_variable: str = "OPENAI_API_KEY"

    answer_type: ClassVar[type[BaseModel]]

    @abstractmethod
    def request(self, question: Any) -> dict[str, Any]:
        """The body of the chat completion that asks ``question`` for the first time."""

    @abstractmethod
    def read(self, text: str | None) -> BaseModel | str:
        """The answer in a completion's text, or why there is none."""

    def ask(self, questions: dict[str, Any]) -> dict[str, Any]:
        """Answers of `answer_type` by the questions' keys, without those that were given up.

        Every answer is kept under its key as it arrives.

        Raises
        ------
        FifaError
            Where there is no key, the endpoint is down, refuses the key or model, or no question
            at all was answered.
        """
        with closing(Answers(self.folder)) as answers:
            known: dict[str, Any] = {
                key: self.answer_type.model_validate_json(text)
                for key, text in answers.get(list(questions)).items()
            }
            missing = {key: asked for key, asked in questions.items() if key not in known}
            if known:
                note(answers_from_cache=len(known))
            if missing:
                talk = _Conversation(self, answers)
                with progress(f"rating prompts ({self.model})", len(missing)) as advance:
                    known |= _run(talk.ask_all(missing, advance))
                talk.report(len(missing))
        return known

    @property
    def public_url(self) -> str:
        """The URL without what may be secret."""
        return public_url(self.url)

    def api_key(self) -> str:
        """The key from the environment; servers on this machine need none."""
        key = os.environ.get(self.key_variable, "")
        if not key and urlsplit(self.url).hostname in LOOPBACK:
            return "none-needed"
        if not key:
            raise FifaError(
                f"the endpoint needs a key and {self.key_variable} is not set",
                where=self.public_url,
                do=f"export {self.key_variable}=...; it is read only from there and never stored",
            )
        return key


@dataclass
class _Conversation:
    """What an endpoint was asked, and how that went."""

    endpoint: Endpoint
    answers: Answers
    structured: bool = True
    answered: int = 0
    failures: int = 0  # in a row
    unanswered: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)

    async def ask_all(self, questions: dict[str, Any], advance: Any) -> dict[str, BaseModel]:
        """Ask every question, `Endpoint.in_flight` at a time."""
        endpoint = self.endpoint
        queue = iter(questions.items())
        found: dict[str, BaseModel] = {}

        async def worker(client: Any) -> None:
            for key, question in queue:
                answer = await self._ask(client, question)
                if isinstance(answer, str):
                    self.unanswered[answer] += 1
                else:
                    self.answers.put(key, endpoint.model, answer.model_dump_json())
                    found[key] = answer
                advance(1)

        async with require("openai", "api").AsyncOpenAI(
            api_key=endpoint.api_key(),
            base_url=endpoint.url,
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        ) as client:
            await _reach(endpoint.url)
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(endpoint.in_flight, len(questions))):
                        workers.create_task(worker(client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return found

    def report(self, asked: int) -> None:
        """Note what was spent; say what could not be rated, or raise if nothing could."""
        unrated = sum(self.unanswered.values())
        note(**self.spent, unrated=unrated)
        reasons = "; ".join(f"{count} x {why}" for why, count in self.unanswered.most_common(5))
        if unrated == asked:
            raise FifaError(
                f"the endpoint rated none of {asked} prompts: {reasons}",
                where=self.endpoint.public_url,
                do="check the model's name, or choose a model that can answer with JSON",
            )
        if unrated:
            echo(f"{unrated} of {asked} prompts could not be rated: {reasons}")

    async def _ask(self, client: Any, question: Any) -> BaseModel | str:
        """The answer to one question, or why there is none."""
        openai = require("openai", "api")
        reason = "no answer"
        for attempt in range(self.endpoint.attempts):
            try:
                reply = await self._send(client, question, attempt)
            except openai.APITimeoutError:
                return self._failed("time-out")
            except openai.APIConnectionError:
                return self._failed("no connection")
            except openai.APIStatusError as error:
                return self._refused(error.status_code)
            except (openai.OpenAIError, ValueError, TypeError) as error:
                # A body that is no completion at all.
                reason = f"unreadable reply ({type(error).__name__})"
            else:
                answer = self.endpoint.read(reply)
                if not isinstance(answer, str):
                    self.answered += 1
                    self.failures = 0
                    return answer
                reason = answer
            self.spent["retries"] += 1
        return reason

    async def _send(self, client: Any, question: Any, attempt: int) -> str | None:
        """The text of one completion."""
        openai = require("openai", "api")
        request = self.endpoint.request(question)
        if attempt:
            request["temperature"] = RETRY_TEMPERATURE
        if not self.structured:
            del request["response_format"]
        create = client.chat.completions.with_raw_response.create
        self.spent["requests"] += 1
        try:
            raw = await create(**request)
        except (openai.BadRequestError, openai.UnprocessableEntityError):
            if self.answered or "response_format" not in request:
                raise
            # Perhaps a server without structured output; the rubric asks for JSON in words too.
            del request["response_format"]
            self.spent["requests"] += 1
            raw = await create(**request)
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
        endpoint = self.endpoint
        self.spent["retries"] += endpoint.max_retries
        self.spent["requests"] += endpoint.max_retries
        self.failures += 1
        if self.failures >= (max(DEAD, endpoint.in_flight) if self.answered else DEAD):
            raise FifaError(
                f"the endpoint keeps failing: {reason}, {self.failures} prompts in a row",
                where=endpoint.public_url,
                do="repair the server and run again: the answers so far are kept",
            ) from None
        return reason

    def _refused(self, status: int) -> str:
        if status in (408, 409, 429) or status >= 500:
            return self._failed(f"HTTP {status}")
        if status not in REFUSALS:
            return f"HTTP {status}"
        endpoint = self.endpoint
        raise FifaError(
            f"the endpoint {REFUSALS[status]} (HTTP {status})",
            where=f"{endpoint.model} at {endpoint.public_url}",
            do=f"check {endpoint.key_variable}, the model's name and the URL (it ends in /v1)",
        ) from None


def endpoint_of(spec: Spec) -> tuple[str, str]:
    """The model and the URL that ``openai:MODEL@URL`` names.

    The URL is ``OPENAI_BASE_URL`` from the environment, or OpenAI's, where the spec has none.
    """
    url = spec.at or os.environ.get("OPENAI_BASE_URL") or OPENAI
    if not spec.model or not urlsplit(url).hostname:
        raise FifaError(
            f"the rater has no model or no URL: {public_url(spec.text)}",
            do="openai:MODEL@http://HOST:PORT/v1, or openai:MODEL",
        )
    return spec.model, url


def public_url(url: str) -> str:
    """``url`` without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


async def _reach(url: str) -> None:
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
        do="start the server or correct the URL and run again: the answers so far are kept",
    )


def _run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end, also where an event loop is running (a notebook)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
