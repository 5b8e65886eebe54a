"""What the normalisation of the three terms does: the table of docs/select.md.

    python scripts/measure_normalisation.py ../shared/data/pickapic_val500/pairs.parquet

For two reward models of very different scale and every normalisation: how strongly importance
follows each term (Spearman, over the eligible pairs), and how often the kept tenth agrees with
the people's labels, with a 95 % Wilson interval.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

import fifa
from fifa.scoring.rewards.metrics import agreement

SCORERS = {
    "PickScore": "column:pickscore_prob_0,pickscore_prob_1",
    "CLIPScore": "column:clip_0,clip_1",
}
HOW = ("none", "z", "rank", "robust")
TERMS = ("margin", "quality", "diversity")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--quality", default="local")
    parser.add_argument("--diversity", default="minilm")
    parser.add_argument("--folder", type=Path, help="keep the scores here")
    given = parser.parse_args()
    pairs = fifa.read_pairs(given.source)
    terms = [t for t in TERMS if getattr(given, t, "") != "none"]
    print(f"| scorer | normalisation | {' | '.join(terms)} | agreement of the kept | prompts |")
    print("|---|---" + "|--:" * len(terms) + "|---|--:|")
    for name, spec in SCORERS.items():
        scores = fifa.score(
            pairs,
            margin=spec,
            quality=given.quality,
            diversity=given.diversity,
            folder=given.folder,
        )
        for how in HOW:
            chosen = fifa.select(pairs, scores, keep=given.keep, normalize=how)
            importance = chosen["importance"].to_numpy()
            known = ~np.isnan(importance)
            follows = [spearmanr(importance[known], chosen[t].to_numpy()[known])[0] for t in terms]
            kept = chosen["weight"].to_numpy() > 0
            found = agreement(chosen["signed_margin"].to_numpy()[kept])
            prompts = len(np.unique(pairs.table["prompt_index"].to_numpy()[kept]))
            cells = " | ".join(f"{100 * f:.0f}" for f in follows)
            share = f"{100 * found.share:.0f} % ({100 * found.low:.0f}-{100 * found.high:.0f})"
            print(f"| {name} | {how} | {cells} | {share} of {found.n} | {prompts} |")


if __name__ == "__main__":
    main()
