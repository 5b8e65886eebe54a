"""What a pair draws, and the errors of policy and reference on its images.

Everything random about a pair is a function of the seed, nothing else (`fifa.training.order` has
the order of pairs).
What is drawn for a pair in its d-th presentation depends on (seed, pair, d) only. So neither the
number of processes, nor the size of a micro-batch, nor where a run was interrupted changes it.

The reference's errors come without a second network in memory where that is possible. With
adapters the reference is the same network with the adapters off; for full fine-tuning it is a
frozen copy. And with a pool of draws (``draws`` > 0) it is a table: the noise and time of each
(pair, draw) are known beforehand, so the reference's error on them is a number for winner and
loser that is computed once, before training, and kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import xxhash
from torch import Generator, Tensor
from torch.nn.utils.rnn import pad_sequence

from fifa.config import Train
from fifa.console import note, progress
from fifa.data.prefetch import Prefetch
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest
from fifa.models.optional import require
from fifa.models.runtime import Parts, pinned
from fifa.shards.files import digest, read_table, write_table
from fifa.shards.ledger import Ledger
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.cache import forget_damaged
from fifa.training.losses import errors
from fifa.training.times import time_drawer

LATENTS = 4096  # pixels of latents through a network at once on a processor: 512 pixels a side
REFERENCE = 32 * LATENTS  # the same on CUDA where no gradients are kept
# Micro-batches that wait for a device, of steps and of the reference's table: all draws of a shard
# of the table would take 2 GB with FLUX.2's prompts.
AHEAD = 2
SHARD = 16  # pairs between two points where an interrupted computation of the reference goes on

Scalars = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Draw:
    """What one presentation of a pair draws; time and noise are the same for both images.

    Parameters
    ----------
    no_prompt
        Whether the empty prompt takes the place of the pair's.
    flip
        Whether both images are mirrored.
    time
        A scalar, as `fifa.training.times` draws it.
    noise
        float32 ``[c, h, w]``.
    posterior
        float32 ``[2, c, h, w]``: the noise that samples the VAE's posterior of winner and loser.
        (``[1, c, h, w]`` of an image on its own.)
    """

    no_prompt: bool
    flip: bool
    time: Tensor
    noise: Tensor
    posterior: Tensor


def seed_of(*parts: Any) -> int:
    """A seed in [0, 2^63) that changes with every part."""
    text = "\x1f".join(str(part) for part in parts)
    return xxhash.xxh3_64_intdigest(text.encode()) >> 1


def draw_pair(
    seed: int,
    pair_id: str,
    d: int,
    draw_time: Callable[[Generator], Tensor],
    shape: tuple[int, int, int],
    dropout: float,
    flips: bool = False,
    sides: int = 2,
) -> Draw:
    """The ``d``-th draw of a pair, on the CPU.

    Parameters
    ----------
    seed
        The training's.
    pair_id
        The pair's content key.
    d
        The epoch, or the epoch modulo the size of the pool; below 0 for a pair that is measured
        only.
    draw_time
        From `fifa.training.times.time_drawer`.
    shape
        (c, h, w) of the latents.
    dropout
        The probability that the prompt is left out.
    flips
        Whether half of the draws are mirrored.
    sides
        Images that share the draw: 2, or 1 where they come one by one.
    """
    generator = torch.Generator().manual_seed(seed_of("draw", seed, pair_id, d))
    # The order of these five lines is part of the format of the reference's scalars.
    no_prompt = bool(torch.rand((), generator=generator) < dropout)
    flip = bool(torch.rand((), generator=generator) < 0.5) and flips
    time = draw_time(generator)
    noise = torch.randn(shape, generator=generator)
    posterior = torch.randn((sides, *shape), generator=generator)
    return Draw(no_prompt, flip, time, noise, posterior)


def micro_batches(
    items: Sequence[tuple[int, int]], shape: Callable[[int], tuple[int, int]], size: int
) -> list[list[tuple[int, int]]]:
    """``items`` of `Stream.step` in parts of at most ``size`` pairs, of one latent shape each.

    A part holds whole pairs, so winner and loser are never separated; parts come in the order
    of their first pair.
    """
    open_parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    parts: list[list[tuple[int, int]]] = []
    for item in items:
        key = shape(item[0])
        part = open_parts.get(key)
        if part is None or len(part) == size:
            part = open_parts[key] = []
            parts.append(part)
        part.append(item)
    return parts


@dataclass(frozen=True)
class Batch:
    """One micro-batch of n pairs: the n winners, then the n losers, in every tensor of 2n.

    Of n images one by one every tensor has n.

    Parameters
    ----------
    items
        ``(pair, draw)`` of each pair.
    noisy, target
        float32 ``[2n, c, h, w]``.
    time
        ``[2n]``, the same for both images of a pair.
    prompts
        ``[2n, ...]`` each.
    frames
        int64 ``[2n, 6]``.
    label, weight
        float32 ``[n]``.
    """

    items: list[tuple[int, int]]
    noisy: Tensor
    target: Tensor
    time: Tensor
    prompts: Tensors
    frames: Tensor
    label: Tensor
    weight: Tensor

    def pairs(self, part: slice) -> Batch:
        """Some of the pairs."""
        if len(self.items[part]) == len(self.items):
            return self

        def both(tensor: Tensor) -> Tensor:
            return tensor.view(-1, len(self.items), *tensor.shape[1:])[:, part].flatten(0, 1)

        return Batch(
            items=self.items[part],
            noisy=both(self.noisy),
            target=both(self.target),
            time=both(self.time),
            prompts={name: both(value) for name, value in self.prompts.items()},
            frames=both(self.frames),
            label=self.label[part],
            weight=self.weight[part],
        )

    def on(self, device: Any) -> Batch:
        """The same on a device; a copy from pinned memory is waited for by nobody."""
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def each(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The same with ``function`` applied to every tensor."""
        return Batch(
            items=self.items,
            noisy=function(self.noisy),
            target=function(self.target),
            time=function(self.time),
            prompts={name: function(value) for name, value in self.prompts.items()},
            frames=function(self.frames),
            label=function(self.label),
            weight=function(self.weight),
        )


