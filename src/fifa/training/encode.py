"""The work behind the cache: which images and prompts there are, and their way through encoders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fifa.console import progress
from fifa.data.decode import BadImage
from fifa.data.images import read
from fifa.data.prefetch import decode_images
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import digest
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.pairs import TrainingPairs
from fifa.training.resize import Frame, Resize, cut
from fifa.training.store import TensorShards

if TYPE_CHECKING:
    from torch import Tensor

Ints = npt.NDArray[np.int32]
Pixels = npt.NDArray[np.uint8]
Todo = tuple[int, Any, bool]  # a shard's number, what goes into it, mirrored or not

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
        torch = require("torch")
        size = 2 * self.backbone.vae.channels * torch.empty((), dtype=self._kind).element_size()
        area = max(h * w for *_, h, w in plan.frames.reshape(-1, 6).tolist())
        factor = self.backbone.vae.factor
        most = max(1, SHARD_BYTES // (size * area // factor**2))
        places, todo = [], []
        for flip in plan.flips:
            place = np.empty((len(plan.first), 2), np.int32)
            for part in plan.chunks(min(SHARD, most)):
                keys = [plan.keys[i] for i in part]
                shard = self.shards.add(f"moments-{self._name(keys, flip)}")
                place[part.start : part.stop, 0] = shard
                place[part.start : part.stop, 1] = np.arange(len(part))
                todo.append((shard, part, flip))
            places.append(place)
        todo = self._mine(todo)
        with (
            progress("encoding images", sum(len(part) for _, part, _ in todo)) as advance,
            ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
        ):
            for shard, part, flip in todo:
                made = []
                for pixels in self._batches(plan, part, flip, pool):
                    made.append(self._kept(self.backbone.vae.moments(_unit(pixels))))
                    advance(len(pixels))
                self.shards.write(shard, {"moments": torch.cat(made)})
        return tuple(places)

    def prompts(self, captions: Sequence[str]) -> Ints:
        """Where every prompt is: shard and row, int32 [prompts, 2]."""
        torch = require("torch")
        with torch.no_grad():
            one = self.backbone.encode_prompts([""])
        size = sum(value.numel() for value in one.values())
        size *= torch.empty((), dtype=self._kind).element_size()
        most = max(1, min(SHARD, SHARD_BYTES // size))
        place = np.empty((len(captions), 2), np.int32)
        todo = []
        for start in range(0, len(captions), most):
            part = list(captions[start : start + most])
            shard = self.shards.add(f"prompts-{self._name(part)}")
            place[start : start + len(part), 0] = shard
            place[start : start + len(part), 1] = np.arange(len(part))
            todo.append((shard, part, False))
        todo = self._mine(todo)
        with progress("encoding prompts", sum(len(part) for _, part, _ in todo)) as advance:
            for shard, part, _ in todo:
                made: list[Tensors] = []
                for start in range(0, len(part), PROMPTS):
                    few = part[start : start + PROMPTS]
                    encoded = self.backbone.encode_prompts(few)
                    made.append({name: self._kept(value) for name, value in encoded.items()})
                    advance(len(few))
                self.shards.write(
                    shard, {name: torch.cat([m[name] for m in made]) for name in made[0]}
                )
        return place

    @property
    def _kind(self) -> Any:
        return getattr(require("torch"), self.dtype)

    def _name(self, keys: Sequence[str], *more: object) -> str:
        return digest(self.backbone.encoders, self.dtype, list(keys), *more)

    def _mine(self, todo: Sequence[Todo]) -> list[Todo]:
        """The shards that are missing and this process's to make."""
        rank, ranks = self.share
        return [one for one in todo[rank::ranks] if not self.shards.has(one[0])]

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
        torch = require("torch")
        kept: Tensor = value.to("cpu", self._kind)
        if not bool(torch.isfinite(kept).all()):
            raise FifaError(
                f"an encoder's numbers are not finite in {self.dtype}",
                do="keep the cache in bfloat16 or float32",
            )
        return kept


def _unit(pixels: Pixels) -> Tensor:
    """From bytes to [-1, 1]."""
    torch = require("torch")
    unit: Tensor = torch.from_numpy(pixels).float() / 127.5 - 1
    return unit
