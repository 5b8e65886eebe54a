"""The training loop: what happens in a step and between steps, and the samples drawn on the way.

What makes it exact is elsewhere and small: which pairs a step takes and what is drawn for them
are functions of the seed (`fifa.training.batches`), so a step needs to know nothing of those before
it but the weights and the optimiser's state (`fifa.training.checkpoint`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fifa.config import Train
from fifa.console import progress as progress_bar
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import peak_bytes, release_memory
from fifa.shards.files import atomic_path, read_json
from fifa.training.backbones.base import Backbone
from fifa.training.batches import Reference, Source, Stream, micro_batches, predict, seed_of
from fifa.training.checkpoint import CHECKPOINTS, Progress, TrainState, step_name
from fifa.training.losses import LOSSES
from fifa.training.metrics import Stats, distance, stats_line, sums

BASE = "samples/base.png"
PROMPTS = 4
GAP = 8  # pixels between two images


@dataclass(frozen=True)
class Samples:
    """Draws the sheets of one training.

    Parameters
    ----------
    train
        The training: prompts, steps, seed.
    backbone
        The base's folder, and the denoiser.
    captions
        Of the training pairs, of which the first few stand in for prompts not given.
    out
        The training's folder.
    accelerator
        Of all processes, only the main one draws.
    resolution
        Pixels a side.
    """

    train: Train
    backbone: Backbone
    captions: Sequence[str]
    out: Path
    accelerator: Any
    resolution: int

    @property
    def prompts(self) -> Sequence[str]:
        """What is drawn."""
        distinct = [caption for caption in dict.fromkeys(self.captions) if caption]
        return self.train.sample_prompts or tuple(distinct[:PROMPTS]) or ("",)

    def base(self) -> None:
        """Draw the base's images once, with its own stock pipeline; every process calls it.

        Raises `FifaError` where the weights are sharded: the pipeline would need them whole.
        """
        if not self.train.sample_every:
            return
        if str(self.accelerator.distributed_type).endswith("FSDP"):
            raise FifaError(
                "a sharded model cannot make sample images", do="--sample-every 0 with FSDP"
            )
        if self.accelerator.is_main_process and not (self.out / BASE).exists():
            _save(self._drawn({}), self.out / BASE)
            release_memory()
        self.accelerator.wait_for_everyone()

    def draw(self, step: int, state: TrainState) -> None:
        """Write ``samples/step-*.png``: a row a prompt, the base's image left, today's right."""
        if self.accelerator.is_main_process:
            model = self.accelerator.unwrap_model(state.model)
            model.eval()
            average = state.average.in_place() if state.average else nullcontext()
            with torch.no_grad(), self.accelerator.autocast(), average:
                images = self._drawn({self.backbone.family.part: model})
            model.train()
            release_memory()
            with Image.open(self.out / BASE) as base:
                sheet = _joined([base, images], axis=1)
            _save(sheet, (self.out / BASE).with_name(f"{step_name(step)}.png"))
        self.accelerator.wait_for_everyone()

    def _drawn(self, parts: dict[str, Any]) -> Image.Image:
        """An image a prompt, one below the other, by the stock pipeline of the base's folder.

        ``parts`` of it are in memory already.
        """
        diffusers = require("diffusers", "train")
        index = read_json(self.backbone.folder / "model_index.json", "the pipeline's index")
        if "safety_checker" in index:  # no part of what is trained, and often not downloaded
            parts = {"safety_checker": None, "feature_extractor": None, **parts}
            parts["requires_safety_checker"] = False
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            self.backbone.folder, dtype=torch.float32, local_files_only=True, **parts
        )
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(self.accelerator.device)
        images = []
        for number, prompt in enumerate(self.prompts):
            seed = seed_of("sample", self.train.seed, number)
            made = pipeline(
                prompt=prompt,
                height=self.resolution,
                width=self.resolution,
                num_inference_steps=self.train.sample_steps,
                generator=torch.Generator().manual_seed(seed),
            )
            images.append(made.images[0])
        return _joined(images, axis=0)


def _joined(images: Sequence[Image.Image], axis: int) -> Image.Image:
    """Images of one size below (axis 0) or beside (axis 1) each other, with white between them."""
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    gap = np.full_like(arrays[0].take(range(GAP), axis), 255)
    parts = [part for array in arrays for part in (gap, array)][1:]
    return Image.fromarray(np.concatenate(parts, axis))


def _save(image: Image.Image, path: Path) -> None:
    with atomic_path(path) as temporary:
        image.save(temporary, "PNG")


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
    """

    train: Train
    steps: int
    out: Path
    source: Source
    reference: Reference | None
    state: TrainState
    samples: Samples

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
            self.state.export(
                train, self.source.backbone, self.out / CHECKPOINTS / step_name(done.step)
            )
        if train.sample_every and done.step % train.sample_every == 0:
            self.samples.draw(done.step, self.state)
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
