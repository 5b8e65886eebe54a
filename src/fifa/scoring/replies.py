"""What a server sends back: limited in size and time, and told apart.

`bounded_client` is openai's HTTP client with a limit on what a reply may take. `text_of` takes the
answer out of a completion, `without_thinking` the thinking out of the answer, and `words_of` says
what a server says of an error.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from pydantic import ValidationError

MAX_REPLY = 2 << 20  # bytes; an answer with 32,000 tokens of thinking takes some 200,000
WORDS = 300  # characters of a server's own words that are quoted
UNUSABLE = 599  # our status for a reply that is no use and that the client must not ask for again
NO_REPLY = "x-no-reply"  # our header on such a reply: a server may answer with any status
INSIDE = "x-error-inside"  # our header on an error that came with the status 200
TOKENS = ("prompt_tokens", "completion_tokens")
KEPT = ("retry-after", "retry-after-ms", "location")
LAST = 100_000  # characters at the end of an answer in which its JSON is looked for
BRACES = 1_000  # of them, the last places where an object may begin

T = TypeVar("T")

_NAMES = r"(?:seed:)?(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|reflection)"
# Where thinking begins and ends: tags, Mistral's brackets, Kimi's arrows, the channels of gpt-oss.
_THINKING = re.compile(
    rf"(?P<start><{_NAMES}(?:\s[^<>]{{0,100}})?>|\[THINK\]|◁think▷|<\|begin_of_thought\|>"
    r"|<\|channel\|>\s{0,9}(?:analysis|commentary)\b)"
    rf"|(?P<end></\s?{_NAMES}\s?>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>"
    r"|<\|channel\|>\s{0,9}final\b\s{0,9}(?:<\|constrain\|>)?[^<]{0,100}<\|message\|>)",
    re.IGNORECASE,
)
_CUT = ("length", "max_tokens", "model_length")
_FILTERED = ("content_filter", "safety", "prohibited_content", "recitation", "blocklist")


class NoAnswerError(Exception):
    """Why a completion holds no answer.

    Parameters
    ----------
    reason
        For people.
    unreadable
        The reply is no completion at all: the server is to blame, not the model.
    """

    def __init__(self, reason: str, unreadable: bool = False) -> None:
        super().__init__(reason)
        self.unreadable = unreadable


def bounded_client(base: Any, seconds: float, spent: Counter[str]) -> Any:
    """An HTTP client for `openai.AsyncOpenAI` whose replies have limits.

    Every exchange ends after ``seconds``, every body at `MAX_REPLY` bytes; compressed bodies are
    not read and redirects not followed. An error inside a reply with the status 200 gets its own
    status, so that openai's client backs off as it does for every other.

    Parameters
    ----------
    base
        ``openai.DefaultAsyncHttpxClient``.
    seconds
        For an exchange, from the connection to the last byte.
    spent
        Its ``requests`` are counted here.
    """

    class Bounded(base):  # type: ignore[misc]
        async def send(self, request: Any, **options: Any) -> Any:
            spent["requests"] += 1
            made: Any = None
            why = ""
            try:
                async with asyncio.timeout(seconds):
                    reply = await super().send(request, **(options | {"stream": True}))
                    made = type(reply)
                    try:
                        body, why = await _body(reply)
                    finally:
                        await reply.aclose()
            except TimeoutError:
                why = f"no whole reply in {seconds:g} seconds"
            if why:
                made = made or response_class(base)
                headers = {"x-should-retry": "false", NO_REPLY: "yes"}
                return made(UNUSABLE, headers=headers, content=why.encode(), request=request)
            kept = {name: reply.headers.get(name, "") for name in KEPT}
            headers = {name: value for name, value in kept.items() if _is_usable(name, value)}
            status, error = reply.status_code, None
            if status == 200 and (error := _error_inside(_json(body))) is not None:
                status, headers[INSIDE] = _status(error), "yes"
            return made(status, headers=headers, content=body, request=request)

    return Bounded(follow_redirects=False, timeout=None)


def _is_usable(name: str, value: str) -> bool:
    """Whether a header says something; openai's client before 3 breaks off at a wait that is none.

    A wait is seconds, or a date (RFC 9110, 10.2.3).
    """
    if not value.isascii() or name == "location":
        return bool(value) and value.isascii()
    try:
        float(value)
    except ValueError:
        try:
            parsedate_to_datetime(value)
        except (ValueError, TypeError, OverflowError):
            return False
    return True


def response_class(base: Any) -> Any:
    """The Response class of whichever httpx openai was built on."""
    from importlib import import_module

    name = next(one.__module__ for one in base.__mro__ if one.__module__.startswith("httpx"))
    return import_module(name.partition(".")[0]).Response


async def _body(reply: Any) -> tuple[bytes, str]:
    """A reply's body, and why it is no use."""
    if reply.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        return b"", "the reply is compressed, which it was not asked to be"
    body = bytearray()
    async for piece in reply.aiter_raw():
        body += piece
        if len(body) > MAX_REPLY:
            return b"", f"the reply has more than {MAX_REPLY:,} bytes"
    return bytes(body), ""


