"""One client for models behind OpenAI-compatible endpoints: hosted, vLLM, Ollama, llama.cpp.

A rater or a judge derives from `Endpoint` and says how a question becomes a request and how an
answer is read. The client asks many at once, again where that helps, and keeps every answer the
moment it arrives.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sqlite3
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from pydantic import BaseModel, ValidationError

from fifa.config import Compute
from fifa.console import echo, note, progress
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.scoring.offline import RETRY_TEMPERATURE, answer_offline, weights_of
from fifa.scoring.replies import (
    INSIDE,
    NO_REPLY,
    NoAnswerError,
    bounded_client,
    hint_of,
    public_url,
    response_class,
    text_of,
    tokens_of,
    without_secrets,
    words_of,
)
from fifa.scoring.specs import Spec
from fifa.shards.files import digest

ANSWERS = "ratings.sqlite"
OPENAI = "https://api.openai.com/v1"
VLLM = "vllm"  # in place of a URL: vLLM as a library, in this process
LOOPBACK = ("localhost", "127.0.0.1", "::1", "[::1]")
DEAD = 3  # failures in a row, before any answer, after which the endpoint counts as down
HOPELESS = 20  # prompts without an answer, before any answer, after which the model is given up
REFUSALS = {401: "refuses the key", 403: "refuses the key", 404: "does not know the model"}
# What servers say when it is this prompt that they do not take, not every one.
THIS_PROMPT = re.compile(
    r"content.?(filter|policy|management|moderation)|moderation|flagged|safety"
    r"|context.length|too long",
    re.IGNORECASE,
)


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
            try:
                # WAL: a kill loses at most the answer being written, and readers never wait.
                self.base.execute("PRAGMA journal_mode = WAL")
                self.base.execute("PRAGMA synchronous = NORMAL")
                self.base.execute(
                    "CREATE TABLE IF NOT EXISTS rated"
                    " (key TEXT PRIMARY KEY, model TEXT, answer TEXT, digest TEXT) WITHOUT ROWID"
                )
            except BaseException:
                self.close()
                raise

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """The answers known for ``keys``; one that was changed since is not known."""
        query = (
            "SELECT key, answer, digest FROM rated WHERE key IN (SELECT value FROM json_each(?))"
        )
        with self._failing("cannot read the cache of ratings", "delete the file if it is damaged"):
            found = self.base.execute(query, [json.dumps(list(keys))]).fetchall()
        whole = {key: answer for key, answer, known in found if known == digest(key, answer)}
        if damaged := len(found) - len(whole):
            echo(f"{self.path} is damaged: {damaged:,} answers are asked for again")
        return whole

    def put(self, key: str, model: str, answer: str) -> None:
        """Keep an answer."""
        with self._failing("cannot keep a rating", "free space; what was answered before is kept"):
            row = (key, model, answer, digest(key, answer))
            self.base.execute("INSERT OR REPLACE INTO rated VALUES (?, ?, ?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self.base.close()

    @contextmanager
    def _failing(self, what: str, do: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError, UnicodeError) as error:  # also of names in the file
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
    max_tokens
        Tokens that an answer may have, with the thinking before it. An answer that was cut off
        does not count, so this is no part of what names an answer.
    timeout
        Seconds that a whole exchange may take.
    max_retries
        How often a request is sent again after 429, 5xx or a broken connection: the client's own
        exponential back-off, which honours ``Retry-After``.
    attempts
        How often a question is asked until an answer parses.
    temperature
        Until there was an answer that does not parse.
    key_variable
        The environment variable that holds the key; loopback servers need none.
    """

    model: str
    url: str = OPENAI
    folder: Path | None = None
    in_flight: int = Compute.in_flight
    max_tokens: int = Compute.max_tokens
    timeout: float = 600.0
    max_retries: int = 6
    attempts: int = 3
    temperature: float = 0.0
    key_variable: str = "OPENAI_API_KEY"

    answer_type: ClassVar[type[BaseModel]]
    # for messages: what is done, to what, and what then came of it
    words: ClassVar[tuple[str, str, str]] = ("rating", "prompts", "rated")
    shows_images: ClassVar[bool] = False

    @abstractmethod
    def request(self, question: Any) -> dict[str, Any]:
        """The body of the chat completion that asks ``question`` for the first time.

        Called in a thread, so it may wait. Raises `NoAnswerError` where there is nothing to ask.
        """

    @abstractmethod
    def read(self, text: str) -> BaseModel | str:
        """The answer in a completion's text, or why there is none."""

    def read_reply(self, reply: Any) -> BaseModel | str:
        """The answer in a completion (its JSON); raises `NoAnswerError` as `text_of` does."""
        return self.read(text_of(reply, self.secrets()))

    def ask(self, questions: dict[str, Any], before: int = 0) -> dict[str, Any]:
        """Answers of `answer_type` by the questions' keys, without those that were given up.

        Every answer is kept under its key as it arrives. ``before`` is how many other questions
        were answered before: then it is no reason to stop that none of these is.

        Raises
        ------
        FifaError
            Where there is no key, the endpoint is down, refuses the key or model, or no question
            at all was answered.
        """
        with closing(Answers(self.folder)) as answers:
            known: dict[str, Any] = {}
            for key, text in answers.get(list(questions)).items():
                with suppress(ValidationError):  # a damaged answer is asked for again
                    known[key] = self.answer_type.model_validate_json(text)
            missing = {key: asked for key, asked in questions.items() if key not in known}
            if known:
                note(answers_from_cache=len(known))
            if missing:
                talk = Conversation(self, answers, known=len(known) + before)
                with progress(self.what, len(missing)) as advance:
                    if self.is_offline:
                        known |= answer_offline(talk, missing, advance)
                    else:
                        known |= _run(talk.ask_all(missing, advance))
                talk.report(len(missing))
        return known

    @property
    def what(self) -> str:
        """What is done, for progress bars."""
        return f"{' '.join(self.words[:2])} ({self.model})"

    @property
    def is_offline(self) -> bool:
        """Whether the model is loaded into this process."""
        return self.url == VLLM

    @property
    def source(self) -> dict[str, str]:
        """What names the model: its name and URL, or the content of its files."""
        model = weights_of(self.model) if self.is_offline else self.model
        return {"model": model, "url": self.public_url}

    @property
    def public_url(self) -> str:
        """The URL without what may be secret."""
        return public_url(self.url)

    def secrets(self) -> list[str]:
        """What no message may hold, whatever a server says."""
        parts = urlsplit(self.url)
        inside = [value for _, value in parse_qsl(parts.query)]
        return [os.environ.get(self.key_variable, ""), parts.password or "", *inside]

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
class Conversation:
    """What an endpoint was asked, and how that went."""

    endpoint: Endpoint
    answers: Answers
    known: int = 0  # answers from earlier conversations
    answered: int = 0
    failures: int = 0  # in a row
    changes: set[str] = field(default_factory=set)  # to requests, because the server wants them
    unanswered: Counter[str] = field(default_factory=Counter)
    not_asked: Counter[str] = field(default_factory=Counter)
    spent: Counter[str] = field(default_factory=Counter)

    async def ask_all(self, questions: dict[str, Any], advance: Any) -> dict[str, BaseModel]:
        """Ask every question, `Endpoint.in_flight` at a time."""
        endpoint, openai = self.endpoint, require("openai", "api")
        queue = iter(questions.items())
        found: dict[str, BaseModel] = {}

        async def worker(client: Any) -> None:
            for key, question in queue:
                try:
                    request = await asyncio.to_thread(endpoint.request, question)
                except NoAnswerError as error:
                    self.not_asked[str(error)] += 1
                else:
                    answer = await self._ask(client, request)
                    if isinstance(answer, str):
                        self.give_up(answer)
                    else:
                        self.keep(key, answer)
                        found[key] = answer
                advance(1)

        base = openai.DefaultAsyncHttpxClient
        async with openai.AsyncOpenAI(
            api_key=endpoint.api_key(),
            base_url=endpoint.url,
            timeout=None,
            max_retries=endpoint.max_retries,
            http_client=bounded_client(base, endpoint.timeout, self.spent),
            default_headers={"Accept-Encoding": "identity"},
        ) as client:
            await _reach(endpoint.url)
            try:
                async with asyncio.TaskGroup() as workers:
                    for _ in range(min(endpoint.in_flight, len(questions))):
                        workers.create_task(worker(client))
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
        return found

    def keep(self, key: str, answer: BaseModel) -> None:
        """Keep an answer."""
        self.answered += 1
        self.answers.put(key, self.endpoint.model, answer.model_dump_json())

    def report(self, asked: int) -> None:
        """Note what was spent; say what could not be rated, or raise if nothing ever could."""
        unrated, things = sum(self.unanswered.values()), self.endpoint.words[1]
        could = asked - sum(self.not_asked.values())
        retries = max(self.spent["requests"] - could, 0)
        note(**self.spent, retries=retries, unrated=unrated)
        if unrated and unrated == could and not self.known:
            raise self._hopeless(f"none of {could} {things}")
        if self.not_asked:
            echo(f"{asked - could} of {asked} {things} were not asked: {_most(self.not_asked)}")
        if unrated:
            done = self.endpoint.words[2]
            echo(f"{unrated} of {asked} {things} could not be {done}: {_most(self.unanswered)}")

    def _hopeless(self, what: str) -> FifaError:
        who = "the model" if self.endpoint.is_offline else "the endpoint"
        images = "lower --judge-side if images take more tokens than it reads; "
        return FifaError(
            f"{who} {self.endpoint.words[2]} {what}: {_most(self.unanswered)}",
            where=f"{self.endpoint.model} at {self.endpoint.public_url}",
            do="raise --max-tokens if answers are cut off or thinking has no end; "
            f"{images if self.endpoint.shows_images else ''}otherwise check "
            "the model's name, or choose a model that can answer with JSON",
        )

    def give_up(self, reason: str) -> None:
        """Count a prompt without an answer; raise where no prompt seems to get one."""
        self.unanswered[reason] += 1
        count = sum(self.unanswered.values())
        if not (self.answered or self.known) and count >= max(HOPELESS, self.endpoint.in_flight):
            raise self._hopeless(f"none of the first {count} {self.endpoint.words[1]}")

    async def _ask(self, client: Any, request: dict[str, Any]) -> BaseModel | str:
        """The answer to one question, or why there is none."""
        openai = require("openai", "api")
        answer: BaseModel | str = "no answer"
        heard = unreadable = False
        for _ in range(self.endpoint.attempts):
            try:
                reply = await self._send(client, request, heard)
                answer = self.endpoint.read_reply(reply)
                heard, unreadable = True, False
            except NoAnswerError as error:
                answer, unreadable = str(error), error.unreadable
                heard = heard or not unreadable
            except openai.APIStatusError as error:
                if NO_REPLY not in error.response.headers:
                    return self._refused(error)
                answer, unreadable = words_of(error.response.content), True
            except openai.APIConnectionError:
                return self._failed("no connection")
            if not isinstance(answer, str):
                self.failures = 0
                return answer
        return self._failed(str(answer)) if unreadable else answer

    async def _send(self, client: Any, asked: dict[str, Any], heard: bool) -> Any:
        """The JSON of one completion; what the server refuses of a request is changed once."""
        openai = require("openai", "api")
        response = response_class(openai.DefaultAsyncHttpxClient)
        changes = set(self.changes)
        while True:
            again = {"temperature": RETRY_TEMPERATURE} if heard else {}
            request = changed_request({**asked, **again}, changes)
            try:
                # not `chat.completions.create`, which takes milliseconds to look through a request
                raw = await client.post("/chat/completions", body=request, cast_to=response)
                break
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                change = self._change(request, hint_of(error.response.content))
                if not change:
                    raise
                changes.add(change)
        try:
            plain = json.loads(raw.content)
        except (ValueError, RecursionError):
            words = words_of(raw.content, self.endpoint.secrets())
            reason = f"the reply is no JSON: {words}" if words else "the reply is empty"
            raise NoAnswerError(reason, unreadable=True) from None
        self.changes |= changes
        tokens_in, tokens_out = tokens_of(plain)
        self.spent["tokens_in"] += tokens_in
        self.spent["tokens_out"] += tokens_out
        return plain

    def _change(self, request: dict[str, Any], hint: str) -> str:
        """What to change in a request that the server refuses with ``hint``; empty for nothing."""
        if re.search(r"max_(completion_)?tokens|context.length|completion.tokens", hint):
            if "max_tokens" in request and "max_completion_tokens" in hint:
                return "max_completion_tokens"
            if "max_tokens" in request or "max_completion_tokens" in request:
                return "no limit"
        if "temperature" in hint and "temperature" in request:
            return "no temperature"
        if "logprobs" in hint and "logprobs" in request:
            return "no logprobs"
        # Perhaps a server without structured output; the question asks for JSON in words too.
        if not self.answered:
            for name, change in {"response_format": "no format", "logprobs": "no logprobs"}.items():
                if name in request:
                    return change
        return ""

    def _failed(self, reason: str) -> str:
        """``reason``, unless so many prompts failed in a row that the endpoint seems lost."""
        endpoint = self.endpoint
        self.failures += 1
        once = self.answered or self.known
        if self.failures >= (max(DEAD, endpoint.in_flight) if once else DEAD):
            raise FifaError(
                f"the endpoint keeps failing: {reason}, "
                f"{self.failures} {endpoint.words[1]} in a row",
                where=f"{endpoint.model} at {endpoint.public_url}",
                do="mend what is named and run again: the answers so far are kept",
            ) from None
        return reason

    def _refused(self, error: Any) -> str:
        """Why the server has no answer to a question; raises where it has none to any."""
        endpoint, status, headers = self.endpoint, error.status_code, error.response.headers
        at = f"{endpoint.model} at {endpoint.public_url}"
        words = words_of(error.response.content, endpoint.secrets())
        told = f"error {status} inside a reply" if INSIDE in headers else f"HTTP {status}"
        told += f": {words}" if words else ""
        if 300 <= status < 400:
            raise FifaError(
                f"the endpoint sends prompts elsewhere (HTTP {status}), which is refused",
                where=at,
                do="correct the URL; it was led to "
                + without_secrets(_leads(endpoint.url, headers), endpoint.secrets())[:300],
            ) from None
        if status in (400, 403, 413, 422) and THIS_PROMPT.search(hint_of(error.response.content)):
            return told
        if status not in REFUSALS:
            return self._failed(told)
        raise FifaError(
            f"the endpoint {REFUSALS[status]} ({told})",
            where=at,
            do=f"check {endpoint.key_variable}, the model's name and the URL (it ends in /v1)",
        ) from None


