import json
import math
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from commands import fifa
from fifa.config import Compute, Plan, Read, Recipe, Score, Select, Train
from fifa.data.read import read_pairs
from fifa.errors import FifaError
from fifa.models.runtime import Runtime
from fifa.moji.family import CLIP, SD
from fifa.run import bench, cost, passes
from fifa.run.bench import Rate
from fifa.run.cost import cost_text, different, facts_of, plan_cost
from fifa.run.passes import Passes, Taken, grown, rate_of, sample_of

COLUMNS = "column:clipscore_0,clipscore_1"
LIGHT = ("--margin", COLUMNS, "--quality", "none", "--diversity", "none")
RATES = {
    "read": Rate(0, 0, "pairs", "by hand", size=100),
    "margin": Rate(2, 0.5, "pairs", "by hand", size=10),
    "diversity": Rate(1, 0.25, "prompts", "by hand"),
    "quality": Rate(3, 0.125, "prompts", "by hand"),
    "select": Rate(0.5, 0.001, "kept pairs", "by hand"),
    "export": Rate(0, 0.002, "kept pairs", "by hand", size=1e6),
    "report": Rate(4, 0, "kept pairs", "by hand"),
}
TRAINING = {
    "cache": Rate(10, 0.5, "pairs", "by hand", size=2e5),
    "pair": Rate(0, 0.25, "pairs", "by hand"),
    "state": Rate(0, 0, "states", "by hand", size=3e6),
    "weights": Rate(0, 0, "weights", "by hand", size=1e6),
}
BENCH = {
    "neighbours": Rate(0, 1e-3, "distances", "by hand"),
    "image tower": Rate(0, 2.0, "images", "by hand"),
    "decoding": Rate(0, 0.5, "images", "by hand"),
    "writing": Rate(0, 1e-6, "bytes", "by hand"),
}


@pytest.fixture
def by_hand(monkeypatch):
    """Rates that were not measured."""
    monkeypatch.setattr(Passes, "rates", lambda self: RATES)
    monkeypatch.setattr(Passes, "training", lambda self, train: TRAINING)
    monkeypatch.setattr(cost, "bench_rate", BENCH.__getitem__)


def test_a_rate_is_the_slope_of_two_passes_and_the_cold_pass_says_what_it_takes_to_begin():
    cold = {"quality": Taken(5.0, 4, 900)}
    rate = rate_of("quality", cold, [Taken(1.0, 4, 900), Taken(2.0, 9, 9), Taken(3.0, 24, 2900)])
    assert (rate.each, rate.size) == (pytest.approx(0.1), 100)  # (3 - 1) / 20, (2900 - 900) / 20
    assert rate.start == pytest.approx(4.6)  # 5 - 4 * 0.1
    assert rate.seconds(100) == pytest.approx(14.6)
    assert "on 4 and on 24 of them" in rate.of
    noisy = rate_of("quality", cold, [Taken(1.0, 4, 9), Taken(0.5, 24, 9)])
    assert (noisy.each, noisy.start) == (0.5 / 24, 5.0 - 4 * 0.5 / 24)
    assert "at most" in noisy.of
    whole = rate_of("quality", cold, [Taken(1.0, 4, 8)])
    assert (whole.each, whole.size, whole.start) == (0.25, 2, 4.0)


def test_passes_grow_until_what_comes_on_top_of_loading_is_long_enough():
    asked = []

    def work(prompts):
        asked.append(prompts)
        return {"quality": Taken(3 + 0.01 * prompts, prompts, 0)}

    found = grown(work, ["quality"], 2, 10**6, 9.0)
    assert asked[:2] == [2, 32]
    assert 3 < found[-1]["quality"].seconds - 3.02 < 9
    asked.clear()
    grown(work, ["quality"], 2, 10**6, 3.1)  # the time that it may take is over
    assert len(asked) == 2
    asked.clear()
    grown(work, ["quality"], 2, 5, 9.0)
    assert asked == [2, 5]
    asked.clear()
    grown(work, ["quality"], 2, 2, 9.0)
    assert asked == [2]


