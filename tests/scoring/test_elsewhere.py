"""Questions asked by an executor's workers, and by vLLM's engine: the answers of one process."""

from __future__ import annotations

import json
import os
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from endpoint_server import VLM, server
from test_judge_server import judged, some, source

import fifa
from fifa.config import Compute
from fifa.errors import FifaError
from fifa.scoring import elsewhere, offline
from fifa.scoring.endpoint import ANSWERS, endpoint_of
from fifa.scoring.judges import pairs as judges
from fifa.scoring.quality import make_rater, quality_scores
from fifa.scoring.rubric import QUALITIES
from fifa.scoring.specs import RATERS
from fifa.shards import pool
from fifa.shards.pool import LocalPool

# What FiFA uses of vLLM, with a model that grades by a prompt's length. "again": the first answer
# does not parse; "never": none does; "long": more than the model reads.
STAND_IN = """
import json, os
from dataclasses import dataclass, field
from types import SimpleNamespace


@dataclass
class StructuredOutputsParams:
    json: dict


@dataclass
class SamplingParams:
    temperature: float
    max_tokens: int
    seed: int
    logprobs: int | None
    structured_outputs: StructuredOutputsParams | None


class LLM:
    def __init__(self, model, seed, gpu_memory_utilization):
        assert 0 < gpu_memory_utilization < 1
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if "broken" in model:
            raise RuntimeError("no such architecture")
        self.model = model

    def chat(self, messages, how, use_tqdm):
        prompts = [one[-1]["content"] for one in messages]
        with open(os.path.join(self.model, "asked"), "a") as asked:
            asked.writelines(f"{os.getpid()} {prompt!r}\\n" for prompt in prompts)
        if any("long" in prompt for prompt in prompts):
            raise ValueError("the prompt is longer than the maximum model length")
        return [self.answer(*one) for one in zip(prompts, how, strict=True)]

    def answer(self, prompt, how):
        names = how.structured_outputs.json["properties"]
        grade = 1 + len(prompt) % 5
        text = json.dumps({name: [] if name == "flags" else grade for name in names})
        garbled = "never" in prompt or ("again" in prompt and not how.temperature)
        out = SimpleNamespace(
            text="what?" if garbled else text, token_ids=[1, 2], logprobs=None, finish_reason="stop"
        )
        return SimpleNamespace(outputs=[out], prompt_token_ids=[1, 2, 3])
"""


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a model, and the stand-in in place of vLLM, in this process and its children."""
    place = tmp_path / "site" / "vllm"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(STAND_IN)
    (place / "sampling_params.py").write_text("from vllm import *\n")
    monkeypatch.syspath_prepend(str(place.parent))
    monkeypatch.setenv("PYTHONPATH", str(place.parent), prepend=":")
    for name in ("vllm", "vllm.sampling_params"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    folder = tmp_path / "grader"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    yield folder
    for name in ("vllm", "vllm.sampling_params"):
        sys.modules.pop(name, None)
    offline._engine.cache_clear()
    offline.weights_of.cache_clear()


def asked(model: Path) -> list[tuple[str, str]]:
    """The process and the prompt of every question."""
    lines = (model / "asked").read_text().splitlines()
    return [tuple(line.split(" ", 1)) for line in lines]  # type: ignore[misc]


PROMPTS = ["a cat", "a dog again", "never mind", "an owl in the rain", "long ago"]


def test_vllm_rates_in_this_process_and_keeps_every_answer(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rater = make_rater(f"vllm:{model}", tmp_path / "kept")
    found = rater.rate(PROMPTS).to_pylist()
    assert [row["rating"] == row["rating"] for row in found] == [True, True, False, True, False]
    assert {name: found[0][name] for name in QUALITIES} == dict.fromkeys(QUALITIES, 5.0)
    assert "2 of 5 prompts could not be rated" in capsys.readouterr().err
    assert rater.name == "vllm-grader"
    base = sqlite3.connect(tmp_path / "kept" / ANSWERS)
    assert base.execute("SELECT count(*) FROM rated").fetchone() == (3,)
    base.close()
    before = len(asked(model))
    again = make_rater(f"vllm:{model}", tmp_path / "kept").rate(PROMPTS[:2]).to_pylist()
    assert again == found[:2]
    assert len(asked(model)) == before


def test_vllm_is_named_by_its_weights(model: Path, tmp_path: Path) -> None:
    before = make_rater(f"vllm:{model}").identity
    assert endpoint_of(RATERS.parse(f"vllm:{model}")) == (str(model), "vllm")
    moved = model.rename(tmp_path / "elsewhere")
    assert make_rater(f"vllm:{moved}").identity == before
    (moved / "config.json").write_text('{"other": 1}')
    offline.weights_of.cache_clear()
    assert make_rater(f"vllm:{moved}").identity != before


def test_vllm_that_is_missing_or_fails_is_told(model: Path, monkeypatch: Any) -> None:
    broken = model.rename(model.with_name("broken"))
    with pytest.raises(FifaError, match="cannot load the model: no such architecture"):
        make_rater(f"vllm:{broken}").rate(["a cat"])
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(FifaError, match=r"vllm:MODEL needs vllm.*\n.*pip install vllm; or serve"):
        make_rater(f"vllm:{broken}").rate(["a cat"])


def test_workers_load_vllm_and_the_driver_does_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(elsewhere, "SHARD", 4)
    path = source(
        tmp_path,
        [
            (f"{word} {i}", *row[1:])
            for i, (word, row) in enumerate(zip(PROMPTS[:4] * 3, some(12), strict=True))
        ],
    )
    pairs = fifa.read_pairs(path)
    here = quality_scores(pairs, f"vllm:{model}", folder=tmp_path / "here")
    (model / "asked").unlink()
    workers = LocalPool(2)
    try:
        there = quality_scores(pairs, f"vllm:{model}", folder=tmp_path / "there", executor=workers)
        assert str(there.to_pydict()) == str(here.to_pydict())
        assert there["flags"].null_count == 3
        first = Counter(prompt for _, prompt in asked(model))
        assert str(os.getpid()) not in {process for process, _ in asked(model)}
        # a later run asks again for those without an answer only
        (model / "asked").unlink()
        again = quality_scores(pairs, f"vllm:{model}", folder=tmp_path / "there", executor=workers)
    finally:
        workers.close()
    assert str(again.to_pydict()) == str(here.to_pydict())
    assert {prompt for _, prompt in asked(model)} == {p for p in first if "never" in p}


def test_a_judge_is_asked_by_workers_that_read_the_images(tmp_path: Path) -> None:
    rows = some(12)
    rows[3] = (rows[3][0], b"no image", *rows[3][2:])
    pairs = fifa.read_pairs(source(tmp_path, rows))
    tables, questions = [], []
    for executor in ("local", "local:2"):
        vlm = VLM("vllm")
        with server(vlm) as url:
            folder = tmp_path / executor.replace(":", "-")
            compute = Compute(in_flight=2, executor=executor)
            tables.append(judged(pairs, f"vlm:m@{url}", folder, compute=compute))
            questions.append(Counter(vlm.good.values()))
            if executor == "local:2":  # all answers are there: nobody is asked
                before = sum(vlm.good.values())
                next(folder.glob("margin-*.parquet")).unlink()
                judged(pairs, f"vlm:m@{url}", folder, compute=Compute())
                assert sum(vlm.good.values()) == before
        bad = pq.read_table(next(folder.glob("unreadable-*.parquet")))
        assert bad.num_rows == 1
        assert bad["reason"][0].as_py()
    here, there = (table.to_pydict() for table in tables)
    assert json.dumps(here) == json.dumps(there)
    assert questions[0] == questions[1] == Counter({1: 22})


def test_workers_stay_over_the_rounds_of_a_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pq.read_table(source(tmp_path, some(24)))
    for side in (0, 1):
        table = table.append_column(f"cheap_{side}", pa.array([0.1 * i * side for i in range(24)]))
    pq.write_table(table, tmp_path / "pairs.parquet")
    pairs = fifa.read_pairs(tmp_path / "pairs.parquet")
    rounds, started = Counter[str](), Counter[str]()
    ask, start = judges.ask_elsewhere, pool.ProcessPoolExecutor

    def asking(*given: Any) -> Any:
        rounds[executor] += 1
        return ask(*given)

    def starting(*given: Any, **options: Any) -> Any:
        started[executor] += 1
        return start(*given, **options)

    monkeypatch.setattr(judges, "ask_elsewhere", asking)
    monkeypatch.setattr(judges, "FIRST", 4)
    monkeypatch.setattr(pool, "ProcessPoolExecutor", starting)
    found = []
    for executor in ("local", "local:1"):
        folder = tmp_path / executor.replace(":", "-")
        asked = {"budget": 20_000, "folder": folder}
        compute = Compute(in_flight=2, executor=executor)
        with server(VLM()) as url:
            margin = ["column:raw:cheap_0,cheap_1", f"vlm:m@{url}"]
            found.append(judged(pairs, margin, **asked, compute=compute).to_pydict())
    assert json.dumps(found[0]) == json.dumps(found[1])
    assert rounds["local:1"] >= 2
    assert started == {"local:1": 2}  # to tell images apart, and to ask
