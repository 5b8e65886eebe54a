"""How stable trainings are in the Moji world, by the pairs and the loss; what each loss buys.

    python scripts/measure_stability.py --out /tmp/stability --workers 2

Two tables, judged by the hidden utility, which nothing is selected or trained by, on the same
prompts and the same noise for every checkpoint. `stability`: FiFA's subset, as many random pairs
and all pairs, each with three losses and five seeds. `losses`: FiFA's subset with more labels
flipped than the annotators got wrong, and every loss. A seed draws the random pairs, the flips,
what is held out, the order and the noise, so losses are compared under the same of all of these.

What has been trained is kept training by training: the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import io
import multiprocessing
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from safetensors.torch import load_file
from scipy.stats import chi2, t

import fifa
from fifa.config import RECIPE_FILE, Demo, Train
from fifa.console import echo
from fifa.data.table import Pairs, load_pairs
from fifa.demo import ARMS, filter_feedback, test_prompts
from fifa.moji.family import SD, generate, load_sd
from fifa.moji.judges import moji_judges
from fifa.run.folder import open_run
from fifa.run.steps import load_scores
from fifa.shards.files import digest, write_table
from fifa.shards.ledger import Ledger
from fifa.training.checkpoint import CHECKPOINTS
from fifa.training.holdout import split_pairs
from fifa.training.metrics import read_stats

LOSSES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "SDPO": {"sdpo": 0.9},
    "adaptive beta": {"beta_target": 1.4},
    "DPOP": {"dpop": 1.0},
    "KTO": {"loss": "kto"},
    "Poly": {"loss": "poly"},
    "IPO": {"loss": "ipo"},
}
STABLE = ("sigmoid", "SDPO", "adaptive beta")  # of the first table
FLIPS = (0.0, 0.2, 0.4)
STEPS = {"stability": 96, "losses": 48}  # of a training
EVERY = {"stability": 12, "losses": 24}  # steps between two evaluations
KNOBS = Train(
    method="full",
    batch=8,
    micro_batch=8,
    lr=5e-5,
    beta=1000.0,
    device="cpu",
    dtype="float32",
    cache_dtype="float32",
    tracker="none",
)
SIZE = 150  # pairs of FiFA's subset, and of the random one
HELD = 0.3  # of the pairs of the second table, which are SIZE / (1 - HELD)
PROMPTS = test_prompts(Demo(prompts=16, unsafe=0))  # as many seen as unseen scenes, one image each
SAMPLER = {"steps": 10, "guidance": 1.0}

Utility = Callable[[Path], float]


@dataclass(frozen=True)
class Group:
    """Trainings on the same pairs with the same seed: they share cache and reference."""

    table: str
    pairs: str
    flip: float
    seed: int

    @property
    def losses(self) -> tuple[str, ...]:
        """Those of its table."""
        return STABLE if self.table == "stability" else tuple(LOSSES)

    @property
    def train(self) -> Train:
        """The training, but for its loss.

        A pool of draws is as large as there are epochs, or larger: it is the same as new draws.
        """
        steps, every = STEPS[self.table], EVERY[self.table]
        train = replace(
            KNOBS, steps=steps, checkpoint_every=every, seed=self.seed, save_every=steps
        )
        if self.table == "losses":
            return replace(train, holdout=HELD, validate_every=steps, draws=3)
        return replace(train, holdout=0.0, draws=1 if self.pairs == "full" else 8)

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.table}-{self.pairs}-{self.flip:g}-{self.seed}"

    def key(self, loss: str) -> str:
        """Names a training, and all that its row depends on."""
        settings = [self.train.to_yaml(), LOSSES[loss], SIZE, PROMPTS, SAMPLER]
        return f"{self.name}-{loss.replace(' ', '-')}-{digest(settings)}"


def groups(seeds: int, loss_seeds: int) -> list[Group]:
    """All of them, seed by seed, so that what is there early is a whole."""
    arms = ("full", "fifa", "random")
    stable = [Group("stability", arm, 0.0, seed) for seed in range(seeds) for arm in arms]
    return stable + [
        Group("losses", "fifa", flip, seed) for seed in range(loss_seeds) for flip in FLIPS
    ]


def export_group(group: Group, out: Path) -> Path:
    """A run folder with the pairs of a group as its subset."""
    folder = out / "pairs" / group.name
    if not (folder / "subset" / "subset.json").exists():
        run = open_run(out / "feedback")
        keep = round(SIZE / (1 - group.train.holdout))
        select = replace(run.recipe.select, keep=keep, seed=group.seed)
        select = replace(select, **ARMS[group.pairs])
        pairs, scores = load_pairs(run.folder), load_scores(run)
        selection = fifa.select(pairs, scores, select)
        pairs = flipped(pairs, selection, group)
        recipe = replace(run.recipe, select=select)
        fifa.export(pairs, selection, scores, folder / "subset", recipe=recipe)
    for name in ("run.json", RECIPE_FILE):
        shutil.copy(out / "feedback" / name, folder)
    return folder


def flipped(pairs: Pairs, selection: pa.Table, group: Group) -> Pairs:
    """With the labels of some pairs turned round, of those that are selected and trained on."""
    if not group.flip:
        return pairs
    chosen = selection.filter(pc.equal(selection["status"], "selected"))["pair_id"]
    rows = np.flatnonzero(pc.is_in(pairs.table["pair_id"], value_set=chosen.combine_chunks()))
    taught, _ = split_pairs(pairs.table["prompt"].take(rows).to_pylist(), group.train)
    draw = np.random.default_rng(group.seed)
    wrong = draw.choice(rows[taught], round(group.flip * len(taught)), replace=False)
    label = pairs.table["label"].to_numpy().copy()
    label[wrong] = 1 - label[wrong]
    place = pairs.table.column_names.index("label")
    return replace(pairs, table=pairs.table.set_column(place, "label", pa.array(label)))


def run_group(group: Group, out: Path) -> str:
    """Train and evaluate what is missing of a group: a row a training, kept at once."""
    ledger = Ledger(str(out / "rows"))
    known = ledger.keys()
    missing = [loss for loss in group.losses if group.key(loss) not in known]
    if missing:
        source, utility = export_group(group, out), hidden_utility()
        base = utility(SD)
        for loss in missing:
            folder = out / "trained" / group.key(loss)
            knobs = replace(group.train, **LOSSES[loss])
            trained = fifa.train(source, SD, folder, knobs)
            ledger.write(group.key(loss), row_of(group, loss, trained, utility, base))
            shutil.rmtree(folder)
        shutil.rmtree(source)
    return group.name


def hidden_utility() -> Utility:
    """What takes the folder of a checkpoint or of the base to the mean utility of its images."""
    pipe, judge = load_sd(), moji_judges()[0]
    prompts = [row["prompt"] for row in csv.DictReader(io.StringIO(PROMPTS))]

    def measure(folder: Path) -> float:
        weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
        pipe.unet.load_state_dict({k: v.float() for k, v in load_file(weights).items()})
        pictures = generate(pipe, prompts, range(len(prompts)), **SAMPLER)
        return float(judge.measure(prompts, list(map(Image.fromarray, pictures))).mean())

    return measure


def row_of(group: Group, loss: str, trained: Path, utility: Utility, base: float) -> pa.Table:
    """The row of a training: gains over the base by step, held-out pairs, seconds a step."""
    lines = read_stats(trained)
    last, places = lines[-1], sorted((trained / CHECKPOINTS).iterdir())
    row = {
        **vars(group),
        "loss": loss,
        "steps": [int(place.name.removeprefix("step-")) for place in places],
        "gain": [utility(place) - base for place in places],
        # of steps that nothing held up: the processor may be shared
        "seconds": float(np.quantile(np.diff([line["seconds"] for line in lines]), 0.25)),
        "accuracy": last.get("heldout_implicit_accuracy"),
        "displacement": last.get("heldout_winner_minus_reference"),
        "winner_error": last.get("heldout_winner_error"),
    }
    return pa.Table.from_pylist([row])


def mean(values: np.ndarray, digits: int = 3, sign: str = "+") -> str:
    """The mean with its 95 % interval by Student's t, for the table."""
    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    middle, low, high = (
        f"{value:{sign}.{digits}f}"
        for value in (values.mean(), values.mean() - half, values.mean() + half)
    )
    return f"{middle} ({low} to {high})"


