"""A search for the knobs of a training: what is tried, for how long, and what decides."""

import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from trainings import quick

from fifa.cli import cli
from fifa.config import Generate, Train, Tune
from fifa.errors import FifaError
from fifa.reporting.tune import PAGE, tune_text
from fifa.run import tune as module
from fifa.run.tune import tune
from fifa.shards.files import write_table
from fifa.training.search import rungs_of, searched, settings_of

TRAIN = Train(source="pairs", model="model", lr=1e-5, beta=5000.0)


def test_what_is_searched():
    over = searched(("lr=1e-6..1e-4", "beta=500", "2000", "5000"), TRAIN)
    assert over == {"lr": (1e-6, 1e-4), "beta": ("500", "2000", "5000")}
    spans = searched(("lr", "beta"), TRAIN)
    assert spans == {"lr": pytest.approx((1e-6, 1e-4)), "beta": (500.0, 50000.0)}
    settings = settings_of(over, TRAIN, 10)
    assert settings[0] == {"lr": 1e-5, "beta": 5000.0}  # as planned
    assert settings == settings_of(over, TRAIN, 10)
    # each third of each range is tried as often as the others
    rates = [one["lr"] for one in settings[1:]]
    parts = np.floor((np.log10(rates) + 6) / 2 * 9)
    assert sorted(parts) == list(range(9))
    assert sorted(one["beta"] for one in settings[1:]) == [500.0] * 3 + [2000.0] * 3 + [5000.0] * 3
    lists = searched(("beta=500,5000", "loss=ipo", "kto"), TRAIN)
    every = settings_of(lists, TRAIN, 9)
    assert [tuple(one.values()) for one in every] == [
        *((5000.0, "sigmoid"), (500.0, "ipo"), (500.0, "kto"), (5000.0, "ipo"), (5000.0, "kto")),
    ]


@pytest.mark.parametrize(
    ("over", "told"),
    [
        (("seed=1", "2"), "cannot search 'seed'"),
        (("nonsense",), "cannot search 'nonsense'"),
        (("sft",), "sft has no values"),
        (("lr=1e-4..1e-6",), "no range: lr=1e-4..1e-6"),
        (("lr=0..1",), "no range"),
        (("lr=a..b",), "no range"),
        (("lr=1e-6..1e-4", "3"), "no range"),
        (("rank=4..16",), "rank takes whole numbers"),
        (("lr=nan",), "lr: "),
        (("beta=-1",), "beta: Input should be greater than 0"),
        (("lr", "lr"), "lr twice"),
        ((), "no knob"),
    ],
)
def test_what_cannot_be_searched_is_told(over, told):
    with pytest.raises(FifaError, match=told):
        searched(over, TRAIN)


def test_every_rung_has_its_share_of_the_budget():
    assert rungs_of(9, 360, 10_000) == [(9, 20), (3, 80)]
    assert rungs_of(27, 810, 10_000) == [(27, 10), (9, 40), (3, 130)]
    assert rungs_of(2, 100, 40) == [(2, 40)]  # never past the training's end
    with pytest.raises(FifaError, match="17 steps are too few for 9 trials"):
        rungs_of(9, 17, 100)


def ask(world, **knobs):
    train = quick(world, holdout=0.4, steps=40, lr=0.02, schedule="linear", draws=2)
    return Tune(over=("lr=0.001..0.1",), budget=24, trials=4, train=train, **knobs)


