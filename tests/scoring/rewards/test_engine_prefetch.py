"""What runs ahead of the model: order, limits, errors, and that it stops."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
from tiny import Tiny, picture, recurring

from fifa.config import Compute
from fifa.data import decoders
from fifa.data.decode import BadImage
from fifa.data.prefetch import Prefetch, batched, decode_images
from fifa.scoring.rewards import worker
from fifa.scoring.rewards.engine import score_pairs
from fifa.scoring.rewards.pixels import square


def test_items_come_in_order_and_only_so_many_wait():
    made = []

    def items():
        for i in range(50):
            made.append(i)
            yield i

    ahead = Prefetch(items(), 3)
    time.sleep(0.1)
    assert 3 <= len(made) <= 5
    assert list(ahead) == list(range(50))


def test_an_error_is_raised_where_the_items_are_taken():
    def items():
        yield 1
        raise KeyError("lost")

    taken = []
    with pytest.raises(KeyError, match="lost"):
        taken.extend(Prefetch(items(), 2))
    assert taken == [1]


@pytest.mark.parametrize("end", ["close", "forget"])
def test_every_thread_behind_stops_once_nobody_wants_the_items(end):
    before = set(threading.enumerate())  # some of an earlier test's may be about to end
    outer = Prefetch(Prefetch(iter(int, 1), 2), 2)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    if end == "close":
        outer.close()
    del outer
    deadline = time.monotonic() + 5
    while own & set(threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not own & set(threading.enumerate())


def test_slow_images_do_not_change_the_order_or_the_batches():
    def preprocess(image, row):
        time.sleep(0.02 if image.width == 16 else 0)
        return np.zeros((3, image.height, image.width), np.uint8)

    sizes = [(16, 12), (12, 16), (12, 16)] * 5
    images = [(i, picture(i, size)) for i, size in enumerate(sizes)]
    images.insert(4, (99, BadImage("gone")))
    images.insert(7, (98, b"nothing"))
    bad = {}
    with ThreadPoolExecutor(4) as pool:
        decoded = decode_images(images, preprocess, pool=pool, most=4)
        batches = [
            (numbers, pixels.shape) for numbers, pixels in batched(decoded, lambda h, w: 4, bad)
        ]
    wide = [i for i, size in enumerate(sizes) if size == (16, 12)]
    tall = [i for i, size in enumerate(sizes) if size == (12, 16)]
    by_shape = {(3, 12, 16): wide, (3, 16, 12): tall}
    for shape, members in by_shape.items():
        own = [numbers for numbers, of in batches if of[1:] == shape]
        assert own == [members[i : i + 4] for i in range(0, len(members), 4)]
    assert bad[99] == "gone"
    assert bad[98].startswith("cannot be decoded")


class Abroad(Tiny):
    """Its images can be prepared in other processes."""

    preprocess = staticmethod(partial(square, size=8))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_scores_are_the_same_bytes_in_threads_in_processes_and_in_processes_that_die(
    tmp_path, monkeypatch
):
    pairs, _ = recurring(tmp_path / "data", pairs=60, images=40)
    pools = []

    def told(*arguments, **options):
        pools.append(decoders.choose_decoders(*arguments, **options))
        return pools[-1]

    monkeypatch.setattr(worker, "choose_decoders", told)
    for name, cores in (("threads", 2), ("processes", 8), ("dying", 8)):
        monkeypatch.setattr(decoders, "cores", lambda cores=cores: cores)
        over, number = threading.Event(), len(pools)

        def kill(over=over, number=number):  # once: an image survives no second death
            while not over.wait(0.05):
                if len(pools) > number and (alive := list(pools[-1]._processes)):
                    for process in alive:
                        os.kill(process._popen.pid, signal.SIGKILL)
                    return

        killer = threading.Thread(target=kill)
        if name == "dying":
            killer.start()
        try:
            compute = Compute(batch=4, workers=2)
            score_pairs(pairs, Abroad(), folder=tmp_path / name, compute=compute, shard=7)
        finally:
            over.set()
    assert [pool.apart for pool in pools] == [False, True, True]
    assert contents(tmp_path / "processes") == contents(tmp_path / "threads")
    assert contents(tmp_path / "dying") == contents(tmp_path / "threads")


def test_a_shard_is_read_back_while_the_next_is_on_the_device(tmp_path, monkeypatch):
    """One wait a shard, by another thread than that which gives out work; its numbers are right."""
    events, held, own = [], [], threading.main_thread()

    class Late(Abroad):
        def image_features(self, pixels):
            events.append(("launch", threading.current_thread() is own))
            return super().image_features(pixels)

    def late(tensor):
        """The numbers are only there once asked for; until then the memory holds others."""
        copy, true = torch.full_like(tensor, float("nan")), tensor.clone()
        held.append(copy)

        def wait():
            events.append(("wait", threading.current_thread() is own))
            time.sleep(0.05)
            with torch.inference_mode():
                copy.copy_(true)
            return copy

        return wait

    cpu = torch.Tensor.cpu

    def waited(tensor):
        events.append(("cpu", threading.current_thread() is own))
        return cpu(tensor)

    pairs, _ = recurring(tmp_path, pairs=60, images=40)
    compute = Compute(batch=4, workers=2)
    expected = score_pairs(pairs, Abroad(), compute=compute, shard=8)
    monkeypatch.setattr(worker, "read_back", late)
    monkeypatch.setattr(torch.Tensor, "cpu", waited)
    found = score_pairs(pairs, Late(), compute=compute, shard=8)
    assert found.equals(expected)
    counts = Counter(events)
    assert counts["wait", False] == len(held) == -(-counts["launch", True] // 2)
    # the prompts', before any image
    assert sum(counts.values()) == counts["launch", True] + counts["wait", False] + 1
    assert events[0] == ("cpu", True)


def test_batches_are_pinned_in_a_thread_ahead(tmp_path, monkeypatch):
    pinned: list[tuple[torch.Tensor, bool]] = []
    seen = []

    def pin(tensor, device):
        pinned.append((tensor.clone(), threading.current_thread() is threading.main_thread()))
        return pinned[-1][0]

    class Watched(Abroad):
        def image_features(self, pixels):
            seen.append([ahead for one, ahead in pinned if one.data_ptr() == pixels.data_ptr()])
            return super().image_features(pixels)

    monkeypatch.setattr(worker, "pinned", pin)
    pairs, _ = recurring(tmp_path, pairs=20, images=20)
    score_pairs(pairs, Watched(), compute=Compute(batch=4, workers=2))
    assert seen and seen == [[False]] * len(seen)


def test_a_scaled_decode_is_another_score(tmp_path):
    pairs, _ = recurring(tmp_path / "data")
    for fast in (False, True):
        compute = Compute(batch=4, workers=2, fast_decode=fast)
        score_pairs(pairs, Abroad(), folder=tmp_path / "scores", compute=compute)
    assert len(list((tmp_path / "scores").glob("margin-*.parquet"))) == 2
    assert len(list((tmp_path / "scores").glob("prompts-*.npy"))) == 1  # no image in them