def _json(body: bytes) -> Any:
    """The JSON in a body; None where there is none."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def _error_inside(plain: Any) -> Any:
    """The error that a body holds, whatever its status; None where there is none."""
    if not isinstance(plain, dict):
        return None
    if plain.get("object") == "error":
        return plain
    choices = plain.get("choices")
    if choices is None and not plain.get("error") and _number(plain.get("code")):
        return plain
    if not plain.get("error") and isinstance(choices, list) and choices:
        return (isinstance(choices[0], dict) and choices[0].get("error")) or None
    return plain.get("error") or None


def _number(code: Any) -> int:
    """The HTTP status of an error that a code is, as a number or in digits; 0 for none."""
    digits = str(code)[:9] if isinstance(code, int | str) else ""
    number = int(digits) if digits.isascii() and digits.isdigit() else 0
    return number if 400 <= number < UNUSABLE else 0


def _status(error: Any) -> int:
    """The HTTP status that an error inside a body stands for."""
    code = error.get("code") if isinstance(error, dict) else None
    kind = error.get("type") if isinstance(error, dict) else None
    if number := _number(code):
        return number
    return 429 if re.search("rate_?limit|overloaded", f"{code} {kind}", re.IGNORECASE) else 400


def words_of(body: bytes, secrets: Iterable[str] = ()) -> str:
    """A server's own words in the body of an error: one short line without ``secrets``."""
    plain = _json(body)
    if plain is None:
        said: Any = without_secrets(body.decode("utf-8", "replace"), secrets)[: 8 * WORDS]
        if "<" in said:  # a page
            said = re.sub(r"<style.*?(</style>|$)|<[^<>]*>", " ", said, flags=re.DOTALL)
    else:
        said = _message(_error_inside(plain) or plain)
    return _line(said, secrets)


def without_secrets(said: str, secrets: Iterable[str]) -> str:
    """Text without ``secrets``; before it is cut, so that no part of one stays."""
    for secret in filter(None, secrets):
        said = said.replace(secret, "[secret]")
    return said


