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
from fifa.data.images import unique_images
from fifa.data.table import PROMPTS, Origin, Pairs
from fifa.scoring.rewards.engine import tell_apart

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
        rows = len(prompt)
        columns = {
            "image_0": keys[0],
            "image_1": keys[1],
            "prompt_index": pa.array(prompt, pa.int32()),
            "image_0_ref": pa.nulls(rows, pa.string()),
            "image_1_ref": pa.nulls(rows, pa.string()),
            "file": pa.array(["train.parquet"] * rows).dictionary_encode(),
            "row": np.arange(start, start + rows),
            "swapped": pa.array(np.zeros(rows, bool)),
        }
        batches.append(pa.table(columns))
    prompts = -(-n // PAIRS_A_PROMPT)
    nothing = pa.nulls(prompts, pa.string())
    origin = Origin(format="pickapic", cells=("jpg_0", "jpg_1"))
    return Pairs(
        pa.concat_tables(batches), pa.table([nothing, nothing], schema=PROMPTS), origin=origin
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10_000_000)
    given = parser.parse_args()
    pairs = make_pairs(given.pairs)
    before = psutil.Process().memory_info().rss / 1e6
    begun = time.perf_counter()
    images, of_slot = unique_images(pairs)
    distinct = tell_apart(images, None)
    prompt = np.repeat(pairs.table["prompt_index"].to_numpy().astype(np.int64), 2)
    both = distinct.of_image[of_slot] * pairs.prompts.num_rows + prompt
    asked, of_request = np.unique(both, return_inverse=True)
    seconds = time.perf_counter() - begun
    arrays = (images.table, of_slot, distinct.first, distinct.of_image, asked, of_request)
    kept = sum(array.nbytes for array in arrays) / 1e6
    report(
        "score_index",
        [
            ("pairs", f"{given.pairs:,}"),
            ("images", f"{len(distinct):,}"),
            ("rewards to ask for", f"{len(asked):,}"),
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
