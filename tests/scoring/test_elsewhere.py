"""Questions asked by an executor's workers, and by vLLM's engine: the answers of one process."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sqlite3
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from endpoint_server import VLM, server
from test_judge_server import difference, judged, opened, some, source

import fifa
from fifa.config import Compute, Measure, Rubric
from fifa.errors import FifaError
from fifa.evaluation import measure
from fifa.scoring import elsewhere, offline
from fifa.scoring.endpoint import ANSWERS, endpoint_of
from fifa.scoring.judges import pairs as judges
from fifa.scoring.judges.questions import train_rubric
from fifa.scoring.quality import make_rater, quality_scores
from fifa.scoring.rubric import QUALITIES
from fifa.scoring.specs import RATERS, REWARDS
from fifa.shards import pool
from fifa.shards.pool import LocalPool

# What FiFA uses of vLLM, with a model that grades by a prompt's length and likes bright images.
# "again": the first answer does not parse; "never": none does; "long": more than the model reads.
STAND_IN = """
import base64, io, json, os, re
from dataclasses import dataclass, field
from types import SimpleNamespace

from PIL import Image


class VLLMClientError(Exception):  # as in 0.32: no ValueError
    pass


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
    def __init__(self, model, seed, structured_outputs_config, **options):
        assert structured_outputs_config["disable_any_whitespace"]
        assert 0 < options.get("gpu_memory_utilization", 0.5) < 1
        assert 0 < options.get("kv_cache_memory_bytes", 1) <= 4 * 2**30
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        if "broken" in model:
            raise RuntimeError("no such architecture")
        self.model = model

    def chat(self, messages, how, use_tqdm):
        contents = [one[-1]["content"] for one in messages]
        parts = [[c] if isinstance(c, str) else [p.get("text", "") for p in c] for c in contents]
        prompts = ["".join(texts) for texts in parts]
        with open(os.path.join(self.model, "lots"), "a") as lots:
            lots.write(f"{len(prompts)}\\n")
        with open(os.path.join(self.model, "asked"), "a") as asked:
            asked.writelines(f"{os.getpid()} {prompt!r}\\n" for prompt in prompts)
        if "text" in self.model and not all(isinstance(one, str) for one in contents):
            raise ValueError("text is not a multimodal model")
        if any("long ago" in prompt for prompt in prompts):
            raise VLLMClientError("the prompt is longer than the maximum model length")
        return [self.answer(*one) for one in zip(prompts, contents, how, strict=True)]

    def answer(self, prompt, content, how):
        names = how.structured_outputs.json["properties"]
        grade = 1 + len(prompt) % 5
        said = {name: [] if name == "flags" else grade for name in names}
        if not isinstance(content, str):
            urls = [one["image_url"]["url"] for one in content if "image_url" in one]
            data = [io.BytesIO(base64.b64decode(url.partition(",")[2])) for url in urls]
            light = [sum(Image.open(one).getpixel((0, 0))) for one in data]
            said = dict.fromkeys(names, "AB"[light[0] < light[-1]])
            if len(light) == 1:
                said = {n: "yes" if ("bright" in q) == (light[0] > 384) else "no"
                        for n, q in re.findall(r"(q\\d+): (.*)", prompt)}
        text = json.dumps(said)
        garbled = "never" in prompt or ("again" in prompt and not how.temperature)
        out = SimpleNamespace(
            text="what?" if garbled else text, token_ids=[1, 2], logprobs=None, finish_reason="stop"
        )
        return SimpleNamespace(outputs=[out], prompt_token_ids=[1, 2, 3])