def _line(said: str, secrets: Iterable[str], most: int = WORDS) -> str:
    """Text from outside as one short line without ``secrets`` and control characters."""
    said = without_secrets(said, secrets)[: 8 * WORDS]
    line = " ".join("".join(c if c.isprintable() else " " for c in said).split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _message(plain: Any) -> str:
    """The message in the errors of OpenAI, vLLM, Ollama, FastAPI and OpenRouter."""
    for _ in range(9):
        if isinstance(plain, list) and plain:
            plain = plain[0]
        elif isinstance(plain, dict) and isinstance(plain.get("loc"), list):  # FastAPI's
            place = ".".join(str(part) for part in plain["loc"][:9])
            return f"{place}: {plain.get('msg')}"
        elif isinstance(plain, dict):
            found = (plain.get(name) for name in ("message", "msg", "detail", "error", "errors"))
            plain = next((one for one in found if one), "")
        else:
            break
    return plain if isinstance(plain, str) else ""


def hint_of(body: bytes) -> str:
    """What an error says of its cause: the words, the parameter and the code."""
    plain = _json(body)
    error = _error_inside(plain) or plain
    named = [error.get("param"), error.get("code")] if isinstance(error, dict) else []
    return " ".join([words_of(body), *(str(one)[:WORDS] for one in named if one)])


def tokens_of(plain: Any) -> tuple[int, int]:
    """The tokens read and written that a completion reports; 0 where it does not say."""
    usage = plain.get("usage") if isinstance(plain, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in TOKENS]
    known = [one if isinstance(one, int) and 0 <= one < 1 << 40 else 0 for one in counts]
    return known[0], known[1]


def text_of(plain: Any, secrets: Iterable[str] = ()) -> str:
    """The text that answers in a chat completion (its JSON).

    Only text counts: thinking parts, ``reasoning_content``, refusals and calls of tools do not,
    nor does an answer that was cut off.

    Raises `NoAnswerError`, whose words are without ``secrets``.
    """
    choices = plain.get("choices") if isinstance(plain, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(choice, dict) or not isinstance(message, dict):
        words = _line(_message(plain), secrets)
        raise NoAnswerError("no completion" + (f": {words}" if words else ""), unreadable=True)
    if isinstance(refusal := message.get("refusal"), str) and refusal.strip():
        raise NoAnswerError(f"the model refuses: {_line(refusal, secrets, 80)}")
    finish = _line(str(choice.get("finish_reason") or ""), secrets, 40)
    if finish.lower() in _CUT:
        raise NoAnswerError("cut off at max_tokens")
    if finish.lower() in _FILTERED:
        raise NoAnswerError("stopped by a content filter")
    content = message.get("content")
    text = _joined(content)
    if text.strip():
        return text
    if message.get("tool_calls") or message.get("function_call"):
        raise NoAnswerError("a call of a tool instead of text")
    if _thoughts(content) or message.get("reasoning_content") or message.get("reasoning"):
        raise NoAnswerError("reasoning without an answer")
    if content and not text:
        raise NoAnswerError("content that is no text")
    raise NoAnswerError("empty answer" + (f" ({finish})" if finish not in ("", "stop") else ""))


def _joined(content: Any) -> str:
    """The text of a message's content; of a list its ``text`` parts only."""
    if not isinstance(content, list):
        return content if isinstance(content, str) else ""
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(part["text"] for part in parts if isinstance(part.get("text"), str))


def _thoughts(content: Any) -> bool:
    """True where a content has parts of thinking."""
    parts = content if isinstance(content, list) else []
    kinds = {str(part.get("type")) for part in parts if isinstance(part, dict)}
    return bool(kinds & {"thinking", "reasoning", "redacted_thinking"})


def without_thinking(text: str) -> str | None:
    """An answer without what the model thought before it; None where the thinking has no end.

    Thinking that ends but never began has begun in the server's template.
    """
    kept, start, thinking = [], 0, False
    for mark in _THINKING.finditer(text):
        if mark["start"] and not thinking:
            kept.append(text[start : mark.start()])
            thinking = True
        elif mark["end"]:
            if not thinking:
                kept.clear()
            start, thinking = mark.end(), False
    return None if thinking else "".join([*kept, text[start:]])


def final_text(text: str) -> str:
    """What an answer says after its thinking; raises `NoAnswerError` where that is nothing."""
    if not text.strip():
        raise NoAnswerError("empty answer")
    final = without_thinking(text)
    if final is None:
        raise NoAnswerError("the thinking has no end")
    if not final.strip():
        raise NoAnswerError("thinking without an answer")
    return final


def last_object(
    text: str, validate: Callable[[dict[str, Any]], T], names: Collection[str]
) -> T | str:
    """What ``validate`` makes of the last JSON object it takes, or why there is none.

    Thinking is dropped; the object may stand within prose or a code fence.

    Parameters
    ----------
    text
        A model's answer.
    validate
        From an object to an answer; raises `pydantic.ValidationError`.
    names
        Keys, in lower case, one of which an object has that was meant as the answer.
    """
    try:
        final = final_text(text)[-LAST:]
    except NoAnswerError as error:
        return str(error)
    decoder, end = json.JSONDecoder(), 0
    found: T | str = "no JSON object"
    for brace in [place.start() for place in re.finditer(r"\{", final)][-BRACES:]:
        if brace < end:  # within the object before
            continue
        try:
            plain, after = decoder.raw_decode(final, brace)
        except (ValueError, RecursionError):
            continue
        try:
            found, end = validate(plain), after
        except ValidationError as error:
            wrong = ", ".join(sorted({str(e["loc"][0]) for e in error.errors()}))
            meant = set(names) & {str(key).strip().lower() for key in plain}
            if found == "no JSON object" or (isinstance(found, str) and meant):
                found = f"wrong JSON: {wrong}"
    return found


def public_url(url: str) -> str:
    """``url`` without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
