"""The reference's errors, without a second network in memory where that is possible.

Three ways. With adapters the reference is the same network with the adapters off. For full
fine-tuning it is a frozen copy. And with a pool of draws (``draws`` > 0) it is a table: the
noise and time of each (pair, draw) are known beforehand, so the reference's error on them is a
number for winner and loser that is computed once, before training, and kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fifa.console import note, progress
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest
from fifa.shards.files import digest, write_table
from fifa.shards.ledger import Ledger
from fifa.training.adapters import adapters_off
from fifa.training.backbones.base import Backbone
from fifa.training.batches import Batch, Source, predict
from fifa.training.draws import micro_batches

SHARD = 16  # pairs between two points where an interrupted computation goes on

Scalars = npt.NDArray[np.float32]


class Reference(Protocol):
    """Anything that knows the reference's errors."""

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Errors of (winner, loser), float32 ``[n, 2]``, and the prediction if there is one."""
        ...


@dataclass(frozen=True)
class AdaptersOff:
    """The network itself, with its adapters off.

    Parameters
    ----------
    backbone
        Its denoiser may be wrapped.
    unwrap
        From the wrapped denoiser to the one that has the adapters.
    """

    backbone: Backbone
    unwrap: Callable[[Any], Any]

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `Reference`."""
        with torch.no_grad(), adapters_off(self.unwrap(self.backbone.denoiser)):
            return predict(self.backbone, batch)


class FrozenCopy:
    """A copy of the network as it is now; takes the memory of its weights."""

    def __init__(self, backbone: Backbone, autocast: Any) -> None:
        frozen = copy.deepcopy(backbone.denoiser).eval().requires_grad_(False)
        self.backbone = backbone.with_denoiser(frozen)
        self.autocast = autocast

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `Reference`."""
        with torch.no_grad(), self.autocast():
            return predict(self.backbone, batch)


class Table:
    """Errors that were computed before training, float32 ``[pairs, draws, 2]``."""

    def __init__(self, scalars: Scalars, device: Any) -> None:
        self.scalars = torch.tensor(scalars)
        self.device = device

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `Reference`."""
        pair, draw = zip(*batch.items, strict=True)
        return self.scalars[list(pair), list(draw)].to(self.device, non_blocking=True), None


def precompute(source: Source, folder: Path, dtype: str, accelerator: Any) -> Scalars:
    """The reference's errors on all draws, float32 ``[pairs, draws, 2]``; computed once.

    To be called while ``source.backbone.denoiser`` is the base. Every process computes its share
    of the shards; one that is finished is not computed again.

    Parameters
    ----------
    source
        Of the micro-batches.
    folder
        The cache's, where the errors are kept: named by the base, the pairs and the draws.
    dtype
        What the denoiser computes in.
    accelerator
        Its processes and its precision.
    """
    train, backbone = source.train, source.backbone
    parts = (backbone.family.part, "scheduler")
    depends_on = {
        "format": 2,
        "base": [model_digest(backbone.folder / part, CONFIG_AND_WEIGHTS) for part in parts],
        "encoded": source.encoded.digest,
        "pairs": source.pairs.pair_id,
        "seed": train.seed,
        "draws": train.draws,
        "dropout": train.prompt_dropout,
        "flips": train.flips,
        "dtype": dtype,
    }
    path = folder / f"reference-{digest(depends_on)}.parquet"
    ledger = Ledger.beside(path)
    starts = range(0, len(source.pairs), SHARD)
    if not path.exists():
        finished = ledger.keys()
        mine = starts[accelerator.process_index :: accelerator.num_processes]
        with progress("the reference's errors", len(mine) * SHARD) as advance:
            for start in mine:
                if str(start) not in finished:
                    with torch.no_grad(), accelerator.autocast():
                        ledger.write(str(start), _errors(source, start))
                advance(SHARD)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_table(path, pa.concat_tables(ledger.read(str(start)) for start in starts))
        note(reference_draws=len(source.pairs) * source.train.draws)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ledger.forget()
    flat = pq.read_table(path)["error"].to_numpy()
    scalars: Scalars = flat.reshape(-1, source.train.draws, 2)
    return scalars


def _errors(source: Source, start: int) -> pa.Table:
    """The errors of a shard of pairs, winner and loser of every draw one after the other."""
    pairs = range(start, min(start + SHARD, len(source.pairs)))
    items = [(pair, d) for pair in pairs for d in range(source.train.draws)]
    found: dict[tuple[int, int], Scalars] = {}
    for part in micro_batches(items, source.encoded.shape, source.train.micro_batch):
        errors, _ = predict(source.backbone, source.batch(part))
        found |= zip(part, errors.cpu().numpy(), strict=True)
    return pa.table({"error": np.concatenate([found[item] for item in items])})
