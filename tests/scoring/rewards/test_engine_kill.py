"""SIGKILL in every phase of scoring: resumed, it ends with the bytes of an unbroken run."""

from __future__ import annotations

import signal
from itertools import count
from pathlib import Path

import torch
from tiny import Tiny, recurring

from fifa.config import Compute
from fifa.data import read_pairs
from fifa.scoring.rewards.engine import score_pairs
from fifa.shards.files import sweep
from forked import die_at, finish, start

RENAME = ("os.rename", r"scores-\w+/.*")  # with which every file gets its place


def score(data: Path, scores: Path, *death: object) -> None:
    torch.set_num_threads(1)
    if death:
        die_at(*death)
    sweep(scores)  # as every run does with its folder
    how = {"compute": Compute(batch=4, workers=2), "shard": 8}
    score_pairs(read_pairs(data / "pairs.parquet"), Tiny(), folder=scores, **how)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_kill_before_any_file_is_in_its_place_changes_nothing(memory):
    data, unbroken = memory / "data", memory / "scores-unbroken"
    recurring(data, pairs=60, images=30)
    score(data, unbroken)
    expected = contents(unbroken)
    assert sorted(name.partition("-")[0] for name in expected) == [
        "images",
        "margin",
        "prompts",
        "unreadable",
    ]
    for nth in count(1):
        scores = memory / f"scores-{nth}"
        process = start(score, data, scores, *RENAME, nth)
        process.join()
        if process.exitcode == 0:  # it has fewer files
            break
        assert process.exitcode == -signal.SIGKILL
        assert contents(scores) != expected
        score(data, scores)
        assert contents(scores) == expected
    assert nth > 10


def test_one_run_killed_again_and_again_gets_done(memory):
    data, chain = memory / "data", memory / "scores-chain"
    recurring(data, pairs=100, images=50)
    score(data, memory / "scores-unbroken")
    for _ in range(4):
        finish(start(score, data, chain, *RENAME, 3), -signal.SIGKILL)
    score(data, chain)
    assert contents(chain) == contents(memory / "scores-unbroken")
