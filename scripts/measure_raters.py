"""Measure the raters that ship, on prompts that were not used to build them.

    python scripts/measure_raters.py

Prints what docs/quality.md says of nonsense and detail; scripts/measure_harm.py measures harm. The
halves are rater_data.py's: what scripts/train_harm_head.py saw is not here. A few minutes on two
cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from sklearn.metrics import roc_auc_score

from fifa.scoring.raters.local import default_ratings, logit_ratings
from fifa.scoring.raters.logits import load_reader, precision, smollm_path
from rater_data import made_nonsense, parti_prompts, real_prompts, views_of

Array = npt.NDArray[np.float64]


def auroc(low: Array, high: Array) -> float:
    truth = np.repeat([0, 1], [len(low), len(high)])
    return float(roc_auc_score(truth, np.concatenate([low, high])))


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


def main() -> None:
    reader = load_reader(smollm_path(), *precision())

    def rate(prompts: list[str]) -> Rated:
        reading = reader.read(prompts)
        return Rated(default_ratings(reading, *views_of(prompts)), logit_ratings(reading))

    pick, parti = real_prompts(1, 160), parti_prompts(1, 80)
    real = pick + parti
    good = rate(real)
    bad = {kind: rate(prompts) for kind, prompts in made_nonsense(real, seed=1).items()}
    ordinary = {"Pick-a-Pic": slice(len(pick)), "PartiPrompts": slice(len(pick), None)}
    measure_nonsense(good, bad, ordinary)
    measure_detail(good, rate([" ".join(p.split()[: max(1, len(p.split()) // 3)]) for p in real]))


if __name__ == "__main__":
    main()