def test_how_many_there_are_in_all_follows_from_what_files_share():
    rng = np.random.default_rng(0)
    files = [set(map(str, rng.choice(1000, 400, replace=False))) for _ in range(4)]
    assert different(files, 40) == pytest.approx(1000, rel=0.1)
    assert different(files, 4) == pytest.approx(len(set.union(*files)), rel=0.1)
    apart = [{f"{i}-{j}" for j in range(50)} for i in range(4)]
    assert different(apart, 10) == 500
    assert different([{"a", "b"}] * 2, 100) == 2
    assert different([set(), set()], 100) == 0


def test_a_sample_has_whole_prompts(shipped):
    pairs = read_pairs(shipped)
    few, more = sample_of(pairs, 8), sample_of(pairs, 32)
    assert few.prompts.num_rows == 8
    assert set(few.table["pair_id"].to_pylist()) < set(more.table["pair_id"].to_pylist())
    names = few.prompts["prompt_id"].take(few.table["prompt_index"].combine_chunks())
    assert names.to_pylist() == few.table["prompt_id"].to_pylist()
    whole = pairs.table["prompt_id"].to_pylist()
    assert len(few) == sum(one in set(names.to_pylist()) for one in whole)
    assert len(sample_of(pairs, 10**6)) == len(pairs)
    assert sample_of(pairs, 1).prompts.num_rows == 1


def test_every_step_by_hand(by_hand, shipped, tmp_path):
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "machine_hour: 3600\ndisk_gb_month: 1000\nendpoints:\n  default: {input: 1000000}\n"
    )
    score = Score((COLUMNS,), quality="local", diversity="minilm")
    train = tmp_path / "train.yaml"
    train.write_text(f"model: {SD}\nbatch: 4\nsteps: 20\nsave_every: 5\ncheckpoint_every: 10\n")
    plan = Plan(
        str(train), prices=str(prices), read=Read(str(shipped)), score=score, select=Select(20)
    )
    found = plan_cost(plan)
    n, prompts = found.facts.pairs, found.facts.prompts
    took = {step.name: step.seconds for step in found.steps}
    assert took == {
        "read": found.facts.seconds,
        "margin": 2 + 0.5 * n,
        "diversity": 1 + 0.25 * prompts + 1e-3 * prompts**2,
        "quality": 3 + 0.125 * prompts,
        "select": 0.5 + 0.001 * 20,
        "export": 0.002 * 20,
        "report": 4,
        "encode": 10 + 0.5 * 20,
        "training": 20 * 4 * 0.25 + 4 * 3e6 * 1e-6,  # steps, and four states written
    }
    disk = {step.name: step.disk for step in found.steps if step.disk}
    assert disk == {
        **{"read": 100 * n, "margin": 10 * n, "export": 2e7, "encode": 4e6},
        "training": 3e6 + 3 * 1e6,  # the state, two checkpoints and the end
    }
    assert found.total == pytest.approx(sum(took.values()))  # a dollar a second
    assert found.month == pytest.approx(sum(disk.values()) / 1e6)
    plain = found.plain()
    assert plain["together"]["seconds"] == pytest.approx(found.seconds)
    assert plain["steps"][1]["money"] == 2 + 0.5 * n
    text = cost_text(found)
    assert "money is not told" not in text
    assert f"{prompts:,} prompts" in text
    assert all(f"\n{name} " in text for name in took)


def test_what_is_fetched_of_a_remote_source(by_hand, shipped, tmp_path):
    facts = replace(facts_of(Plan(read=Read(str(shipped)))), is_remote=True, images=1000)
    prices = cost.Prices(network_gb=2.0)
    for margin, step, fetched in (
        (f"clipscore:{CLIP}", "margin", 1000 * 0.5e6),  # each image, of half a pair's bytes
        (COLUMNS, "select", 20 * 2 * 0.5e6),  # only those of the kept pairs
    ):
        recipe = Recipe(Read(str(shipped)), Score((margin,), "none", "none"))
        steps = tuple(cost._filter_steps(facts, recipe, prices, RATES, 20))
        network = {one.name: one.network for one in steps if one.network}
        assert network == {step: fetched}
        found = cost.Cost(facts, steps, prices)
        assert found.total == pytest.approx(fetched / 1e9 * 2)
        assert found.plain()["together"]["network"] == fetched


