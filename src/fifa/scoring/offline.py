"""vLLM as a library: an `Endpoint`'s questions answered in this process, many at a time.

``vllm:MODEL`` names it, for raters and judges alike. Requests are those that the same model would
get behind an endpoint, and replies are read by the same code.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from fifa.console import quiet
from fifa.errors import FifaError
from fifa.models.hub import PART_FILES, model_digest, model_folder
from fifa.models.optional import require
from fifa.models.runtime import SHARE, best_device, free_bytes, release_memory
from fifa.scoring.replies import NoAnswerError, tokens_of

if TYPE_CHECKING:
    from fifa.scoring.endpoint import Conversation

# Questions that the engine is given at once; answers are kept after each lot. It makes the images
# of a whole lot ready before it begins: 3 to 14 MB of memory each, of 768 x 768 pixels.
TOGETHER, WITH_IMAGES = 1024, 128
CPU_CACHE = 4 * 2**30  # bytes of keys and values without a GPU
INSTALL = "pip install vllm; or serve the model and name openai:MODEL@URL or vlm:MODEL@URL"
RETRY_TEMPERATURE = 0.7  # after an answer that does not parse, for some chance of a better one


@lru_cache(maxsize=1)
def weights_of(model: str) -> str:
    """Names the weights of a folder or hub id, by the content of its files."""
    return model_digest(_folder(model), PART_FILES)


def _folder(model: str) -> Path:
    """The model's folder, with the template of a chat, which may be a file of its own."""
    return model_folder(model, [f"*{suffix}" for suffix in PART_FILES])


def answer_offline(
    talk: Conversation, questions: dict[str, Any], advance: Any
) -> dict[str, BaseModel]:
    """Answer ``questions`` (by their keys), those that do not parse `Endpoint.attempts` times.

    Every answer is kept in ``talk.answers``. Raises `FifaError` where the model cannot be loaded,
    and as `Conversation.give_up` does.
    """
    endpoint, found, items = talk.endpoint, dict[str, BaseModel](), list(questions.items())
    lot = WITH_IMAGES if endpoint.shows_images else TOGETHER
    for start in range(0, len(items), lot):
        part = items[start : start + lot]
        left: dict[str, dict[str, Any]] = {}
        for key, question in part:
            try:
                left[key] = endpoint.request(question)
            except NoAnswerError as error:
                talk.not_asked[str(error)] += 1
        why: dict[str, str] = {}
        for attempt in range(endpoint.attempts):
            asked, left = left, {}
            replies = _chat(endpoint.model, list(asked.values()), attempt)
            for (key, request), reply in zip(asked.items(), replies, strict=True):
                tokens_in, tokens_out = tokens_of(reply)
                talk.spent.update(requests=1, tokens_in=tokens_in, tokens_out=tokens_out)
                try:
                    answer = endpoint.read_reply(reply)
                except NoAnswerError as error:
                    answer = str(error)
                if "error" in reply:  # it would be refused again
                    talk.give_up(str(answer))
                elif isinstance(answer, str):
                    left[key], why[key] = {**request, "temperature": RETRY_TEMPERATURE}, answer
                else:
                    talk.keep(key, answer)
                    found[key] = answer
        for key in left:
            talk.give_up(why[key])
        advance(len(part))
    return found


def _chat(model: str, requests: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """A completion (as an endpoint's JSON) of each of some chat requests."""
    if not requests:
        return []
    engine, parameters = _engine(model), require("vllm.sampling_params")

    def sampling(request: dict[str, Any]) -> Any:
        schema = request.get("response_format", {}).get("json_schema", {}).get("schema")
        return parameters.SamplingParams(
            temperature=request["temperature"],
            max_tokens=request["max_tokens"],
            seed=seed,
            logprobs=request.get("top_logprobs"),
            structured_outputs=parameters.StructuredOutputsParams(json=schema) if schema else None,
        )

    messages, how = [r["messages"] for r in requests], [sampling(r) for r in requests]
    try:
        with quiet(require("transformers")):
            outputs = engine.chat(messages, how, use_tqdm=False)
    except Exception as error:
        if not _is_refusal(error):
            raise
        if len(requests) == 1:
            return [{"error": {"message": str(error)}}]
        half = len(requests) // 2
        return [r for part in (requests[:half], requests[half:]) for r in _chat(model, part, seed)]
    return [_completion(output) for output in outputs]


def _is_refusal(error: Exception) -> bool:
    """Whether one of the requests is at fault: more tokens than the model reads, for example."""
    own = "VLLMClientError"  # 0.32 has it, and it is no ValueError
    return isinstance(error, ValueError) or own in (kind.__name__ for kind in type(error).__mro__)


def forget_engine() -> None:
    """Let the engine go, if there is one, and with it its part of the device's memory.

    Whoever asks next loads one again.
    """
    if _engine.cache_info().currsize:
        _engine.cache_clear()
        release_memory()


@lru_cache(maxsize=1)
def _engine(model: str) -> Any:
    """The model, loaded once until `forget_engine`."""
    forget_engine()  # of another model, which has most of the memory
    for name, value in {
        # in this process: nothing outlives it, and it may be a daemon, which has no children
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
    folder = _folder(model)
    vllm = require("vllm", what="vllm:MODEL", do=INSTALL)
    try:
        with quiet(require("transformers")):
            return vllm.LLM(
                str(folder),
                seed=0,
                max_model_len=-1,  # the model's own, or as many tokens as there is memory for
                limit_mm_per_prompt={"video": 0},  # or it keeps memory for the longest one
                # between the values of an object small models may write white space without end
                structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": True},
                use_tqdm_on_load=False,
                **_memory(),
            )
    except Exception as error:  # vllm's, torch's and the model's own
        raise FifaError(
            f"vLLM cannot load the model: {str(error).strip()[:300]}",
            where=model,
            do="if memory is short, rate in a command of its own; otherwise try "
            f"`vllm serve {model}`, which says more",
        ) from error


def _memory() -> dict[str, Any]:
    """What the engine takes of a device's memory: a share of what is free, as others may be there.

    Without CUDA the memory is everybody's, and the engine takes what it is given at once: there
    the cache of keys and values has a size of its own, or ``VLLM_CPU_KVCACHE_SPACE`` (GiB).
    """
    torch = require("torch")
    release_memory()  # what torch keeps of scorers before it is free to this process, not to vLLM
    place = torch.device(best_device())
    free = free_bytes(place) or 0
    if place.type == "cuda":
        return {"gpu_memory_utilization": SHARE * free / int(torch.cuda.mem_get_info(place)[1])}
    return {"kv_cache_memory_bytes": min(CPU_CACHE, free // 4)}


def _completion(output: Any) -> dict[str, Any]:
    """vLLM's output of a request, as an OpenAI-compatible endpoint would send it."""
    (best,) = output.outputs
    choice: dict[str, Any] = {
        "message": {"content": best.text},
        "finish_reason": best.finish_reason,
    }
    if best.logprobs:
        choice["logprobs"] = {
            "content": [_token(*one) for one in zip(best.token_ids, best.logprobs, strict=True)]
        }
    used = {"prompt_tokens": len(output.prompt_token_ids), "completion_tokens": len(best.token_ids)}
    return {"choices": [choice], "usage": used}


def _token(number: int, likely: dict[int, Any]) -> dict[str, Any]:
    top = [{"token": one.decoded_token, "logprob": one.logprob} for one in likely.values()]
    return {"token": likely[number].decoded_token, "top_logprobs": top}
