"""A training from its command to its weights."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from trainings import LORA, assemble, furthest, quick, weights_of

import fifa.training.job as job_module
from fifa.errors import FifaError
from fifa.training.backbones.parts import ModelFolder
from fifa.training.checkpoint import Average
from fifa.training.job import plan_training, run_training
from fifa.training.loop import learning_rate
from fifa.training.metrics import read_stats


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_training_writes_what_its_contract_says(method, world, tmp_path):
    train = quick(world, method=method, checkpoint_every=2, lr=1e-4, tracker="tensorboard")
    out = run_training(train, tmp_path / "out")
    names = {path.name for path in out.iterdir()}
    weights = {"lora": LORA, "full": "unet"}[method]
    assert names == {
        weights,
        *("README.md", "train.yaml", "train.json", "stats.jsonl", "digests.json"),
        *("cache", "checkpoints", "state", "logs"),
    }
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    assert (out / "checkpoints" / "step-000002" / weights).exists()
    assert [path.name for path in (out / "state").iterdir()] == ["step-000003"]
    facts = json.loads((out / "train.json").read_text())
    assert (facts["family"], facts["method"], facts["steps"]) == ("sd", method, 3)
    assert (facts["pairs"], facts["pairs_seen"]) == (4, 12)
    assert facts["base_model"] == str(world / "sd15")
    assert facts["accelerator_hours"] == pytest.approx(facts["seconds"] / 3600, rel=1e-2)
    card = (out / "README.md").read_text()
    assert str(world) not in card
    assert "load_lora_weights" in card or "UNet2DConditionModel.from_pretrained" in card


def test_statistics_tell_winner_and_loser_apart(world, tmp_path):
    out = run_training(quick(world, steps=4, log_every=2), tmp_path / "out")
    lines = read_stats(out)
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert set(line) == {
            *("step", "loss", "winner_error", "loser_error"),
            *("winner_minus_reference", "loser_minus_reference", "implicit_accuracy"),
            *("kl", "kl_bound", "gap", "gradient_norm", "lr", "pairs", "skipped", "seconds"),
            *("pairs_per_second", "peak_bytes", "by_level"),
        }
        assert 0 < line["kl_bound"] <= line["kl"]
        assert line["gradient_norm"] > 0
    first = read_stats(run_training(quick(world, steps=1), tmp_path / "first"))[0]
    # before its first update the policy is the reference
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["implicit_accuracy"] == 0.5
    assert (first["winner_minus_reference"], first["kl"]) == (0.0, 0.0)


def test_a_finished_training_is_left_alone(world, tmp_path, capsys):
    out = run_training(quick(world), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "train.yaml"}
    run_training(quick(world), out)
    assert "finished" in capsys.readouterr().err
    assert before == {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "train.yaml"
    }


def test_who_encodes_changes_no_weight_and_is_no_other_training(
    world, tmp_path, capsys, one_thread
):
    here = run_training(quick(world), tmp_path / "here")
    out = tmp_path / "there"
    there = run_training(quick(world, cluster={"executor": "local:1"}), out)
    for name in (LORA, *(f"cache/{path.name}" for path in (here / "cache").iterdir())):
        assert (there / name).read_bytes() == (here / name).read_bytes()
    assert len(list((there / "cache").iterdir())) == len(list((here / "cache").iterdir()))
    capsys.readouterr()
    run_training(quick(world, cluster={"executor": "ray", "actors": 2}), out)
    assert "finished" in capsys.readouterr().err


@pytest.mark.parametrize("draws", [0, 2])
def test_pairs_that_no_step_takes_are_not_encoded(draws, world, tmp_path, monkeypatch, capsys):
    train = quick(world, steps=1, batch=2, draws=draws)
    plan = plan_training(train, tmp_path)
    assert plan.latents == plan_training(quick(world, steps=2, batch=2), tmp_path).latents / 2
    assert plan.scalars == 2 * 2 * draws
    some = run_training(train, tmp_path / "some")
    assert "4 images" in capsys.readouterr().err
    facts = json.loads((some / "train.json").read_text())
    assert (facts["pairs"], facts["pairs_seen"]) == (4, 2)
    monkeypatch.setattr(job_module, "presented", lambda train, pairs: list(range(pairs)))
    every = run_training(train, tmp_path / "every")
    assert "8 images" in capsys.readouterr().err
    (one,), (other,) = read_stats(some), read_stats(every)
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-3)


def test_another_training_is_not_taken_up(world, tmp_path):
    out = run_training(quick(world), tmp_path / "out")
    with pytest.raises(FifaError, match=r"another training.*beta: 500.0 / 1.0"):
        run_training(quick(world, beta=1.0), out)
    with pytest.raises(FifaError, match="holds no training"):
        run_training(quick(world), world)


def test_a_dry_run_tells_what_it_takes_and_writes_nothing(world, tmp_path):
    train = quick(world, epochs=3, batch=2, draws=5)
    plan = plan_training(train, tmp_path / "out")
    assert (plan.pairs, plan.steps, plan.scalars) == (4, 6, 2 * 4 * 5)
    text = str(plan)
    for words in ("epochs      3.00", "cache", "memory", "precomputed scalars on 5 draws"):
        assert words in text
    assert not (tmp_path / "out").exists()


def test_too_little_memory_is_told_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr(job_module, "free_bytes", lambda device: 1000)
    monkeypatch.setattr(ModelFolder, "model", lambda *a, **k: pytest.fail("loaded"))
    with pytest.raises(FifaError, match="too little memory"):
        run_training(quick(world), tmp_path / "out")


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(world, tmp_path, monkeypatch):
    unbroken = run_training(quick(world, steps=2), tmp_path / "unbroken")
    loop = assemble(quick(world, steps=4, save_every=1), tmp_path / "broken")
    forward = type(loop).forward
    calls = []

    def broken(self, part):
        loss, told = forward(self, part)
        calls.append(part)
        bad = math.nan if len(calls) > 4 else 1.0  # from the third step on, two parts a step
        return loss * bad, told * bad

    monkeypatch.setattr(type(loop), "forward", broken)
    with pytest.raises(FifaError, match="loss is not finite in step 3"):
        loop.run()
    assert [path.name for path in (tmp_path / "broken" / "state").iterdir()] == ["step-000002"]
    kept = weights_of_state(tmp_path / "broken", 2)
    assert furthest(kept, weights_of_state(unbroken, 2)) == 0.0
    assert all(torch.isfinite(value).all() for value in loop.state.weights().values())


def weights_of_state(out, step):
    state = torch.load(out / "state" / f"step-{step:06d}" / "state.pt", weights_only=True)
    return state["weights"]


@pytest.mark.parametrize(
    ("optimizer", "knobs"),
    [
        ("adamw", {"log_every": 4}),
        ("adamw", {"draws": 2, "order": "stages:2", "order_by": "implicit", "ema": 0.9}),
        ("adamw", {"lora_dropout": 0.5, "time_range": (0.1, 0.9)}),
        ("adafactor", {"ema": 0.9}),
    ],
    ids=str,
)
def test_an_interrupted_training_ends_with_the_same_weights(
    optimizer, knobs, world, tmp_path, monkeypatch
):
    train = quick(world, steps=5, save_every=2, optimizer=optimizer, **knobs)
    whole = assemble(train, tmp_path / "whole")
    whole.run()
    parts = assemble(train, tmp_path / "parts")
    step = type(parts).step

    def stopped(self, number, *more):
        if number == 3:
            raise KeyboardInterrupt
        return step(self, number, *more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(type(parts), "step", stopped)
        parts.run()
    again = assemble(train, tmp_path / "parts")
    assert again.run().step == 5
    for kind in ("weights", "averaged"):
        one, other = (getattr(loop.state, kind)() for loop in (whole, again))
        assert furthest(one, other) == 0.0
    lines = [[line["loss"] for line in read_stats(tmp_path / name)] for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_the_average_is_what_is_written(world, tmp_path):
    loop = assemble(quick(world, steps=4, ema=0.99), tmp_path / "out")
    expected = [value.clone() for value in loop.state.average.values]
    step, passed = type(loop).step, []

    def watched(self, number, *more):
        told = step(self, number, *more)
        decay = min(0.99, (2 + number) / (11 + number))
        for value, parameter in zip(expected, self.state.average.parameters, strict=True):
            value.mul_(decay).add_(parameter.detach(), alpha=1 - decay)
        passed.append(number)
        return told

    type(loop).step, kept = watched, step
    try:
        loop.run()
    finally:
        type(loop).step = kept
    assert passed == [0, 1, 2, 3]
    averaged = list(loop.state.averaged().values())
    for value, found in zip(expected, averaged, strict=True):
        assert torch.allclose(value, found, atol=1e-7)
    assert furthest(loop.state.weights(), loop.state.averaged()) > 0


def test_average_gives_weights_back_bit_for_bit():
    weight = torch.nn.Parameter(torch.randn(50))
    before = weight.detach().clone()
    average = Average([weight], 0.9)
    average.values[0].add_(1.0)
    with average.in_place():
        assert not torch.equal(weight, before)
    assert torch.equal(weight, before)


def test_learning_rates_warm_up_and_decay():
    train = replace(quick_knobs(), lr=1.0, warmup=4, schedule="constant")
    assert [learning_rate(train, s, 8) for s in range(8)] == [0.25, 0.5, 0.75, 1.0, 1, 1, 1, 1]
    linear = replace(train, schedule="linear", warmup=0)
    assert [learning_rate(linear, s, 4) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    cosine = replace(train, schedule="cosine", warmup=2)
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * s / 4)) for s in range(4)]
    assert [learning_rate(cosine, s, 6) for s in range(6)] == pytest.approx(expected)


def quick_knobs():
    from trainings import QUICK

    return QUICK


def test_micro_batches_and_checkpointing_change_nothing_but_rounding(world, tmp_path):
    # Adam divides by a gradient's size, so rounding counts in units of the learning rate
    train = quick(world, micro_batch=4, lr=1e-4)
    base = weights_of(run_training(train, tmp_path / "base"))
    far = furthest(base, weights_of(run_training(replace(train, seed=1), tmp_path / "far")))
    assert far > 1e-4
    for number, knobs in enumerate(
        (
            {"micro_batch": 1},
            {"micro_batch": 3},
            {"gradient_checkpointing": True},
            {"channels_last": True},
        )
    ):
        other = weights_of(run_training(replace(train, **knobs), tmp_path / str(number)))
        assert furthest(base, other) < 1e-5


@pytest.fixture
def count_graphs(monkeypatch):
    """The graphs that a training compiles, which is as it is but for the code of kernels."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))

    def count(train, out):
        torch._dynamo.reset()
        counters.clear()
        run_training(train, out)
        return counters["stats"]["unique_graphs"]

    yield count
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # which torch hides
def test_only_steps_are_compiled(count_graphs, world, tmp_path):
    alone = quick(world, compile=True, micro_batch=4, holdout=0.2, steps=1)
    often = replace(alone, steps=3, validate_every=1, sample_every=1, sample_steps=1)
    assert count_graphs(often, tmp_path / "often") == count_graphs(alone, tmp_path / "alone") > 0


def test_the_folders_own_weights_enter_the_loss(world, tmp_path):
    from tiny_diffusion import write_pairs

    write_pairs(tmp_path / "weighted.parquet", weight=[2.0, 0.0, 1.0, 1.0])
    train = replace(quick(world), source=str(tmp_path / "weighted.parquet"))
    weighed = run_training(train, tmp_path / "a")
    plain = run_training(replace(train, weights=False), tmp_path / "b")
    assert read_stats(weighed)[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert furthest(weights_of(weighed), weights_of(plain)) > 1e-5
