"""How well a cross-fitted proxy foretells people, beside how well people foretell each other.

    python scripts/measure_proxy.py ../shared/data/hpdv2_gallery

The folder holds rankings in HPDv2's test.json schema, with every annotator's, and the images.
`--image` compares image encoders, `--seeds` says how often the folds are drawn.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import combinations
from pathlib import Path

import numpy as np

from fifa.config import Reward
from fifa.data import read_pairs
from fifa.data.table import Pairs
from fifa.scoring.rewards.fit import crossfit_folds
from fifa.scoring.rewards.metrics import Metrics, measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--image", nargs="+", default=["efficientnet-lite0"])
    parser.add_argument("--text", default="minilm")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    pairs = read_pairs(arguments.source)
    label = pairs.table["label"].to_numpy()
    print(
        f"{len(pairs):,} pairs of {pairs.prompts.num_rows} prompts, "
        f"{int((label != 0.5).sum()):,} with a majority"
    )
    agreed, judged = human_ceiling(arguments.source / "test.json")
    print(
        f"human ceiling: {agreed / judged:.3f} "
        f"(one person against the majority of the others, {judged:,} verdicts)\n"
    )
    print(
        "encoder                  seed  accuracy  95 % interval   nll    ece: before  after  top10"
    )
    with tempfile.TemporaryDirectory() as kept:
        for image in arguments.image:
            options = Reward(image=image, text=arguments.text)
            for seed in range(arguments.seeds):
                found, raw, best = judge(pairs, options, seed, Path(kept))
                print(
                    f"{image:24} {seed:4} {found.accuracy:9.3f}  "
                    f"{found.low:.3f} to {found.high:.3f}  {found.nll:.3f} "
                    f"{raw.ece:12.3f} {found.ece:6.3f} {best:6.3f}"
                )


def judge(pairs: Pairs, options: Reward, seed: int, kept: Path) -> tuple[Metrics, Metrics, float]:
    """Metrics after and before calibration, and the accuracy in the tenth of largest margin."""
    table = crossfit_folds(pairs, seed=seed, folder=kept, options=options)
    label, prompt = (pairs.table[name].to_numpy() for name in ("label", "prompt_index"))
    logits = (table["reward_0"].to_numpy() - table["reward_1"].to_numpy()).astype(np.float64)
    found = measure(logits, label, prompt)
    raw = measure(logits * table["temperature"].to_numpy(), label, prompt)
    largest = np.argsort(-np.abs(logits), kind="stable")[: len(logits) // 10]
    return found, raw, measure(logits[largest], label[largest], prompt[largest]).accuracy


def human_ceiling(rankings: Path) -> tuple[int, int]:
    """How often one annotator agrees with the majority of the others, and of how many verdicts.

    Pairs where the others are split evenly, or the annotator ranks both alike, do not count.
    """
    agreed = judged = 0
    for ranking in json.loads(rankings.read_text("utf-8")):
        ranks = np.array([person["rank"] for person in ranking["raw_annotations"]])
        for i, j in combinations(range(ranks.shape[1]), 2):
            verdict = np.sign(ranks[:, j] - ranks[:, i])
            others = np.sign(verdict.sum() - verdict)
            counts = (verdict != 0) & (others != 0)
            agreed += int((verdict == others)[counts].sum())
            judged += int(counts.sum())
    return agreed, judged


if __name__ == "__main__":
    main()
