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
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fifa.console import note, progress
from fifa.models.optional import require
from fifa.shards.files import atomic_path, digest, write_bytes
from fifa.shards.ledger import Ledger
from fifa.training.backbones.base import Backbone
from fifa.training.batches import Batch, Source, predict
from fifa.training.draws import micro_batches

if TYPE_CHECKING:
    from torch import Tensor

PAIRS_A_PART = 16  # pairs between two points where an interrupted computation goes on

Scalars = npt.NDArray[np.float32]


def with_denoiser(backbone: Backbone, denoiser: Any) -> Backbone:
    """The backbone with another denoiser; everything else is shared."""
    other = copy.copy(backbone)
    other.denoiser = denoiser
    return other


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
        from fifa.training.adapters import adapters_off

        torch = require("torch", "train")
        plain = with_denoiser(self.backbone, self.unwrap(self.backbone.denoiser))
        with torch.no_grad(), adapters_off(plain):
            return predict(self.backbone, batch)


class FrozenCopy:
    """A copy of the network as it is now; takes the memory of its weights."""

    def __init__(self, backbone: Backbone, autocast: Any) -> None:
        frozen = copy.deepcopy(backbone.denoiser).eval().requires_grad_(False)
        self.backbone = with_denoiser(backbone, frozen)
        self.autocast = autocast

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `Reference`."""
        torch = require("torch", "train")
        with torch.no_grad(), self.autocast():
            return predict(self.backbone, batch)


class Table:
    """Errors that were computed before training, float32 ``[pairs, draws, 2]``."""

    def __init__(self, scalars: Scalars, device: Any) -> None:
        self.scalars = require("torch", "train").from_numpy(scalars)
        self.device = device

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """See `Reference`."""
        pair, draw = zip(*batch.items, strict=True)
        return self.scalars[list(pair), list(draw)].to(self.device, non_blocking=True), None


def scalars_path(source: Source, folder: Path, base: list[str], dtype: str) -> Path:
    """Where the scalars of this base, these pairs and these draws are kept.

    Parameters
    ----------
    source
        Of the micro-batches.
    folder
        The cache's.
    base
        Names the denoiser's weights and the schedule.
    dtype
        What the denoiser computes in.
    """
    train = source.train
    name = digest(
        {
            "format": 1,
            "base": base,
            "encoded": source.encoded.digest,
            "pairs": source.pairs.pair_id,
            "seed": train.seed,
            "draws": train.draws,
            "dropout": train.prompt_dropout,
            "flips": train.flips,
            "dtype": dtype,
        }
    )
    return folder / f"reference-{name}.safetensors"


def precompute(source: Source, path: Path, accelerator: Any) -> Scalars:
    """The reference's errors on all draws, float32 ``[pairs, draws, 2]``; computed once.

    To be called while ``source.backbone.denoiser`` is the base. Every process computes its share
    of the parts; a part that is on the disk is not computed again.

    Parameters
    ----------
    source
        Of the micro-batches.
    path
        From `scalars_path`.
    accelerator
        Its processes and its precision.
    """
    save, load = (
        getattr(require("safetensors.numpy", "train"), name) for name in ("save_file", "load_file")
    )
    if not path.exists():
        parts = path.parent / f".parts-{path.stem}"
        starts = range(0, len(source.pairs), PAIRS_A_PART)
        mine = starts[accelerator.process_index :: accelerator.num_processes]
        with progress("the reference's errors", len(mine) * PAIRS_A_PART) as advance:
            for start in mine:
                _part(source, start, parts, accelerator.autocast)
                advance(PAIRS_A_PART)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            whole = [_part(source, start, parts, accelerator.autocast) for start in starts]
            with atomic_path(path) as temporary:
                save({"errors": np.concatenate(whole)}, temporary)
            Ledger.beside(path).forget()
        note(reference_draws=len(source.pairs) * source.train.draws)
    accelerator.wait_for_everyone()
    scalars: Scalars = load(path)["errors"]
    return scalars


def _part(source: Source, start: int, folder: Path, autocast: Any) -> Scalars:
    """The scalars of the pairs from ``start`` on, from the disk if they are there."""
    torch = require("torch", "train")
    draws = source.train.draws
    stop = min(start + PAIRS_A_PART, len(source.pairs))
    path = folder / f"{start}.f32"
    if path.exists():
        return np.frombuffer(path.read_bytes(), np.float32).reshape(-1, draws, 2)
    items = [(pair, d) for pair in range(start, stop) for d in range(draws)]
    made = np.empty((stop - start, draws, 2), np.float32)
    with torch.no_grad(), autocast():
        for part in micro_batches(items, source.encoded.shape, source.train.micro_batch):
            found, _ = predict(source.backbone, source.batch(part))
            for (pair, d), values in zip(part, found.cpu().numpy(), strict=True):
                made[pair - start, d] = values
    write_bytes(path, made.tobytes())
    return made
