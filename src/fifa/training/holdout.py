"""Pairs that are not trained on, and whether a training still gets better on them.

All pairs of a prompt are held out together. What is drawn for a held-out pair is fixed, so that
two measurements differ by the weights alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.errors import FifaError
from fifa.models.runtime import Parts
from fifa.training.backbones.base import Backbone
from fifa.training.batches import Batch, Reference, Source, micro_batches, predict, seed_of
from fifa.training.checkpoint import Progress, TrainState
from fifa.training.levels import LEVELS, NAMES, levels_of, line_by_level, sums_by_level
from fifa.training.losses import LOSSES
from fifa.training.metrics import SUMS, stats_line, sums

FROM = 200  # pairs from which on some are held out unless told otherwise
SHARE = 0.05
TIMES = 10  # measurements of a training, at most, unless told otherwise
COST = 0.05  # of a training's time that they may take, unless it is they that end it
DRAWS = (-1, -2, -3, -4)  # of each pair; no pair that is trained on has such numbers
# What a line of metrics has of held-out pairs.
HELD = (
    *("loss", "implicit_accuracy", "winner_error", "loser_error"),
    *("winner_minus_reference", "loser_minus_reference"),
)


def split_pairs(captions: Sequence[str], train: Train) -> tuple[list[int], list[int]]:
    """The pairs to train on and those held out, in their order.

    Prompts come in an order of the seed's; theirs are held out until the share is reached.
    Raises `FifaError` where all would be.
    """
    share = train.holdout
    if share is None:
        share = SHARE if len(captions) >= FROM else 0.0
    rows: dict[str, list[int]] = {}
    for row, caption in enumerate(captions):
        rows.setdefault(caption, []).append(row)
    held: list[int] = []
    for caption in sorted(rows, key=lambda text: seed_of("holdout", train.seed, text)):
        if len(held) >= share * len(captions):
            break
        held += rows[caption]
    if len(held) == len(captions):
        raise FifaError(
            f"--holdout {share:g} would leave no pair to train on: {len(rows):,} prompts",
            do="hold out a smaller share, or nothing: --holdout 0",
        )
    out = set(held)
    return [row for row in range(len(captions)) if row not in out], sorted(held)


def steps_between(train: Train, steps: int, held: int) -> int:
    """Steps between two measurements of ``held`` pairs in a training of ``steps``.

    The last step is always followed by one; `TIMES` for ``stop``, else as many of these as `COST`
    allows.
    """
    if train.validate_every:
        return train.validate_every
    # forward passes of a pair; a backward pass takes as long as two
    trained, measured = 3 * steps * train.batch, max(1, held * len(DRAWS))
    times = TIMES if train.stop else min(TIMES, int(COST * trained / measured))
    return max(1, steps // max(1, times))


@dataclass(frozen=True)
class Holdout:
    """The held-out pairs of a training, ready to be measured.

    Parameters
    ----------
    train, source
        The training and its micro-batches.
    rows
        The pairs.
    reference
        What knows the reference's errors on `DRAWS`; None for a loss that needs none.
    every
        Steps between two measurements.
    through
        How many pairs go together, once memory has run out.
    """

    train: Train
    source: Source
    rows: Sequence[int]
    reference: Reference | None
    every: int
    through: Parts = field(default_factory=lambda: Parts("pair"))

    def is_due(self, step: int, steps: int) -> bool:
        """Whether they are measured after so many steps of all."""
        return bool(self.rows) and (step % self.every == 0 or step == steps)

    def measure(self, state: TrainState, size: int) -> dict[str, Any]:
        """``heldout_`` and each of `HELD`: means over pairs and draws of the weights to give away.

        And ``heldout_by_level``, the same by noise level, of `line_by_level`.

        With the beta that the training began with, and every pair of weight 1. Every process calls
        it; ``size`` pairs go through the network at once.
        """
        accelerator, model = state.accelerator, state.model
        items = list(product(self.rows, DRAWS))
        # sharded processes meet in every forward pass: each does all
        world = 1 if state.sharded else accelerator.num_processes
        mine = items if state.sharded else items[accelerator.process_index :: world]
        backbone = self.source.backbone
        if not state.sharded:  # a wrapped one may wait for processes that have fewer pairs
            backbone = backbone.with_denoiser(accelerator.unwrap_model(model))
        total: Tensor = torch.zeros(len(SUMS) + LEVELS * len(NAMES), device=self.source.device)
        model.eval()
        try:
            with torch.no_grad(), accelerator.autocast(), state.to_give_away():
                for part in micro_batches(mine, self.source.encoded.shape, size):
                    batch, n = self.source.batch(part).on(self.source.device), len(part)

                    def sums_of(rows: slice, batch: Batch = batch) -> Tensor:
                        return self._sums(batch.pairs(rows), backbone)

                    # sharded processes would have to agree on smaller parts
                    found = (
                        [sums_of(slice(n))] if state.sharded else self.through.run(sums_of, n, n)
                    )
                    for sums_of_some in found:
                        total += sums_of_some
        finally:
            model.train()
        if world > 1:
            total = accelerator.reduce(total, reduction="sum")
        told = total.tolist()
        line = stats_line(told[: len(SUMS)], len(items))
        by_level = line_by_level(told[len(SUMS) :], "heldout_by_level")
        return {f"heldout_{name}": line[name] for name in HELD} | by_level

    def _sums(self, batch: Batch, backbone: Backbone) -> Tensor:
        base, _ = self.reference(batch) if self.reference else (None, None)
        policy, _ = predict(backbone, batch)
        single = self.source.single(batch, held=True)
        # of images one by one, the weight is what balances good and bad ones
        weight = torch.ones_like(batch.weight) if single is None else batch.weight
        loss = LOSSES[self.train.loss](self.train, policy, base, batch.label, weight)
        by_level = sums_by_level(levels_of(backbone, batch), policy, base, None)
        return torch.cat([sums(loss, policy, base, None, single), by_level])


def verdict(train: Train, done: Progress) -> str:
    """Why the training should end now, in words; empty where it goes on."""
    if not train.stop:
        return ""
    if done.worse >= train.patience:
        return f"the loss on held-out pairs has not fallen in {done.worse:,} measurements"
    if done.displaced > train.displacement:
        return (
            f"the error on the preferred images of held-out pairs is {done.displaced:.1%} above "
            "the reference's"
        )
    return ""
