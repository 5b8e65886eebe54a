"""Every image and prompt through VAE and text encoders once; what comes out stays on disk.

Kept are the *moments* of the VAE's posterior, never one sample of it: a training that sees the
same sample of an image at every presentation learns its noise. They lie in shards of tensors:
safetensors files, there whole or not at all, mapped when they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import groupby
from math import prod
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fifa.console import echo, note, progress
from fifa.data.images import look, read
from fifa.data.prefetch import Prefetch, batched, decode_images
from fifa.errors import FifaError
from fifa.models.networks import working
from fifa.models.optional import require
from fifa.models.runtime import DTYPES, SHARE, Parts, free_bytes, pinned
from fifa.shards.files import atomic_path, digest, read_table, write_table
from fifa.shards.pool import cores
from fifa.shards.sealed import BLANK, SEAL, DamagedError, check_whole, is_whole, seal
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.pairs import TrainingPairs
from fifa.training.resize import Frame, Resize, cut

Ints = npt.NDArray[np.int32]
Chunk = TypeVar("Chunk", bound=Sequence[Any])
Batch = TypeVar("Batch")
T = TypeVar("T")

SHARD = 256  # images or prompts between two points where a run can be resumed, at most
SHARD_BYTES = 64 << 20  # of a file, about, at most
IMAGES, PROMPTS = 8, 16  # through VAE and text encoders at once
PIXELS, TOKENS = 4 << 20, 8192  # the same on CUDA
AGAIN = 16  # captions that were encoded last and are not encoded again
CANNOT_ENCODE = "the text encoders cannot encode prompts"
COUNTED = 2_000  # captions whose tokens are counted, at most
AHEAD = 3  # batches of images that wait for the VAE


class TensorShards:
    """Some of the shards in a folder, numbered as they are added.

    Parameters
    ----------
    folder
        Where they are, ``<name>.safetensors`` each: tensors with the same number of rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._open: dict[int, Any] = {}

    def add(self, name: str) -> int:
        """The number of the shard ``name``, which may be written later."""
        self.names.append(name)
        return len(self.names) - 1

    def path(self, shard: int) -> Path:
        """Where a shard is, or will be."""
        return self.folder / f"{self.names[shard]}.safetensors"

    def write(self, shard: int, tensors: Tensors) -> None:
        """Write a shard, atomically: the same tensors give the same bytes."""
        save = require("safetensors.torch", "train")
        whole = {name: value.contiguous() for name, value in tensors.items()}
        with atomic_path(self.path(shard)) as temporary:
            save.save_file(whole, temporary, metadata={SEAL: BLANK})
            with temporary.open("r+b") as file:
                seal(file)

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there, as it was written."""
        try:
            with self.path(shard).open("rb") as file:
                if is_whole(file):
                    return True
        except FileNotFoundError:
            return False
        except OSError as error:
            raise FifaError(
                f"a shard of the cache cannot be read: {error.strerror}",
                where=str(self.path(shard)),
            ) from error
        echo(f"a shard of the cache is damaged, and made again: {self.path(shard)}")
        return False

    def row(self, shard: int, row: int) -> Tensors:
        """One row of every tensor in a shard, without the dimension of rows; a copy.

        Of prompts that were kept without padding, ``mask`` is all 1.
        """
        file = self._file(shard)
        if "ends" in file.keys():  # noqa: SIM118 - no dict
            start, end = [0, *file.get_slice("ends")[:].tolist()][row : row + 2]
            return {"prompt": file.get_slice("prompt")[start:end], "mask": torch.ones(end - start)}
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no dict

    def check(self) -> int:
        """Bytes of all files; raises `FifaError` if a shard is missing or damaged."""
        for shard in range(len(self.names)):
            self._file(shard)
        return sum(self.path(shard).stat().st_size for shard in range(len(self.names)))

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            safetensors = require("safetensors", "train")
            try:
                self._open[shard] = safetensors.safe_open(self.path(shard), framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise FifaError(
                    f"a shard of the cache cannot be read: {error}",
                    where=str(self.path(shard)),
                    do="remove the file; it will be made again",
                ) from error
        return self._open[shard]


@dataclass(frozen=True)
class Encoded:
    """What the denoiser needs of every pair, read from mapped files as it is asked for.

    Of images one by one there is one where a pair has two.

    Parameters
    ----------
    shards
        Where the numbers are.
    moment_places
        By flip (1 with flips, else only 0): int32 [n, 2, 2], shard and row of both images.
    captions
        [n].
    text
        What `Backbone.encode_prompts` gives for a caption, without the batch dimension.
    all_frames
        int64 [n, 2, 6]: `fifa.training.resize.Frame` of winner and loser.
    factor
        Pixels a side of a latent's pixel.
    bytes
        The size of the files.
    digest
        16 hex characters: which pairs, through which encoders, at which size and precision.
    """

    shards: TensorShards
    moment_places: tuple[Ints, ...]
    captions: Sequence[str]
    text: Callable[[str], Tensors]
    all_frames: npt.NDArray[np.int64]
    factor: int
    bytes: int
    digest: str

    def moments(self, i: int, flip: bool = False) -> Tensor:
        """``[2, 2c, h, w]``, winner and loser of pair i, mirrored with ``flip``, as stored."""
        if flip and len(self.moment_places) < 2:
            raise FifaError("the cache has no mirrored images: encode with flips")
        places = self.moment_places[int(flip)][i].tolist()
        return torch.stack([self.shards.row(shard, row)["moments"] for shard, row in places])

    def prompts(self, i: int) -> Tensors:
        """What `Backbone.encode_prompts` gave for pair i's prompt, without the batch dimension."""
        return self.text(self.captions[i])

    @property
    def empty(self) -> Tensors:
        """The same for the empty prompt, which dropped prompts are replaced with."""
        return self.text("")

    def frames(self, i: int) -> Tensor:
        """int64 ``[2, 6]``."""
        return torch.from_numpy(self.all_frames[i])

    def shape(self, i: int) -> tuple[int, int]:
        """Height and width of the latents of pair i."""
        height, width = self.all_frames[i, 0, 4:].tolist()
        return height // self.factor, width // self.factor