def test_a_search_that_is_killed_goes_on_and_the_best_is_a_recipe(world, tmp_path, monkeypatch):
    asked, real, calls = ask(world), module.run_training, []

    def dies(*given):  # before every part of a training
        calls.append(given)
        if len(calls) % 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(module, "run_training", dies)
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            tune(asked, tmp_path / "killed")
    # four trials have come to step 3; in a copy the two that go on begin again, from no state
    shutil.copytree(tmp_path / "killed", tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "trials")
    with pytest.raises(KeyboardInterrupt):
        tune(asked, tmp_path / "killed")
    again = tune(asked, tmp_path / "killed")
    assert len(calls) == 12
    monkeypatch.setattr(module, "run_training", real)
    best = tune(asked, tmp_path / "whole")
    for name in ("trials.parquet", "best.yaml"):
        assert (again.parent / name).read_bytes() == (best.parent / name).read_bytes()
    rows = pq.read_table(best.parent / "trials.parquet").to_pylist()
    assert sorted(row["rung"] for row in rows) == [1] * 4 + [2] * 2
    assert {row["steps"] for row in rows if row["rung"] == 2} == {9}
    by_place = sorted((row for row in rows if row["place"]), key=lambda row: row["place"])
    assert [row["place"] for row in by_place] == [1, 2, 3, 4]
    assert [row["rung"] for row in by_place] == [2, 2, 1, 1]
    assert all(row["judged_by"] == "held-out pairs" for row in by_place)
    assert Train.from_yaml(best) == replace(asked.train, lr=by_place[0]["lr"])
    assert not list((best.parent / "trials").iterdir())
    monkeypatch.setattr(module, "run_training", None)
    assert tune(asked, tmp_path / "killed") == again  # finished: nothing is trained

    (tmp_path / "asked.yaml").write_text(asked.to_yaml(), "utf-8")
    given = ["tune", "--recipe", str(tmp_path / "asked.yaml"), "--out", str(tmp_path / "killed")]
    done = CliRunner().invoke(cli, given)
    assert done.stdout.strip() == str(again)
    assert "held-out loss" in done.stderr
    assert f"\n{by_place[0]['trial']}" in done.stderr
    done = CliRunner().invoke(cli, [*given, "--budget", "50%"])
    assert "another search" in str(done.exception)
    assert "budget: 24 / 0.5" in str(done.exception)


def test_images_decide_among_the_last_and_what_diverges_is_last(world, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red fox\n", "utf-8")
    asked = replace(ask(world), over=("lr=1e30,0.01", "loss=sigmoid"), budget=9, trials=3)
    asked = replace(asked, images=Generate(steps=2, width=64, height=64, device="cpu"))

    def brighter(prompts, images):
        return np.array([np.asarray(image).mean() for image in images], np.float32)

    with pytest.raises(FifaError, match="both --prompts and --scorer"):
        tune(asked, tmp_path / "out", judges={"brightness": brighter})
    asked = replace(asked, prompts=str(tmp_path / "prompts.txt"))
    best = tune(asked, tmp_path / "out", judges={"brightness": brighter})
    rows = pq.read_table(best.parent / "trials.parquet").to_pylist()
    places = {row["lr"]: row for row in rows}
    assert places[1e30]["place"] == 3
    assert {row["loss"] for row in rows} == {"sigmoid"}  # of a trial; its measure has its own name
    assert places[1e30]["heldout_loss"] is None
    assert places[1e30]["judged_by"] == "held-out pairs"
    sound = [places[lr] for lr in (0.02, 0.01)]
    assert {row["judged_by"] for row in sound} == {"brightness"}
    first, second = sorted(sound, key=lambda row: row["place"])
    assert (first["place"], second["place"]) == (1, 2)
    assert first["reward"] >= second["reward"]
    text = tune_text(best.parent)
    assert "diverged" in text
    assert text.endswith("the best one by brightness")
    assert "is the best one by brightness" in (best.parent / "tune.html").read_text("utf-8")
    for loss, told in ((0.7, True), (0.69, False)):  # weights that have not moved have log 2
        known = [row | {"heldout_loss": loss} if row["place"] == 1 else row for row in rows]
        write_table(best.parent / "trials.parquet", pa.Table.from_pylist(known))
        assert ("is no lower than" in tune_text(best.parent)) == told
        again = CliRunner().invoke(cli, ["report", str(best.parent)], catch_exceptions=False)
        assert again.stdout == f"{best.parent / PAGE}\n"
        assert ("is no lower than" in (best.parent / PAGE).read_text("utf-8")) == told
    older = [
        {"loss" if name == "heldout_loss" else name: row[name] for name in row} for row in rows
    ]
    write_table(best.parent / "trials.parquet", pa.Table.from_pylist(older))
    with pytest.raises(FifaError, match=r"earlier version .* no heldout_loss"):
        CliRunner().invoke(cli, ["report", str(best.parent)], catch_exceptions=False)


def test_what_cannot_be_compared_is_told_before_anything_is_trained(world, tmp_path):
    asked = ask(world)
    for wrong, told in (
        (replace(asked, train=replace(asked.train, holdout=0.0)), "no pairs are held out"),
        (replace(asked, budget=3), "3 steps are too few for 4 trials"),
        (replace(asked, scorer="pickscore"), "both --prompts and --scorer"),
        (replace(asked, train=replace(asked.train, source="nowhere")), "no Parquet files"),
    ):
        with pytest.raises(FifaError, match=told):
            tune(wrong, tmp_path / "out")
    assert not (tmp_path / "out" / "tune.yaml").exists()
