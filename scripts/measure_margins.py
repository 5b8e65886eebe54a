"""How often margins agree with people: the tables of docs/margin.md.

    python scripts/measure_margins.py ../shared/data/pickapic_val500/pairs.parquet

Every scorer of the source, then all of them as a committee: agreement with the people's untied
labels over all pairs and among those of largest margin, with 95 % Wilson intervals; then how
much better the committee is than each scorer on the same pairs, with a paired bootstrap.
"""

from __future__ import annotations

import argparse

import numpy as np

from fifa.data import read_pairs
from fifa.scoring.margin import CommitteeMargin, committee, margin_scores
from fifa.scoring.rewards.metrics import agreement_by_margin

SCORERS = {
    "PickScore": "column:pickscore_prob_0,pickscore_prob_1",
    "HPSv2": "column:hpsv2_0,hpsv2_1",
    "ImageReward": "column:imagereward_0,imagereward_1",
    "CLIPScore": "column:clip_0,clip_1",
    "BLIP": "column:blip_0,blip_1",
}
FRACTIONS = (1.0, 0.5, 0.25, 0.1)
RESAMPLES = 2000


def top_share(margin: np.ndarray, signed: np.ndarray, fraction: float) -> float:
    """The agreement of the ``fraction`` of largest margin."""
    n = max(1, round(fraction * len(margin)))
    kept = signed[np.argsort(-margin, kind="stable")[:n]]
    return float(np.mean((kept > 0) + 0.5 * (kept == 0)))


def gain(one: CommitteeMargin, other: CommitteeMargin, fraction: float) -> tuple[float, ...]:
    """Points of agreement that ``one`` has over ``other``, and a 95 % bootstrap interval."""
    known = ~np.isnan(one.signed_margin) & ~np.isnan(other.signed_margin)
    margins = [(m.margin[known], m.signed_margin[known]) for m in (one, other)]
    rng = np.random.default_rng(0)
    n = int(known.sum())
    drawn = []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, n, n)
        mine, theirs = (top_share(m[rows], s[rows], fraction) for m, s in margins)
        drawn.append(mine - theirs)
    mine, theirs = (top_share(m, s, fraction) for m, s in margins)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return 100 * (mine - theirs), 100 * float(low), 100 * float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    pairs = read_pairs(parser.parse_args().source)
    label = pairs.table["label"].to_numpy()
    rewards = {}
    for name, spec in SCORERS.items():
        table = margin_scores(pairs, spec)
        rewards[name] = (table["reward_0"].to_numpy(), table["reward_1"].to_numpy())
    found = {name: committee([scorer], label) for name, scorer in rewards.items()}
    found["all five"] = committee(list(rewards.values()), label)
    print(f"{len(pairs)} pairs, {int((label != 0.5).sum())} of them untied\n")
    print("| scorer | " + " | ".join(f"top {f:.0%}" if f < 1 else "all" for f in FRACTIONS) + " |")
    print("|---|" + "---|" * len(FRACTIONS))
    for name, one in found.items():
        rows = agreement_by_margin(one.signed_margin, FRACTIONS).to_pylist()
        cells = [
            f"{100 * r['share']:.1f} ({100 * r['low']:.0f}-{100 * r['high']:.0f})" for r in rows
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")
    print(f"\npairs in each: {', '.join(str(r['n']) for r in rows)}\n")
    for name in SCORERS:
        cells = [
            "{:+.1f} ({:+.1f} to {:+.1f})".format(*gain(found["all five"], found[name], f))
            for f in FRACTIONS
        ]
        print(f"| all five over {name} | " + " | ".join(cells) + " |")
    # Consensus: pairs on which every scorer agrees with the person, as a share of the untied.
    share = found["all five"].agreement
    known = share[~np.isnan(share)]
    print("\nscorers that agree with the person, share of the untied pairs:")
    for count in range(len(SCORERS) + 1):
        part = np.mean(np.round(known * len(SCORERS)) == count)
        print(f"  {count} of {len(SCORERS)}: {100 * part:.1f} %")


if __name__ == "__main__":
    main()
