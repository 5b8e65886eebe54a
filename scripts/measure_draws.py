"""Does training on a pool of draws follow training on new noise every epoch?

    python scripts/measure_draws.py --figure docs/images/draws.png

moji-sd, a LoRA, the first pairs of moji-feedback with a winner. Three seeds each of the online
run (new noise and time every epoch, the reference at every step) and of runs whose draws come from
a pool of 8, 4 and 1 a pair, with the reference's errors computed before. Every checkpoint is then
measured on draws that no run has seen: the loss and the implicit accuracy on the training pairs,
and on pairs that were held out. Prints the table and draws the first of them.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from fifa import train
from fifa.config import Train
from fifa.moji.family import FEEDBACK, SD
from fifa.training.backbones import load_backbone
from fifa.training.batches import Source, predict
from fifa.training.cache import encode
from fifa.training.checkpoint import LORA_FILE
from fifa.training.losses import LOSSES, logits
from fifa.training.pairs import read_training_pairs

WHERE = ("trained on", "held out")  # pairs to look at
KNOBS = Train(
    model=str(SD),
    resolution=32,
    batch=16,
    micro_batch=16,
    rank=8,
    lr=3e-4,
    beta=500.0,
    tracker="none",
    device="cpu",
    dtype="float32",
    log_every=1000,
)
UNSEEN = 12_345  # the seed of the draws that checkpoints are measured on
EYES = 4  # draws a pair to measure on


def write_pairs(folder: Path, count: int) -> tuple[Path, Path]:
    """The first ``count`` untied pairs to train on, and the next as many to look at."""
    table = pq.read_table(FEEDBACK)
    table = table.filter(pc.not_equal(table["label_0"], 0.5))
    parts = folder / "seen.parquet", folder / "held.parquet"
    for number, path in enumerate(parts):
        part = table.slice(number * count, count)
        ids = pa.array([f"{path.stem}-{i}" for i in range(len(part))])
        names = ("jpg_0", "jpg_1", "label_0", "label_1", "caption")
        pq.write_table(part.select(names).append_column("pair_id", ids), path)
    return parts


class Eye:
    """Measures checkpoints on fixed draws of some pairs."""

    def __init__(self, pairs: Path, folder: Path) -> None:
        self.train = replace(KNOBS, seed=UNSEEN)
        self.pairs = read_training_pairs(pairs)
        self.base = load_backbone(SD)
        self.encoded = encode(self.pairs, self.base, folder / "eye", resolution=32)
        self.reference = self.errors(self.base)

    def errors(self, backbone: object) -> torch.Tensor:
        """Errors of (winner, loser) on the fixed draws, ``[pairs * EYES, 2]``."""
        source = Source(self.train, backbone, self.pairs, self.encoded, torch.device("cpu"))
        items = [(pair, d) for pair in range(len(self.pairs)) for d in range(EYES)]
        parts = [items[i : i + 32] for i in range(0, len(items), 32)]
        with torch.no_grad():
            return torch.cat([predict(backbone, source.batch(part))[0] for part in parts])

    def look(self, checkpoint: Path) -> tuple[float, float]:
        """The mean loss and the implicit accuracy of a checkpoint."""
        backbone = load_backbone(SD)
        denoiser: Any = backbone.denoiser
        denoiser.load_lora_adapter(checkpoint, weight_name=LORA_FILE, prefix="unet")
        policy = self.errors(backbone)
        one = torch.ones(len(policy))
        loss = LOSSES[KNOBS.loss](KNOBS, policy, self.reference, one, one)
        z = logits(policy, self.reference, KNOBS.beta)
        return float(loss.mean()), float((z > 0).float().mean())


def measure(
    pairs: int, epochs: int, seeds: int, pools: list[int], where: Sequence[str] = WHERE
) -> tuple[dict[tuple[int, str], np.ndarray], list[int]]:
    """Loss and implicit accuracy, ``[seeds, marks, 2]``, by (pool, pairs); and the steps."""
    steps = epochs * pairs // KNOBS.batch
    every = max(1, steps // 8)
    marks = list(range(every, steps + 1, every))
    curves: dict[tuple[int, str], np.ndarray] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = dict(zip(WHERE, write_pairs(folder, pairs), strict=True))
        eyes = {name: Eye(files[name], folder) for name in where}
        for draws in pools:
            found: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in eyes}
            for seed in range(seeds):
                out = folder / f"draws-{draws}-{seed}"
                knobs = {"draws": draws, "seed": seed, "steps": steps, "checkpoint_every": every}
                train(files["trained on"], SD, out, KNOBS, **knobs)
                for name, eye in eyes.items():
                    at = [out / "checkpoints" / f"step-{mark:06d}" for mark in marks]
                    found[name].append([eye.look(path) for path in at])
            curves |= {(draws, name): np.array(rows) for name, rows in found.items()}
    return curves, marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draws", type=int, nargs="+", default=[0, 8, 4, 1])
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    curves, marks = measure(given.pairs, given.epochs, given.seeds, given.draws)
    names = {draws: f"pool of {draws}" if draws else "online" for draws in given.draws}
    for where in WHERE:
        print(f"\nloss on unseen draws of the pairs {where}, mean (deviation) of seeds")
        print("step".rjust(6), *(names[d].rjust(18) for d in given.draws))
        for i, mark in enumerate(marks):
            row = [curves[d, where][:, i, 0] for d in given.draws]
            cells = [f"{v.mean():.4f} ({v.std():.4f})".rjust(18) for v in row]
            print(str(mark).rjust(6), *cells)
        last = [f"{names[d]} {curves[d, where][:, -1, 1].mean():.3f}" for d in given.draws]
        print("implicit accuracy at the end:", ", ".join(last))
    if given.figure:
        draw(curves, names, marks, given.figure)


def draw(curves: dict, names: dict, marks: list[int], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), constrained_layout=True)
    for axis, where in zip(axes, WHERE, strict=True):
        for draws, name in names.items():
            rows = curves[draws, where][:, :, 0]
            low, high = rows.min(0), rows.max(0)
            (line,) = axis.plot(marks, rows.mean(0), label=name)
            axis.fill_between(marks, low, high, color=line.get_color(), alpha=0.15)
        axis.set_title(f"pairs {where}", fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylabel("loss on unseen draws")
    axes[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