@pytest.mark.parametrize(
    ("prompts", "device", "took"),
    [
        (100_000, "cpu", 1e-3 * 100_000**2),
        (49_999, "cuda", 1e-3 * 49_999**2),
        (400_000, "cuda", 1e-6 * 400_000**2),
        (8192 * 100, "cpu", 2.0 * 8192 * 100 * 10),  # by an index: the square root of 100 more each
    ],
)
def test_neighbours_by_their_number_and_place(by_hand, shipped, monkeypatch, prompts, device, took):
    monkeypatch.setitem(BENCH, "neighbours on a GPU", Rate(0, 1e-6, "distances", "by hand"))
    monkeypatch.setitem(BENCH, "approximate neighbours", Rate(0, 2.0, "neighbours", "by hand"))
    monkeypatch.setattr(cost, "make_runtime", lambda asked: Runtime(device))
    facts = replace(facts_of(Plan(read=Read(str(shipped)))), prompts=prompts)
    step = cost._diversity(Rate(0, 0, "prompts", "by hand"), facts, Recipe())
    assert step.seconds == pytest.approx(took)


def test_of_less_than_an_epoch_only_what_is_presented_is_encoded(by_hand, shipped):
    recipe = Recipe(Read(str(shipped)), Score((COLUMNS,)))
    facts = facts_of(Plan(read=recipe.read))
    own, plan = Passes(facts.sample, recipe, 1.0, False), Plan("lora-small", read=recipe.read)
    for order, pairs in (("random", 6), ("hard-first", 20)):
        train = Train("", str(SD), batch=2, steps=3, holdout=0.0, order=order)
        encode, _ = cost._train_steps(facts, own, train, plan, 20)
        assert (encode.count, encode.seconds) == (f"{pairs} pairs", 10 + 0.5 * pairs)


