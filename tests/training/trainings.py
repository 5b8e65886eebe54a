"""Trainings of a few steps on models of a few thousand weights."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file

from fifa.config import Train, changed
from fifa.training.job import make_accelerator, make_job, make_loop
from fifa.training.loop import Loop
from fifa.training.trackers import no_track

LORA = "pytorch_lora_weights.safetensors"

# Quick, and far enough from the base for a mistake to show.
QUICK = Train(
    resolution=64,
    steps=3,
    batch=4,
    micro_batch=2,
    lr=1e-3,
    beta=500.0,
    tracker="none",
    cache_dtype="float32",
    device="cpu",
    dtype="float32",
)


def quick(world: Path, kind: str = "sd15", **knobs) -> Train:
    """A quick training on the world's pairs and model."""
    pairs, model = world / "pairs.parquet", world / kind
    return changed(QUICK, source=str(pairs), model=str(model), **knobs)


@contextmanager
def fresh_process():
    """accelerate as it is in a process that has not used it yet."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def assemble(train: Train, out: Path, step: int = 0) -> Loop:
    """A training's loop, ready to run, that writes nothing but states and statistics."""
    out.mkdir(parents=True, exist_ok=True)
    train = replace(train, checkpoint_every=0, sample_every=0)
    return make_loop(make_job(train, out, make_accelerator(train)), out, no_track)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    """The weights that a training has written."""
    file = out / LORA
    if file.exists():
        return load_file(file)
    part = next(out / name for name in ("unet", "transformer") if (out / name).is_dir())
    return load_file(part / "diffusion_pytorch_model.safetensors")


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference between two sets of weights."""
    assert one.keys() == other.keys()
    return max(float((one[k].double() - other[k].double()).abs().max()) for k in one)
