"""Images a second that are decoded and resized, in threads and in processes, by their number.

512 x 512 JPEGs of about 70 KB become 224 x 224 pixels, as a reward model of the CLIP family sees
them; nothing computes meanwhile. What `fifa score` takes without an option is marked.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import cycle, islice

import numpy as np

from common import report
from fifa.data.decoders import Decoders, choose_decoders
from fifa.data.prefetch import decode_images
from fifa.scoring.rewards.pixels import convert_crop, prepared
from fifa.shards.pool import cores
from made import jpeg

SIDE = 224
FUNCTION = partial(prepared, partial(convert_crop, size=SIDE))
AHEAD = 256


def rate(decoders: Decoders[np.ndarray], images: Sequence[bytes], seconds: float) -> float:
    """Images a second once everybody is at work; ends the decoders."""
    list(decode_images(enumerate(images), decoders, most=AHEAD))  # starts threads and processes
    end = time.perf_counter() + seconds

    def until() -> Iterator[tuple[int, bytes]]:
        for number, data in enumerate(cycle(images)):
            if time.perf_counter() > end:
                return
            yield number, data

    begun, count = time.perf_counter(), 0
    for _ in decode_images(until(), decoders, most=AHEAD):
        count += 1
    took = time.perf_counter() - begun
    decoders.close()
    return count / took


def numbers(most: int) -> list[int]:
    """1, 2, 4, ... and ``most``."""
    doubled = [1 << i for i in range(most.bit_length()) if 1 << i < most]
    return [*doubled, most]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement")
    parser.add_argument("--workers", type=int, nargs="*", help="default: 1, 2, 4, ... to the cores")
    given = parser.parse_args(arguments)
    draw = np.random.default_rng(0)
    images = list(islice((jpeg(draw) for _ in cycle([0])), 64))
    rows: list[tuple[str, ...]] = [("workers", "threads", "processes", "of size 1/2")]
    best = {"threads": 0.0, "processes": 0.0}
    for n in given.workers or numbers(cores()):
        threads = rate(Decoders(FUNCTION, n), images, given.seconds)
        processes = rate(Decoders(FUNCTION, n, apart=True), images, given.seconds)
        half = rate(Decoders(FUNCTION, n, apart=True, least=SIDE), images, given.seconds)
        rows.append((str(n), f"{threads:.0f}", f"{processes:.0f}", f"{half:.0f}"))
        best["threads"] = max(best["threads"], threads)
        best["processes"] = max(best["processes"], processes)
    chosen = choose_decoders(FUNCTION)
    kind = "processes" if chosen.apart else "threads"
    default = rate(chosen, images, given.seconds)
    rows.append((f"default: {chosen.workers} {kind}", f"{default:.0f}", "", ""))
    report("decode", rows, default=default, **best)


if __name__ == "__main__":
    main()
