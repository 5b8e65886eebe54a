"""Two processes (gloo) against one, at the same global batch."""

import json
import signal
import socket
import sys

import nodes
import pytest
import sharded
from accelerate.commands import launch as accelerate
from trainings import furthest, quick, weights_of

from fifa.training.job import run_training
from forked import start


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def launch(*words):
    """`accelerate launch`."""
    sys.argv = ["accelerate", *words]
    accelerate.main()


def two(function, *arguments, said):
    """Two processes with the environment that such launchers give theirs."""
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = ({"RANK": rank, "LOCAL_RANK": rank} for rank in "01")
    processes = [start(function, *arguments, said=said, **world, **rank) for rank in ranks]
    for process in processes:
        process.join(280)
    return [process.exitcode for process in processes], said.read_text()[-3000:]


def lines_of(out):
    return [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]


HELD = {"holdout": 0.2, "validate_every": 2}


def same_held_out(mine, theirs):
    """One pair is held out and measured after every second step, to the same numbers."""
    assert ("heldout_loss" in mine) == (mine["step"] % 2 == 0)
    for name in (name for name in mine if name.startswith("heldout_")):
        one, other = (line[name] for line in (mine, theirs))
        if name == "heldout_by_level":  # a list of numbers each
            assert all(one[key] == pytest.approx(other[key], abs=1e-4) for key in one)
        else:
            assert one == pytest.approx(other, abs=1e-4)


def test_two_processes_train_as_one_does(world, tmp_path):
    # a batch of three: one process has one pair, the other two
    knobs = {"batch": 3, "micro_batch": 1, "lr": 1e-4, "draws": 2, "ema": 0.9, "steps": 4}
    knobs |= {**HELD, "order": "easy-first", "order_by": "implicit"}
    train = quick(world, **knobs)
    one, out = run_training(train, tmp_path / "one"), tmp_path / "two"
    recipe, said = tmp_path / "train.yaml", tmp_path / "said"
    recipe.write_text(train.to_yaml())
    how = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    how += ["--dynamo_backend", "no", "--main_process_port", free_port(), "-m", "fifa", "train"]
    words = [*how, "--recipe", str(recipe), "--out", str(out)]
    launched = start(launch, *words, said=said, OMP_NUM_THREADS="1")
    launched.join(280)
    assert launched.exitcode == 0, said.read_text()[-3000:]
    other = run_training(quick(world, **{**knobs, "seed": 1}), tmp_path / "other")
    assert furthest(weights_of(one), weights_of(out)) < 1e-5
    assert furthest(weights_of(one), weights_of(other)) > 1e-4
    assert json.loads((out / "train.json").read_text())["processes"] == 2
    # only the main process writes: a line a step, the numbers those of the whole batch
    assert [line["step"] for line in lines_of(out)] == [1, 2, 3, 4]
    for mine, theirs in zip(lines_of(one), lines_of(out), strict=True):
        for name in ("loss", "winner_error", "loser_error", "implicit_accuracy"):
            assert mine[name] == pytest.approx(theirs[name], abs=1e-4)
        same_held_out(mine, theirs)
    assert {path.name for path in out.iterdir()} == {path.name for path in one.iterdir()}


def test_sharded_weights_train_resume_and_save_as_whole_ones_do(world, tmp_path):
    train = quick(world, steps=4, save_every=2, ema=0.9, lr=1e-4, **HELD)
    one, out = run_training(train, tmp_path / "one"), tmp_path / "two"
    (tmp_path / "train.yaml").write_text(train.to_yaml())
    sharded_training = (sharded.train, tmp_path / "train.yaml", out)
    codes, said = two(*sharded_training, 3, said=tmp_path / "said")
    assert codes == [3, 3], said
    assert [path.name for path in (out / "state").iterdir()] == ["step-000002"]
    codes, said = two(*sharded_training, said=tmp_path / "said")
    assert codes == [0, 0], said
    assert furthest(weights_of(one), weights_of(out)) < 1e-5
    for mine, theirs in zip(lines_of(one), lines_of(out), strict=True):
        for name in ("loss", "gradient_norm", "kl"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-9)
        same_held_out(mine, theirs)


def test_a_node_that_dies_ends_the_training_and_those_left_go_on(world, tmp_path):
    knobs = {"batch": 3, "micro_batch": 1, "lr": 1e-4, "draws": 2, "ema": 0.9, "steps": 6}
    train = quick(world, save_every=2, **knobs, **HELD)
    one, out = run_training(train, tmp_path / "one"), tmp_path / "two"
    recipe, said = tmp_path / "train.yaml", tmp_path / "said"
    recipe.write_text(train.to_yaml())
    # two addresses of one machine stand for two nodes, each with a process
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    world |= {"MASTER_ADDR": "127.0.0.2", "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    first = start(nodes.train, recipe, out, said=said, RANK="0", **world)
    second = start(nodes.train, recipe, out, 3, said=said, RANK="1", **world)
    second.join(280)
    assert second.exitcode == -signal.SIGKILL, said.read_text()[-3000:]
    first.join(60)  # it does not wait for ever
    assert first.exitcode == 1, said.read_text()[-3000:]
    assert "another process of this training is gone" in said.read_text()
    states = out / "state"
    assert [path.name for path in states.iterdir()] == ["step-000002"]
    # on with the machine that is left: what is drawn does not depend on how many there are
    run_training(train, out)
    assert furthest(weights_of(one), weights_of(out)) < 1e-5
    assert [line["step"] for line in lines_of(out)] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(lines_of(one), lines_of(out), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
        same_held_out(mine, theirs)
