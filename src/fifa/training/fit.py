"""How many pairs go through the network at once: as many as the device has memory for.

What is drawn for a pair does not depend on it, only rounding does. So it is found anew on another
device, and remembered beside the training for the next start on the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.runtime import SHARE, even_batch, even_batches, largest_batch, release_memory
from fifa.shards.files import digest, read_json, write_json
from fifa.training.batches import LATENTS, Batch, Source
from fifa.training.checkpoint import TrainState
from fifa.training.plan import OPTIMIZER_BYTES

FIT = "device.json"


@dataclass(frozen=True)
class Fit:
    """What suits a device.

    Parameters
    ----------
    micro_batch
        Pairs a forward and backward pass.
    gradient_checkpointing
        Whether activations are computed twice.
    """

    micro_batch: int
    gradient_checkpointing: bool


def find_fit(
    train: Train,
    source: Source,
    state: TrainState,
    forward: Callable[[Batch], tuple[Tensor, Tensor]],
    out: Path,
) -> Fit:
    """What the training asks for, and for what it leaves open what its device has memory for.

    On CUDA found by trying: a forward and a backward pass at the real size, with room for the
    optimiser's state. Where not even one pair fits, activations are computed twice. On a processor
    (and with sharded weights, whose processes would have to meet in every try) it follows from the
    size of the latents alone.

    Parameters
    ----------
    train
        The training.
    source, state, forward
        Its micro-batches, what is trained, and the loss of a micro-batch.
    out
        Its folder, where what was found by trying is remembered.

    Raises
    ------
    FifaError
        Where not even one pair fits.
    """
    twice = train.offload or train.gradient_checkpointing
    if train.micro_batch is not None and twice is not None:
        return Fit(train.micro_batch, twice)
    share = -(-train.batch // state.accelerator.num_processes)
    device = source.device
    if device.type != "cuda" or state.sharded:
        area = max(h * w for h, w in map(source.encoded.shape, source.taught))
        size = 1 if state.sharded else max(1, LATENTS // area)
        return Fit(train.micro_batch or even_batch(share, size), bool(twice))
    path = out / FIT
    here = (torch.cuda.get_device_name(device), train.to_yaml(), share)
    fit = kept_fit(path, *here)
    # processes on cards of several kinds do not all know theirs, and meet in every try
    known: Any = state.accelerator.gather(torch.tensor([fit is not None], device=device))
    if fit is not None and bool(known.all()):
        state.checkpoint_gradients(fit.gradient_checkpointing)
    else:
        fit = _tried(train, source, state, forward, share)
        if state.accelerator.is_main_process:
            keep_fit(path, fit, *here)
    again = ", activations computed twice" if fit.gradient_checkpointing else ""
    echo(f"micro-batches of {fit.micro_batch:,} pairs{again}")
    return fit


def keep_fit(path: Path, fit: Fit, *here: object) -> None:
    """Remember what was found by trying, for the device and the training that ``here`` names."""
    write_json(path, {"key": digest(*here, asdict(fit)), **asdict(fit)})


def kept_fit(path: Path, *here: object) -> Fit | None:
    """What was found by trying; None for another device or training, or a damaged file."""
    try:
        known = read_json(path, "what fits the device", missing={})
    except FifaError:
        return None  # it is found again
    found = {name: known.get(name) for name in Fit.__dataclass_fields__}
    return Fit(**found) if known.get("key") == digest(*here, found) else None


def _tried(
    train: Train,
    source: Source,
    state: TrainState,
    forward: Callable[[Batch], tuple[Tensor, Tensor]],
    share: int,
) -> Fit:
    """The `Fit` of a CUDA device for a process's ``share`` of a batch, found by trying."""
    accelerator, optimizer, device = state.accelerator, state.optimizer, source.device
    shapes = {pair: source.encoded.shape(pair) for pair in source.taught}
    largest = max(shapes, key=lambda pair: shapes[pair][0] * shapes[pair][1])

    def attempt(pairs: int) -> None:
        batch = source.batch([(largest, 0)] * pairs).on(device)
        with accelerator.no_sync(state.model):
            loss, _ = forward(batch)
            accelerator.backward(loss.sum())

    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    for parameter in trained:  # held from the second micro-batch of a step on
        parameter.grad = torch.zeros_like(parameter)
    numbers = sum(parameter.numel() for parameter in trained)
    # of the optimiser, which makes it in its first step
    to_come = 0 if optimizer.state else OPTIMIZER_BYTES[train.optimizer] * numbers
    sizes = [train.micro_batch] if train.micro_batch else even_batches(share)
    given = train.offload or train.gradient_checkpointing
    twice, size = bool(given), 0
    # in the usual share of the memory; computed twice if need be; at last in whatever there is
    tries = [(False, SHARE)] * (not given) + [(True, SHARE)] * (given is not False)
    for twice, part in (*tries, (given is not False, 1.0)):
        state.checkpoint_gradients(twice)
        few = sizes if part < 1 else sizes[:1]
        size = largest_batch(attempt, few, device, reserved=to_come, share=part)
        # all processes take what the smallest of them bears
        of_all: Any = accelerator.gather(torch.tensor([size], device=device))
        size = int(of_all.min())
        if size:
            break
    optimizer.zero_grad()
    release_memory()
    if not size:
        raise FifaError(
            "out of memory with a single pair",
            where=str(device),
            do="a smaller --resolution, --method lora, --optimizer adafactor, --draws 8 (no frozen "
            "copy), or a device with more memory",
        )
    return Fit(size, twice)
