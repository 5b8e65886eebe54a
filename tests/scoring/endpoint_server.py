"""A chat completion endpoint on loopback, for the tests of raters."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web


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
