"""Rating prompts on this machine and through an endpoint, beside the loops people write.

Local: ours reads three grades and the perplexity of every prompt in one batched pass behind a
shared start. The peer is the plain transformers loop with the same model, precision and threads:
one prompt at a time, the chat template around rubric and prompt, `generate` for one digit, three
digits a prompt. The limit is the bare model's forward pass over ready, padded batches of our own
shapes, without the start. Endpoint: ours with 16 requests in flight and a sequential loop with
the same client, against a loopback server that takes 50 ms an answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from common import peak_mb, report
from fifa.models.transformer import length_batches
from fifa.scoring.raters.endpoint import EndpointRater
from fifa.scoring.raters.logits import (
    CUDA_ROWS,
    CUDA_TOKENS,
    ROWS,
    TOKENS,
    load_reader,
    precision,
    smollm_path,
)
from fifa.scoring.rubric import QUALITIES, load_rubric

REAL = Path(__file__).parents[2] / "shared/data/prompts/pickapic.parquet"
CHAT = "<|im_start|>system\n{}<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
SLOW = """
import asyncio, sys
from aiohttp import web

async def answer(request):
    await request.read()
    await asyncio.sleep(0.05)
    message = {"role": "assistant", "content": sys.argv[1]}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return web.json_response({"id": "c", "object": "chat.completion", "created": 0,
        "model": "m", "choices": [choice],
        "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}})

async def main():
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/chat/completions", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    print(site._server.sockets[0].getsockname()[1], flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


def made_prompts(count: int) -> list[str]:
    """Real prompts where they are at hand, else drawn ones of about their lengths."""
    if REAL.exists():
        import pyarrow.parquet as pq

        return random.Random(0).sample(pq.read_table(REAL)["prompt"].to_pylist(), count)
    rng, words = (
        random.Random(0),
        ["a", "red", "fox", "old", "castle", "snow", "oil", "painting", "light", "city"],
    )
    return [
        " ".join(rng.choices(words, k=int(rng.lognormvariate(2.6, 0.7)) + 1)) for _ in range(count)
    ]


def peer(model: Any, tokenizer: Any, prompts: list[str]) -> None:
    """One prompt at a time, the whole chat every time, a digit generated a question."""
    import tokenizers
    import torch

    rubric = load_rubric().completion["start"].removesuffix('"')
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    end = tokenizer.token_to_id("<|im_end|>")
    for prompt in prompts:
        for quality in QUALITIES:
            question = f"Prompt: {prompt}\n\nRate its {quality}. Answer with one digit."
            text = tokenizer.encode(CHAT.format(rubric, question)).ids
            ids = torch.tensor([text], device=model.device)
            with torch.inference_mode():
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=1,
                    do_sample=False,
                    pad_token_id=end,
                )


def limit_batches(reader: Any, prompts: list[str]) -> list[Any]:
    """Ready token batches of the shapes that the reader makes."""
    encoded = reader.tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
    ids = [encoding.ids[:256] for encoding in encoded]
    most = (CUDA_TOKENS, CUDA_ROWS) if reader.device.type == "cuda" else (TOKENS, ROWS)
    batches = length_batches([len(row) + reader.tail for row in ids], *most)
    return [reader._tree([ids[row] for row in batch])[0] for batch in batches]


def local(count: int, peers: int, rounds: int, device: str | None) -> list[tuple[str, float]]:
    """Seconds a prompt: ours, the peer, the limit; and seconds to load."""
    import torch

    prompts = made_prompts(count)
    started = time.perf_counter()
    reader = load_reader(smollm_path(), *precision(device))
    load = time.perf_counter() - started
    batches = limit_batches(reader, prompts)
    times: dict[str, list[float]] = {"ours": [], "peer": [], "limit": []}
    reader.read(prompts[:64])

    def limit() -> None:
        with torch.inference_mode():
            for batch in batches:
                reader.model.base_model(batch, use_cache=False)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    for _ in range(rounds):
        for name, run, size in (
            ("ours", lambda: reader.read(prompts), count),
            ("peer", lambda: peer(reader.model, reader.tokenizer, prompts[:peers]), peers),
            ("limit", limit, count),
        ):
            started = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - started) / size)
    return [*((name, median(seconds)) for name, seconds in times.items()), ("load", load)]


async def sequential(url: str, prompts: list[str]) -> None:
    import openai

    async with openai.AsyncOpenAI(api_key="none", base_url=url) as client:
        for prompt in prompts:
            reply = await client.chat.completions.create(**EndpointRater("m", url).request(prompt))
            json.loads(reply.choices[0].message.content or "")


@contextmanager
def slow_server(answer: dict[str, Any]) -> Iterator[str]:
    """The URL of a server in a process of its own that answers so after 50 ms."""
    command = [sys.executable, "-c", SLOW, json.dumps(answer)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{process.stdout.readline().strip()}/v1"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def endpoint(count: int, rounds: int) -> tuple[float, float]:
    """Seconds for ``count`` prompts: ours and the sequential loop."""
    ours, theirs = [], []
    with slow_server({"clarity": 4, "specificity": 3, "harmlessness": 5, "flags": []}) as url:
        for turn in range(rounds):
            prompts = [f"prompt {turn} {i}" for i in range(count)]
            started = time.perf_counter()
            EndpointRater("m", url).rate(prompts)
            ours.append(time.perf_counter() - started)
            started = time.perf_counter()
            asyncio.run(sequential(url, prompts))
            theirs.append(time.perf_counter() - started)
    return median(ours), median(theirs)


def measured_peak(count: int) -> float:
    """Peak memory of a fresh process that does only our rating, in MB."""
    command = [sys.executable, __file__, "--peak-only", "--prompts", str(count)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.split()[-1])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--peer-prompts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument("--peak-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.peak_only:
        load_reader(smollm_path(), *precision()).read(made_prompts(options.prompts))
        print(peak_mb())
        return
    given = (options.prompts, options.peer_prompts, options.rounds, options.device)
    seconds = dict(local(*given))
    together, one_by_one = endpoint(100, options.rounds)
    report(
        "rate",
        [
            ("local rater", "ms a prompt", "against ours"),
            *(
                (label, f"{1000 * seconds[name]:.1f}", f"{seconds[name] / seconds['ours']:.2f} x")
                for label, name in (
                    ("ours: 3 grades and perplexity", "ours"),
                    ("peer: a generate call a digit", "peer"),
                    ("limit: bare forward, ready batches", "limit"),
                )
            ),
            (
                f"(loading, {precision(options.device)[1]})",
                f"{1000 * seconds['load']:.0f} once",
                "",
            ),
            ("endpoint, 50 ms an answer", "", ""),
            ("ours: 16 in flight", f"{10 * together:.1f}", "1.00 x"),
            ("peer: one after another", f"{10 * one_by_one:.1f}", f"{one_by_one / together:.2f} x"),
        ],
        speedup=seconds["peer"] / seconds["ours"],
        of_limit=seconds["limit"] / seconds["ours"],
        endpoint_speedup=one_by_one / together,
        peak_mb=measured_peak(options.prompts),
    )


if __name__ == "__main__":
    main()