def spread(values: np.ndarray) -> str:
    """The standard deviation with its 95 % interval for normal values, for the table."""
    freedom, deviation = len(values) - 1, values.std(ddof=1)
    low, high = deviation * np.sqrt(freedom / chi2.ppf([0.975, 0.025], freedom))
    return f"{deviation:.3f} ({low:.3f} to {high:.3f})"


def numbers_of(row: dict[str, Any]) -> dict[str, float]:
    """What the tables show of a training."""
    gain = np.array(row["gain"])
    best = int(gain.argmax())
    numbers = {name: row[name] for name in ("seconds", "accuracy", "displacement", "winner_error")}
    if row["displacement"] is not None:  # of the reference's error
        numbers["displacement"] /= row["winner_error"] - row["displacement"]
    fall = float(gain[best] - gain[best:].min())
    return numbers | {"final": gain[-1], "best": gain[best], "at": row["steps"][best], "fall": fall}


def by_loss(rows: list[dict[str, Any]], **same: Any) -> dict[str, dict[str, np.ndarray]]:
    """Numbers by loss and name ``[seeds]``, of the seeds that all losses have."""
    chosen = [row for row in rows if all(row[key] == value for key, value in same.items())]
    losses = [loss for loss in LOSSES if loss in {row["loss"] for row in chosen}]
    found = {(row["loss"], row["seed"]): numbers_of(row) for row in chosen}
    seeds = [
        n
        for n in sorted({row["seed"] for row in chosen})
        if all((one, n) in found for one in losses)
    ]
    return {
        loss: {
            name: np.array([found[loss, seed][name] for seed in seeds], float)
            for name in found[loss, seeds[0]]
        }
        for loss in losses
    }


