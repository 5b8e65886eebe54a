"""Batch files: written for the Batch API and `vllm run-batch`, read into the same cache."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter

from fifa.data.table import PAIRS, PROMPTS, Pairs
from fifa.errors import FifaError
from fifa.scoring.quality import quality_scores
from fifa.scoring.raters.endpoint import read_batch, write_batch

SPEC = "openai:gpt-x@http://127.0.0.1:9/v1"  # nothing listens there: all comes from the files
GOOD = {"clarity": 5, "specificity": 2, "harmlessness": 5, "flags": []}


def pairs_of(*prompts: str) -> Pairs:
    ids = [f"p{i}" for i in range(len(prompts))]
    return Pairs(PAIRS.empty_table(), pa.table([ids, list(prompts)], schema=PROMPTS))


def result(request: dict[str, object], text: str) -> str:
    body = {
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 2},
    }
    response = {"status_code": 200, "request_id": "r", "body": body}
    line = {"id": "b", "custom_id": request["custom_id"], "response": response, "error": None}
    return json.dumps(line) + "\n"


def requests_in(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_batch_goes_out_and_comes_back(tmp_path: Path) -> None:
    pairs, out, back = pairs_of("a", "b — ü", "c"), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    assert write_batch(pairs, SPEC, out) == 3
    requests = requests_in(out)
    back.write_text("".join(result(r, json.dumps(GOOD)) for r in reversed(requests)))
    got = read_batch(pairs, SPEC, back, folder=tmp_path / "scores")
    assert (got.rated, got.missing, got.tokens_in, got.tokens_out) == (3, 0, 21, 6)
    table = quality_scores(pairs, SPEC, folder=tmp_path / "scores")
    assert table["rating"].to_pylist() == [4.0, 4.0, 4.0]
    assert write_batch(pairs, SPEC, out, folder=tmp_path / "scores") == 0


def test_a_request_is_what_the_api_takes(tmp_path: Path) -> None:
    write_batch(pairs_of("a red fox"), SPEC, tmp_path / "in.jsonl")
    (request,) = requests_in(tmp_path / "in.jsonl")
    assert request["method"] == "POST"
    assert request["url"] == "/v1/chat/completions"
    TypeAdapter(CompletionCreateParamsNonStreaming).validate_python(request["body"])
    assert "a red fox" in str(request["body"]["messages"][-1])
    write_batch(pairs_of("a red fox"), SPEC, tmp_path / "new.jsonl", reasoning=True)
    (newer,) = requests_in(tmp_path / "new.jsonl")
    assert newer["custom_id"] == request["custom_id"]
    changed = {"max_completion_tokens": request["body"].pop("max_tokens")}
    del request["body"]["temperature"]
    assert newer["body"] == {**request["body"], **changed}


def test_what_is_no_use_is_counted_with_its_reason(tmp_path: Path) -> None:
    pairs, path = pairs_of(*"abcde"), tmp_path / "in.jsonl"
    write_batch(pairs, SPEC, path)
    requests = requests_in(path)
    failed = {"custom_id": requests[1]["custom_id"], "response": {"status_code": 500}}
    empty = {"custom_id": requests[3]["custom_id"], "response": {"body": {"choices": []}}}
    lines = [
        result(requests[0], "fine: " + json.dumps(GOOD)),
        json.dumps(failed) + "\n",
        result(requests[2], "no"),
        json.dumps(empty) + "\n",
        result({"custom_id": "stranger"}, json.dumps(GOOD)),
        "garbage\n",
    ]
    (tmp_path / "out.jsonl").write_text("".join(lines))
    got = read_batch(pairs, SPEC, tmp_path / "out.jsonl", folder=tmp_path)
    assert (got.rated, got.missing) == (1, 4)
    assert got.reasons == {
        "HTTP 500": 1,
        "no JSON object": 1,
        "no completion": 1,
        "not one of these prompts": 1,
        "not a result": 1,
    }
    assert write_batch(pairs, SPEC, path, folder=tmp_path) == 4


def test_odd_results_are_counted_and_the_servers_words_are_quoted(tmp_path: Path) -> None:
    pairs, path = pairs_of(*"abcdefg"), tmp_path / "in.jsonl"
    write_batch(pairs, SPEC, path, max_tokens=77)
    requests = requests_in(path)
    assert requests[0]["body"]["max_tokens"] == 77  # type: ignore[index]
    draft = json.dumps(GOOD | {"clarity": 1})
    cut = json.loads(result(requests[5], draft))
    cut["response"]["body"]["choices"][0]["finish_reason"] = "length"
    error = {"error": {"message": "unknown model"}}
    odd: list[dict[str, object]] = [
        {"custom_id": requests[1]["custom_id"], "response": "text"},
        {"custom_id": requests[2]["custom_id"], "response": {"body": {"choices": {"0": 1}}}},
        {"custom_id": requests[3]["custom_id"], "response": {"status_code": 400, "body": error}},
        {"custom_id": requests[4]["custom_id"], "error": {"message": "expired"}},
        cut,
    ]
    lines = [
        result(requests[0], f"<think>{draft}</think>{json.dumps(GOOD)}"),
        result(requests[6], f"<think>{draft}"),
        *(json.dumps(one) + "\n" for one in odd),
        "[" * 100_000 + "\n",
        "7\n",
    ]
    (tmp_path / "out.jsonl").write_text("".join(lines))
    got = read_batch(pairs, SPEC, tmp_path / "out.jsonl", folder=tmp_path)
    assert (got.rated, got.missing) == (1, 6)
    assert got.reasons == {
        "the thinking has no end": 1,
        "no completion": 2,
        "HTTP 400: unknown model": 1,
        "error: expired": 1,
        "cut off at max_tokens": 1,
        "not a result": 2,
    }
    ratings = quality_scores(pairs_of("a"), SPEC, folder=tmp_path)
    assert ratings["clarity"].to_pylist() == [5.0]


def test_a_batch_of_another_rater_is_refused(tmp_path: Path) -> None:
    pairs, path = pairs_of("a"), tmp_path / "in.jsonl"
    write_batch(pairs, SPEC, path)
    (tmp_path / "out.jsonl").write_text(result(requests_in(path)[0], json.dumps(GOOD)))
    with pytest.raises(FifaError, match="answers none of the prompts"):
        read_batch(pairs, "openai:other@http://h/v1", tmp_path / "out.jsonl", folder=tmp_path)
    with pytest.raises(FifaError, match="cannot read the batch"):
        read_batch(pairs, SPEC, tmp_path / "nothing", folder=tmp_path)