def encode(
    pairs: TrainingPairs,
    backbone: Backbone,
    folder: str | Path,
    *,
    resolution: int,
    buckets: bool = False,
    flips: bool = False,
    dtype: str = "float16",
    prompts: bool = True,
    batch: int | None = None,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Encoded:
    """Encode all images and prompts of ``pairs`` that are not in ``folder`` yet.

    Everything is named by content: a killed run goes on where it was and ends with the same
    bytes, and several trainings share what they have in common. Images are decoded in threads
    ahead of the VAE; memory holds a few batches and two shards. Text encoders and VAE are loaded
    one after the other, where something is missing, and let go at once.

    Parameters
    ----------
    pairs, backbone
        What to encode and with what.
    folder
        Where the cache is.
    resolution, buckets
        As for `fifa.training.resize.Resize`.
    flips
        Encode every image mirrored as well.
    dtype
        How numbers are kept: ``float16``, ``bfloat16`` or ``float32``.
    prompts
        Keep them; else each is encoded whenever it is asked for, and the text encoders stay.
    batch
        Images through the VAE at once; default: `images_at_once`. Fewer where memory runs out.
    share
        (rank, ranks) of a group of processes that encode together, each its share of the shards.
    wait
        Called once this process's share is done, until all are.

    Raises
    ------
    FifaError
        If an image is missing or cannot be decoded (its pair is named), the resolution does not
        fit the model, a number is not finite, memory does not suffice for one image or prompt, or
        the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise FifaError(f"no such precision: {dtype}", do=", ".join(DTYPES))
    folder = Path(folder)
    resize = Resize(resolution, backbone.pixels_per_latent, buckets)
    plan = plan_images(_facts(pairs, folder), resize, pairs.sides)
    captions = list(dict.fromkeys(["", *pairs.caption]))
    batch = batch or images_at_once(backbone, resolution)
    encoder = Encoder(pairs, backbone, TensorShards(folder), dtype, batch, share)
    named: list[Any] = [pairs.digest]
    if prompts:
        places = encoder.prompts(captions).tolist()
        number = {caption: i for i, caption in enumerate(captions)}

        def text(caption: str) -> Tensors:
            return encoder.shards.row(*places[number[caption]])

        _told_cuts(backbone, captions)
        backbone.release_text()
    images = encoder.images(plan, flips)
    backbone.vae.release()
    wait()
    if not prompts:
        _ = backbone.text  # now, to be part of what training holds
        text = lru_cache(maxsize=AGAIN)(partial(encode_caption, backbone, dtype))
        named += [backbone.encoders, dtype]
        _told_cuts(backbone, captions)
    encoded = Encoded(
        shards=encoder.shards,
        moment_places=tuple(place[plan.slots] for place in images),
        captions=pairs.caption,
        text=text,
        all_frames=plan.frames,
        factor=backbone.vae.factor,
        bytes=encoder.shards.check(),
        digest=digest(*named, encoder.shards.names),
    )
    kept = len(captions) if prompts else 0
    note(cached_images=len(plan.first), cached_prompts=kept, cache_bytes=encoded.bytes)
    echo(
        f"cache: {len(plan.first):,} images, {kept:,} prompts, "
        f"{encoded.bytes / 1e9:.2f} GB in {folder}"
    )
    return encoded


def _told_cuts(backbone: Backbone, captions: Sequence[str]) -> None:
    """Say how many captions, the empty one first, the text encoders cut."""
    cut, alike = backbone.cut_prompts(captions)
    if cut:
        note(captions_cut=cut, captions_cut_alike=alike)
        echo(
            f"{cut:,} of {len(captions) - 1:,} captions are longer than the text encoder reads and "
            f"are cut; {alike:,} of these are then the same as another"
        )


def encode_caption(backbone: Backbone, dtype: str, caption: str) -> Tensors:
    """What the denoiser needs of one caption, as it would be read from files."""
    device = backbone.device.type
    with torch.autocast(device, enabled=False), working(CANNOT_ENCODE, backbone.folder):
        found = backbone.encode_prompts([caption])
    return {name: in_type(value[0].cpu(), dtype) for name, value in found.items()}


def forget_damaged(path: Path) -> None:
    """Remove a table of the cache that is not as it was written: it is made again."""
    try:
        if path.exists():
            check_whole(path)
    except DamagedError:
        echo(f"a file of the cache is damaged, and made again: {path}")
        path.unlink(missing_ok=True)


def _facts(pairs: TrainingPairs, folder: Path) -> pa.Table:
    """`fifa.data.images.FACTS` of `TrainingPairs.image_table`, kept in ``folder``.

    Raises `FifaError` if an image is missing or its header is that of no image: before
    anything has been computed.
    """
    path = folder / f"images-{digest(pairs.digest, pairs.fingerprint)}.parquet"
    forget_damaged(path)
    if path.exists():
        return read_table(path)
    with progress("looking at images", pairs.sides * len(pairs)) as advance:
        facts = look(pairs.image_table, done=advance)
    bad = np.flatnonzero(facts["reason"].is_valid())
    if len(bad):
        first = int(bad[0])
        raise pairs.unreadable(first, facts["reason"][first].as_py(), len(bad))
    write_table(path, facts)
    return facts


def cache_bytes(
    pairs: TrainingPairs, backbone: Backbone, resolution: int, dtype: str
) -> tuple[int, int]:
    """About how many bytes of latents and of prompts `encode` will keep.

    At most: images are taken to be all different. With aspect-ratio buckets it is a little less.
    """
    # factor^2 pixels are one latent pixel of 2 c numbers
    sides = resolution // backbone.pixels_per_latent * backbone.patch
    images = pairs.sides * len(pairs) * 2 * backbone.vae.channels * sides**2
    prompts = numbers_of(backbone, list(dict.fromkeys(["", *pairs.caption])))
    size: int = getattr(torch, dtype).itemsize
    return size * images, size * prompts


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

    def images(self, plan: ImagePlan, flips: bool) -> tuple[Ints, ...]:
        """Where every image is: shard and row, int32 [images, 2]; with ``flips`` mirrored too."""
        area = max(h * w for *_, h, w in plan.frames.reshape(-1, 6).tolist())
        numbers = 2 * self.backbone.vae.channels * area // self.backbone.vae.factor**2
        chunks = list(plan.chunks(self._rows(numbers)))
        keys = [[plan.keys[i] for i in chunk] for chunk in chunks]
        device, vae = self.backbone.device, self.backbone.vae
        place = self.backbone.folder / "vae"
        parts = Parts("image")
        threads = cores()
        with ThreadPoolExecutor(threads) as pool:

            def decoded(flip: bool, chunk: range) -> Iterator[Tensor]:
                frames = {plan.first[i]: plan.frame(i) for i in chunk}
                cuts = decode_images(
                    read(self.pairs.image_table, list(frames)),  # ascending: yielded in this order
                    lambda image, row: cut(image, frames[row], flip),
                    pool=pool,
                    most=2 * max(self.batch, threads),
                )
                bad: dict[int, str] = {}
                for _, pixels in batched(cuts, lambda *_: self.batch, bad):
                    batch = torch.from_numpy(pixels)
                    yield pinned(batch, device)
                for row, reason in bad.items():
                    raise self.pairs.unreadable(row, reason, len(bad))

            def encoded(pixels: Tensor) -> Iterator[Tensors]:
                def moments(part: slice) -> Tensors:
                    there = pixels[part].to(device, non_blocking=True)
                    # from bytes to [-1, 1]
                    with working("the VAE cannot encode images", place):
                        return {"moments": vae.moments(there.float() / 127.5 - 1)}

                return parts.run(moments, len(pixels), self.batch)

            return tuple(
                self._fill("moments", chunks, keys, partial(decoded, flip), encoded, flip)
                for flip in ((False, True) if flips else (False,))
            )

    def prompts(self, captions: Sequence[str]) -> Ints:
        """Where every prompt is: shard and row, int32 [prompts, 2]."""
        rows = self._rows(numbers_of(self.backbone, captions) // len(captions))
        chunks = [captions[start : start + rows] for start in range(0, len(captions), rows)]
        most = prompts_at_once(self.backbone)
        parts = Parts("prompt")

        def batches(chunk: Sequence[str]) -> Iterator[Sequence[str]]:
            for start in range(0, len(chunk), most):
                yield chunk[start : start + most]

        def encoded(batch: Sequence[str]) -> Iterator[Tensors]:
            def encode(part: slice) -> Tensors:
                with working(CANNOT_ENCODE, self.backbone.folder):
                    return self.backbone.encode_prompts(batch[part])

            return parts.run(encode, len(batch), most)

        return self._fill("prompts", chunks, [list(chunk) for chunk in chunks], batches, encoded)

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

        Returns
        -------
        numpy.ndarray
            int32 [n, 2]: shard and row of everything in ``chunks``.
        """
        names = [digest(self.backbone.encoders, self.dtype, key, *more) for key in keys]
        shards = [self.shards.add(f"{what}-{name}") for name in names]
        rank, ranks = self.share
        mine = list(zip(shards, chunks, strict=True))[rank::ranks]
        mine = [(shard, chunk) for shard, chunk in mine if not self.shards.is_whole(shard)]
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
        counts = list(map(len, chunks))
        rows = np.concatenate([np.arange(count) for count in counts])
        return np.stack([np.repeat(shards, counts), rows], axis=1).astype(np.int32)

    def _kept(self, what: str, value: Tensor) -> Tensor:
        """As it goes into the file; `FifaError` where that is not finite."""
        found = value.cpu()  # the one wait for the device in a batch
        if what == "moments" and not bool(torch.isfinite(found).all()):
            self.backbone.vae.check(found)
        return in_type(found, self.dtype)


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
