"""What a selection keeps by people's own verdicts, and how many labels a margin needs.

    python scripts/measure_people.py --pickapic ../shared/data/pickapic_val500/pairs.parquet
    python scripts/measure_people.py --gallery ../shared/data/hpdv2_gallery

Tables of docs/study.md, with 95 % intervals: 1,000 resamples of the prompts, in each of which the
pairs are selected again from what was drawn, every arm from the same.

`--pickapic`: pairs with the scores of five public models. One of them selects; the kept labels are
compared with that one, and with the committee of the other four.

`--gallery`: rankings by ten people, and the images. The labels of one person are filtered by a
margin that was cross-fitted on that person's labels, and the kept ones compared with the majority
of the other nine; each of the ten in turn. Then the learning curve: a proxy that is fitted to some
labels, each by a person drawn for it, against the majority of all ten on prompts it has not seen.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import rankdata

import fifa
from fifa.config import Reward
from fifa.data.table import Pairs
from fifa.scoring.encoders import prompt_embeddings
from fifa.scoring.rewards.features import Features, frozen_features
from fifa.scoring.rewards.fit import comparisons, crossfit_rewards, fit_head
from fifa.scoring.rewards.head import prompt_folds
from fifa.scoring.rewards.metrics import wilson
from fifa.scoring.table import Scores
from measure_margins import SCORERS

ARMS: dict[str, dict[str, Any]] = {
    "FiFA": {},
    "margin alone": {"alpha": 0.0, "gamma": 0.0},
    "margin + quality": {"gamma": 0.0},
    "margin + diversity": {"alpha": 0.0},
    "consensus": {"strategy": "consensus"},
    "FiFA, greedy diversity": {"strategy": "farthest"},
    "margin, 50th to 90th percentile": {
        "alpha": 0.0,
        "gamma": 0.0,
        "margin_percentiles": (50.0, 90.0),
    },
    "middle margin": {"strategy": "middle"},
    "low margin": {"strategy": "low"},
    "random": {"strategy": "random"},
}
RESAMPLES = 1000
LABELS = (5, 10, 20, 50, 100, 200, 400, 800)

Array = np.ndarray


def orders_of(pairs: Pairs, scores: Scores, folder: Path) -> dict[str, Array]:
    """Of every arm the rows of the eligible pairs, the first to be kept first."""
    vectors = prompt_embeddings(pairs, "minilm", folder)
    return {arm: order_of(pairs, scores, knobs, vectors) for arm, knobs in ARMS.items()}


def order_of(pairs: Pairs, scores: Scores, knobs: dict[str, Any], vectors: Array) -> Array:
    """The rows of the eligible pairs, the first to be kept first."""
    chosen = fifa.select(pairs, scores, keep=1.0, anyway=True, embeddings=vectors, **knobs)
    rank = chosen["rank"].to_numpy(zero_copy_only=False).astype(float)
    return np.argsort(np.where(np.isnan(rank), np.inf, rank), kind="stable")[
        : int(np.sum(~np.isnan(rank)))
    ]


def drawn_weights(prompt: Array, rng: np.random.Generator) -> Array:
    """How often each pair is in each resample of the prompts, [1 + resamples, pairs].

    The first row is the data set as it is.
    """
    count = prompt.max() + 1
    times = [np.bincount(rng.integers(0, count, count), minlength=count) for _ in range(RESAMPLES)]
    return np.stack([np.ones(count, int), *times])[:, prompt]


def share_right(weights: Array, order: Array, right: Array, keep: int) -> Array:
    """In every resample, the share of the first ``keep`` pairs that are right (NaN: nobody knows).

    float64 [1 + resamples].
    """
    there = weights[:, order]
    before = np.cumsum(there, 1) - there
    kept = np.clip(keep - before, 0, there) * ~np.isnan(right[order])
    known = np.maximum(kept.sum(1), 1)
    shares: Array = (kept * np.nan_to_num(right[order])).sum(1) / known
    return shares


def by_chance(weights: Array, order: Array, right: Array, keep: int, seed: int) -> Array:
    """`share_right` of random pairs, another draw in every resample; the first is the mean."""
    rng = np.random.default_rng(seed)
    there = weights[:, order]
    known = ~np.isnan(right[order])
    shares = np.empty(len(there))
    for i, times in enumerate(there):
        rows = rng.permutation(np.repeat(np.arange(len(order)), times))[:keep]
        rows = np.flatnonzero(known) if i == 0 else rows[known[rows]]
        shares[i] = right[order][rows].mean() if len(rows) else np.nan
    return shares


def interval(values: Array, kept: int = 0) -> str:
    """The first value and the 95 % interval of the others, as percentages.

    With ``kept`` it is a share of so many pairs, which has Wilson's interval where all of them are
    right in every resample; without, a difference.
    """
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    if kept and low == high:
        low, high = wilson(values[0] * kept, kept)
    sign = "" if kept else "+"
    return f"{100 * values[0]:{sign}.1f} ({100 * low:{sign}.0f} to {100 * high:{sign}.0f})"


def print_arms(shares: dict[str, dict[str, Array]], heads: Sequence[str], kept: int) -> None:
    """A row an arm, two columns a head: the share, and how much that is over random pairs."""
    print("| arm | " + " | ".join(f"{head} | over random" for head in heads) + " |")
    print("|---|" + "---|" * 2 * len(heads))
    for arm, found in shares.items():
        cells = []
        for head in heads:
            over = found[head] - shares["random"][head]
            cells += [interval(found[head], kept), "" if arm == "random" else interval(over)]
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print(flush=True)


def pickapic(source: Path, selects: str, budgets: Sequence[float], folder: Path) -> None:
    """One scorer selects; it and the committee of the other four judge the kept labels."""
    pairs = fifa.read_pairs(source)
    label, prompt = (pairs.table[name].to_numpy() for name in ("label", "prompt_index"))
    knobs: dict[str, Any] = {"quality": "local", "diversity": "minilm", "folder": folder / "scores"}
    scores = fifa.score(pairs, margin=tuple(SCORERS.values()), **knobs)
    tables = dict(zip(SCORERS, scores.margins.items(), strict=True))
    difference = {
        name: (table["reward_0"].to_numpy() - table["reward_1"].to_numpy()).astype(float)
        for name, (_, table) in tables.items()
    }
    others = sum(d / np.sqrt(np.mean(d**2)) for n, d in difference.items() if n != selects)
    right = {
        "by the scorer that selects": agrees(difference[selects], label),
        "by the other four": agrees(others, label),
    }
    mine = replace(scores, margins=dict([tables[selects]]))
    weights = drawn_weights(prompt, np.random.default_rng(0))
    orders = orders_of(pairs, mine, folder)
    for budget in budgets:
        keep = round(budget * len(pairs))
        print(f"{selects} selects {keep} of {len(pairs)} pairs ({budget:.0%})\n")
        shares = {
            arm: {
                head: (
                    by_chance(weights, order, judge, keep, 1)
                    if arm == "random"
                    else share_right(weights, order, judge, keep)
                )
                for head, judge in right.items()
            }
            for arm, order in orders.items()
        }
        print_arms(shares, list(right), keep)


def agrees(difference: Array, label: Array) -> Array:
    """1 where a difference of rewards has the label's side, 0 where not; NaN at ties."""
    side = np.sign(np.asarray(label, float) - 0.5)
    return np.where(side == 0, np.nan, (np.sign(difference) * side + 1) / 2)


