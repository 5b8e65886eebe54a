"""How often the default rater's word list flags real prompts."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from fifa.scoring.raters.local import word_flags

BANDS = ((0.0, 0.1), (0.1, 0.3), (0.3, 0.5), (0.5, 1.01))


def share(name: str, prompts: list[str]) -> None:
    flagged = sum(bool(word_flags(prompt)) for prompt in prompts)
    print(f"{name:<24} {flagged:>6,} of {len(prompts):>6,}  {flagged / len(prompts):6.1%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("../shared/data/prompts"))
    folder = parser.parse_args().folder
    safety = pq.read_table(folder / "safety.parquet").to_pandas()
    share("Pick-a-Pic", pq.read_table(folder / "pickapic.parquet")["prompt"].to_pylist())
    share("PartiPrompts", safety[safety.source == "parti"].prompt.tolist())
    i2p = safety[safety.source == "i2p"]
    toxicity = i2p.prompt_toxicity.to_numpy(np.float64)
    for low, high in BANDS:
        inside = (toxicity >= low) & (toxicity < high)
        share(f"I2P, toxicity {low} to {min(high, 1)}", i2p[inside].prompt.tolist())


if __name__ == "__main__":
    main()
