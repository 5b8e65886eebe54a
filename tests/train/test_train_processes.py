"""Two processes through `accelerate launch` (gloo) against one, at the same global batch."""

import json
import os
import socket
import subprocess
import sys

from trainings import furthest, quick, weights_of

from fifa.train.job import run_training


def test_two_processes_train_as_one_does(world, tmp_path):
    # a batch of three: one process has two pairs, the other one, and both micro-batches of one
    knobs = {"batch": 3, "micro_batch": 1, "lr": 1e-4, "draws": 2, "ema": 0.9, "steps": 4}
    train = quick(world, **knobs)
    one = run_training(train, tmp_path / "one")
    (tmp_path / "train.yaml").write_text(train.to_yaml())
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
    ]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", str(free_port()), "--num_cpu_threads_per_process", "1"]
    command = ["-m", "fifa", "train", "--recipe", str(tmp_path / "train.yaml")]
    done = subprocess.run(
        [*launch, *command, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    two = tmp_path / "two"
    assert furthest(weights_of(one), weights_of(two)) < 1e-5
    assert (
        furthest(
            weights_of(one),
            weights_of(run_training(quick(world, **{**knobs, "seed": 1}), tmp_path / "other")),
        )
        > 1e-4
    )
    facts = json.loads((two / "train.json").read_text())
    assert facts["processes"] == 2
    # only the main process writes: a line a step, the numbers those of the whole batch
    lines = [
        [json.loads(line) for line in (out / "stats.jsonl").read_text().splitlines()]
        for out in (one, two)
    ]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    for mine, theirs in zip(*lines, strict=True):
        for name in ("loss", "winner_error", "loser_error", "implicit_accuracy"):
            assert abs(mine[name] - theirs[name]) < 1e-4
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