def verdicts(pairs: Pairs, rankings: Path) -> Array:
    """Every person's verdict on every pair: 1 for image 0, -1 for image 1, 0; [people, pairs]."""
    ranks: dict[tuple[str, str], list[int]] = {}
    for ranking in json.loads(rankings.read_text("utf-8")):
        by_person = np.array([person["rank"] for person in ranking["raw_annotations"]])
        for i, image in enumerate(ranking["image_path"]):
            ranks[ranking["prompt"], image] = by_person[:, i].tolist()
    columns = (pairs.table[name].to_pylist() for name in ("prompt", "image_0", "image_1"))
    rows = [np.subtract(ranks[p, b], ranks[p, a]) for p, a, b in zip(*columns, strict=True)]
    return np.sign(np.array(rows)).T


def gallery(source: Path, budgets: Sequence[float], folder: Path) -> None:
    """Each person's labels are filtered; the majority of the others judges what is kept."""
    pairs = fifa.read_pairs(source)
    prompt = pairs.table["prompt_index"].to_numpy().astype(int)
    people = verdicts(pairs, source / "test.json")
    scores = fifa.score(
        pairs, margin=(), quality="local", diversity="minilm", folder=folder / "scores"
    )
    weights = drawn_weights(prompt, np.random.default_rng(0))
    of_person = []
    for person, verdict in enumerate(people):
        own = relabelled(pairs, (verdict + 1) / 2)
        margin = crossfit_rewards(own, folder=folder, options=Reward(text="none"))
        others = people.sum(0) - verdict
        right = np.where(others == 0, np.nan, verdict == np.sign(others))
        known = replace(scores, margins={"proxy": margin})
        of_person.append((right, orders_of(own, known, folder)))
        print(f"person {person}: {np.nanmean(right):.3f} with the majority of the others")
    print()
    for budget in budgets:
        keep = round(budget * len(pairs))
        head = "right, by the other nine"
        shares: dict[str, dict[str, Array]] = {arm: {} for arm in ARMS}
        for arm in ARMS:
            found = [
                by_chance(weights, orders[arm], right, keep, 1 + i)
                if arm == "random"
                else share_right(weights, orders[arm], right, keep)
                for i, (right, orders) in enumerate(of_person)
            ]
            shares[arm][head] = np.mean(found, 0)
        print(f"{keep} of {len(pairs)} pairs ({budget:.0%}), ten people in turn\n")
        print_arms(shares, [head], keep)