"""


def test_an_engine_is_given_no_memory_that_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [8.0]  # GB of a card of 24, once a reward model has gone
    monkeypatch.setattr(offline, "best_device", lambda: "cuda")
    monkeypatch.setattr(offline, "free_bytes", lambda place: 23.0)
    monkeypatch.setattr(offline, "release_memory", kept.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda place: (23.0 - sum(kept), 24.0))
    share = offline._memory()["gpu_memory_utilization"]
    free, whole = torch.cuda.mem_get_info("cuda")
    assert 0 < share * whole <= free  # or the engine refuses to start


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


def test_a_judge_of_vllms_is_asked_in_small_lots(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(offline, "WITH_IMAGES", 8)  # images of a lot are all in memory
    rows = some(6)
    rows[2] = ("a story of long ago", *rows[2][1:])
    pairs = fifa.read_pairs(source(tmp_path, rows))
    table = judged(pairs, f"vllm:{model}", tmp_path / "scores")
    right = [np.sign(opened(row[1]) - opened(row[2])) for row in rows]
    right[2] = np.nan
    assert np.array_equal(np.sign(difference(table)), right, equal_nan=True)
    # the first lot is halved until what the engine refuses is alone: nothing is asked thrice
    assert (model / "lots").read_text().split() == list("84421124")
    assert "2 x no completion: the prompt is longer than" in capsys.readouterr().err
    [path] = (tmp_path / "scores").glob("margin-*.parquet")
    assert path.name.startswith("margin-vllm-grader-")
    # from workers, which read the images
    compute = Compute(executor="local:2")
    there = judged(pairs, f"vllm:{model}", tmp_path / "there", compute=compute)
    assert str(there.to_pydict()) == str(table.to_pydict())


def test_no_engine_holds_memory_that_what_comes_next_wants(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A judge's engine goes before a rater's comes, and that with the last score."""
    other = shutil.copytree(model, model.with_name("another"))
    memory, alive = offline._memory, []

    def counted() -> dict[str, Any]:
        alive.append(sum(type(one).__name__ == "LLM" for one in gc.get_objects()))
        return memory()

    monkeypatch.setattr(offline, "_memory", counted)
    pairs = fifa.read_pairs(source(tmp_path, some(4)))
    fifa.score(pairs, f"vllm:{model}", f"vllm:{other}", "none", folder=tmp_path / "scores")
    counted()
    images = pa.table({"prompt_id": ["a"], "prompt": ["a cat"], "category": ["x"]})
    asked_for = Measure(rater=f"vllm:{model}")
    measure._unsafe_prompts(images, asked_for, tmp_path / "measured", Compute())
    counted()
    assert alive == [0, 0, 0, 0, 0]


def test_a_model_that_sees_no_images_is_no_judge(model: Path, tmp_path: Path) -> None:
    model = model.rename(model.with_name("text"))
    pairs = fifa.read_pairs(source(tmp_path, some(4)))
    told = r"the model answered none of 8 .*: 8 x .*not a multimodal.*\n.*\n.*--judge-side"
    with pytest.raises(FifaError, match=told):
        judged(pairs, f"vllm:{model}", tmp_path / "scores")


def test_a_rubric_of_a_model_of_vllms_scores(model: Path, tmp_path: Path) -> None:
    rows = [(*row[:3], float(opened(row[1]) > opened(row[2]))) for row in some(24)]
    pairs, asked = fifa.read_pairs(source(tmp_path, rows)), tmp_path / "questions.txt"
    asked.write_text("Is it bright?\nIs it dark?\n")
    options = Rubric(judge=f"vllm:{model}", questions=str(asked))
    train_rubric(pairs, tmp_path / "rubric", options, Compute())
    d = difference(judged(pairs, f"rubric:{tmp_path / 'rubric'}"))
    found = {(one > 0, row[3]) for one, row in zip(d, rows, strict=True) if one}
    assert found == {(True, 1.0), (False, 0.0)}
    served = REWARDS.parse(f"rubric:{tmp_path / 'rubric'}@http://localhost:8/v1").make()
    assert (served.model, served.url) == (str(model), "http://localhost:8/v1")


def test_vllm_is_named_by_its_weights_and_template(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = make_rater(f"vllm:{model}").identity
    assert endpoint_of(RATERS.parse(f"vllm:{model}")) == (str(model), "vllm")
    moved = model.rename(tmp_path / "elsewhere")
    assert make_rater(f"vllm:{moved}").identity == before
    known = [before]
    for name in ("config.json", "chat_template.jinja"):  # a template says what the model is asked
        (moved / name).write_text('{"other": 1}')
        offline.weights_of.cache_clear()
        after = make_rater(f"vllm:{moved}").identity
        assert after not in known
        known.append(after)
    monkeypatch.setattr(offline, "model_folder", lambda model, names: names)
    assert "*.jinja" in offline._folder("hub/id")


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