def write_stability(rows: list[dict[str, Any]]) -> None:
    """Print the first table: differences are between trainings of the same seed."""
    print(
        "| pairs | loss | final gain | spread of it | best gain | at step | fall after the best |"
    )
    print("|---|---|---|---|---|---|---|")
    arms = {arm: by_loss(rows, table="stability", pairs=arm) for arm in ("fifa", "random", "full")}
    for arm, losses in arms.items():
        for loss, n in losses.items():
            cells = [arm, loss, mean(n["final"]), spread(n["final"]), mean(n["best"])]
            print("|", " | ".join([*cells, f"{n['at'].mean():.0f}", mean(n["fall"])]), "|")
    print("\n| | final gain | fall after the best |\n|---|---|---|")
    for arm, losses in arms.items():
        for loss in STABLE[1:]:
            one, other = losses[loss], losses["sigmoid"]
            cells = [mean(one[name] - other[name]) for name in ("final", "fall")]
            print("|", " | ".join([f"{loss} against sigmoid, {arm}", *cells]), "|")
    for arm in ("random", "full"):
        for loss in STABLE:
            one, other = arms["fifa"][loss], arms[arm][loss]
            cells = [mean(one[name] - other[name]) for name in ("final", "fall")]
            print("|", " | ".join([f"fifa against {arm}, {loss}", *cells]), "|")


def write_losses(rows: list[dict[str, Any]]) -> None:
    """Print the second table: what each loss buys; and its differences to sigmoid, together."""
    print("\n| flipped | loss | gain | against sigmoid | held-out accuracy, % | displacement, % |")
    print("|---|---|---|---|---|---|")
    differences: dict[str, dict[str, list[np.ndarray]]] = {}
    for flip in FLIPS:
        losses = by_loss(rows, table="losses", flip=flip)
        base = losses["sigmoid"]
        for loss, n in losses.items():
            against = {name: n[name] - base[name] for name in ("final", "accuracy", "displacement")}
            against["seconds"] = n["seconds"] / base["seconds"]
            for name, values in against.items():
                differences.setdefault(loss, {}).setdefault(name, []).append(values)
            cells = [f"{flip:.0%}", loss, mean(n["final"])]
            cells += ["" if loss == "sigmoid" else mean(against["final"])]
            cells += [mean(100 * n["accuracy"], 1, ""), mean(100 * n["displacement"], 1)]
            print("|", " | ".join(cells), "|")
    print("\n| against sigmoid | time of a step | gain | held-out accuracy, % | displacement, % |")
    print("|---|---|---|---|---|")
    for loss, found in list(differences.items())[1:]:
        n = {name: np.mean(values, axis=0) for name, values in found.items()}  # [seeds], of levels
        cells = [loss, mean(n["seconds"], 2, ""), mean(n["final"])]
        cells += [mean(100 * n[name], 1) for name in ("accuracy", "displacement")]
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5, help="of the table of stability")
    parser.add_argument("--loss-seeds", type=int, default=3, help="of the table of losses")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    filter_feedback(given.out / "feedback", Demo())
    every = groups(given.seeds, given.loss_seeds)
    spawn = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    with spawn.Pool(given.workers, maxtasksperchild=1) as pool:
        for name in pool.imap_unordered(partial(run_group, out=given.out), every, chunksize=1):
            echo(name)
    ledger = Ledger(str(given.out / "rows"))
    tables = [ledger.read(group.key(loss)) for group in every for loss in group.losses]
    table = pa.concat_tables(tables, promote_options="permissive")
    write_table(given.out / "trainings.parquet", table)
    if given.seeds:
        write_stability(table.to_pylist())
    if given.loss_seeds:
        write_losses(table.to_pylist())


if __name__ == "__main__":
    main()
