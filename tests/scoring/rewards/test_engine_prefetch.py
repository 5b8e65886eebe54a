"""What runs ahead of the model: order, limits, errors, and that it stops."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tiny import picture

from fifa.data.decode import BadImage
from fifa.data.prefetch import Prefetch, batched, decode_images


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
