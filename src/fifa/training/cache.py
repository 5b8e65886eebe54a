"""Every image and prompt through VAE and text encoders once; what comes out stays on disk.

Kept are the *moments* of the VAE's posterior, never one sample of it: a training that sees the
same sample of an image at every presentation learns its noise. They lie in shards of tensors
(`fifa.training.tensors`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fifa.console import collect_facts, echo, note, progress
from fifa.data.images import look
from fifa.errors import FifaError
from fifa.models.networks import working
from fifa.models.runtime import DTYPES
from fifa.shards.files import digest, read_table, write_table
from fifa.shards.pool import Executor
from fifa.shards.sealed import DamagedError, check_whole
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.encoding import (
    CANNOT_ENCODE,
    Encoder,
    Ints,
    images_at_once,
    in_type,
    numbers_of,
    plan_images,
)
from fifa.training.pairs import TrainingPairs
from fifa.training.resize import Resize
from fifa.training.tensors import TensorShards

AGAIN = 16  # captions that were encoded last and are not encoded again


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
    executor: Executor | None = None,
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
    executor
        Who encodes; by default this process. Workers elsewhere work for the first process of a
        group, load the model from the same path, and read the images by theirs.

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
    there = executor if executor and not executor.is_here else None
    encoder = Encoder(backbone, TensorShards(folder), dtype, batch, share, there)
    named: list[Any] = [pairs.digest]
    if prompts:
        with collect_facts() as facts:
            places = encoder.prompts(captions).tolist()
        number = {caption: i for i, caption in enumerate(captions)}

        def text(caption: str) -> Tensors:
            return encoder.shards.row(*places[number[caption]])

        _told_cuts(backbone, captions, facts.get("captions_cut"))
        backbone.release_text()
    images = encoder.images(pairs, plan, flips)
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


def spread(encoded: Encoded, rows: Sequence[int], n: int) -> Encoded:
    """What was encoded of some of n pairs, by the numbers ``rows`` that they have among all.

    Nothing can be read of the others.
    """
    captions = [""] * n
    for row, caption in zip(rows, encoded.captions, strict=True):
        captions[row] = caption

    def among_all(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        found = np.full((n, *values.shape[1:]), -1, values.dtype)
        found[rows] = values
        return found

    return replace(
        encoded,
        moment_places=tuple(map(among_all, encoded.moment_places)),
        captions=captions,
        all_frames=among_all(encoded.all_frames),
    )


def _told_cuts(backbone: Backbone, captions: Sequence[str], elsewhere: Any = None) -> None:
    """Say how many captions, the empty one first, the text encoders cut, here or ``elsewhere``."""
    cut, alike = backbone.cut_prompts(captions)
    if elsewhere:
        note(captions_cut=elsewhere)
        echo(f"{elsewhere:,} captions are longer than the text encoder reads and are cut")
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
