"""SIGKILL at random moments of scoring: resumed, it ends with the bytes of an unbroken run."""

from __future__ import annotations

import multiprocessing
import os
import random
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from tiny import Tiny, recurring

from fifa.pairs import read_pairs
from fifa.rewards.engine import EngineOptions, score_images
from fifa.shards.files import sweep

KILLS = 20


def score(data: Path, scores: Path) -> None:
    import torch

    torch.set_num_threads(1)
    sweep(scores)  # as every run does with its folder
    options = EngineOptions(batch=4, workers=2, shard=8)
    model = Tiny(seconds=0.003)
    score_images(read_pairs(data / "pairs.parquet"), model, folder=scores, options=options)


@pytest.fixture(scope="module")
def start():
    """Processes that are there at once: forked from one that has loaded everything, run nothing."""
    context = multiprocessing.get_context("forkserver")
    loaded = ["torch", "fifa.rewards.engine", "fifa.pairs.read", "rich.progress", "pytest"]
    context.set_forkserver_preload([*loaded, "hypothesis", "tiny", "test_engine_kill"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        forkserver.ensure_running()

    def begin(*arguments):
        process = context.Process(target=score, args=arguments)
        process.start()
        return process

    return begin


@pytest.fixture
def folder(tmp_path):
    """In memory where that is possible: 43 runs would wait for the disk most of their time."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def finish(process) -> None:
    process.join(60)
    assert process.exitcode == 0


def timed(start, data: Path, scores: Path) -> float:
    begun = time.monotonic()
    finish(start(data, scores))
    return time.monotonic() - begun


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_twenty_kills_at_random_moments_change_nothing(folder, start):
    recurring(folder / "data", pairs=100, images=50)
    duration = min(timed(start, folder / "data", folder / f"unbroken-{i}") for i in range(3))
    expected = contents(folder / "unbroken-0")
    assert sorted(name.partition("-")[0] for name in expected) == [
        "images",
        "margin",
        "prompts",
        "unreadable",
    ]
    draw = random.Random(0)
    interrupted = 0
    for number in range(KILLS):
        scores = folder / f"killed-{number}"
        process = start(folder / "data", scores)
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        interrupted += contents(scores) != expected
        finish(start(folder / "data", scores))
        assert contents(scores) == expected
    assert interrupted >= KILLS // 2


def test_one_run_killed_again_and_again_gets_done(folder, start):
    recurring(folder / "data", pairs=100, images=50)
    duration = timed(start, folder / "data", folder / "unbroken")
    draw = random.Random(1)
    for _ in range(4):
        process = start(folder / "data", folder / "chain")
        time.sleep(draw.uniform(0.2, 0.5) * duration)
        process.kill()
        process.join()
    finish(start(folder / "data", folder / "chain"))
    assert contents(folder / "chain") == contents(folder / "unbroken")
