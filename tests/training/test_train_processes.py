"""Two processes through `accelerate launch` (gloo) against one, at the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from trainings import furthest, quick, weights_of

from fifa.training.job import run_training


def launch(*command):
    """Run a command in two processes; returns its exit code and what it said."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    how = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    how += ["--dynamo_backend", "no", "--main_process_port", port]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", *how, *map(str, command)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    return done.returncode, done.stderr[-3000:]


def lines_of(out):
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


def test_two_processes_train_as_one_does(world, tmp_path):
    # a batch of three: one process has one pair, the other two
    knobs = {"batch": 3, "micro_batch": 1, "lr": 1e-4, "draws": 2, "ema": 0.9, "steps": 4}
    train = quick(world, **knobs)
    one, two = run_training(train, tmp_path / "one"), tmp_path / "two"
    (tmp_path / "train.yaml").write_text(train.to_yaml())
    code, said = launch("-m", "fifa", "train", "--recipe", tmp_path / "train.yaml", "--out", two)
    assert code == 0, said
    other = run_training(quick(world, **{**knobs, "seed": 1}), tmp_path / "other")
    assert furthest(weights_of(one), weights_of(two)) < 1e-5
    assert furthest(weights_of(one), weights_of(other)) > 1e-4
    assert json.loads((two / "train.json").read_text())["processes"] == 2
    # only the main process writes: a line a step, the numbers those of the whole batch
    assert [line["step"] for line in lines_of(two)] == [1, 2, 3, 4]
    for mine, theirs in zip(lines_of(one), lines_of(two), strict=True):
        for name in ("loss", "winner_error", "loser_error", "implicit_accuracy"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.timeout(600)
def test_sharded_weights_train_resume_and_save_as_whole_ones_do(world, tmp_path):
    train = quick(world, steps=4, save_every=2, ema=0.9, lr=1e-4)
    one, two = run_training(train, tmp_path / "one"), tmp_path / "two"
    (tmp_path / "train.yaml").write_text(train.to_yaml())
    sharded = (Path(__file__).parent / "sharded.py", tmp_path / "train.yaml", two)
    code, _ = launch(*sharded, 3)
    assert code != 0
    assert [path.name for path in (two / "state").iterdir()] == ["step-000002"]
    code, said = launch(*sharded)
    assert code == 0, said
    assert furthest(weights_of(one), weights_of(two)) < 1e-5
    for mine, theirs in zip(lines_of(one), lines_of(two), strict=True):
        for name in ("loss", "gradient_norm", "kl"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-9)
