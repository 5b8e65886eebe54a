"""SIGKILL at random moments of a training: resumed, it ends with the bytes of an unbroken one."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest
from tiny_diffusion import write_model, write_pairs
from trainings import quick

from forked import finish, forked

KILLS = 10
KNOBS = {
    "steps": 8,
    "save_every": 3,
    "checkpoint_every": 2,
    "draws": 2,
    "lora_dropout": 0.1,
    "log_every": 2,
}


def work(world: Path, out: Path) -> None:
    import torch

    torch.set_num_threads(1)
    from fifa.training.job import run_training

    # one of every two waits for the reference's table, the other computes it at every step
    pool = {} if out.name.endswith("1") else {"draws": 0}
    run_training(quick(world, ema=0.9, prompt_dropout=0.2, **{**KNOBS, **pool}), out)


@pytest.fixture(scope="module")
def start():
    loaded = ("diffusers", "peft", "accelerate", "tiny_diffusion", "trainings", "fifa.training.job")
    return forked(work, *loaded, "fifa.training.cache")


def contents(out: Path) -> dict[str, bytes]:
    """What has to be the same: all tensors, and the statistics but for what a clock tells."""
    tensors = (*out.rglob("*.safetensors"), *out.rglob("*.pt"), *out.rglob("*.parquet"))
    found = {str(p.relative_to(out)): p.read_bytes() for p in tensors}
    clock = ("seconds", "pairs_per_second", "peak_bytes")
    for text in (out / "stats.jsonl").read_text().splitlines():
        line = {k: v for k, v in json.loads(text).items() if k not in clock}
        assert f"step {line['step']}" not in found
        found[f"step {line['step']}"] = json.dumps(line).encode()
    return found


@pytest.mark.timeout(1500)  # 22 runs of a second on an idle machine
def test_ten_kills_at_random_moments_change_nothing(memory, start):
    write_model(memory / "sd15")
    write_pairs(memory / "pairs.parquet")
    expected, durations = {}, {}
    for kind in ("0", "1"):
        begun = time.monotonic()
        finish(start(memory, memory / f"unbroken-{kind}"))
        durations[kind] = time.monotonic() - begun
        expected[kind] = contents(memory / f"unbroken-{kind}")
        assert sum(name.startswith("step ") for name in expected[kind]) == 4
        assert sum(name.startswith("checkpoints") for name in expected[kind]) == 4
    draw = random.Random(0)
    interrupted = resumed = 0
    for number in range(KILLS):
        kind = str(number % 2)
        out = memory / f"killed-{number}-{kind}"
        process = start(memory, out)
        if number % 3 == 0:  # some time after its first state, so that there is one to go on from
            while process.is_alive() and not any((out / "state").glob("step-*")):
                time.sleep(0.002)
            time.sleep(draw.uniform(0, 0.1) * durations[kind])
        else:
            time.sleep(draw.uniform(0.1, 1) * durations[kind])
        process.kill()
        process.join()
        interrupted += not (out / "train.json").exists()
        resumed += any((out / "state").glob("step-*"))
        finish(start(memory, out))
        assert contents(out) == expected[kind]
    assert interrupted >= KILLS // 2
    assert resumed >= 1
