"""`fifa train` against a step that does what diffusers' train_diffusion_dpo.py does.

The architecture of Stable Diffusion 1.5 with random weights at 256 x 256, a LoRA, pairs of 512 x
512 JPEGs, several epochs, this machine's processors. The step decodes both images, sends them
through the VAE and the prompt through the text encoder, asks the UNet with its adapters off for
the reference, and trains the policy: every time, as the script does (`train_step.py`). Ours is
`fifa.train` whole, its cache included: once with the reference computed at every step, once with
its errors on a pool of draws computed before (``--draws``). Loading the weights is in no figure.
The limit is the policy's forward and backward alone. All take turns, each in its own process.

``--peer-script`` times a checkout's real train_diffusion_dpo.py as well (needs torchvision).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import peak_mb, report
from made import jpegs, write_diffusion, write_pairs


def ours(given: argparse.Namespace) -> dict[str, float]:
    """`fifa.train` from weights in memory to weights on the disk."""
    import accelerate  # noqa: F401 - imports are in no figure
    import diffusers
    import peft  # noqa: F401
    import torch
    from transformers import CLIPTextModel  # noqa: F401

    from fifa import train
    from fifa.training.backbones.parts import ModelFolder

    torch.set_num_threads(given.threads)
    _ = diffusers.UNet2DConditionModel, diffusers.AutoencoderKL
    loaded = [0.0, 0.0]
    load = ModelFolder.model

    def timed(*arguments: Any, **options: Any) -> Any:
        begun, busy = time.perf_counter(), time.process_time()
        network = load(*arguments, **options)
        loaded[0] += time.perf_counter() - begun
        loaded[1] += time.process_time() - busy
        return network

    setattr(ModelFolder, "model", timed)  # noqa: B010 - mypy knows it as a method
    with tempfile.TemporaryDirectory() as out:
        begun, busy = time.perf_counter(), time.process_time()
        train(
            given.folder / "data" / "train.parquet",
            given.folder / "model",
            out,
            resolution=given.resolution,
            batch=given.batch,
            micro_batch=given.batch,
            epochs=given.epochs,
            rank=given.rank,
            draws=given.draws if given.worker == "scalars" else 0,
            lr=1e-5,
            device="cpu",
            dtype="float32",
            tracker="none",
            save_every=10**6,
        )
        seconds, processor = time.perf_counter() - begun, time.process_time() - busy
    return {
        "seconds": seconds - loaded[0],
        "processor": processor - loaded[1],
        "peak_mb": peak_mb(),
    }


def peer(given: argparse.Namespace) -> dict[str, float]:
    """The script's loop, and how long each part of its steps took."""
    import torch

    from train_step import PeerStep

    torch.set_num_threads(given.threads)
    step = PeerStep(given.folder / "model", given.resolution, given.rank)
    return {
        **step.train(given.folder / "data" / "train.parquet", given.batch, given.epochs),
        "peak_mb": peak_mb(),
    }


def worker(name: str, given: argparse.Namespace) -> dict[str, float]:
    """Run one side in its own process; what it found."""
    told = [f"--{key}={value}" for key, value in vars(given).items() if key in PASSED]
    command = [sys.executable, __file__, f"--worker={name}", *told]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(name, json.dumps({k: round(v, 2) for k, v in found.items()}), file=sys.stderr)
    return found


PASSED = ("folder", "resolution", "batch", "epochs", "rank", "draws", "threads")


def script(given: argparse.Namespace) -> float:
    """Seconds of a step of the real script: a run of some steps less a run of one."""

    def run(steps: int) -> float:
        with tempfile.TemporaryDirectory() as out:
            options = {
                "pretrained_model_name_or_path": given.folder / "model",
                "dataset_name": given.folder / "data",
                "dataset_split_name": "train",
                "resolution": given.resolution,
                "train_batch_size": given.batch,
                "rank": given.rank,
                "max_train_steps": steps,
                "learning_rate": 1e-5,
                "output_dir": out,
                "seed": 0,
            }
            told = [f"--{name}={value}" for name, value in options.items()]
            begun = time.perf_counter()
            subprocess.run([sys.executable, given.peer_script, *told], check=True)
            return time.perf_counter() - begun

    return (run(1 + SCRIPT_STEPS) - run(1)) / SCRIPT_STEPS


SCRIPT_STEPS = 4


def compare(given: argparse.Namespace) -> None:
    write_diffusion(given.folder / "model")
    write_pairs(given.folder / "data" / "train.parquet", jpegs(2 * given.pairs))
    rounds = [
        {name: worker(name, given) for name in ("peer", "online", "scalars")}
        for _ in range(given.rounds)
    ]

    def median(name: str, what: str) -> float:
        return statistics.median(one[name][what] for one in rounds)

    shown = given.pairs * given.epochs  # pairs that are trained on
    seconds = {name: median(name, "seconds") for name in ("peer", "online", "scalars")}
    peaks = {name: max(one[name]["peak_mb"] for one in rounds) for name in seconds}
    parts = {name: median("peer", name) / shown for name in PARTS}
    limit = parts["policy"] * shown
    labels = {
        "peer": "step of train_diffusion_dpo.py",
        "online": "fifa train, reference at every step",
        "scalars": f"fifa train, {given.draws} draws a pair",
    }
    rows: list[Sequence[object]] = [("", "pairs/s", "s/pair", "peak MB", "times the step")]
    rows += [
        (
            labels[name],
            f"{shown / taken:.4f}",
            f"{taken / shown:.2f}",
            f"{peaks[name]:,.0f}",
            f"{seconds['peer'] / taken:.2f}",
        )
        for name, taken in seconds.items()
    ]
    rows.append(("policy alone", f"{shown / limit:.4f}", f"{limit / shown:.2f}", "", ""))
    if given.peer_script:
        taken = script(given) / given.batch
        times = f"{taken * shown / seconds['scalars']:.2f} slower than with draws"
        rows.append(("the script itself", f"{1 / taken:.4f}", f"{taken:.2f}", "", times))
    rows += [(f"  of the step: {name}", "", f"{parts[name]:.2f}", "", "") for name in PARTS]
    report(
        "train",
        rows,
        speedup=seconds["peer"] / seconds["online"],
        speedup_draws=seconds["peer"] / seconds["scalars"],
        speedup_processor=median("peer", "processor") / median("online", "processor"),
        speedup_draws_processor=median("peer", "processor") / median("scalars", "processor"),
        of_limit=limit / seconds["scalars"],
        of_limit_online=limit / seconds["online"],
        peak_mb=max(peaks["online"], peaks["scalars"]),
        peer_peak_mb=peaks["peer"],
    )


PARTS = ("decode", "vae", "text", "reference", "policy", "optimizer")


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4, help="pairs a step; the script's default")
    parser.add_argument("--rank", type=int, default=4, help="of the LoRA; the script's default")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1, help="turns that each takes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="keep model and data here")
    parser.add_argument("--peer-script", help="diffusers' train_diffusion_dpo.py, timed as well")
    parser.add_argument("--worker", choices=["peer", "online", "scalars"], help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(peer(given) if given.worker == "peer" else ours(given)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        given.folder = given.folder or Path(temporary)
        compare(given)


if __name__ == "__main__":
    main()
