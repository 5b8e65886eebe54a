"""In which order pairs come."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tiny_diffusion import write_pairs
from trainings import assemble, quick

from fifa.config import Train
from fifa.errors import FifaError
from fifa.training.order import Stream, presented

EASE = [0.1, 0.5, 0.5, 0.9, 0.0, 0.7, 0.5]


def pairs_of(stream, steps):
    return [pair for step in steps for pair, _ in stream.step(step)]


@pytest.mark.parametrize("order", ["random", "easy-first", "stages:2"])
def test_what_is_presented_is_what_the_steps_take(order):
    train = Train("pairs", "model", batch=3, steps=4, order=order)
    ease = np.arange(50.0)
    stream = Stream(50, 3, train.seed, 0, order, ease, 4)
    taken = {pair for step in range(4) for pair, _ in stream.step(step)}
    found = presented(train, 50)
    assert found == sorted(found)
    assert set(found) == taken if order == "random" else found == list(range(50))
    assert presented(train, 12) == list(range(12))


def test_random_is_what_it_has_always_been():
    assert [Stream(7, 4, 3).step(step) for step in range(4)] == [
        [(5, 0), (1, 0), (6, 0), (4, 0)],
        [(2, 0), (0, 0), (3, 0), (5, 1)],
        [(6, 1), (3, 1), (0, 1), (2, 1)],
        [(1, 1), (4, 1), (4, 2), (2, 2)],
    ]
    assert [Stream(7, 4, 3, 2).step(step, 1, 2) for step in range(6)] == [
        *([(6, 0), (4, 0)], [(3, 0), (5, 1)], [(0, 1), (2, 1)]),
        *([(4, 0), (2, 0)], [(1, 0), (6, 0)], [(0, 1), (1, 1)]),
    ]


def test_every_epoch_goes_from_one_end_to_the_other():
    for order, sign in (("easy-first", -1), ("hard-first", 1)):
        stream = Stream(7, 7, 0, order=order, ease=EASE)
        for step in range(5):
            found = stream.step(step)
            assert sorted(found) == [(pair, step) for pair in range(7)]
            assert [EASE[pair] for pair, _ in found] == sorted(EASE, key=lambda x: sign * x)
        # pairs that are equally easy come in a new order each time
        equal = {tuple(p for p in pairs_of(stream, [step]) if EASE[p] == 0.5) for step in range(20)}
        assert len(equal) > 1


def test_stages_begin_with_the_easiest_pairs():
    stream = Stream(7, 3, 0, order="stages:3", ease=EASE, steps=30)
    easiest = [3, 5, 1, 2, 6, 0, 4]
    for stage, pairs in enumerate((3, 5, 7)):
        steps = range(10 * stage, 10 * (stage + 1))
        found = Counter(pairs_of(stream, steps))
        assert set(found) == set(easiest[:pairs])
        assert max(found.values()) - min(found.values()) <= 1  # whole epochs, and one begun
    every = [item for step in range(60) for item in stream.step(step)]  # and on beyond the last
    assert len(set(every)) == len(every)  # no pair has the same noise twice
    for world in (2, 3):
        parts = [stream.step(step, rank, world) for step in range(60) for rank in range(world)]
        assert [item for part in parts for item in part] == every
    assert {d for _, d in replace(stream, pool=4).step(29)} < set(range(4))
    # more stages than steps, or than pairs
    for stages, steps in ((9, 4), (30, 30)):
        short = Stream(7, 3, 0, order=f"stages:{stages}", ease=EASE, steps=steps)
        every = [item for step in range(steps + 5) for item in short.step(step)]
        assert len(set(every)) == len(every)
        assert set(pairs_of(short, range(steps - 1, steps + 5))) == set(range(7))


def test_what_makes_a_pair_easy(world, tmp_path):
    with pytest.raises(FifaError, match="4 of 4 pairs have no margin to be ordered by"):
        assemble(quick(world, order="easy-first"), tmp_path / "a")
    write_pairs(tmp_path / "pairs.parquet", signed_margin=[0.3, -0.2, 0.1, -0.4])
    train = replace(quick(world, order="easy-first"), source=str(tmp_path / "pairs.parquet"))
    loop = assemble(train, tmp_path / "b")
    assert pairs_of(loop.stream, [0, 1]) == [3, 0, 1, 2] * 2
    loop = assemble(replace(train, order_by="implicit"), tmp_path / "c")
    with_reference = loop.source.batch([(pair, d) for pair in range(4) for d in (-1, -2, -3, -4)])
    base, _ = loop.reference(with_reference)
    gain = (base[:, 1] - base[:, 0]).view(4, 4).mean(1)
    assert loop.source.ease == pytest.approx(gain.tolist(), rel=1e-4)
    assert pairs_of(loop.stream, [0]) == gain.argsort(descending=True).tolist()
    for wrong in ("stages:0", "stages", "easy"):
        with pytest.raises(FifaError, match="order"):
            quick(world, order=wrong)
