"""A chat completion endpoint on loopback, for the tests of raters and of judges."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import exp, log
from typing import Any

import numpy as np
from aiohttp import web
from PIL import Image


def completion(text: str) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "c",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 3, "total_tokens": 13},
    }


def asked(body: dict[str, Any]) -> str:
    """The prompt inside a request."""
    return body["messages"][-1]["content"].removeprefix("<prompt>\n").removesuffix("\n</prompt>")


Handler = Callable[[web.Request, dict[str, Any]], Any]


@contextmanager
def server(handle: Handler) -> Iterator[str]:
    """A chat completion endpoint on loopback; yields its base URL."""
    ready: list[Any] = []
    started = threading.Event()

    async def serve() -> None:
        async def post(request: web.Request) -> web.StreamResponse:
            return await handle(request, await request.json())

        app = web.Application()
        app.router.add_post("/v1/chat/completions", post)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        stop = asyncio.Event()
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        ready.extend([port, asyncio.get_running_loop(), stop])
        started.set()
        await stop.wait()
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert started.wait(10)
    try:
        yield f"http://127.0.0.1:{ready[0]}/v1"
    finally:
        ready[1].call_soon_threadsafe(ready[2].set)
        thread.join(10)


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image.convert("L")).mean())


class VLM:
    """A vision-language model behind a server of some style; it likes bright images.

    Parameters
    ----------
    style
        ``vllm`` and ``llama.cpp`` give log-probabilities and take a schema, ``openai`` is a newer
        model: it refuses max_tokens, temperatures and log-probabilities. ``plain`` knows neither
        schema nor log-probabilities and thinks aloud.
    faults
        The share of requests that fail, each in its own way.
    always_first
        It names the image that it was shown first, whatever it shows.
    wait
        Seconds that an answer takes.
    """

    def __init__(
        self,
        style: str = "vllm",
        *,
        faults: float = 0.0,
        seed: int = 0,
        always_first: bool = False,
        wait: float = 0.0,
    ) -> None:
        self.style, self.faults, self.always_first, self.wait = style, faults, always_first, wait
        self.random = random.Random(seed)
        self.good: Counter[tuple[str, ...]] = Counter()  # by prompt and the images' data
        self.failed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.seen: Counter[tuple[str, int, int]] = Counter()  # format, width and height

    async def __call__(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        for name in self._foreign(body):
            self.refused[name] += 1
            error = {"message": f"Unsupported parameter: '{name}'", "param": name}
            if name == "max_tokens":
                error["message"] += ". Use 'max_completion_tokens' instead."
            if self.style == "plain":
                error = {"message": "bad request"}
            if self.style == "llama.cpp":
                error = {"code": 400, "message": error["message"], "type": "invalid_request_error"}
            return web.json_response({"error": error}, status=400)
        parts = body["messages"][-1]["content"]
        urls = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
        text = "".join(part["text"] for part in parts if part["type"] == "text")
        images = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))) for url in urls]
        for image, url in zip(images, urls, strict=True):
            assert url.startswith(f"data:image/{str(image.format).lower()};base64,")
            self.seen[str(image.format), *image.size] += 1
        await asyncio.sleep(self.wait)
        if self.random.random() < self.faults:
            return await self._fault()
        shown = re.search(r"<prompt>\n(.*)\n</prompt>|Caption: \[(.*)\]|Instruction: (.*)\n", text)
        assert shown is not None
        self.good[next(filter(None, shown.groups())), *urls] += 1
        return web.json_response(self._answer(text, [brightness(image) for image in images]))

    def _foreign(self, body: dict[str, Any]) -> list[str]:
        known = {
            "openai": ("max_tokens", "temperature", "logprobs"),
            "plain": ("response_format", "logprobs"),
            "llama.cpp": (),
        }
        return [name for name in known.get(self.style, ()) if name in body]

    async def _fault(self) -> web.StreamResponse:
        kinds = ["429", "500", "garbage", "half", "none", "refusal", "cut", "thinking", "filter"]
        kind = self.random.choice(kinds)
        self.failed[kind] += 1
        if kind in ("429", "500"):
            headers = {"Retry-After": "0.01", "retry-after-ms": "10"}
            return web.json_response({"error": "busy"}, status=int(kind), headers=headers)
        if kind == "garbage":
            return web.Response(body=b"\xff\x00<html>", content_type="application/json")
        made = completion(
            {"half": '{"alignment": "A", "co', "none": "", "thinking": "<think>so"}.get(kind, "x")
        )
        choice = made["choices"][0]
        if kind == "refusal":
            choice["message"] |= {"content": None, "refusal": "I cannot judge this."}
        if kind in ("cut", "filter"):
            choice["finish_reason"] = {"cut": "length", "filter": "content_filter"}[kind]
        return web.json_response(made)

    def _answer(self, text: str, light: list[float]) -> dict[str, Any]:
        ahead = 3.0 if self.always_first else (light[0] - light[-1]) / 20
        p = 1 / (1 + exp(-ahead))  # of the first image
        grade = 1 + 4 * light[0] / 255
        if "Alignment Score" in text:
            titles = ("Alignment", "Coherence", "Style")
            pair = "\n\n".join(f"{t} Score:\n Image 1: {p!r}\n Image 2: {1 - p!r}" for t in titles)
            alone = "\n".join(f"{t} Score (1-5): {grade!r}" for t in titles)
            said = pair if len(light) == 2 else alone
        elif "Detailed Judgement" in text:
            said = "# User Request Analysis\n...\n# Detailed Judgement\n"
            for i, t in enumerate(("Text Faithfulness", "Physical and Visual Quality"), 1):
                scores = [1 + 3 * (p if i else 1), 1 + 3 * (1 - p)]
                lines = [f"## Score {s}: {x!r}" for s, x in zip("AB", scores, strict=True)]
                if len(light) == 1:
                    lines = [f"## Score: {1 + 3 * light[0] / 255!r}"]
                said += f"{i}. {t}:\n## Justification: Score 9 of 10\n" + "\n".join(lines) + "\n"
            said += "3. Text Rendering:\n## Score A: N/A\n## Score B: N/A\n## Score: N/A\n"
            said += "# Summary: Score A: 1"
        elif len(light) == 2:
            side = "tie" if ahead == 0 else "AB"[ahead < 0]
            aspects = dict.fromkeys(("alignment", "coherence", "taste"), side)
            said = json.dumps({**aspects, "safety": "tie", "winner": side})
        else:
            grades = dict.fromkeys(("alignment", "coherence", "taste"), round(grade))
            said = json.dumps({**grades, "safety": 5})
        if self.style == "plain":
            said = f'<think>{{"winner": "B"}}? no.</think>Sure:\n```json\n{said}\n```'
        made = completion(said)
        made["usage"] = {"prompt_tokens": 400 * len(light), "completion_tokens": 40}
        if self.style in ("vllm", "llama.cpp") and said.startswith("{"):
            made["choices"][0]["logprobs"] = {"content": self._tokens(said, p, grade)}
        return made

    def _tokens(self, said: str, p: float, grade: float) -> list[dict[str, Any]]:
        """Tokens of words and marks; a value's alternatives have their probabilities."""
        found, name = [], ""
        for token in re.findall(r"\w+|\W+", said):
            top = {token: 1.0, "{": 1e-9}
            if name == "winner" and token in ("A", "B", "tie"):
                top = {"A": 0.9 * p, "B": 0.9 * (1 - p), "tie": 0.1}
            elif token.isdigit() and name != "safety":
                low = min(int(grade), 4)  # the expected grade is the grade itself
                top = {str(low): low + 1 - grade, str(low + 1): grade - low}
            name = token if len(token) > 4 and token.isalpha() else name
            ranked = sorted(top.items(), key=lambda one: -one[1])
            alternatives = [{"token": t, "logprob": log(max(q, 1e-12))} for t, q in ranked]
            found.append({**alternatives[0], "token": token, "top_logprobs": alternatives})
        return found
