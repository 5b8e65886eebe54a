"""The work behind the cache: which images and prompts there are, and their way through encoders."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fifa.console import progress
from fifa.data.decode import BadImage
from fifa.data.images import read
from fifa.data.prefetch import decode_images
from fifa.errors import FifaError
from fifa.shards.files import digest
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.pairs import TrainingPairs
from fifa.training.resize import Frame, Resize, cut
from fifa.training.store import TensorShards

Ints = npt.NDArray[np.int32]
Pixels = npt.NDArray[np.uint8]
Chunk = TypeVar("Chunk", bound=Sequence[Any])

SHARD = 256  # images or prompts between two points where a run can be resumed, at most
SHARD_BYTES = 64 << 20  # of a file, about, at most
PROMPTS = 16  # through the text encoders at once


@dataclass(frozen=True)
class ImagePlan:
    """Every different training image of the pairs, once.

    Parameters
    ----------
    frames
        int64 [n, 2, 6], of winner and loser.
    slots
        int32 [n, 2]: which of the images winner and loser are.
    first
        [images]: where each is met first, a row of `TrainingPairs.image_table`; images of one
        size are neighbours, in the order of the pairs.
    keys
        [images]: what each is, its bytes' hash and its frame.
    flips
        False, or False and True where every image is wanted mirrored as well.
    """

    frames: npt.NDArray[np.int64]
    slots: Ints
    first: list[int]
    keys: list[str]
    flips: tuple[bool, ...]

    def frame(self, image: int) -> Frame:
        """The frame of one of the images."""
        return Frame(*self.frames.reshape(-1, 6)[self.first[image]].tolist())

    def chunks(self, most: int) -> Iterator[range]:
        """The images in runs of one size, at most ``most`` in each."""
        start = 0
        shapes = [self.frame(i)[4:] for i in range(len(self.first))]
        for i in range(1, len(shapes) + 1):
            if i == len(shapes) or shapes[i] != shapes[start] or i - start == most:
                yield range(start, i)
                start = i


def plan_images(
    contents: Sequence[str], sizes: npt.NDArray[np.int64], resize: Resize, flips: bool
) -> ImagePlan:
    """The plan for images whose bytes have these hashes ([2 n]) and sizes ([n, 2, 2])."""
    pairs = [resize.frames(*map(tuple, both)) for both in sizes.tolist()]
    frames = np.array(pairs, np.int64).reshape(-1, 2, 6)
    # an image recurs under one key only where its target is the same as well
    flat = frames.reshape(-1, 6).tolist()
    keys = [f"{content}:{frame}" for content, frame in zip(contents, flat, strict=True)]
    first: dict[str, int] = {}
    for slot, key in enumerate(keys):
        first.setdefault(key, slot)
    shape = {key: flat[slot][4:] for key, slot in first.items()}
    ordered = sorted(first, key=lambda key: (shape[key], first[key]))
    number = {key: i for i, key in enumerate(ordered)}
    slots = np.array([number[key] for key in keys], np.int32).reshape(-1, 2)
    places = [first[key] for key in ordered]
    return ImagePlan(frames, slots, places, ordered, (False, True) if flips else (False,))


@dataclass(frozen=True)
class Encoder:
    """Fills shards with what a backbone makes of images and prompts.

    Parameters
    ----------
    pairs, backbone
        What is encoded, and with what.
    shards
        Where it is kept.
    dtype
        The floating type in the files: a torch dtype's name.
    batch
        Images through the VAE at once, if they are squares of the plan's resolution.
    share
        (rank, ranks): which shards are this process's to make.
    """

    pairs: TrainingPairs
    backbone: Backbone
    shards: TensorShards
    dtype: str
    batch: int
    share: tuple[int, int]

    def images(self, plan: ImagePlan) -> tuple[Ints, ...]:
        """Where every image of the plan is: shard and row, int32 [images, 2], by flip."""
        area = max(h * w for *_, h, w in plan.frames.reshape(-1, 6).tolist())
        numbers = 2 * self.backbone.vae.channels * area // self.backbone.vae.factor**2
        chunks = list(plan.chunks(self._rows(numbers)))
        keys = [[plan.keys[i] for i in chunk] for chunk in chunks]
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:

            def encoded(chunk: range, flip: bool) -> Iterator[Tensors]:
                for pixels in self._batches(plan, chunk, flip, pool):
                    yield {"moments": self.backbone.vae.moments(_unit(pixels))}

            return tuple(
                self._fill("moments", chunks, keys, partial(encoded, flip=flip), flip)
                for flip in plan.flips
            )

    def prompts(self, captions: Sequence[str]) -> Ints:
        """Where every prompt is: shard and row, int32 [prompts, 2]."""
        rows = self._rows(numbers_a_prompt(self.backbone))
        chunks = [captions[start : start + rows] for start in range(0, len(captions), rows)]

        def encoded(chunk: Sequence[str]) -> Iterator[Tensors]:
            for start in range(0, len(chunk), PROMPTS):
                yield self.backbone.encode_prompts(chunk[start : start + PROMPTS])

        return self._fill("prompts", chunks, [list(chunk) for chunk in chunks], encoded)

    def _rows(self, numbers: int) -> int:
        """How many rows of so many numbers a shard has."""
        size = torch.empty((), dtype=getattr(torch, self.dtype)).element_size()
        return max(1, min(SHARD, SHARD_BYTES // (size * numbers)))

    def _fill(
        self,
        what: str,
        chunks: Sequence[Chunk],
        keys: Sequence[list[str]],
        encoded: Callable[[Chunk], Iterator[Tensors]],
        *more: object,
    ) -> Ints:
        """Write the shards that are missing and this process's to make.

        Parameters
        ----------
        what
            ``moments`` or ``prompts``.
        chunks, keys
            What goes into each shard, and what names it there, with ``more``.
        encoded
            Encodes a chunk, batch by batch.

        Returns
        -------
        numpy.ndarray
            int32 [n, 2]: shard and row of everything in ``chunks``.
        """
        names = [digest(self.backbone.encoders, self.dtype, key, *more) for key in keys]
        shards = [self.shards.add(f"{what}-{name}") for name in names]
        rank, ranks = self.share
        mine = list(zip(shards, chunks, strict=True))[rank::ranks]
        mine = [(shard, chunk) for shard, chunk in mine if not self.shards.has(shard)]
        with progress(f"encoding {what}", sum(len(chunk) for _, chunk in mine)) as advance:
            for shard, chunk in mine:
                batches: list[Tensors] = []
                for batch in encoded(chunk):
                    batches.append({name: self._kept(value) for name, value in batch.items()})
                    advance(len(next(iter(batch.values()))))
                joined = {name: torch.cat([one[name] for one in batches]) for name in batches[0]}
                self.shards.write(shard, joined)
        rows = [range(len(chunk)) for chunk in chunks]
        places = [(shard, i) for shard, own in zip(shards, rows, strict=True) for i in own]
        return np.array(places, np.int32)

    def _batches(
        self, plan: ImagePlan, part: range, flip: bool, pool: ThreadPoolExecutor
    ) -> Iterator[Pixels]:
        """Pixels ``[b, 3, h, w]`` of some images, decoded ahead in threads."""
        frames = {plan.first[i]: plan.frame(i) for i in part}
        found = read(self.pairs.image_table, list(frames))  # ascending: yielded in this order
        decoded = decode_images(
            found, lambda image, row: cut(image, frames[row], flip), pool=pool, most=2 * self.batch
        )
        waiting: list[Pixels] = []
        for row, pixels in decoded:
            if isinstance(pixels, BadImage):
                raise self.pairs.unreadable(row, pixels.reason)
            waiting.append(pixels)
            if len(waiting) == self.batch:
                yield np.stack(waiting)
                waiting = []
        if waiting:
            yield np.stack(waiting)

    def _kept(self, value: Tensor) -> Tensor:
        """As it goes into the file; `FifaError` where that is not finite."""
        kept = value.to("cpu", getattr(torch, self.dtype))
        if not bool(torch.isfinite(kept).all()):
            raise FifaError(
                f"an encoder's numbers are not finite in {self.dtype}",
                do="keep the cache in bfloat16 or float32",
            )
        return kept


def _unit(pixels: Pixels) -> Tensor:
    """From bytes to [-1, 1]."""
    return torch.from_numpy(pixels).float() / 127.5 - 1


def numbers_a_prompt(backbone: Backbone) -> int:
    """How many numbers the denoiser needs of one prompt."""
    return sum(value.numel() for value in backbone.encode_prompts([""]).values())