def test_held_out_pairs_are_measured_before_and_in_the_training(by_hand, shipped):
    recipe = Recipe(Read(str(shipped)), Score((COLUMNS,)))
    facts = facts_of(Plan(read=recipe.read))
    plan = Plan("lora-small", str(SD), read=recipe.read)
    own = Passes(facts.sample, recipe, 1.0, False)
    encode, training = cost._train_steps(facts, own, cost.training_of(plan), plan, 300)
    steps = round(10 * 285 / 32)  # one in twenty is held out
    assert training.count == f"{steps} steps of 32 pairs"
    measured = 15 * 4 * 0.25 / 4  # 15 pairs, four draws, one pass of the four that a step takes
    assert encode.seconds == pytest.approx(10 + 0.5 * 300 + measured)
    times = -(-steps // (steps // 7))  # 0.05 * 3 * 89 * 32 / (15 * 4)
    assert training.seconds == pytest.approx(steps * 32 * 0.25 + times * measured)


def test_what_an_endpoint_takes(by_hand, shipped, tmp_path):
    prices = tmp_path / "prices.yaml"
    endpoint = {"input": 2, "output": 4, "answer": 100, "seconds": 8}
    prices.write_text(yaml.safe_dump({"endpoints": {"big": endpoint}}))
    score = Score((COLUMNS, "vlm:big@http://h/v1"), "openai:big@http://h/v1", "none", budget=0.5)
    compute = Compute(in_flight=4, judge_side=280)
    asked = partial(Plan, read=Read(str(shipped)), score=score, compute=compute)
    found = plan_cost(asked(prices=str(prices)))
    quality = next(step for step in found.steps if step.name == "quality")
    n = found.facts.prompts
    assert quality.seconds == n * 8 / 4
    tokens = (quality.tokens / n * 1e6 - 4 * 100) / 2  # of a question
    assert 350 < tokens < 600
    judge = [step for step in found.steps if step.name == "margin"][1]
    assert judge.count == f"{found.facts.pairs:,} questions"  # both orders of half of the pairs
    each = 500 + 2 * (280 / 28) ** 2
    assert judge.tokens == pytest.approx(found.facts.pairs * (each * 2 + 100 * 4) / 1e6)
    assert found.money(judge) == judge.tokens  # the machine has no price

    untold = plan_cost(asked())
    judge = [step for step in untold.steps if step.name == "margin"][1]
    assert (judge.seconds, judge.tokens) == (None, None)
    assert "together is without the steps whose time is not told" in cost_text(untold)
    assert "money is not told" in cost_text(untold)


def test_models_that_are_not_here_are_not_fetched(by_hand, shipped, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    score = Score(("pickscore", "hpsv3:org/none"), "local:org/none", "text:org/none")
    found = plan_cost(Plan("lora-small", "org/none", read=Read(str(shipped)), score=score))
    told = [(step.name, step.seconds) for step in found.steps]
    images = found.facts.images
    assert ("margin", images * 2.0) in told  # ViT-H/14, which decoding is quicker than
    for name in ("margin", "diversity", "quality", "training"):
        assert (name, None) in told
    assert "org/none is not on this machine" in cost_text(found)


def test_the_flops_of_a_tower_are_those_of_its_layers():
    # 24 layers of ViT-L/14: 81 billion multiplications are its published count
    assert bench.tower_flops(24, 1024, 257) == pytest.approx(2 * 81e9, rel=0.01)
    assert bench.tower_flops() == pytest.approx(2 * 167e9, rel=0.01)


def test_of_many_files_some_are_read(by_hand, shipped, tmp_path, monkeypatch):
    source, table = tmp_path / "source", pq.read_table(shipped)
    source.mkdir()
    for i in range(12):
        pq.write_table(table.slice(30 * i, 30), source / f"{i:02}.parquet")
    true = facts_of(Plan(read=Read(str(source))))
    assert true.read == 12
    assert "counted" in str(true)
    monkeypatch.setattr(cost, "MANY", 0)
    found = facts_of(Plan(read=Read(str(source))))
    assert (found.read, found.files) == (4, 12)
    assert "from 4 of 12 files" in str(found)
    assert found.pairs == pytest.approx(true.pairs, rel=0.25)
    assert found.images == pytest.approx(true.images, rel=0.25)
    plan = Plan(read=Read(str(source)), score=Score((COLUMNS,), "none", "none"))
    assert "the rest by their bytes" in cost_text(plan_cost(plan))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("machine_hour: -1", "machine_hour"),
        ("machine_hour: much", "machine_hour"),
        ("gpu_hour: 1", "gpu_hour"),
        ("endpoints: {m: {input: x}}", "endpoints.m.input"),
        ("endpoints: {m: {price: 1}}", "endpoints.m.price"),
        ("machine_hour: .nan", "machine_hour"),
        ("- 1", "prices"),
        ("a: [", "prices"),
        (None, "prices"),
    ],
)
def test_prices_that_are_none_end_in_words(text, told, shipped, tmp_path):
    prices = tmp_path / "prices.yaml"
    if text is not None:
        prices.write_text(text)
    done = fifa("plan", shipped, *LIGHT, "--prices", prices)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_the_shipped_prices_say_nothing():
    assert cost.read_prices(str(cost.PRICES)) == cost.read_prices(None)


def test_a_recipe_is_a_source_too(by_hand, shipped, tmp_path):
    recipe = Recipe(Read(str(shipped)), Score((COLUMNS,), "none", "none"), Select(keep=7))
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    by_recipe = json.loads(fifa("plan", tmp_path / "recipe.yaml", "--json").stdout)
    by_options = json.loads(fifa("plan", shipped, *LIGHT, "--keep", 7, "--json").stdout)
    counts = [[step["count"] for step in one["steps"]] for one in (by_recipe, by_options)]
    assert counts[0] == counts[1]
    assert "7 kept pairs" in counts[0]


