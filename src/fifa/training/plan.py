"""What a training will take, told before it takes it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.families import Family
from fifa.models.memory import free_bytes
from fifa.models.optional import require

# Bytes a trained number takes beside its weight and its gradient: AdamW keeps two float32, the
# 8-bit one two bytes, Adafactor next to nothing (a row and a column of each matrix).
OPTIMIZER_BYTES = {"adamw": 8, "adamw8bit": 2, "adafactor": 0}
FLOAT = 4
HALF = 2


@dataclass(frozen=True)
class Memory:
    """Bytes that a training holds at once on one device, activations not counted.

    Parameters
    ----------
    weights
        The denoiser's, and those of the frozen copy if there is one.
    training
        Gradients, the optimiser's state, the average.
    encoding
        All networks while the cache is made, before training.
    """

    weights: int
    training: int
    encoding: int

    @property
    def least(self) -> int:
        """What has to be there at the least."""
        return max(self.weights + self.training, self.encoding)


def numbers_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of all weights in a folder's safetensors files, by name; reads headers only.

    Raises `FifaError` for a file that is damaged.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
            shapes |= {k: tuple(v["shape"]) for k, v in header.items() if k != "__metadata__"}
        except (OSError, ValueError, KeyError, MemoryError, OverflowError) as error:
            raise FifaError(f"not a safetensors file: {error}", where=str(path)) from error
    return shapes


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """How many numbers there are in these shapes."""
    return sum(map(prod, shapes.values()))


def lora_numbers(shapes: dict[str, tuple[int, ...]], targets: tuple[str, ...], rank: int) -> int:
    """How many numbers adapters on the layers called ``targets`` have.

    A layer ``[out, in, ...]`` gets ``[rank, in, ...]`` and ``[out, rank]``.
    """
    ends = tuple(f".{target}.weight" for target in targets)
    return sum(
        rank * (shape[0] + prod(shape[1:]))
        for name, shape in shapes.items()
        if name.endswith(ends) and len(shape) >= 2
    )


def memory_of(
    train: Train,
    family: Family,
    dtype: str,
    denoiser: dict[str, tuple[int, ...]],
    encoders: int,
) -> Memory:
    """The least memory a training takes.

    Parameters
    ----------
    train, family
        The training, and the base's family.
    dtype
        What the base's weights are loaded in.
    denoiser
        Shapes of the UNet's or transformer's weights.
    encoders
        Numbers in VAE and text encoders.
    """
    whole, size = count(denoiser), FLOAT if dtype == "float32" else HALF
    if train.method == "lora":
        trained = lora_numbers(denoiser, train.targets or family.targets, train.rank)
        weights = whole * size + trained * FLOAT
    else:
        trained = whole
        weights = whole * FLOAT * (2 if needs_copy(train) else 1)
    average = FLOAT if train.ema else 0
    training = trained * (FLOAT + OPTIMIZER_BYTES[train.optimizer] + average)
    return Memory(weights, training, (whole + encoders) * size)


def memory_of_model(train: Train, dtype: str, accelerator: Any) -> tuple[Memory, int | None]:
    """The least memory that training the model takes, and what is free; nothing is loaded.

    Raises `FifaError` where there is no such model.
    """
    from fifa.training.backbones.parts import open_folder

    torch = require("torch", "train")
    folder = open_folder(train.model, accelerator.device, getattr(torch, dtype))
    shapes = {part: numbers_in(folder.path / part) for part in folder.parts}
    denoiser = shapes.pop(folder.family.part, {})
    encoders = sum(map(count, shapes.values()))
    memory = memory_of(train, folder.family, dtype, denoiser, encoders)
    return memory, free_bytes(accelerator.device)


def needs_copy(train: Train) -> bool:
    """Whether a frozen copy of the network is the reference."""
    return train.method == "full" and not train.draws and train.loss != "mapo"


@dataclass(frozen=True)
class Plan:
    """What a training will do.

    Parameters
    ----------
    pairs
        With a winner.
    dropped
        Rows that are no such pairs, by reason.
    steps, batch, processes, micro_batch
        The batch is that of all processes.
    reference
        How the reference's errors come about.
    cache
        Bytes of latents and embeddings.
    scalars
        How many errors of the reference are computed beforehand.
    memory
        The least memory of one device.
    free
        What is free there; None where that is not known.
    resolution
        Pixels a side.
    dtype
        What the denoiser computes in.
    """

    pairs: int
    dropped: dict[str, int]
    steps: int
    batch: int
    processes: int
    micro_batch: int
    reference: str
    cache: int
    scalars: int
    memory: Memory
    free: int | None
    resolution: int
    dtype: str

    def __str__(self) -> str:
        """A line a fact."""
        left_out = ", ".join(f"{n:,} {why}" for why, n in self.dropped.items())
        each = ceil(self.batch / self.processes / self.micro_batch)
        presented = self.steps * self.batch
        free = "unknown" if self.free is None else size(self.free)
        lines = [
            f"pairs       {self.pairs:,}" + (f" (left out: {left_out})" if left_out else ""),
            f"steps       {self.steps:,} of {self.batch:,} pairs: {self.processes:,} process(es), "
            f"{each:,} micro-batch(es) of up to {self.micro_batch:,} each",
            f"epochs      {presented / self.pairs:.2f} ({presented:,} pairs presented)",
            f"resolution  {self.resolution:,}, computed in {self.dtype}",
            f"reference   {self.reference}",
            f"cache       {size(self.cache)} on disk at most",
            f"memory      {size(self.memory.least)} at the least, activations come on top (weights "
            f"{size(self.memory.weights)}, gradients and optimiser {size(self.memory.training)}; "
            f"while encoding {size(self.memory.encoding)})",
            f"free        {free}",
        ]
        if self.scalars:
            lines.insert(5, f"            {self.scalars:,} errors computed before training")
        return "\n".join(lines)


def size(number: int) -> str:
    """Bytes for people: ``3.44 GB``, ``12.3 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def make_plan(
    train: Train,
    *,
    pairs: Any,
    processes: int,
    resolution: int,
    cache: int,
    memory: Memory,
    free: int | None,
    dtype: str,
) -> Plan:
    """The plan of a training on these pairs."""
    return Plan(
        pairs=len(pairs),
        dropped=pairs.dropped,
        steps=train.steps_of(len(pairs)),
        batch=train.batch,
        processes=processes,
        micro_batch=train.micro_batch,
        reference=reference_words(train),
        cache=cache,
        scalars=2 * len(pairs) * train.draws,
        memory=memory,
        free=free,
        resolution=resolution,
        dtype=dtype,
    )


def check_memory(memory: Memory, free: int | None, where: str) -> None:
    """Raise `FifaError` if even the weights do not fit."""
    if free is not None and memory.least > free:
        raise FifaError(
            f"too little memory: weights, gradients and optimiser take "
            f"{size(memory.least)} at the least, {size(free)} are free",
            where=where,
            do="--method lora, --dtype bfloat16, --draws 8 (no frozen copy), --optimizer "
            "adafactor, or shard over several devices (FSDP through accelerate)",
        )


def reference_words(train: Train) -> str:
    """How the reference's errors come about, for people."""
    if train.draws:
        return f"precomputed scalars on {train.draws:,} draws a pair"
    if train.loss == "mapo":
        return "none: MaPO needs none"
    if train.method == "lora":
        return "the same network with its adapters off, at every step"
    return "a frozen copy of the network, at every step"
