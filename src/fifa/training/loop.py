"""The training loop: what happens in a step and between steps.

What makes it exact is elsewhere and small: which pairs a step takes (`fifa.training.order`) and
what is drawn for them (`fifa.training.batches`) are functions of the seed, so a step needs to know
nothing of those before it but the weights and the optimiser's state (`fifa.training.checkpoint`).

What keeps a CUDA device busy: micro-batches are made in a thread ahead of it, and the numbers of
a step are read when the next one is queued already. So a loss that is not finite is noticed one
step late, when it has reached the weights in memory, but before anything of it is written: states,
checkpoints and samples wait for the numbers of all their steps.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.config import Train
from fifa.console import echo
from fifa.console import progress as progress_bar
from fifa.data.prefetch import Prefetch
from fifa.errors import FifaError
from fifa.models.runtime import out_of_memory, peak_bytes, read_back, release_memory
from fifa.training.batches import (
    AHEAD,
    Batch,
    Reference,
    Source,
    micro_batches,
    predict,
    seed_of,
)
from fifa.training.checkpoint import BEST, CHECKPOINTS, Progress, TrainState, step_name
from fifa.training.fit import find_fit
from fifa.training.holdout import Holdout, verdict
from fifa.training.levels import levels_of, line_by_level, output_gradient, sums_by_level
from fifa.training.losses import LOSSES, run_on, safeguarded
from fifa.training.metrics import SUMS, Stats, distance, means_of, stats_digest, stats_line, sums
from fifa.training.order import Stream
from fifa.training.samples import Samples
from fifa.training.trackers import Track, no_track

# Steps in a row that float16 may skip: its loss scale, 2^16 at first and halved by each, is then so
# small that nothing overflows for its sake.
SKIPS = 40

# A micro-batch, whether it counts, and whether it is the last of its step.
Item = tuple[Batch, bool, bool]
Line = dict[str, Any]
# Waits for numbers that are on their way to the host.
Read = Callable[[], list[float]]


class DivergedError(FifaError):
    """A loss or a gradient that is not finite."""


def learning_rate(train: Train, step: int, steps: int) -> float:
    """The learning rate of ``step``, counted from 0.

    It rises linearly to ``train.lr`` over the first ``train.warmup`` steps, of which none has
    rate 0, then follows the schedule, which would reach 0 right after the last step.
    """
    if step < train.warmup:
        return train.lr * (step + 1) / train.warmup
    done = (step - train.warmup) / max(1, steps - train.warmup)
    if train.schedule == "linear":
        return train.lr * max(0.0, 1.0 - done)
    if train.schedule == "cosine":
        return train.lr * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return train.lr


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
    samples
        Draws sheets of samples when it is time.
    holdout
        Measures held-out pairs when it is time.
    until
        The step after which it pauses; None: the last one.
    track
        Gets the lines of the statistics as well.
    """

    train: Train
    steps: int
    out: Path
    source: Source
    reference: Reference | None
    state: TrainState
    samples: Samples
    holdout: Holdout
    until: int | None = None
    track: Track = no_track

    @property
    def last(self) -> int:
        """The step after which `run` returns, unless the training stops by itself before."""
        return min(self.steps, self.until or self.steps)

    def run(self) -> Progress:
        """Train from the newest state to the last step, or to where it stops by itself.

        Returns how far it went.

        Raises
        ------
        FifaError
            For a loss or gradient that is not finite, and where memory does not suffice. The
            newest state and all checkpoints stay.
        """
        train, state = self.train, self.state
        done = state.load(self.out)
        state.running.copy_(torch.tensor(done.running))
        state.model.train()
        fit = find_fit(train, self.source, state, self.forward, self.out)
        feed = Feed(self, fit.micro_batch)
        if train.compile:
            echo("compiling the denoiser: the first step may take minutes")
            state.compile()
        main = state.accelerator.is_main_process
        stats = Stats(self.out, done, self.track) if main else None
        begun = time.perf_counter() - done.seconds
        in_a_row = 0  # steps that were skipped
        with closing(feed), progress_bar("training", self.last, done.step) as advance:

            def take(step: int, rate: float, read: Read, found: Line | None = None) -> Progress:
                """Take in the numbers of a step, which may have to be waited for.

                ``found`` is what held-out pairs say after it.
                """
                nonlocal in_a_row
                *totals, norm, spread, gain = read()
                in_a_row = 0 if math.isfinite(norm) else in_a_row + 1
                self._must_be_finite(step, totals[0], norm, in_a_row)
                taken = done.after_step(
                    totals,
                    train.batch,
                    time.perf_counter() - begun,
                    running=(spread, gain),
                    skipped=not math.isfinite(norm),
                )
                if found:
                    taken = taken.after_holdout(found)
                if found or taken.step % train.log_every == 0 or taken.step == self.last:
                    if stats:
                        line = {**self.metrics(taken, rate, norm), **(found or {})}
                        stats.log(taken.step, line)
                    taken = taken.after_metrics()
                advance(1)
                return taken

            queued: tuple[int, float, Read] | None = None
            for step in range(done.step, self.last):
                if why := verdict(train, done):
                    echo(f"stopped after step {done.step:,}: {why}")
                    break
                rate = learning_rate(train, step, self.steps)
                read = self.step(step, rate, feed)
                if queued:
                    done = take(*queued)
                queued = (step, rate, read)
                if self.writes_after(step + 1):
                    with self._uncompiled():
                        found = None
                        if self.holdout.is_due(step + 1, self.last):
                            found = self.holdout.measure(state, feed.size)
                        done, queued = take(*queued, found), None
                        self.save(done)
        return done

    def metrics(self, done: Progress, rate: float, norm: float) -> dict[str, Any]:
        """The metrics of the steps since the last line; rate and norm are the last step's."""
        return {
            **stats_line(done.sums[: len(SUMS)], done.window),
            **line_by_level(done.sums[len(SUMS) :], "by_level"),
            "gradient_norm": norm if math.isfinite(norm) else None,
            "lr": rate,
            "pairs": done.pairs,
            "skipped": done.skipped,
            "seconds": round(done.seconds, 3),
            "pairs_per_second": done.window / (done.seconds - done.since),
            "peak_bytes": peak_bytes(self.source.device),
        }

    def step(self, step: int, rate: float, feed: Feed) -> Read:
        """One step: every micro-batch forward and backward, then the optimiser.

        Parameters
        ----------
        step
            Counted from 0.
        rate
            The learning rate.
        feed
            Has its micro-batches; smaller ones once memory has run out.

        Returns
        -------
        Read
            What `forward` adds up, over all processes; then the gradient's norm before it was
            clipped, which is not finite if float16's gradients overflowed and the step was skipped;
            then what `run_on` keeps.
        """
        train, state = self.train, self.state
        accelerator, optimizer = state.accelerator, state.optimizer
        total: Tensor | None = None
        while total is None:
            try:
                total = self.gradients(step, feed)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or not self._may_halve(feed.size):
                    raise
            if total is None:  # only now: the error kept what the attempt had allocated
                optimizer.zero_grad()
                release_memory()
                feed.size //= 2
                echo(f"out of memory: {feed.size:,} pairs a micro-batch from here on")
        total = accelerator.reduce(total, reduction="sum")
        clip = train.clip if train.clip and train.optimizer != "adafactor" else math.inf
        norm = accelerator.clip_grad_norm_(state.model.parameters(), clip)
        if hasattr(norm, "full_tensor"):  # of shards: each process knows its own part
            norm = norm.full_tensor()
        state.running.copy_(run_on(state.running, *means_of(total, train.batch)))
        numbers = torch.cat([total, norm.detach().float().reshape(1), state.running])
        read = read_back(numbers)
        if self.source.device.type != "cuda":  # nothing to wait for: before it reaches the weights
            loss, *_, known, _, _ = read().tolist()
            self._must_be_finite(step, loss, known)
        for group in optimizer.param_groups:
            group["lr"] = rate
        # the fused optimiser skips on the device, so `step_was_skipped` never says so
        optimizer.step()
        optimizer.zero_grad()
        # float16 waits for the device here
        if state.average is not None and (accelerator.scaler is None or bool(norm.isfinite())):
            state.average.update(step + 1)
        return lambda: read().tolist()

    def gradients(self, step: int, feed: Feed) -> Tensor:
        """Add a step's gradients up; its sums on this process, not yet on the host."""
        train, state = self.train, self.state
        accelerator = state.accelerator
        # adapters' dropout is all that is random from here on: a function of step and process
        torch.manual_seed(seed_of("step", train.seed, step, accelerator.process_index))
        total: Any = 0.0
        for batch, counts, last in feed.items(step):
            # gradients travel between processes with the last micro-batch only
            with nullcontext() if last else accelerator.no_sync(state.model):
                loss, sums_of_part = self.forward(batch)
                # the mean over the batch, not over a process's share: processes are averaged
                scale = accelerator.num_processes / train.batch if counts else 0.0
                accelerator.backward(loss.sum() * scale)
            total = total + sums_of_part if counts else total
        found: Tensor = total
        return found

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The weighted loss of each pair of a micro-batch, and the sums of its metrics.

        First those of `sums`, then those of `sums_by_level`.
        """
        train, backbone = self.train, self.source.backbone
        base, base_prediction = self.reference(batch) if self.reference else (None, None)
        policy, prediction = predict(backbone, batch)
        safe = policy
        if train.sdpo is not None:
            safe = safeguarded(policy, prediction, batch.target, train.sdpo)
        loss = LOSSES[train.loss](train, safe, base, batch.label, batch.weight, self.state.running)
        kl = None
        if base_prediction is not None:
            kl = distance(prediction, base_prediction, len(batch.items))
        single = self.source.single(batch)
        known = loss.requires_grad  # not under no_grad, where nothing is learned
        gradient = output_gradient(loss, policy, prediction[0].numel()) if known else None
        by_level = sums_by_level(levels_of(backbone, batch), policy, base, gradient)
        return loss, torch.cat([sums(loss, policy, base, kl, single), by_level])

    @cached_property
    def stream(self) -> Stream:
        """The order of the pairs to train on."""
        train, n, ease = self.train, len(self.source.taught), self.source.ease
        return Stream(n, train.batch, train.seed, train.draws, train.order, ease, self.steps)

    def parts(self, step: int, size: int) -> list[tuple[list[tuple[int, int]], bool]]:
        """This process's micro-batches of a step, ``size`` pairs each, and whether each counts.

        Sharded processes meet in every forward pass, so the ones with fewer micro-batches repeat
        their last one, for nothing.
        """
        accelerator, taught = self.state.accelerator, self.source.taught
        world = accelerator.num_processes

        def share(rank: int) -> list[list[tuple[int, int]]]:
            items = [(taught[row], d) for row, d in self.stream.step(step, rank, world)]
            return micro_batches(items, self.source.encoded.shape, size)

        mine = share(accelerator.process_index)
        most = max(len(share(rank)) for rank in range(world)) if world > 1 else len(mine)
        return [(part, True) for part in mine] + [(mine[-1], False)] * (most - len(mine))

    def writes_after(self, done: int) -> bool:
        """Whether anything is written after so many steps."""
        train = self.train
        due = (train.checkpoint_every, train.sample_every, train.save_every)
        due_now = any(every and done % every == 0 for every in due)
        return due_now or done == self.last or self.holdout.is_due(done, self.last)

    def save(self, done: Progress) -> None:
        """Write what is due after a step; the state last, so that it vouches for the rest."""
        train, stopped = self.train, bool(verdict(self.train, done))
        if done.best_step == done.step:
            self.state.export(train, self.source.backbone, self.out / BEST)
        if train.checkpoint_every and done.step % train.checkpoint_every == 0:
            self.state.export(
                train, self.source.backbone, self.out / CHECKPOINTS / step_name(done.step)
            )
        if train.sample_every and done.step % train.sample_every == 0:
            self.samples.draw(done.step, self.state)
        if done.step % train.save_every == 0 or done.step == self.last or stopped:
            self.state.save(self.out, replace(done, stats=stats_digest(self.out)))

    def _uncompiled(self) -> AbstractContextManager[object]:
        """Between steps the network runs as written: a graph without gradients is one more each.

        To compile them takes longer than they save. And held-out pairs are compared with errors of
        the reference that were computed uncompiled: in bfloat16, two graphs differ by rounding.
        """
        if not self.train.compile:
            return nullcontext()
        stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
        return stance

    def _may_halve(self, size: int) -> bool:
        """Whether smaller micro-batches help: several processes would have to agree on them."""
        return size > 1 and self.state.accelerator.num_processes == 1

    def _must_be_finite(self, step: int, loss: float, norm: float, in_a_row: int = 0) -> None:
        # with float16, gradients overflow now and then: their scale is lowered, the step skipped
        scaled = self.state.accelerator.scaler is not None and in_a_row < SKIPS
        if math.isfinite(loss) and (scaled or math.isfinite(norm)):
            return
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise DivergedError(
            f"the {what} is not finite in step {step + 1}: stopped before anything of it was "
            "written",
            where=str(self.out),
            do="the newest state and checkpoints are as they were; lower --lr or --beta, or "
            "compute in bfloat16 or float32",
        )


class Feed:
    """The micro-batches of a training, made in a thread that runs ahead of a CUDA device.

    Parameters
    ----------
    loop
        Whose they are.
    size
        Pairs in each, at most; may be changed between two steps.
    ahead
        Whether a thread makes them; default: for a CUDA device, which would wait otherwise.
    """

    def __init__(self, loop: Loop, size: int, ahead: bool | None = None) -> None:
        self.size, self._loop = size, loop
        self._ahead = loop.source.device.type == "cuda" if ahead is None else ahead
        self._made: Iterator[Item] = iter(())
        self._thread: Prefetch[Item] | None = None
        self._from: tuple[int, int] | None = None  # the step, and the size, that come next

    def items(self, step: int) -> Iterator[Item]:
        """The micro-batches of one step, on the device."""
        if self._from != (step, self.size):  # the first step, or one that is taken up again
            self.close()
            self._made = self._make(step, self.size)
            if self._ahead:
                self._thread = Prefetch(self._made, AHEAD)
                self._made = iter(self._thread)
        self._from = None
        for batch, counts, last in self._made:
            yield batch.on(self._loop.source.device), counts, last
            if last:
                break
        self._from = (step + 1, self.size)

    def close(self) -> None:
        """Let the thread stop."""
        if self._thread is not None:
            self._thread.close()

    def _make(self, first: int, size: int) -> Iterator[Item]:
        for step in range(first, self._loop.steps):
            parts = self._loop.parts(step, size)
            for number, (part, counts) in enumerate(parts, 1):
                yield self._loop.source.batch(part), counts, number == len(parts)
