"""What `--fast-decode` does to scores, and what it saves.

    python scripts/measure_fast_decode.py ../shared/data/hpdv2_gallery

The folder holds pairs with their images. On each, a proxy is trained from several sizes of its
input, and the same images are scored in full and decoded to a part of their size. The smaller the
input, the more such images are like larger ones before a model of 224 pixels.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from fifa.config import Reward
from fifa.data import read_pairs
from fifa.data.decode import open_image
from fifa.data.images import read, unique_images
from fifa.scoring.rewards import score
from fifa.scoring.rewards.fit import train_reward

GAPS = (1, 2, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 128, 224])
    given = parser.parse_args()
    pairs = read_pairs(given.source)
    images, of_slot = unique_images(pairs)
    data = {row: found for row, found in read(images) if isinstance(found, bytes)}
    at = {row: i for i, row in enumerate(data)}
    known = np.array([[at.get(row, -1) for row in both] for both in of_slot.reshape(-1, 2)])
    known = known[(known >= 0).all(1)]
    print("input  at least  decoded to  error / spread  other sign  decoding, of the time in full")
    for side in given.sides:
        with tempfile.TemporaryDirectory() as folder:
            options = Reward(image=f"efficientnet-lite0:{side}", text="none")
            model = train_reward(pairs, Path(folder) / "proxy", options).load()
            full, plain = difference(model, list(data.values()), known, 0)
            for gap in GAPS:
                fast, seconds = difference(model, list(data.values()), known, gap * side)
                wide = open_image(next(iter(data.values())), gap * side).width
                error = np.sqrt(np.mean((fast - full) ** 2) / np.mean(full**2))
                other = np.mean(np.sign(fast) != np.sign(full))
                print(
                    f"{side:5}  {gap:6} x  {wide:10}  {error:14.4f}  {other:10.4f}  "
                    f"{seconds / plain:10.2f}"
                )


def difference(model, data, known, least):
    """The rewards' differences of pairs, and the seconds that decoding took."""
    begun = time.process_time()
    pictures = [open_image(one, least) for one in data]
    seconds = time.process_time() - begun
    rewards = np.concatenate(
        [
            score(model, [""] * len(pictures[i : i + 32]), pictures[i : i + 32])
            for i in range(0, len(pictures), 32)
        ]
    )
    return rewards[known[:, 0]] - rewards[known[:, 1]], seconds


if __name__ == "__main__":
    main()