def test_a_training_needs_a_model(shipped, tmp_path):
    done = fifa("plan", shipped, *LIGHT, "--train", "lora-small")
    assert done.returncode == 1
    assert "--model" in done.stderr
    assert "no such" in fifa("plan", shipped, *LIGHT, "--train", tmp_path / "no").stderr.lower()


def test_rates_are_kept_for_one_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path))
    measured = []

    def measure():
        measured.append(1)
        return {"a": Rate(1, 2, "things", "by hand", 3)}

    first = bench.kept_rates("one", measure)
    assert first == bench.kept_rates("one", measure) == measure()
    assert len(measured) == 2  # the last one by the test
    bench.kept_rates("one", measure, fresh=True)
    bench.kept_rates("two", measure)
    assert len(measured) == 4
    path = tmp_path / bench.FILE
    path.write_text(path.read_text().replace("by hand", "by foot"))
    assert bench.kept_rates("one", measure) == first
    assert len(measured) == 5
    monkeypatch.setattr(bench, "machine", lambda: "another")
    bench.kept_rates("one", measure)
    assert len(measured) == 6


def test_the_bench_measures_what_it_can(tmp_path, monkeypatch):
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path))

    def lacking():
        raise FifaError("no such library", do="pip install it")

    some = {name: bench.BENCH[name] for name in ("decoding", "writing")}
    monkeypatch.setattr(bench, "BENCH", {**some, "rating": lacking})
    from fifa.run import doctor

    monkeypatch.setattr(doctor, "probed", lambda modules: doctor.Probe({}, {}))
    found = json.loads(fifa("doctor", tmp_path, "--bench", "--json").stdout)["checks"]
    told = {check["name"]: check for check in found if check["name"].startswith("rate ")}
    assert list(told) == ["rate decoding", "rate writing", "rate rating"]
    assert "images a second" in told["rate decoding"]["found"]
    assert told["rate rating"]["state"] == "note"
    assert 0 < bench.bench_rate("decoding").each < 1
    assert not math.isnan(bench.bench_rate("writing").each)


def test_a_real_plan_on_a_sample(shipped, tmp_path, monkeypatch):
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "cache"))
    train = tmp_path / "train.yaml"
    train.write_text("resolution: 32\nbatch: 4\nsteps: 8\ndevice: cpu\n")
    source = tmp_path / "cache" / "feedback.parquet"
    source.parent.mkdir()
    pq.write_table(pq.read_table(shipped).slice(0, 80), source)
    words = (source, "--margin", f"clipscore:{CLIP}", "--quality", "none", "--diversity", "none")
    words += ("--keep", 12, "--train", train, "--model", SD, "--seconds", 0.1, "--json")
    done = fifa("plan", *words)
    assert done.returncode == 0, done.stderr
    plain = json.loads(done.stdout)
    names = [step["name"] for step in plain["steps"]]
    assert names == ["read", "margin", "select", "export", "report", "encode", "training"]
    assert all(0 < step["seconds"] < 600 for step in plain["steps"])
    disk = {step["name"]: step["disk"] for step in plain["steps"]}
    assert disk["export"] > 10_000  # images
    assert disk["encode"] > 1000
    assert {path.name for path in tmp_path.iterdir()} == {"train.yaml", "cache"}

    def never(*_):
        raise AssertionError("measured twice")

    monkeypatch.setattr(Passes, "once", never)
    monkeypatch.setattr(passes, "training_rates", never)
    again = json.loads(fifa("plan", *words).stdout)
    assert again["steps"][1:] == plain["steps"][1:]
    done = fifa("plan", *words, "--keep", 24)
    assert json.loads(done.stdout)["steps"][3]["count"] == "24 kept pairs"


