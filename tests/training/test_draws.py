from collections import Counter

import pytest
import torch

from fifa.training.batches import draw_pair, micro_batches
from fifa.training.order import Stream

SHAPE = (4, 3, 5)


def draw(seed=0, pair="a", d=0, dropout=0.0):
    def time(generator):
        return torch.randint(0, 1000, (), generator=generator)

    return draw_pair(seed, pair, d, time, SHAPE, dropout)


def numbers(one):
    return [one.no_prompt, int(one.time), one.noise.tolist(), one.posterior.tolist()]


def test_a_draw_is_a_function_of_seed_pair_and_number():
    assert numbers(draw()) == numbers(draw())
    others = [draw(seed=1), draw(pair="b"), draw(d=1)]
    for other in others:
        assert not torch.equal(draw().noise, other.noise)
    assert draw().noise.shape == SHAPE
    assert draw().posterior.shape == (2, *SHAPE)
    assert not torch.equal(draw().posterior[0], draw().posterior[1])


def test_dropping_prompts_changes_nothing_else():
    kept, dropped = draw(dropout=0.0), draw(dropout=1.0)
    assert (kept.no_prompt, dropped.no_prompt) == (False, True)
    assert numbers(kept)[1:] == numbers(dropped)[1:]
    share = sum(draw(d=d, dropout=0.2).no_prompt for d in range(2000)) / 2000
    assert share == pytest.approx(0.2, abs=0.03)


def test_the_times_of_a_pool_are_spread_over_the_schedule():
    times = torch.tensor([float(draw(pair=str(i)).time) for i in range(2000)])
    assert times.mean() == pytest.approx(499.5, abs=30)
    assert times.std() == pytest.approx(288.7, abs=20)


def test_an_epoch_presents_every_pair_once():
    stream = Stream(pairs=10, batch=4, seed=3)
    seen = [item for step in range(5) for item in stream.step(step)]
    assert Counter(seen) == Counter((pair, epoch) for pair in range(10) for epoch in (0, 1))
    first, second = [pair for pair, _ in seen[:10]], [pair for pair, _ in seen[10:]]
    assert first != second
    assert first != list(range(10))


def test_a_step_longer_than_the_data_set_goes_on_with_the_next_epoch():
    assert Counter(Stream(pairs=3, batch=7, seed=0).step(0)) == Counter(
        [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), *Stream(3, 1, 0).step(6)]
    )


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_processes_share_a_step_without_overlap(world):
    stream = Stream(pairs=10, batch=6, seed=3)
    for step in range(6):
        parts = [item for rank in range(world) for item in stream.step(step, rank, world)]
        assert parts == stream.step(step)


def test_a_pool_repeats_its_draws():
    stream = Stream(pairs=2, batch=2, seed=0, pool=3)
    assert [stream.step(step)[0][1] for step in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_micro_batches_hold_one_shape_and_lose_nothing():
    shapes = [(8, 8), (8, 8), (4, 16), (8, 8), (4, 16), (8, 8)]
    items = [(pair, 0) for pair in range(6)]
    parts = micro_batches(items, lambda pair: shapes[pair], 2)
    assert [[pair for pair, _ in part] for part in parts] == [[0, 1], [2, 4], [3, 5]]