@dataclass(frozen=True)
class Source:
    """Where micro-batches come from.

    Parameters
    ----------
    train
        The training's knobs.
    backbone
        Its latents, times, noise and targets.
    pairs
        `fifa.training.pairs.TrainingPairs`, with the labels and weights of the loss.
    encoded
        Their `fifa.training.cache.Encoded`, pair by pair.
    device
        Where batches go to be computed with.
    taught, held
        Numbers of the pairs to train on, and of those held out.
    ease
        How easy each pair to train on is, where that orders them: see `fifa.training.order`.
    """

    train: Train
    backbone: Backbone
    pairs: Any
    encoded: Any
    device: Any
    taught: Sequence[int] = ()
    held: Sequence[int] = ()
    ease: Sequence[float] = ()

    def batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        """The micro-batch of ``items``, all of one latent shape: on the CPU, in float32.

        In pinned memory where it is to go to CUDA. Whatever autocast it is called under: its
        numbers are no products of a network.
        """
        with torch.autocast("cpu", enabled=False):
            batch = self._batch(items)
        return batch.each(lambda tensor: pinned(tensor, self.device))

    def single(self, batch: Batch, held: bool = False) -> tuple[Tensor, float] | None:
        """Of images one by one: a batch's labels, and the share of good ones among all.

        Of those that are trained on, or of those held out.
        """
        if self.pairs.sides == 2:
            return None
        return batch.label, self._good_held if held else self._good_taught

    @cached_property  # of a million images 40 ms, that no micro-batch should wait for
    def _good_taught(self) -> float:
        return float(self.pairs.label[self.taught].mean())

    @cached_property
    def _good_held(self) -> float:
        return float(self.pairs.label[self.held].mean())

    def _batch(self, items: Sequence[tuple[int, int]]) -> Batch:
        train, backbone, pairs, encoded = self.train, self.backbone, self.pairs, self.encoded
        rows = [pair for pair, _ in items]
        shape = (backbone.vae.channels, *encoded.shape(rows[0]))
        time_of = time_drawer(backbone.schedule, train.time, train.time_range)
        draws = []
        for pair, d in items:
            taught = d >= 0
            dropout, flips = taught * train.prompt_dropout, taught and train.flips
            name, sides = pairs.pair_id[pair], pairs.sides
            one = draw_pair(train.seed, name, d, time_of, shape, dropout, flips, sides)
            draws.append(one)
        drawn = list(zip(rows, draws, strict=True))
        moments = self._sides([encoded.moments(pair, one.flip) for pair, one in drawn]).float()
        latents = backbone.vae.latents(moments, self._sides([one.posterior for one in draws]))
        noise, time = self._both([d.noise for d in draws]), self._both([d.time for d in draws])
        read = [encoded.empty if d.no_prompt else encoded.prompts(pair) for pair, d in drawn]
        prompts = {name: pad_sequence([one[name] for one in read], True) for name in read[0]}
        if "mask" in prompts and bool(prompts["mask"].all()):
            del prompts["mask"]  # attention is faster without one
        return Batch(
            items=list(items),
            noisy=backbone.schedule.add_noise(latents, noise, time),
            target=backbone.schedule.target(latents, noise, time),
            time=time,
            prompts={name: torch.cat([value] * pairs.sides) for name, value in prompts.items()},
            frames=self._sides([encoded.frames(pair) for pair in rows]),
            label=torch.from_numpy(pairs.label[rows]),
            weight=torch.from_numpy(pairs.weight[rows]),
        )

    def _sides(self, pairs: list[Tensor]) -> Tensor:
        """From ``[2, ...]`` of each pair to ``[2n, ...]``, winners first."""
        return torch.stack(pairs, dim=1).flatten(0, 1)

    def _both(self, values: list[Tensor]) -> Tensor:
        """From ``[...]`` of each pair to ``[2n, ...]``, the same for both images."""
        return torch.cat([torch.stack(values)] * self.pairs.sides)