def relabelled(pairs: Pairs, label: Array) -> Pairs:
    """The pairs with other labels, float [pairs]."""
    at = pairs.table.schema.get_field_index("label")
    table = pairs.table.set_column(at, "label", pa.array(label, pa.float32()))
    return Pairs(table, pairs.prompts, origin=pairs.origin)


def learning_curve(source: Path, repeats: int, folder: Path) -> None:
    """How good the margin of a proxy is that has seen some people's labels."""
    pairs = fifa.read_pairs(source)
    prompt = pairs.table["prompt_index"].to_numpy().astype(int)
    people = verdicts(pairs, source / "test.json")
    majority = (np.sign(people.sum(0)) + 1) / 2
    options = Reward(text="none")  # with 29 prompts nothing is learned from them
    features, _ = frozen_features(pairs, options, folder)
    weights = drawn_weights(prompt, np.random.default_rng(0))
    which = np.random.default_rng(1).integers(0, repeats, len(weights))  # a repeat a resample
    print("| labels | all pairs | top 10 % | area under the curve | repeats below 60 % |")
    print("|---|---|---|---|---|")
    for count in LABELS:
        logits = [
            held_out(pairs, features, people, count, repeat, options) for repeat in range(repeats)
        ]
        right = np.stack([agrees(z, majority) for z in logits])
        order = [np.argsort(-np.abs(z), kind="stable") for z in logits]
        tenth = round(0.1 * len(pairs))
        everything, top, area = (np.empty((repeats, len(weights))) for _ in range(3))
        for i in range(repeats):
            everything[i] = share_right(weights, order[i], right[i], 10 * len(pairs))
            top[i] = share_right(weights, order[i], right[i], tenth)
            mine = np.flatnonzero((which == i) | (np.arange(len(which)) == 0))
            area[i, mine] = [auc(logits[i], majority, weights[j]) for j in mine]
        resampled = np.arange(len(which))
        cells = []
        for values in (everything, top, area):
            row = values[which, resampled]  # a repeat and prompts drawn together
            row[0] = values[:, 0].mean()
            cells.append(interval(row, tenth))
        poor = int(np.sum(everything[:, 0] < 0.6))
        print(f"| {count} | " + " | ".join(cells) + f" | {poor} of {repeats} |", flush=True)


def held_out(
    pairs: Pairs, features: Features, people: Array, count: int, seed: int, options: Reward
) -> Array:
    """reward_0 - reward_1 of every pair, by a head fitted to ``count`` labels of other prompts.

    Each label is the verdict of one person, drawn for the pair; a fold's labels are drawn from all
    pairs of the other four folds. NaN where a fold has too few prompts to fit a head.
    """
    rng = np.random.default_rng(seed)
    said = people[rng.integers(0, len(people), people.shape[1]), np.arange(people.shape[1])]
    data, _ = comparisons(relabelled(pairs, (said + 1) / 2), features)
    fold = prompt_folds(pairs.prompts["prompt_id"], data.prompt, data.image, seed=seed)[data.prompt]
    logits = np.full(len(fold), np.nan)
    for k in np.unique(fold):
        rows = rng.permutation(np.flatnonzero(fold != k))[:count]
        chosen = np.isin(np.arange(len(fold)), rows)
        head = fit_head(pairs, features, data.part(chosen), replace(options, seed=seed)).head
        mine = fold == k
        logits[mine] = head.logits(features.images, features.prompts, data.part(mine))
    return logits


def auc(logits: Array, label: Array, weights: Array) -> float:
    """The chance that a pair whose image 0 is preferred has the larger logit than another."""
    rows = np.repeat(np.arange(len(logits)), weights)
    rows = rows[label[rows] != 0.5]
    first = label[rows] == 1
    ranks = rankdata(logits[rows])
    n, m = int(first.sum()), int((~first).sum())
    return float((ranks[first].sum() - n * (n + 1) / 2) / (n * m))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pickapic", type=Path)
    parser.add_argument("--gallery", type=Path)
    parser.add_argument("--selects", nargs="+", default=["PickScore", "CLIPScore"])
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.25])
    parser.add_argument("--repeats", type=int, default=20, help="of the learning curve")
    parser.add_argument("--folder", type=Path, help="keep features and scores here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        if given.pickapic:
            for selects in given.selects:
                pickapic(given.pickapic, selects, given.budgets, folder)
        if given.gallery:
            gallery(given.gallery, given.budgets, folder)
            learning_curve(given.gallery, given.repeats, folder)


if __name__ == "__main__":
    main()