# What FiFA uses of vLLM: it gives the first of all answers that a schema allows
VLLM = """
import json, os
from types import SimpleNamespace


def SamplingParams(structured_outputs, **how):
    return structured_outputs


def StructuredOutputsParams(json):
    return json


class LLM:
    def __init__(self, model, **how):
        with open(os.path.join(model, "loaded"), "a") as file:
            file.write(f"{os.getpid()}\\n")

    def chat(self, messages, schemas, use_tqdm):
        return [self.answer(schema["properties"]) for schema in schemas]

    def answer(self, kinds):
        said = {name: kind["enum"][0] if "enum" in kind else [] for name, kind in kinds.items()}
        out = SimpleNamespace(text=json.dumps(said), token_ids=[1], logprobs=None)
        out.finish_reason = "stop"
        return SimpleNamespace(outputs=[out], prompt_token_ids=[1])
"""


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """A model's folder, and a stand-in in place of vLLM."""
    place = tmp_path / "site" / "vllm"
    place.mkdir(parents=True)
    (place / "__init__.py").write_text(VLLM)
    (place / "sampling_params.py").write_text("from vllm import *\n")
    monkeypatch.syspath_prepend(place.parent)
    monkeypatch.setenv("PYTHONPATH", str(place.parent), prepend=os.pathsep)
    monkeypatch.setenv("FIFA_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    return model


def test_a_model_of_vllms_is_timed_and_never_loaded_here(shipped, vllm, tmp_path):
    source = tmp_path / "feedback.parquet"
    pq.write_table(pq.read_table(shipped).slice(0, 80), source)
    score = Score((COLUMNS, f"vllm:{vllm}"), f"vllm:{vllm}", "none", budget=0.5)
    found = plan_cost(Plan(read=Read(str(source)), score=score, seconds=0.1))
    steps = {step.name: step for step in found.steps}
    assert list(steps) == ["read", "margin", "quality", "select", "export", "report"]
    assert "vllm" in steps["margin"].why
    assert 0 < steps["margin"].seconds < 600 and 0 < steps["quality"].seconds < 600
    assert steps["margin"].tokens is None  # it is behind no endpoint
    loaded = (vllm / "loaded").read_text().split()
    assert len(loaded) == 2  # for the cold pass, and once for all others
    assert str(os.getpid()) not in loaded


def test_without_vllm_nothing_is_told_of_its_model(by_hand, shipped, tmp_path, monkeypatch):
    monkeypatch.setattr(passes, "find_spec", lambda name: None)
    score = Score((f"vllm-image:{tmp_path}",), f"vllm:{tmp_path}", "none")
    found = plan_cost(Plan(read=Read(str(shipped)), score=score))
    assert [(s.name, s.seconds) for s in found.steps][1:3] == [("margin", None), ("quality", None)]
    assert "its model or vLLM is not on this machine" in found.steps[1].why


def test_the_share_of_a_budget_of_tokens(by_hand, shipped, vllm, monkeypatch):
    asked = []
    monkeypatch.setattr(Passes, "rates", lambda self: asked.append(self) or RATES)
    score = Score(("pickscore", f"vllm:{vllm}"), "none", "none", budget=50_000)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(passes, "is_here", lambda model: model == str(vllm))
    compute = Compute(judge_side=280)
    found = plan_cost(Plan(read=Read(str(shipped)), score=score, compute=compute))
    each = 500 + 2 * (280 / 28) ** 2 + 60  # tokens of a question with its answer, twice a pair
    share = 50_000 / each / (2 * found.facts.pairs)
    measured = asked[0]._measured
    assert measured.budget == pytest.approx(share)
    assert measured.margin == ("column:raw:plan_0,plan_1", f"vllm:{vllm}")


def test_a_step_that_cannot_run_is_told_before_it_is_planned(shipped):
    done = fifa("plan", shipped, "--margin", "column:no_0,no_1", "--seconds", 1)
    assert done.returncode == 1
    assert "no score column 'no_0'" in done.stderr