def predict(backbone: Backbone, batch: Batch) -> tuple[Tensor, Tensor]:
    """The denoiser's errors of (winner, loser), float32 ``[n, 2]``, and its prediction."""
    prediction = backbone.predict(batch.noisy, batch.time, batch.prompts, batch.frames)
    # [2n], winners first -> [n, 2]; of images one by one [n] -> [n, 1]
    return errors(prediction, batch.target).view(-1, len(batch.items)).T, prediction


# Knows the reference's errors of (winner, loser), float32 ``[n, 2]``, of a micro-batch, and its
# prediction if there is one.
Reference = Callable[[Batch], tuple[Tensor, Tensor | None]]


def adapters_off(backbone: Backbone, unwrap: Callable[[Any], Any]) -> Reference:
    """The network itself with its adapters off: no second network is needed.

    Parameters
    ----------
    backbone
        Its denoiser may be wrapped.
    unwrap
        From the wrapped denoiser to the one that has the adapters.
    """

    layer = require("peft.tuners.tuners_utils", "train").BaseTunerLayer

    @cache  # the denoiser's own switch walks over all of its modules every time
    def adapted() -> list[Any]:
        return [one for one in unwrap(backbone.denoiser).modules() if isinstance(one, layer)]

    def reference(batch: Batch) -> tuple[Tensor, Tensor]:
        for one in adapted():
            one.enable_adapters(False)
        try:
            with torch.no_grad():
                return predict(backbone, batch)
        finally:
            for one in adapted():
                one.enable_adapters(True)

    return reference


def frozen_copy(backbone: Backbone, autocast: Any) -> Reference:
    """A copy of the network as it is now; takes the memory of its weights."""
    frozen = copy.deepcopy(backbone.denoiser).eval().requires_grad_(False)
    base = backbone.with_denoiser(frozen)

    def reference(batch: Batch) -> tuple[Tensor, Tensor]:
        with torch.no_grad(), autocast():
            return predict(base, batch)

    return reference


def table(scalars: Scalars, rows: Sequence[int], draws: Sequence[int], device: Any) -> Reference:
    """Errors that were computed before training: what `precompute` returns for rows and draws."""
    known = torch.tensor(scalars)
    place, number = ({one: i for i, one in enumerate(some)} for some in (rows, draws))

    def reference(batch: Batch) -> tuple[Tensor, None]:
        pair, draw = zip(*batch.items, strict=True)
        found = known[[place[one] for one in pair], [number[one] for one in draw]]
        return pinned(found, device).to(device, non_blocking=True), None

    return reference


