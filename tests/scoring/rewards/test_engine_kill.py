"""SIGKILL at random moments of scoring: resumed, it ends with the bytes of an unbroken run."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest
from tiny import Tiny, recurring

from fifa.config import Compute
from fifa.data import read_pairs
from fifa.scoring.rewards.engine import score_pairs
from fifa.shards.files import sweep
from forked import finish, forked

KILLS = 20


def score(data: Path, scores: Path) -> None:
    import torch

    torch.set_num_threads(1)
    sweep(scores)  # as every run does with its folder
    how = {"compute": Compute(batch=4, workers=2), "shard": 8}
    model = Tiny(seconds=0.003)
    score_pairs(read_pairs(data / "pairs.parquet"), model, folder=scores, **how)


@pytest.fixture(scope="module")
def start():
    loaded = (
        "fifa.scoring.rewards.engine",
        "fifa.data.read",
        "rich.progress",
        "hypothesis",
        "tiny",
    )
    return forked(score, *loaded)


def timed(start, data: Path, scores: Path) -> float:
    begun = time.monotonic()
    finish(start(data, scores))
    return time.monotonic() - begun


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_twenty_kills_at_random_moments_change_nothing(memory, start):
    recurring(memory / "data", pairs=100, images=50)
    duration = min(timed(start, memory / "data", memory / f"unbroken-{i}") for i in range(3))
    expected = contents(memory / "unbroken-0")
    assert sorted(name.partition("-")[0] for name in expected) == [
        "images",
        "margin",
        "prompts",
        "unreadable",
    ]
    draw = random.Random(0)
    interrupted = 0
    for number in range(KILLS):
        scores = memory / f"killed-{number}"
        process = start(memory / "data", scores)
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        interrupted += contents(scores) != expected
        finish(start(memory / "data", scores))
        assert contents(scores) == expected
    assert interrupted >= KILLS // 2


def test_one_run_killed_again_and_again_gets_done(memory, start):
    recurring(memory / "data", pairs=100, images=50)
    duration = timed(start, memory / "data", memory / "unbroken")
    draw = random.Random(1)
    for _ in range(4):
        process = start(memory / "data", memory / "chain")
        time.sleep(draw.uniform(0.2, 0.5) * duration)
        process.kill()
        process.join()
    finish(start(memory / "data", memory / "chain"))
    assert contents(memory / "chain") == contents(memory / "unbroken")
