"""Pairs that are held out: which, what is measured on them, and how a training ends by them."""

from dataclasses import replace

import pytest
import torch
from trainings import LORA, assemble, quick

from fifa.config import Train
from fifa.errors import FifaError
from fifa.evaluation.models import find_checkpoint, find_models
from fifa.training.batches import predict
from fifa.training.checkpoint import Progress
from fifa.training.holdout import COST, DRAWS, FROM, TIMES, split_pairs, steps_between, verdict
from fifa.training.job import plan_training, run_training
from fifa.training.losses import LOSSES
from fifa.training.metrics import read_stats


def test_whole_prompts_are_held_out_from_200_pairs_on():
    prompts = [f"prompt {i // 3}" for i in range(300)]
    for train in (Train(), Train(holdout=0.05)):
        taught, held = split_pairs(prompts, train)
        assert sorted(taught + held) == list(range(300))
        assert 15 <= len(held) <= 17
        assert not {prompts[i] for i in taught} & {prompts[i] for i in held}
    assert split_pairs(prompts, Train(seed=1))[1] != held
    # a prompt's place does not depend on the pairs around it
    assert {prompts[i] for i in held} == {
        prompts[::-1][i] for i in split_pairs(prompts[::-1], Train())[1]
    }
    assert split_pairs(prompts[: FROM - 1], Train())[1] == []
    assert split_pairs(prompts, Train(holdout=0.0))[1] == []
    with pytest.raises(FifaError, match="leave no pair to train on: 1 prompts"):
        split_pairs(["a"] * 4, Train(holdout=0.1))


def test_measuring_takes_a_small_part_of_a_training_unless_it_ends_it():
    for steps, held in ((12, 13), (1000, 250), (1000, 5), (50, 1000)):
        train = Train(batch=32)
        every = steps_between(train, steps, held)
        times = steps // every
        assert 1 <= times <= TIMES
        # forward passes of a pair: four a held-out pair; three a pair that is trained on
        assert times == 1 or times * 4 * held <= COST * 3 * 32 * steps
        assert steps_between(replace(train, stop=True), steps, held) == max(1, steps // TIMES)
        assert steps_between(replace(train, validate_every=3), steps, held) == 3
    assert steps_between(Train(batch=32), 1000, 5) == 100


@pytest.mark.parametrize("knobs", [{}, {"draws": 2}, {"method": "full"}, {"loss": "mapo"}])
def test_held_out_pairs_are_measured_and_not_trained_on(knobs, world, tmp_path):
    train = quick(world, holdout=0.2, steps=6, validate_every=2, log_every=5, flips=True, **knobs)
    out = run_training(train, tmp_path / "out")
    lines = {line["step"]: line for line in read_stats(out)}
    assert sorted(lines) == [2, 4, 5, 6]
    assert [step for step, line in lines.items() if "heldout_loss" in line] == [2, 4, 6]
    loop = assemble(replace(train, prompt_dropout=0.5), tmp_path / "again")
    [row] = loop.source.held
    assert row not in {
        pair for step in range(6) for part, _ in loop.parts(step, 4) for pair, _ in part
    }
    # once more by hand: the base, which no step has changed
    found = loop.holdout.measure(loop.state, 4)
    batch = loop.source.batch([(row, d) for d in DRAWS])
    assert torch.equal(batch.noisy, loop.source.batch([(row, d) for d in DRAWS]).noisy)
    with torch.no_grad():
        policy, _ = predict(loop.source.backbone, batch)
    one = torch.ones(4)
    loss = LOSSES[train.loss](train, policy, policy, batch.label, one).mean()
    assert found["heldout_loss"] == pytest.approx(float(loss), rel=1e-5)
    assert found["heldout_winner_error"] == pytest.approx(float(policy[:, 0].mean()), rel=1e-5)


def test_the_best_is_kept_and_evaluated_and_a_training_stops(world, tmp_path):
    train = quick(world, holdout=0.2, steps=40, validate_every=1, lr=0.05, stop=True, patience=2)
    train = replace(train, displacement=1e9)
    out = run_training(train, tmp_path / "out")
    losses = [line["heldout_loss"] for line in read_stats(out)]
    best = losses.index(min(losses))
    assert len(losses) == best + 3 < 40
    folder = tmp_path / "at-best"
    run_training(replace(train, stop=False, steps=best + 1), folder)
    assert (out / "best" / LORA).read_bytes() == (folder / LORA).read_bytes()
    assert (out / "best" / LORA).read_bytes() != (out / LORA).read_bytes()
    [base, model] = find_models(str(world / "sd15"), {"it": str(out)})
    assert model.path == out / "best" / LORA
    assert model.training == out
    assert find_checkpoint("last", str(out / LORA), base).path == out / LORA
    card = (out / "README.md").read_text("utf-8")
    assert f"{min(losses):.4f}, is after step {best + 1}, whose weights are in `best/`" in card


def test_a_training_that_cannot_stop_says_so(world, tmp_path):
    with pytest.raises(FifaError, match="--stop looks at held-out pairs, and none are held out"):
        plan_training(quick(world, stop=True), tmp_path / "out")


def test_why_a_training_stops():
    train = Train(stop=True, patience=2, displacement=0.02)
    held = {"heldout_winner_minus_reference": 0.01, "heldout_winner_error": 0.51}
    done = Progress(step=5).after_holdout({"heldout_loss": 0.6, **held})
    assert (done.best, done.best_step, done.worse, done.displaced) == (
        0.6,
        5,
        0,
        pytest.approx(0.02),
    )
    assert verdict(train, done) == ""
    later = replace(done, step=6).after_holdout({"heldout_loss": 0.6, **held})
    assert (later.best_step, later.worse, verdict(train, later)) == (5, 1, "")
    last = later.after_holdout({"heldout_loss": 0.7, **held})
    assert "has not fallen in 2 measurements" in verdict(train, last)
    assert verdict(replace(train, stop=False), last) == ""
    assert "2.0% above" in verdict(replace(train, displacement=0.01), done)
