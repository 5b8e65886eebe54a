"""The one prefetcher: images are read and decoded ahead of what is to see them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from fifa.data.decode import BadImage
from fifa.data.decoders import Decoders

T = TypeVar("T")
R = TypeVar("R")

Pixels = np.ndarray
Decoded = tuple[int, "Pixels | BadImage"]
Batch = tuple[list[int], Pixels]
_END = object()  # after the last item


class Prefetch(Generic[T]):
    """The items of an iterable, made in a thread that starts at once and runs ahead.

    Parameters
    ----------
    items
        Iterated in the thread; what it raises is raised where the items are taken.
    most
        How many items may wait.
    """

    def __init__(self, items: Iterable[T], most: int) -> None:
        self._items, self._thread = iter(items), ThreadPoolExecutor(1)
        self._waiting = deque(self._next() for _ in range(most))

    def __iter__(self) -> Iterator[T]:
        while (item := self._waiting.popleft().result()) is not _END:
            self._waiting.append(self._next())
            yield item

    def close(self) -> None:
        """Stop the thread, whatever is left; without, it stops once nobody has this object."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _next(self) -> Future[Any]:
        return self._thread.submit(next, self._items, _END)


def decode_images(
    found: Iterable[tuple[int, bytes | BadImage]],
    function: Callable[[Image.Image, int], R] | Decoders[R],
    *,
    pool: ThreadPoolExecutor | None = None,
    most: int = 64,
) -> Iterator[tuple[int, R | BadImage]]:
    """What ``function`` makes of images, or the reason why there is nothing: in their order.

    Images are read in a thread of its own and decoded in a pool, ahead of whoever takes the
    results; both stop once nobody does. This loop is the only one: scoring, caching, checking,
    exporting, measuring and the report all use it.

    Parameters
    ----------
    found
        What `fifa.data.images.read` yields.
    function
        As `Decoders` take it, or `Decoders`, which stay.
    pool
        The threads that call the function; None makes a thread a core, for this loop alone.
    most
        How many images may be in memory on the way.

    Yields
    ------
    (row, what ``function`` returned, or BadImage)
    """
    decoders = function if isinstance(function, Decoders) else Decoders(function, threads=pool)
    together = decoders.together(most)
    ahead = Prefetch(map(decoders.submit, _grouped(found, together)), max(1, most // together))
    try:
        for job in ahead:
            yield from job.result()
    finally:
        ahead.close()
        if decoders is not function and pool is None:
            decoders.close()


def _grouped(items: Iterable[T], size: int) -> Iterator[list[T]]:
    waiting = iter(items)
    while group := list(islice(waiting, size)):
        yield group


def batched(
    decoded: Iterable[Decoded], most: Callable[[int, int], int], bad: dict[int, str]
) -> Iterator[Batch]:
    """Batches of images with pixels of one shape; their order depends on ``decoded`` alone.

    Parameters
    ----------
    decoded
        What `decode_images` yields.
    most
        From height and width to the images in a batch.
    bad
        Gets the reason of every image that has no pixels.
    """
    buckets: dict[tuple[int, ...], list[tuple[int, Pixels]]] = {}
    for number, pixels in decoded:
        if isinstance(pixels, BadImage):
            bad[number] = pixels.reason
            continue
        bucket = buckets.setdefault((*pixels.shape, pixels.dtype.num), [])
        bucket.append((number, pixels))
        if len(bucket) >= most(*pixels.shape[1:]):
            yield _stacked(bucket)
            bucket.clear()
    for _, bucket in sorted(buckets.items()):
        if bucket:
            yield _stacked(bucket)


def _stacked(bucket: list[tuple[int, Pixels]]) -> Batch:
    return [number for number, _ in bucket], np.stack([pixels for _, pixels in bucket])
