"""The training loop: what happens in a step, and between steps.

What makes it exact is elsewhere and small: which pairs a step takes and what is drawn for them
are functions of the seed (`fifa.training.draws`), so a step needs to know nothing of those before
it but the weights and the optimiser's state (`fifa.training.checkpoint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.console import progress as progress_bar
from fifa.errors import FifaError
from fifa.models.memory import peak_bytes
from fifa.training.batches import Source, predict
from fifa.training.checkpoint import Progress, TrainState
from fifa.training.draws import Stream, micro_batches, seed_of
from fifa.training.losses import LOSSES
from fifa.training.metrics import Stats, distance, stats_line, sums
from fifa.training.optim import learning_rate
from fifa.training.reference import Reference


@dataclass(frozen=True)
class Loop:
    """A training that is ready to run.

    Parameters
    ----------
    train
        Its knobs.
    steps
        How many there are in all.
    out
        Its folder.
    source
        Where micro-batches come from; its backbone holds the network as accelerate wrapped it.
    reference
        What knows the reference's errors; None for a loss that needs none.
    state
        The network, its optimiser, the average of its weights.
    checkpoint, sample
        Called with the number of steps done, when it is time; by every process.
    """

    train: Train
    steps: int
    out: Path
    source: Source
    reference: Reference | None
    state: TrainState
    checkpoint: Callable[[int], None]
    sample: Callable[[int], None]

    def run(self) -> Progress:
        """Train from the newest state to the last step; returns how far it went.

        Raises
        ------
        FifaError
            For a loss or gradient that is not finite, and where memory does not suffice. The
            newest state and all checkpoints stay.
        """
        train, state = self.train, self.state
        done = state.load(self.out)
        main = state.accelerator.is_main_process
        stats = Stats(train, self.out, done.step) if main else None
        state.model.train()
        begun = time.perf_counter() - done.seconds
        try:
            with progress_bar("training", self.steps) as advance:
                advance(done.step)
                for step in range(done.step, self.steps):
                    rate = learning_rate(train, step, self.steps)
                    totals, norm = self.step(step, rate)
                    done = done.after_step(totals, train.batch, time.perf_counter() - begun)
                    if done.step % train.log_every == 0 or done.step == self.steps:
                        if stats:
                            stats.log(done.step, self.metrics(done, rate, norm))
                        done = done.after_metrics()
                    self.save(done)
                    advance(1)
        finally:
            if stats:
                stats.close()
        return done

    def metrics(self, done: Progress, rate: float, norm: float) -> dict[str, float | None]:
        """The metrics of the steps since the last line; rate and norm are the last step's."""
        return {
            **stats_line(done.sums, done.window),
            "gradient_norm": norm,
            "lr": rate,
            "pairs": done.pairs,
            "seconds": round(done.seconds, 3),
            "pairs_per_second": done.window / (done.seconds - done.since),
            "peak_bytes": peak_bytes(self.source.device),
        }

    def step(self, step: int, rate: float) -> tuple[list[float], float]:
        """One step: every micro-batch forward and backward, then the optimiser.

        Parameters
        ----------
        step
            Counted from 0.
        rate
            The learning rate.

        Returns
        -------
        tuple
            What `fifa.training.metrics.sums` adds up, over all processes; the gradient's norm
            before it was clipped.
        """
        train, state = self.train, self.state
        accelerator, model, optimizer = state.accelerator, state.model, state.optimizer
        # adapters' dropout is all that is random from here on: a function of step and process
        torch.manual_seed(seed_of("step", train.seed, step, accelerator.process_index))
        parts = self.parts(step)
        total: Any = 0.0
        for number, (part, counts) in enumerate(parts):
            # gradients travel between processes with the last micro-batch only
            last = number == len(parts) - 1
            with nullcontext() if last else accelerator.no_sync(model):
                loss, sums_of_part = self.forward(part)
                # the mean over the batch, not over a process's share: processes are averaged
                scale = accelerator.num_processes / train.batch if counts else 0.0
                accelerator.backward(loss.sum() * scale)
            total = total + sums_of_part if counts else total
        totals: list[float] = accelerator.reduce(total, reduction="sum").tolist()
        clip = train.clip if train.clip and train.optimizer != "adafactor" else math.inf
        total_norm = accelerator.clip_grad_norm_(model.parameters(), clip)
        if hasattr(total_norm, "full_tensor"):  # of shards: each process knows its own part
            total_norm = total_norm.full_tensor()
        norm = float(total_norm)
        self._must_be_finite(step, totals, norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        if state.average is not None:
            state.average.update(step + 1)
        return totals, norm

    def forward(self, part: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """The weighted loss of each pair of a micro-batch, and the sums of its metrics."""
        train, backbone = self.train, self.source.backbone
        batch = self.source.batch(part)
        base, base_prediction = self.reference(batch) if self.reference else (None, None)
        policy, prediction = predict(backbone, batch)
        loss = LOSSES[train.loss](train, policy, base, batch.label, batch.weight)
        kl = None if base_prediction is None else distance(prediction, base_prediction)
        return loss, sums(loss, policy, base, kl)

    def parts(self, step: int) -> list[tuple[list[tuple[int, int]], bool]]:
        """This process's micro-batches of a step, and whether each counts.

        Sharded processes meet in every forward pass, so the ones with fewer micro-batches repeat
        their last one, for nothing.
        """
        train, accelerator, pairs = self.train, self.state.accelerator, self.source.pairs
        stream = Stream(len(pairs), train.batch, train.seed, train.draws)
        world = accelerator.num_processes

        def share(rank: int) -> list[list[tuple[int, int]]]:
            items = stream.step(step, rank, world)
            return micro_batches(items, self.source.encoded.shape, train.micro_batch)

        mine = share(accelerator.process_index)
        most = max(len(share(rank)) for rank in range(world)) if world > 1 else len(mine)
        return [(part, True) for part in mine] + [(mine[-1], False)] * (most - len(mine))

    def save(self, done: Progress) -> None:
        """Write what is due after a step; the state last, so that it vouches for the rest."""
        train = self.train
        if train.checkpoint_every and done.step % train.checkpoint_every == 0:
            self.checkpoint(done.step)
        if train.sample_every and done.step % train.sample_every == 0:
            self.sample(done.step)
        if done.step % train.save_every == 0 or done.step == self.steps:
            self.state.save(self.out, done)

    def _must_be_finite(self, step: int, totals: list[float], norm: float) -> None:
        loss = totals[0]
        # with float16, gradients overflow now and then: their scale is lowered, the step skipped
        scaled = self.state.accelerator.scaler is not None
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise FifaError(
            f"the {what} is not finite in step {step + 1}: stopped before it reached the weights",
            where=str(self.out),
            do="the newest state and checkpoints are as they were; lower --lr or --beta, or "
            "compute in bfloat16 or float32",
        )
