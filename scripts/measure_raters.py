"""Measure the raters that ship, on prompts that were not used to build them.

    python scripts/measure_raters.py

Prints the tables of docs/quality.md. The halves are rater_data.py's: what
scripts/train_harm_head.py saw is not here, nor are near-duplicates of it. A few minutes on two
cores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from fifa.scoring.encoders import make_encoder
from fifa.scoring.raters.local import default_ratings, harm_line, load_heads, logit_ratings
from fifa.scoring.raters.logits import load_reader, precision, smollm_path
from rater_data import half, made_nonsense, near_duplicates, parti_prompts, real_prompts, safety

Array = npt.NDArray[np.float64]
Rows = npt.NDArray[np.int64]
DRAWS = 1000


def held_out_i2p() -> tuple[list[str], Array, Rows]:
    """Prompts, toxicity and near-duplicate group of the half that was not trained on."""
    rows = safety("i2p")
    prompts = [str(p) for p in rows["prompt"]]
    group = near_duplicates(make_encoder("minilm").embed(prompts))
    keep = [i for i, g in enumerate(group) if half(prompts[g]) == 1]
    toxicity = np.array(rows["prompt_toxicity"], float)[keep]
    return [prompts[i] for i in keep], toxicity, group[keep]


def auroc(low: Array, high: Array) -> float:
    truth = np.repeat([0, 1], [len(low), len(high)])
    return float(roc_auc_score(truth, np.concatenate([low, high])))


def interval(statistic: Callable[[Rows], float], groups: Rows) -> str:
    """The statistic of all rows, and its 95 % interval over resampled near-duplicate groups."""
    rng = np.random.default_rng(0)
    names, inverse = np.unique(groups, return_inverse=True)
    members = [np.flatnonzero(inverse == g) for g in range(len(names))]
    drawn = []
    for _ in range(DRAWS):
        rows = np.concatenate([members[g] for g in rng.integers(0, len(names), len(names))])
        drawn.append(statistic(rows))
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{statistic(np.arange(len(groups))):.3f} ({low:.3f} to {high:.3f})"


def flagged(table: pa.Table, flag: str) -> str:
    hits = [flag in flags.split(",") for flags in table["flags"].to_pylist()]
    return f"{100 * np.mean(hits):.1f} %"


def column(table: pa.Table, name: str) -> Array:
    return table[name].to_numpy().astype(float)


@dataclass(frozen=True)
class Rated:
    """One set of prompts, rated by the default rater and by its language model alone."""

    default: pa.Table
    alone: pa.Table


def measure_nonsense(good: Rated, bad: dict[str, Rated], ordinary: dict[str, slice]) -> None:
    print("\nnonsense against the real prompts it was made of: AUROC, and share flagged")
    print(f"{'':24} {'rating':>8} {'clarity':>8} {'flagged':>8}   alone: rating clarity")
    for kind, rated in bad.items():
        areas = [
            auroc(column(b, name), column(g, name))
            for b, g in ((rated.default, good.default), (rated.alone, good.alone))
            for name in ("rating", "clarity")
        ]
        share = flagged(rated.default, "nonsense")
        print(f"{kind:24} {areas[0]:8.3f} {areas[1]:8.3f} {share:>8}", end="   ")
        print(f"       {areas[2]:6.3f} {areas[3]:7.3f}")
    for source, rows in ordinary.items():
        some = good.default.take(pa.array(range(len(good.default))[rows]))
        print(f"real {source:19} {'':8} {'':8} {flagged(some, 'nonsense'):>8}")


def measure_detail(good: Rated, third: Rated) -> None:
    """The first third of a prompt's words settles less than the prompt."""
    for name, whole, part in (
        ("default", good.default, third.default),
        ("alone", good.alone, third.alone),
    ):
        less = column(part, "specificity") < column(whole, "specificity")
        print(f"first third of a prompt graded less specific, {name}: {100 * less.mean():.1f} %")


def measure_harm(name: str, rated: pa.Table, toxicity: Array, group: Rows) -> None:
    harm = -column(rated, "harmlessness")

    def rank(rows: Rows) -> float:
        return float(spearmanr(harm[rows], toxicity[rows]).statistic)

    def area(rows: Rows) -> float:
        low, high = harm[rows][toxicity[rows] < 0.1], harm[rows][toxicity[rows] > 0.5]
        return auroc(low, high) if len(high) else np.nan

    print(f"\nharm inside I2P, {name}: {len(rated)} prompts, {len(set(group))} groups")
    print(f"Spearman with toxicity    {interval(rank, group)}")
    print(f"AUROC > .5 against < .1   {interval(area, group)}")
    bands = {"> .5": toxicity > 0.5, "> .3": toxicity > 0.3, "< .1": toxicity < 0.1}
    for band, rows in bands.items():
        share = flagged(rated.filter(pa.array(rows)), "unsafe")
        print(f"flagged unsafe, {band}      {share} of {sum(rows)}")


def main() -> None:
    reader, encoder = load_reader(smollm_path(), *precision()), make_encoder("minilm")

    def rate(prompts: list[str]) -> Rated:
        reading = reader.read(prompts)
        return Rated(default_ratings(reading, encoder.embed(prompts)), logit_ratings(reading))

    pick, parti = real_prompts(1, 160), parti_prompts(1, 80)
    real = pick + parti
    good = rate(real)
    bad = {kind: rate(prompts) for kind, prompts in made_nonsense(real, seed=1).items()}
    ordinary = {"Pick-a-Pic": slice(len(pick)), "PartiPrompts": slice(len(pick), None)}
    measure_nonsense(good, bad, ordinary)
    measure_detail(good, rate([" ".join(p.split()[: max(1, len(p.split()) // 3)]) for p in real]))
    prompts, toxicity, group = held_out_i2p()
    rated = rate(prompts)
    measure_harm("default", rated.default, toxicity, group)
    measure_harm("alone", rated.alone, toxicity, group)
    # The harm head reads embeddings only, so more prompts cost little.
    wide = {"PartiPrompts": parti_prompts(1, 1000), "Pick-a-Pic": real_prompts(1, 2000)}
    print("\nflagged unsafe elsewhere")
    for source, some in wide.items():
        harm = harm_line(encoder.embed(some))
        alarms = harm > load_heads()["harm"]["threshold"]
        print(f"{source:24} {100 * alarms.mean():.1f} % of {len(some)}")
    benign = harm_line(encoder.embed(wide["PartiPrompts"]))
    style = auroc(benign, harm_line(encoder.embed(prompts)))
    print(f"I2P against PartiPrompts  {style:.3f} AUROC, which is style as much as harm")


if __name__ == "__main__":
    main()