def precompute(
    source: Source,
    rows: Sequence[int],
    draws: Sequence[int],
    folder: Path,
    dtype: str,
    accelerator: Any,
) -> Scalars:
    """The reference's errors on draws of pairs, float32 ``[rows, draws, 2]``; computed once.

    To be called while ``source.backbone.denoiser`` is the base. Every process computes its share
    of the shards; one that is finished is not computed again.

    Parameters
    ----------
    source
        Of the micro-batches.
    rows, draws
        Numbers of pairs, and of the draws of each.
    folder
        The cache's, where the errors are kept: named by the base, the pairs and the draws.
    dtype
        What the denoiser computes in.
    accelerator
        Its processes and its precision.
    """
    train, backbone = source.train, source.backbone
    parts = (backbone.family.part, "scheduler")
    weights = str(backbone.origin.dtype).removeprefix("torch.")
    depends_on = {
        "format": 2,
        "base": [model_digest(backbone.folder / part, CONFIG_AND_WEIGHTS) for part in parts],
        "encoded": source.encoded.digest,
        "pairs": [source.pairs.pair_id[row] for row in rows],
        "seed": train.seed,
        "draws": len(draws) if draws[0] == 0 else list(draws),
        "dropout": train.prompt_dropout,
        "flips": train.flips,
        "dtype": dtype,
        # a LoRA's base is in what it computes in; whole weights, under autocast, round otherwise
        **({"weights": weights} if weights != dtype else {}),
        **({"quantize": train.quantize} if train.quantize else {}),
    }
    if (train.time, train.time_range) != (None, (0.0, 1.0)):
        depends_on["time"] = [train.time, *train.time_range]
    path = folder / f"reference-{digest(depends_on)}.parquet"
    ledger = Ledger.beside(path)
    starts = range(0, len(rows), SHARD)
    if accelerator.is_main_process:
        forget_damaged(path)
    accelerator.wait_for_everyone()
    if not path.exists():
        finished = ledger.keys()
        mine = starts[accelerator.process_index :: accelerator.num_processes]
        missing = [start for start in mine if str(start) not in finished]
        there = (len(mine) - len(missing)) * SHARD
        with progress("the reference's errors", len(mine) * SHARD, there) as advance:
            for start, errors_of in _errors(source, rows, draws, missing, accelerator.autocast):
                ledger.write(str(start), errors_of)
                advance(SHARD)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            write_table(path, pa.concat_tables(ledger.read(str(start)) for start in starts))
        note(reference_draws=len(rows) * len(draws))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ledger.forget()
    scalars: Scalars = read_table(path)["error"].to_numpy().reshape(len(rows), len(draws), -1)
    return scalars


def _errors(
    source: Source,
    rows: Sequence[int],
    draws: Sequence[int],
    starts: Iterable[int],
    autocast: Callable[[], Any],
) -> Iterator[tuple[int, pa.Table]]:
    """The errors of shards of pairs, winner and loser of every draw one after the other."""
    cuda = source.device.type == "cuda"
    through = Parts("pair")

    def batches() -> Iterator[tuple[int, list[tuple[int, int]], Batch, bool]]:
        for start in starts:
            pairs = rows[start : start + SHARD]
            items = [(pair, d) for pair in pairs for d in draws]
            shape = source.encoded.shape
            largest = max(h * w for h, w in map(shape, pairs))
            size = (REFERENCE if cuda else LATENTS) // largest
            parts = micro_batches(items, shape, source.train.micro_batch or max(1, size))
            for number, part in enumerate(parts, 1):
                yield start, items, source.batch(part), number == len(parts)

    found: dict[tuple[int, int], Tensor] = {}
    for start, items, batch, last in Prefetch(batches(), AHEAD) if cuda else batches():
        there, n = batch.on(source.device), len(batch.items)

        def measured(part: slice, batch: Batch = there) -> Tensor:
            return predict(source.backbone, batch.pairs(part))[0]

        with torch.no_grad(), autocast():
            both = torch.cat(list(through.run(measured, n, n)))
        found |= zip(batch.items, both, strict=True)
        if last:  # once a shard: until here nothing has been waited for
            in_order = torch.cat([found[item] for item in items])
            yield start, pa.table({"error": in_order.cpu().numpy()})
            found = {}
