"""What finding each image and prompt of 10M pairs once costs: seconds, and memory beside the pairs.

The pairs are Pick-a-Pic's in shape (14 a prompt, 8 images each, keys of 36 characters).
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import psutil
import pyarrow as pa

from common import peak_mb, report
from fifa.data.table import PROMPTS, Pairs
from fifa.scoring.rewards.dedup import ask, image_keys

PAIRS_A_PROMPT = 14
IMAGES_A_PROMPT = 8


def make_pairs(n: int) -> Pairs:
    """The columns that matter, a million rows at a time."""
    draw = np.random.default_rng(0)
    batches = []
    for start in range(0, n, 1_000_000):
        prompt = np.arange(start, min(n, start + 1_000_000)) // PAIRS_A_PROMPT
        images = (
            prompt * IMAGES_A_PROMPT + draw.integers(0, IMAGES_A_PROMPT, len(prompt))
            for _ in range(2)
        )
        keys = [pa.array([f"{image:036d}" for image in side.tolist()]) for side in images]
        names = ["image_0", "image_1", "prompt_index"]
        batches.append(pa.table([*keys, pa.array(prompt, pa.int32())], names=names))
    prompts = -(-n // PAIRS_A_PROMPT)
    nothing = pa.nulls(prompts, pa.string())
    return Pairs(pa.concat_tables(batches), pa.table([nothing, nothing], schema=PROMPTS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    given = parser.parse_args()
    pairs = make_pairs(given.pairs)
    before = psutil.Process().memory_info().rss / 1e6
    begun = time.perf_counter()
    asked = ask(pairs, image_keys(pairs), None)
    seconds = time.perf_counter() - begun
    arrays = (asked.first, asked.of_key, asked.image, asked.prompt, asked.of_slot, asked.images)
    kept = sum(array.nbytes for array in arrays) / 1e6
    report(
        "score_index",
        [
            ("pairs", f"{given.pairs:,}"),
            ("images", f"{len(asked.images):,}"),
            ("rewards to ask for", f"{len(asked.image):,}"),
            ("seconds", f"{seconds:.1f}"),
            ("MB kept", f"{kept:.0f}"),
            ("MB at most, beside the pairs", f"{peak_mb() - before:.0f}"),
        ],
        seconds=seconds,
        kept_mb=kept,
        peak_mb=peak_mb(),
    )


if __name__ == "__main__":
    main()