def _leads(url: str, headers: Any) -> str:
    """Where a redirect leads, without secrets."""
    try:
        return public_url(urljoin(url, headers.get("location", "")))
    except ValueError:
        return "no URL"


def changed_request(request: dict[str, Any], changes: Collection[str]) -> dict[str, Any]:
    """``request`` as a server wants it.

    ``changes``: ``max_completion_tokens`` in place of ``max_tokens``, ``no limit``,
    ``no temperature``, ``no format``, ``no logprobs``.
    """
    if "max_completion_tokens" in changes:
        request["max_completion_tokens"] = request.pop("max_tokens")
    gone = {
        "no limit": ("max_tokens", "max_completion_tokens"),
        "no temperature": ("temperature",),
        "no format": ("response_format",),
        "no logprobs": ("logprobs", "top_logprobs"),
    }
    left_out = {name for change in changes for name in gone.get(change, ())}
    return {name: value for name, value in request.items() if name not in left_out}


def _most(reasons: Counter[str]) -> str:
    return "; ".join(f"{count} x {why}" for why, count in reasons.most_common(5))


def endpoint_of(spec: Spec) -> tuple[str, str]:
    """The model and the URL that ``openai:MODEL@URL`` or ``vlm:MODEL@URL`` names, or `VLLM`.

    The URL is ``OPENAI_BASE_URL`` from the environment, or OpenAI's, where the spec has none.
    """
    if spec.name == VLLM:
        return spec.model, VLLM
    url = spec.at or os.environ.get("OPENAI_BASE_URL") or OPENAI
    try:
        parts = urlsplit(url)
        good = parts.port != 0 and bool(parts.hostname)
    except ValueError:
        good = False
    if not spec.model or not good:
        role = "rater" if spec.name == "openai" else "judge"
        raise FifaError(  # without the URL, which may hold a password that cannot be told apart
            f"the {role} has no model or no URL: {spec.name}:{spec.model}@...",
            do=f"{spec.name}:MODEL@http://HOST:PORT/v1, or {spec.name}:MODEL",
        )
    return spec.model, url


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
