"""The demo over several seeds: how often FiFA beats the base and the random subset.

``python scripts/measure_demo.py FOLDER --seeds 10`` keeps a run a seed in FOLDER and goes on where
it was. Every seed draws another random subset, another order of training and other images; the
feedback, its scores and so FiFA's pairs are the same.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait do not spin: others work

from fifa.demo import Demo, demo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--arms", default="fifa,random")
    options = parser.parse_args()
    arms = tuple(options.arms.split(","))
    print(f"{'seed':>4}  " + "  ".join(f"{arm:>22}" for arm in arms) + "  fifa - random")
    met = 0
    for seed in range(options.seeds):
        out = options.folder / f"seed-{seed}"
        scores = options.folder / "seed-0" / "scores"
        if seed and not out.exists() and scores.is_dir():
            # the same feedback is scored once: a run finds what is named by its content
            out.mkdir(parents=True)
            for name in ("recipe.yaml", "run.json"):
                shutil.copy(options.folder / "seed-0" / name, out)
            shutil.copytree(scores, out / "scores")
        demo(out, Demo(arms=arms, seed=seed, curve=0))
        found = json.loads((out / "evaluate" / "results.json").read_text("utf-8"))
        wins = {
            c["ours"]: c["wins"]
            for c in found["comparisons"]
            if c["theirs"] == "base" and c["scale"]["name"] == "hidden utility"
        }
        told = (
            f"{wins[arm]['share']:.3f} ({wins[arm]['low']:.3f}-{wins[arm]['high']:.3f})"
            for arm in arms
        )
        ahead = wins["fifa"]["share"] - wins["random"]["share"] if "random" in wins else 0.0
        met += wins["fifa"]["share"] >= 0.70 and ahead >= 0.10
        print(
            f"{seed:>4}  " + "  ".join(f"{text:>22}" for text in told) + f"  {ahead:+.3f}",
            flush=True,
        )
    print(
        f"at least 0.70 against the base and 0.10 ahead of random: {met} of {options.seeds} seeds"
    )


if __name__ == "__main__":
    main()
