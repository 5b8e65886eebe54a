"""Images and prompts through VAE and text encoders, a shard of tensors at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fifa.console import QUIET, note, output, progress
from fifa.data.images import read
from fifa.data.prefetch import Prefetch, batched, decode_images
from fifa.errors import FifaError
from fifa.models.networks import working
from fifa.models.runtime import SHARE, Parts, free_bytes, pinned, tf32
from fifa.shards.files import digest, write_bytes
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, Shard, cores, each_shard
from fifa.training.backbones import Backbone, load_backbone
from fifa.training.backbones.base import Tensors
from fifa.training.pairs import TrainingPairs
from fifa.training.resize import Frame, Resize, cut
from fifa.training.tensors import TensorShards

Ints = npt.NDArray[np.int32]
Given = Any  # captions, or (pairs, plan, whether mirrored)
Chunk = TypeVar("Chunk", bound=Sequence[Any])
Batch = TypeVar("Batch")
Sizes = tuple[Parts, Parts]
T = TypeVar("T")

SHARD = 256  # images or prompts between two points where a run can be resumed, at most
SHARD_BYTES = 64 << 20  # of a file, about, at most
IMAGES, PROMPTS = 8, 16  # through VAE and text encoders at once
PIXELS, TOKENS = 4 << 20, 8192  # the same on CUDA
CANNOT_ENCODE = "the text encoders cannot encode prompts"
COUNTED = 2_000  # captions whose tokens are counted, at most
AHEAD = 3  # batches of images that wait for the VAE
TOGETHER = 64  # shards that workers elsewhere make before they are moved into the cache


def numbers_of(backbone: Backbone, captions: Sequence[str]) -> int:
    """How many numbers the denoiser needs of all captions, in all.

    Where padding is left out, the tokens of some of them are counted for all.
    """
    shapes, reader = backbone.prompt_shapes(), backbone.reader
    each = sum(map(prod, shapes.values()))
    if reader is None:
        return len(captions) * each
    some = captions[:: -(-len(captions) // COUNTED)]
    return sum(reader.counts(some)) * len(captions) // len(some) * (each // shapes["prompt"][0])


def images_at_once(backbone: Backbone, resolution: int) -> int:
    """How many images of ``resolution`` pixels a side go through the VAE at once."""
    if backbone.device.type != "cuda":
        return IMAGES
    # of 512 pixels 155 images a second on an H100 where 8 go at once, 166 of 16, 168 of 32
    most = PIXELS // resolution**2
    free, image = free_bytes(backbone.device), image_bytes(backbone, resolution)
    if free is not None and image:
        most = min(most, int(SHARE * free // image))
    return max(1, most)


def image_bytes(backbone: Backbone, resolution: int) -> int:
    """The VAE's activations of an image by the family's figures; 0 where it has none."""
    known = backbone.family.activations
    return known.vae * resolution**2 * backbone.vae.dtype.itemsize // 2 if known else 0


def prompts_at_once(backbone: Backbone) -> int:
    """How many prompts go through the text encoders at once."""
    if backbone.device.type != "cuda":
        return PROMPTS
    tokens = max(shape[0] for shape in backbone.prompt_shapes().values() if len(shape) > 1)
    return max(1, TOKENS // tokens)


@dataclass(frozen=True)
class ImagePlan:
    """Every different training image of the pairs, once.

    Parameters
    ----------
    frames
        int64 [n, 2, 6], of winner and loser; [n, 1, 6] of images one by one, and so below.
    slots
        int32 [n, 2]: which of the images winner and loser are.
    first
        [images]: where each is met first, a row of `TrainingPairs.image_table`; images of one
        size are neighbours, in the order of the pairs.
    keys
        [images]: what each is, its bytes' hash and its frame.
    """

    frames: npt.NDArray[np.int64]
    slots: Ints
    first: list[int]
    keys: list[str]

    def frame(self, image: int) -> Frame:
        """The frame of one of the images."""
        return Frame(*self.frames.reshape(-1, 6)[self.first[image]].tolist())

    def part(self, images: range, sides: int) -> tuple[list[int], ImagePlan]:
        """The pairs in which some images are met first, and the plan of these images alone."""
        rows = [self.first[image] for image in images]
        pairs = sorted({row // sides for row in rows})
        place = {pair: i for i, pair in enumerate(pairs)}
        first = [place[row // sides] * sides + row % sides for row in rows]
        keys = [self.keys[image] for image in images]
        return pairs, ImagePlan(self.frames[pairs], self.slots[pairs], first, keys)

    def chunks(self, most: int) -> Iterator[range]:
        """The images in runs of one size, at most ``most`` in each."""
        start = 0
        shapes = [self.frame(i)[4:] for i in range(len(self.first))]
        for i in range(1, len(shapes) + 1):
            if i == len(shapes) or shapes[i] != shapes[start] or i - start == most:
                yield range(start, i)
                start = i


def plan_images(facts: pa.Table, resize: Resize, sides: int = 2) -> ImagePlan:
    """The plan for images of which `fifa.data.images.FACTS` are known, ``sides`` of each pair."""
    sizes = np.stack([facts["height"].to_numpy(), facts["width"].to_numpy()], axis=1)
    pairs = [resize.frames(*map(tuple, both)) for both in sizes.reshape(-1, sides, 2).tolist()]
    frames = np.array(pairs, np.int64)
    flat = frames.reshape(-1, 6).tolist()
    # an image recurs under one key only where its target is the same as well
    contents = facts["content"].to_pylist()
    keys = [f"{content}:{frame}" for content, frame in zip(contents, flat, strict=True)]
    first: dict[str, int] = {}
    for slot, key in enumerate(keys):
        first.setdefault(key, slot)
    ordered = sorted(first, key=lambda key: (flat[first[key]][4:], first[key]))
    number = {key: i for i, key in enumerate(ordered)}
    slots = np.array([number[key] for key in keys], np.int32).reshape(-1, sides)
    return ImagePlan(frames, slots, [first[key] for key in ordered], ordered)


@dataclass(frozen=True)
class Encoder:
    """Fills shards with what a backbone makes of images and prompts.

    Parameters
    ----------
    backbone
        What they are encoded with.
    shards
        Where it is kept.
    dtype
        The floating type in the files: a torch dtype's name.
    batch
        Images through the VAE at once, if they are squares of the plan's resolution.
    share
        (rank, ranks): which shards are this process's to make.
    executor
        Who makes them, where that is not this process: all for the first of the ranks.
    sizes
        How many images and prompts go together, once memory has run out.
    """

    backbone: Backbone
    shards: TensorShards
    dtype: str
    batch: int
    share: tuple[int, int] = (0, 1)
    executor: Executor | None = None
    sizes: Sizes = field(default_factory=lambda: (Parts("image"), Parts("prompt")))

    def images(self, pairs: TrainingPairs, plan: ImagePlan, flips: bool) -> tuple[Ints, ...]:
        """Where every image is: shard and row, int32 [images, 2]; with ``flips`` mirrored too."""
        area = max(h * w for *_, h, w in plan.frames.reshape(-1, 6).tolist())
        numbers = 2 * self.backbone.vae.channels * area // self.backbone.vae.factor**2
        chunks = list(plan.chunks(self._rows(numbers)))
        both = (False, True) if flips else (False,)
        return tuple(self.fill_images(pairs, plan, chunks, flip) for flip in both)

    def fill_images(
        self, pairs: TrainingPairs, plan: ImagePlan, chunks: Sequence[range], flip: bool
    ) -> Ints:
        """As `images` for one of both, a shard of each of ``chunks``."""
        keys = [[plan.keys[i] for i in chunk] for chunk in chunks]
        device, vae = self.backbone.device, self.backbone.vae
        place = self.backbone.folder / "vae"
        parts, _ = self.sizes
        threads = cores()
        with ThreadPoolExecutor(threads) as pool:

            def decoded(chunk: range) -> Iterator[Tensor]:
                frames = {plan.first[i]: plan.frame(i) for i in chunk}
                cuts = decode_images(
                    read(pairs.image_table, list(frames)),  # ascending: yielded in this order
                    lambda image, row: cut(image, frames[row], flip),
                    pool=pool,
                    most=2 * max(self.batch, threads),
                )
                bad: dict[int, str] = {}
                for _, pixels in batched(cuts, lambda *_: self.batch, bad):
                    batch = torch.from_numpy(pixels)
                    yield pinned(batch, device)
                for row, reason in bad.items():
                    raise pairs.unreadable(row, reason, len(bad))

            def encoded(pixels: Tensor) -> Iterator[Tensors]:
                def moments(part: slice) -> Tensors:
                    there = pixels[part].to(device, non_blocking=True)
                    # from bytes to [-1, 1]
                    with working("the VAE cannot encode images", place):
                        return {"moments": vae.moments(there.float() / 127.5 - 1)}

                return parts.run(moments, len(pixels), self.batch)

            def given(chunk: range) -> Given:
                numbers, part = plan.part(chunk, pairs.sides)
                return pairs.take(numbers), part, flip

            return self._fill("moments", chunks, keys, decoded, encoded, given, flip)

    def prompts(self, captions: Sequence[str]) -> Ints:
        """Where every prompt is: shard and row, int32 [prompts, 2]."""
        rows = self._rows(numbers_of(self.backbone, captions) // len(captions))
        return self.fill_prompts(
            [captions[start : start + rows] for start in range(0, len(captions), rows)]
        )

    def fill_prompts(self, chunks: Sequence[Sequence[str]]) -> Ints:
        """As `prompts`, a shard of each of ``chunks``."""
        most = prompts_at_once(self.backbone)
        _, parts = self.sizes

        def batches(chunk: Sequence[str]) -> Iterator[Sequence[str]]:
            for start in range(0, len(chunk), most):
                yield chunk[start : start + most]

        def encoded(batch: Sequence[str]) -> Iterator[Tensors]:
            def encode(part: slice) -> Tensors:
                with working(CANNOT_ENCODE, self.backbone.folder):
                    return self.backbone.encode_prompts(batch[part])

            return parts.run(encode, len(batch), most)

        return self._fill("prompts", chunks, list(map(list, chunks)), batches, encoded, list)

    def _rows(self, numbers: int) -> int:
        """How many rows of so many numbers a shard has."""
        size: int = getattr(torch, self.dtype).itemsize
        return max(1, min(SHARD, SHARD_BYTES // (size * numbers)))

    def _fill(
        self,
        what: str,
        chunks: Sequence[Chunk],
        keys: Sequence[list[str]],
        batches: Callable[[Chunk], Iterator[Batch]],
        encoded: Callable[[Batch], Iterator[Tensors]],
        given: Callable[[Chunk], Given],
        *more: object,
    ) -> Ints:
        """Write the shards that are missing and this process's to make.

        Parameters
        ----------
        what
            ``moments`` or ``prompts``.
        chunks, keys
            What goes into each shard, and what names it there, with ``more``.
        batches
            What a chunk is encoded in, made in a thread ahead.
        encoded
            Encodes a batch, in one part or more.
        given
            What `Elsewhere` is given of a chunk.

        Returns
        -------
        numpy.ndarray
            int32 [n, 2]: shard and row of everything in ``chunks``.
        """
        names = [digest(self.backbone.encoders, self.dtype, key, *more) for key in keys]
        shards = [self.shards.add(f"{what}-{name}") for name in names]
        rank, ranks = self.share
        every = list(zip(shards, chunks, strict=True))
        mine = every[rank::ranks]
        if self.executor:
            mine = [] if rank else every
        mine = [(shard, chunk) for shard, chunk in mine if not self.shards.is_whole(shard)]
        if self.executor:
            self._fill_elsewhere(what, mine, given, self.executor)
        else:
            self._fill_here(what, mine, batches, encoded)
        counts = list(map(len, chunks))
        rows = np.concatenate([np.arange(count) for count in counts])
        return np.stack([np.repeat(shards, counts), rows], axis=1).astype(np.int32)

    def _fill_elsewhere(
        self,
        what: str,
        mine: Sequence[tuple[int, Chunk]],
        given: Callable[[Chunk], Given],
        executor: Executor,
    ) -> None:
        """Have workers make shards, and write them here; a part at a time, for room on the disk."""
        names = self.shards.names
        for start in range(0, len(mine), TOGETHER):
            part = mine[start : start + TOGETHER]
            shards = [Shard(names[shard], len(chunk), chunk) for shard, chunk in part]
            target = self.shards.folder / f"{digest([shard.key for shard in shards])}.parquet"
            ledger = Ledger.beside(target, executor.store)
            made = each_shard(f"encoding {what}", self._there, shards, ledger, executor, given)
            for (shard, _), table in zip(part, made, strict=True):
                if table["name"][0].as_py() != names[shard]:
                    raise FifaError(
                        "a worker has another model, or computes in another precision",
                        where=str(self.backbone.folder),
                        do="give all machines the same folder, and the same type of device",
                    )
                write_bytes(self.shards.path(shard), table["file"][0].as_py())
            ledger.forget()

    @cached_property
    def _there(self) -> Elsewhere:
        """One for all shards: workers keep what they have loaded."""
        return Elsewhere(again(self.backbone), self.dtype, self.batch)

    def _fill_here(
        self,
        what: str,
        mine: Sequence[tuple[int, Chunk]],
        batches: Callable[[Chunk], Iterator[Batch]],
        encoded: Callable[[Batch], Iterator[Tensors]],
    ) -> None:
        ahead = Prefetch(((shard, one) for shard, chunk in mine for one in batches(chunk)), AHEAD)
        try:
            with (
                progress(f"encoding {what}", sum(len(chunk) for _, chunk in mine)) as advance,
                ThreadPoolExecutor(1) as writer,
            ):
                written: Future[None] | None = None
                for shard, group in groupby(ahead, key=itemgetter(0)):
                    parts: list[Tensors] = []
                    for part in behind(part for _, batch in group for part in encoded(batch)):
                        parts.append(
                            {name: self._kept(what, value) for name, value in part.items()}
                        )
                        advance(len(next(iter(part.values()))))
                    joined = joined_rows(parts)
                    if written:
                        written.result()
                    written = writer.submit(self.shards.write, shard, joined)
                if written:
                    written.result()
        finally:
            ahead.close()

    def _kept(self, what: str, value: Tensor) -> Tensor:
        """As it goes into the file; `FifaError` where that is not finite."""
        found = value.cpu()  # the one wait for the device in a batch
        if what == "moments" and not bool(torch.isfinite(found).all()):
            self.backbone.vae.check(found)
        return in_type(found, self.dtype)


class Elsewhere:
    """Makes a shard in a worker: its name, and the bytes of its file.

    Parameters
    ----------
    load
        Loads the backbone, where the first shard is.
    dtype, batch
        As for `Encoder`.
    """

    def __init__(self, load: Callable[[], Backbone], dtype: str, batch: int) -> None:
        self._load, self._dtype, self._batch = load, dtype, batch
        self._sizes = Parts("image"), Parts("prompt")  # of all shards of this worker

    def __reduce__(self) -> tuple[Any, ...]:
        return Elsewhere, (self._load, self._dtype, self._batch)

    @cached_property
    def _backbone(self) -> Backbone:
        return self._load()

    def __call__(self, given: Given) -> pa.Table:
        """``name`` and ``file`` of one shard, in the only row."""
        backbone = self._backbone
        with TemporaryDirectory() as folder, output(QUIET), arithmetic(backbone.device):
            shards = TensorShards(Path(folder))
            how = self._dtype, self._batch
            encoder = Encoder(backbone, shards, *how, sizes=self._sizes)
            if isinstance(given, list):
                backbone.vae.release()
                encoder.fill_prompts([given])
                note(captions_cut=backbone.cut_prompts(given)[0])
            else:
                backbone.release_text()
                pairs, plan, flip = given
                encoder.fill_images(pairs, plan, [range(len(plan.first))], flip)
            file = pa.array([shards.path(0).read_bytes()], pa.large_binary())
        return pa.table({"name": shards.names, "file": file})


def again(backbone: Backbone) -> Callable[[], Backbone]:
    """Loads the backbone in another process, on the same type of device."""
    origin = backbone.origin
    how: dict[str, Any] = {"dtype": origin.dtype, "compute": origin.encoding, "kept": origin.kept}
    return partial(load_backbone, origin.path, device=origin.device.type, **how)


@contextmanager
def arithmetic(device: Any) -> Iterator[None]:
    """How a training computes on a device while the block lasts, and what encodes for it."""
    attention: Any = torch.backends.cuda
    before = attention.cudnn_sdp_enabled()
    # cuDNN's attention gives NaN gradients in bfloat16 (FLUX cannot be trained with it), and torch
    # 2.11 prefers it on Hopper: pytorch/pytorch#196678, NVIDIA/cudnn-frontend#160, and for DPO
    # huggingface/trl#7181. Flash and memory-efficient attention take its place.
    attention.enable_cudnn_sdp(False)
    try:
        with tf32(device):
            yield
    finally:
        attention.enable_cudnn_sdp(before)


def in_type(found: Tensor, dtype: str) -> Tensor:
    """An encoder's numbers in a floating type; `FifaError` where they are not finite."""
    kept = found.to(getattr(torch, dtype))
    if bool(torch.isfinite(kept).all()):
        return kept
    if not bool(torch.isfinite(found).all()):
        raise FifaError(
            "the text encoders give infinite or NaN numbers", do="--dtype bfloat16 or float32"
        )
    raise FifaError(
        f"an encoder's numbers are not finite in {dtype}",
        do="keep the cache in bfloat16 or float32: --cache-dtype",
    )


def joined_rows(parts: Sequence[Tensors]) -> Tensors:
    """The rows of all parts; of prompts with a mask only tokens, and the ends of each one's."""
    if "mask" not in parts[0]:
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    masks = [part["mask"].bool() for part in parts]
    ends = torch.cat([mask.sum(1) for mask in masks]).cumsum(0)
    tokens = [part["prompt"][mask] for part, mask in zip(parts, masks, strict=True)]
    return {"prompt": torch.cat(tokens), "ends": ends}


def behind(items: Iterable[T]) -> Iterator[T]:
    """The items, each once the next has been made: the device works while one is read back."""
    last: list[T] = []
    for item in items:
        yield from last
        last = [item]
    yield from last
