"""Does a training in bfloat16 learn what one in float32 learns?

    python scripts/measure_precision.py

A preference is read from the difference of two networks' errors that are almost the same network:
rounding is as large as that difference in the first steps. moji-sd, a LoRA, the first pairs of
moji-feedback with a winner; the same seeds train in float32 and in bfloat16. Every checkpoint is
measured in float32 on draws that no run has seen, of the pairs trained on and of held-out ones; and
once more in bfloat16, which shows how large rounding is in the logit. Prints a table a beta.
"""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState

from fifa import train
from fifa.moji.family import SD
from fifa.training.backbones import load_backbone
from fifa.training.checkpoint import LORA_FILE
from fifa.training.losses import LOSSES, logits
from measure_draws import KNOBS, WHERE, Eye, write_pairs

DTYPES = ("float32", "bfloat16")


def look(eye: Eye, checkpoint: Path, beta: float) -> list[float]:
    """Loss, accuracy, and root mean squares: the logit's, and of its rounding in bfloat16."""
    backbone = load_backbone(SD)
    denoiser: Any = backbone.denoiser
    denoiser.load_lora_adapter(checkpoint, weight_name=LORA_FILE, prefix="unet")
    found = []
    for precise in (True, False):
        cast = nullcontext() if precise else torch.autocast("cpu", torch.bfloat16)
        with cast:
            policy = eye.errors(backbone)
            reference = eye.reference if precise else eye.errors(eye.base)
        found.append(logits(policy.float(), reference.float(), beta))
        if precise:
            one = torch.ones(len(policy))
            loss = LOSSES[KNOBS.loss](replace(KNOBS, beta=beta), policy, reference, one, one)
    z, rounded = found
    size, noise = (float(x.square().mean().sqrt()) for x in (z, rounded - z))
    return [float(loss.mean()), float((z > 0).float().mean()), size, noise]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=96)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--betas", type=float, nargs="+", default=[500.0, 5000.0])
    given = parser.parse_args()
    marks = [given.steps * part // 24 for part in (1, 3, 6, 12, 24)]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        files = dict(zip(WHERE, write_pairs(folder, given.pairs), strict=True))
        eyes = {name: Eye(files[name], folder) for name in WHERE}
        for beta in given.betas:
            found = {}
            for dtype in DTYPES:
                for seed in range(given.seeds):
                    out = folder / f"{dtype}-{beta}-{seed}"
                    knobs = {"dtype": dtype, "seed": seed, "steps": given.steps, "beta": beta}
                    train(files[WHERE[0]], SD, out, KNOBS, checkpoint_every=marks[0], **knobs)
                    AcceleratorState._reset_state(reset_partial_state=True)  # of another precision
                    GradientState._reset_state()
                    for where, eye in eyes.items():
                        found[dtype, seed, where] = [
                            look(eye, out / "checkpoints" / f"step-{mark:06d}", beta)
                            for mark in marks
                        ]
            for where in WHERE:
                print(f"\nbeta {beta:,.0f}, pairs {where}: mean (deviation) of seeds")
                print(
                    "step    "
                    + "".join(f"{f'{d}: loss':>26}{'accuracy':>10}" for d in DTYPES)
                    + f"{'logit':>10}{'rounding':>10}"
                )
                for i, mark in enumerate(marks):
                    cells = [f"{mark:<8}"]
                    for dtype in DTYPES:
                        rows = torch.tensor(
                            [found[dtype, seed, where][i] for seed in range(given.seeds)]
                        )
                        mean, spread = rows.mean(0), rows.std(0)
                        cells.append(f"{mean[0]:>16.4f} ({spread[0]:.4f}){mean[1]:>10.3f}")
                    cells.append(f"{mean[2]:>10.3f}{mean[3]:>10.3f}")
                    print(" ".join(cells), flush=True)


if __name__ == "__main__":
    main()
