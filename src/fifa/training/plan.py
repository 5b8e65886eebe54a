"""What a training will take, said before it takes it."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch

from fifa.config import Train
from fifa.errors import FifaError
from fifa.training.backbones.parts import open_folder, shapes_in
from fifa.training.losses import LOSSES

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

    def check(self, free: int | None, where: str) -> None:
        """Raise `FifaError` if even the weights do not fit on the device ``where``."""
        if free is not None and self.least > free:
            raise FifaError(
                f"too little memory: weights, gradients and optimiser need "
                f"at least {size(self.least)}, {size(free)} are free",
                where=where,
                do="--method lora, --dtype bfloat16, --draws 8 (no frozen copy), --optimizer "
                "adafactor, or shard over several devices (FSDP through accelerate)",
            )


def memory_of(train: Train, dtype: str) -> Memory:
    """The least memory that training the model takes; nothing is loaded.

    An adapter on a layer ``[out, in, ...]`` has ``[rank, in, ...]`` and ``[out, rank]``.

    Parameters
    ----------
    train
        The training.
    dtype
        What the base's weights are loaded in.

    Raises
    ------
    FifaError
        Where there is no such model.
    """
    folder = open_folder(train.model, torch.device("cpu"), getattr(torch, dtype))
    shapes = {part: shapes_in(folder.path / part) for part in folder.parts}
    counts = {part: sum(map(prod, found.values())) for part, found in shapes.items()}
    part = folder.family.part
    numbers, size = counts.get(part, 0), FLOAT if dtype == "float32" else HALF
    if train.method == "lora":
        ends = tuple(f".{target}.weight" for target in train.targets or folder.family.targets)
        trained = sum(
            train.rank * (shape[0] + prod(shape[1:]))
            for name, shape in shapes.get(part, {}).items()
            if name.endswith(ends) and len(shape) >= 2
        )
        weights = numbers * size + trained * FLOAT
    else:
        trained = numbers
        weights = numbers * FLOAT * (2 if needs_copy(train) else 1)
    average = FLOAT if train.ema else 0
    training = trained * (FLOAT + OPTIMIZER_BYTES[train.optimizer] + average)
    return Memory(weights, training, sum(counts.values()) * size)


def needs_copy(train: Train) -> bool:
    """Whether a frozen copy of the network is the reference."""
    return train.method == "full" and not train.draws and LOSSES[train.loss].needs_reference


@dataclass(frozen=True)
class Plan:
    """What a training will do.

    Parameters
    ----------
    train
        The training.
    pairs
        With a winner.
    dropped
        Rows that are no such pairs, by reason.
    processes
        That share the batch.
    resolution
        Pixels a side.
    dtype
        What the denoiser computes in.
    cache
        Bytes of latents and embeddings.
    memory
        The least memory of one device.
    free
        What is free there; None where that is not known.
    """

    train: Train
    pairs: int
    dropped: dict[str, int]
    processes: int
    resolution: int
    dtype: str
    cache: int
    memory: Memory
    free: int | None

    @property
    def steps(self) -> int:
        """How many steps there are in all."""
        return self.train.steps_of(self.pairs)

    @property
    def scalars(self) -> int:
        """How many errors of the reference are computed before training."""
        return 2 * self.pairs * self.train.draws

    def __str__(self) -> str:
        """A line a fact."""
        train, memory = self.train, self.memory
        dropped = ", ".join(f"{n:,} {why}" for why, n in self.dropped.items())
        presented = self.steps * train.batch
        lines = [
            f"pairs       {self.pairs:,}" + (f" (left out: {dropped})" if dropped else ""),
            f"steps       {self.steps:,} of {train.batch:,} pairs: {self.processes:,} process(es), "
            f"{self._micro_batches}",
            f"epochs      {presented / self.pairs:.2f} ({presented:,} pairs presented)",
            f"resolution  {self.resolution:,}, computed in {self.dtype}",
            f"reference   {self._reference}",
            f"cache       {size(self.cache)} on disk at most",
            f"memory      {size(memory.least)} at least, activations come on top (weights "
            f"{size(memory.weights)}, gradients and optimiser {size(memory.training)}; "
            f"while encoding {size(memory.encoding)})",
            f"free        {'unknown' if self.free is None else size(self.free)}",
        ]
        return "\n".join(lines)

    @property
    def _micro_batches(self) -> str:
        """How a batch is cut, for people."""
        size = self.train.micro_batch
        if size is None:
            return "in micro-batches as large as fit"
        each = ceil(self.train.batch / self.processes / size)
        return f"{each:,} micro-batch(es) of up to {size:,} each"

    @property
    def _reference(self) -> str:
        """How the reference's errors come about, for people."""
        if self.train.draws:
            return f"{self.scalars:,} precomputed scalars on {self.train.draws:,} draws a pair"
        if not LOSSES[self.train.loss].needs_reference:
            return f"none: the loss {self.train.loss} needs none"
        if self.train.method == "lora":
            return "the same network with its adapters off, at every step"
        return "a frozen copy of the network, at every step"


def size(number: int) -> str:
    """Bytes for people: ``3.44 GB``, ``12.3 MB``."""
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"
