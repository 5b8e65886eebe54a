"""Images read and decoded ahead of the model that is to see them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
from PIL import Image

from fifa.data.images import BadImage, open_image
from fifa.scoring.rewards.pixels import MAX_ASPECT

T = TypeVar("T")

Pixels = np.ndarray
Decoded = tuple[int, "Pixels | BadImage"]
Batch = tuple[list[int], Pixels]
_Waiting = tuple[bool, Any]  # (True, an item), or (False, None or the error) after the last


class Ahead(Generic[T]):
    """The items of an iterable, made in a thread that starts at once and runs ahead.

    Parameters
    ----------
    items
        Iterated in the thread; what it raises is raised where the items are taken.
    most
        How many items may wait.
    """

    def __init__(self, items: Iterable[T], most: int) -> None:
        self._waiting: queue.Queue[_Waiting] = queue.Queue(most)
        self._closed = threading.Event()
        # The thread knows nothing of this object: once nobody wants the items, both go.
        arguments = (items, self._waiting, self._closed)
        threading.Thread(target=_fill, args=arguments, daemon=True).start()

    def __iter__(self) -> Iterator[T]:
        while True:
            more, item = self._waiting.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item

    def close(self) -> None:
        """Stop the thread, whatever is left."""
        self._closed.set()

    __del__ = close


def _fill(items: Iterable[Any], waiting: queue.Queue[_Waiting], closed: threading.Event) -> None:
    last: BaseException | None = None
    try:
        for item in items:
            if not _put(waiting, closed, (True, item)):
                break
    except BaseException as error:  # raised again where the items are taken
        last = error
    _put(waiting, closed, (False, last))


def _put(waiting: queue.Queue[_Waiting], closed: threading.Event, item: _Waiting) -> bool:
    """Put an item once there is room; False if nobody wants it any more."""
    while not closed.is_set():
        try:
            waiting.put(item, timeout=0.2)
        except queue.Full:
            continue
        return True
    return False


def decode_ahead(
    images: Iterable[tuple[int, bytes | BadImage]],
    preprocess: Callable[[Image.Image], Pixels],
    pool: ThreadPoolExecutor,
    most: int,
) -> Iterator[Decoded]:
    """Pixels or the reason why there are none, in the order of ``images``.

    Parameters
    ----------
    images
        (number, bytes), read in a thread of its own.
    preprocess
        From an image to pixels ``[3, h, w]``; called in ``pool``.
    pool
        Threads are enough: Pillow lets others run while it decodes and resizes.
    most
        How many images may be in memory on the way.
    """

    def submitted() -> Iterator[Future[Decoded]]:
        for number, data in images:
            yield pool.submit(_decode, number, data, preprocess)

    for job in Ahead(submitted(), most):
        yield job.result()


def batched(
    decoded: Iterable[Decoded], most: Callable[[int, int], int], bad: dict[int, str]
) -> Iterator[Batch]:
    """Batches of images with pixels of one shape; their order depends on ``decoded`` alone.

    Parameters
    ----------
    decoded
        What `decode_ahead` yields.
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


def _decode(
    number: int, data: bytes | BadImage, preprocess: Callable[[Image.Image], Pixels]
) -> Decoded:
    if isinstance(data, BadImage):
        return number, data
    try:
        with open_image(data) as image:
            if max(image.size) > MAX_ASPECT * min(image.size):
                raise BadImage(f"{image.width:,} x {image.height:,} pixels: too long and thin")
            return number, preprocess(image)
    except BadImage as error:
        return number, error
    # Whatever else an odd image does to a model's preprocessing is that image's trouble alone.
    except (OSError, ValueError, OverflowError, ZeroDivisionError, SyntaxError) as error:
        return number, BadImage(f"cannot be preprocessed: {str(error)[:100]}")
    except MemoryError:
        return number, BadImage("cannot be preprocessed: out of memory")
