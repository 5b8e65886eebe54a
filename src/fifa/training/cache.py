"""Every image and prompt through VAE and text encoders once; what comes out stays on disk.

Kept are the *moments* of the VAE's posterior, never one sample of it: a training that sees the
same sample of an image at every presentation learns its noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from fifa.console import echo, note, progress
from fifa.data.images import look
from fifa.errors import FifaError
from fifa.models.runtime import DTYPES
from fifa.shards.files import digest, write_table
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.encode import Encoder, numbers_a_prompt, plan_images
from fifa.training.pairs import TrainingPairs
from fifa.training.resize import Resize
from fifa.training.store import Place, TensorShards


@dataclass(frozen=True)
class Encoded:
    """What the denoiser needs of every pair, read from mapped files as it is asked for.

    Parameters
    ----------
    shards
        Where the numbers are.
    moment_places
        By flip (1 with flips, else only 0): int32 [n, 2, 2], shard and row of both images.
    prompt_places
        int32 [n, 2].
    empty_place
        Of the empty prompt.
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
    moment_places: tuple[npt.NDArray[np.int32], ...]
    prompt_places: npt.NDArray[np.int32]
    empty_place: Place
    all_frames: npt.NDArray[np.int64]
    factor: int
    bytes: int
    digest: str

    def __len__(self) -> int:
        return len(self.prompt_places)

    def moments(self, i: int, flip: bool = False) -> Tensor:
        """``[2, 2c, h, w]``, winner and loser of pair i, mirrored with ``flip``, as stored."""
        if flip and len(self.moment_places) < 2:
            raise FifaError("the cache has no mirrored images: encode with flips")
        places = self.moment_places[int(flip)][i].tolist()
        both = [self.shards.row(shard, row)["moments"] for shard, row in places]
        stacked: Tensor = torch.stack(both)
        return stacked

    def prompts(self, i: int) -> Tensors:
        """What `Backbone.encode_prompts` gave for pair i's prompt, without the batch dimension."""
        shard, row = self.prompt_places[i].tolist()
        return self.shards.row(shard, row)

    @property
    def empty(self) -> Tensors:
        """The same for the empty prompt, which dropped prompts are replaced with."""
        return self.shards.row(*self.empty_place)

    def frames(self, i: int) -> Tensor:
        """int64 ``[2, 6]``."""
        both: Tensor = torch.from_numpy(self.all_frames[i])
        return both

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
    batch: int = 8,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Encoded:
    """Encode all images and prompts of ``pairs`` that are not in ``folder`` yet.

    Everything is named by content: a killed run goes on where it was and ends with the same
    bytes, and several trainings share what they have in common. Images are decoded in threads
    ahead of the VAE; memory holds a few batches and one shard.

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
    batch
        Images through the VAE at once (of a square of ``resolution``).
    share
        (rank, ranks) of a group of processes that encode together, each its share of the shards.
    wait
        Called once this process's share is done, until all are.

    Raises
    ------
    FifaError
        If an image is missing or cannot be decoded (its pair is named), the resolution does not
        fit the model, a moment is not finite, or the folder cannot be written.
    """
    if dtype not in DTYPES:
        raise FifaError(f"no such precision: {dtype}", do=", ".join(DTYPES))
    folder = Path(folder)
    resize = Resize(resolution, backbone.pixels_per_latent, buckets)
    known = _facts(pairs, folder)
    sizes = np.stack([known[name].to_numpy() for name in ("height", "width")], axis=1)
    sizes = sizes.astype(np.int64).reshape(-1, 2, 2)
    plan = plan_images(known["content"].to_pylist(), sizes, resize, flips)
    captions = list(dict.fromkeys(["", *pairs.caption]))
    encoder = Encoder(pairs, backbone, TensorShards(folder), dtype, batch, share)
    prompts = encoder.prompts(captions)
    images = encoder.images(plan)
    wait()
    number = {caption: i for i, caption in enumerate(captions)}
    encoded = Encoded(
        shards=encoder.shards,
        moment_places=tuple(place[plan.slots] for place in images),
        prompt_places=prompts[[number[caption] for caption in pairs.caption]],
        empty_place=(int(prompts[0, 0]), int(prompts[0, 1])),
        all_frames=plan.frames,
        factor=backbone.vae.factor,
        bytes=encoder.shards.check(),
        digest=digest(pairs.digest, encoder.shards.names),
    )
    note(cached_images=len(plan.first), cached_prompts=len(captions), cache_bytes=encoded.bytes)
    echo(
        f"cache: {len(plan.first):,} images, {len(captions):,} prompts, "
        f"{encoded.bytes / 1e9:.2f} GB in {folder}"
    )
    return encoded


def _facts(pairs: TrainingPairs, folder: Path) -> pa.Table:
    """`fifa.data.images.FACTS` of `TrainingPairs.image_table`, kept in ``folder``.

    Raises `FifaError` if an image is missing or its header is no JPEG's, PNG's or WEBP's: before
    anything has been computed.
    """
    path = folder / f"images-{digest(pairs.digest, pairs.fingerprint)}.parquet"
    if path.exists():
        return pq.read_table(path)
    with progress("looking at images", 2 * len(pairs)) as advance:
        facts = look(pairs.image_table, done=advance)
    bad = np.flatnonzero(facts["reason"].is_valid())
    if len(bad):
        first = int(bad[0])
        raise pairs.unreadable(first, facts["reason"][first].as_py(), len(bad))
    write_table(path, facts)
    return facts


def cache_bytes(pairs: TrainingPairs, backbone: Backbone, resolution: int, dtype: str) -> int:
    """About how many bytes `encode` will keep, at most: images are taken to be all different.

    With aspect-ratio buckets it is a little less.
    """
    size = torch.empty((), dtype=getattr(torch, dtype)).element_size()
    prompt = numbers_a_prompt(backbone)
    # factor^2 pixels are one latent pixel of 2 c numbers
    sides = resolution // backbone.pixels_per_latent * backbone.patch
    image = 2 * backbone.vae.channels * sides**2
    return int(size * ((1 + len(set(pairs.caption))) * prompt + 2 * len(pairs) * image))
