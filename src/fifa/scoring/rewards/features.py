"""Frozen features: every image once through an image encoder, every prompt once through a text one.

What a small head is trained on. No label is read here, so the features of a data set serve every
fold of a cross-fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Compute, Reward
from fifa.console import note
from fifa.data.decoders import Decoders, choose_decoders
from fifa.data.images import Images, Integers, read, unique_images
from fifa.data.prefetch import Batch, Prefetch, batched, decode_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import Parts, Tensor, make_runtime, pinned
from fifa.scoring.encoders import make_encoder, prompt_embeddings
from fifa.scoring.rewards.engine import Engine
from fifa.scoring.rewards.image_encoders import ImageEncoder, make_image_encoder
from fifa.scoring.rewards.pixels import prepared
from fifa.scoring.rewards.worker import runtime_of
from fifa.scoring.table import score_path, scored_once
from fifa.shards.files import digest
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, Shard, map_shards, store_of

SHARD = 512  # images embedded between two points where a run can be resumed
# Images of 224 x 224 a forward pass: on a processor more only fills its caches.
BATCH, CUDA_BATCH = 8, 128
MOST = 256  # smaller images share a pass until they weigh as much, up to so many
AREA = 224 * 224
WAITING = 64  # images decoded ahead

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Features:
    """The features of a data set.

    Parameters
    ----------
    images
        float32 [images, d]; NaN where an image could not be read.
    prompts
        float32 [prompts, t], L2-normalised; t is 0 without a text encoder.
    of_pair
        The image on either side, int64 [pairs, 2].
    """

    images: Floats
    prompts: Floats
    of_pair: npt.NDArray[np.int64]


def frozen_features(
    pairs: Pairs,
    options: Reward,
    folder: Path | None = None,
    executor: Executor | None = None,
) -> tuple[Features, ImageEncoder]:
    """The features of every unique image (by content) and every prompt, and the image encoder.

    Parameters
    ----------
    pairs
        The pairs; labels are not read.
    options
        Both encoders, the device, and whether images that the source only names by URL may be
        fetched.
    folder
        Where they are kept; an interrupted run goes on where it was. None keeps nothing.
    executor
        Who makes them; by default this process.
    """
    images, of_slot = unique_images(pairs)
    if not len(images):
        raise FifaError("there are no pairs to take images from")
    # float32 on every device: a head is fitted to these numbers, and applied to the same later
    load = partial(_load, options.image, options.device)
    encoder = load()
    how: dict[str, Any] = {"folder": folder, "executor": executor}
    download = options.read.allow_download
    vectors, of_image = image_features(images, encoder, load=load, allow_download=download, **how)
    prompts = np.empty((pairs.prompts.num_rows, 0), np.float32)
    if options.text != "none":
        texts = make_encoder(options.text, device=options.device or "auto", dtype="float32")
        prompts = prompt_embeddings(pairs, texts, **how)
    return Features(vectors, prompts, of_image[of_slot].reshape(-1, 2)), encoder


def _load(spec: str, device: str | None) -> ImageEncoder:
    return make_image_encoder(spec, make_runtime(device, "float32"))


def image_features(
    images: Images,
    encoder: ImageEncoder,
    *,
    folder: Path | None = None,
    allow_download: bool = False,
    executor: Executor | None = None,
    load: Callable[[], ImageEncoder] | None = None,
) -> tuple[Floats, Integers]:
    """The features of different images, float32 [distinct, d], and which each of ``images`` is.

    ``folder`` is where they are kept; an interrupted run goes on where it was, and None keeps
    nothing. ``executor`` makes them if its workers can ``load`` the encoder; by default this
    process. NaN where an image could not be read; raises `FifaError` where none could.
    """
    executor = executor if load else None
    store = store_of(executor)
    engine = Engine(None, folder, Compute(store=store), executor, allow_download=allow_download)
    distinct = engine.distinct(images)
    n = len(distinct)
    path = folder and score_path(
        folder, "features", encoder.name, encoder.identity, distinct.identity
    )
    parts = [(i, distinct.contents[i : i + SHARD].to_pylist()) for i in range(0, n, SHARD)]
    shards = [Shard(digest(encoder.identity, part), len(part), i) for i, part in parts]
    if load is None or executor is None or executor.is_here:
        load = partial(_same, encoder)
    embed = Embed(load, allow_download)

    def own(start: int) -> Images:
        return images.take(distinct.first[start : start + SHARD])

    def make(ledger: Ledger) -> pa.Table:
        what = f"images through {encoder.name}"
        table = map_shards(what, embed, shards, ledger, executor, own)
        lost = len(table) - table["reason"].null_count
        note(images_embedded=len(table), images_unreadable=lost)
        return table

    with closing(embed):
        table = scored_once(path, make, store=store)
    there = table["features"].is_valid().to_numpy()
    if not there.any():
        raise FifaError(
            f"no image could be read; the first reason: {table['reason'][0].as_py()}",
            where=images.root,
            do="check the source, or --allow-download where it names images by URL",
        )
    known = table["features"].drop_null().combine_chunks().flatten().to_numpy()
    features = np.full((len(table), len(known) // there.sum()), np.nan, np.float32)
    features[there] = known.reshape(-1, features.shape[1])
    return features, distinct.of_image


class Embed:
    """Makes the features of a shard's images, and the reason of each that could not be read.

    Parameters
    ----------
    load
        Loads the encoder, where the first shard is.
    allow_download
        Fetch images that the source only names by URL.
    """

    def __init__(self, load: Callable[[], ImageEncoder], allow_download: bool) -> None:
        self._load, self._allow_download = load, allow_download

    def __reduce__(self) -> tuple[Any, ...]:
        return Embed, (self._load, self._allow_download)

    def __call__(self, images: Images) -> pa.Table:
        """``features`` (a list of float32) and ``reason``, row by row with ``images``."""
        torch = require("torch")
        encoder = self._encoder
        device = runtime_of(encoder).device
        batch = CUDA_BATCH if device.startswith("cuda") else BATCH
        bad: dict[int, str] = {}
        options: dict[str, Any] = {"allow_download": self._allow_download, "batch": batch}

        def ready() -> Iterator[tuple[list[int], Tensor]]:
            for numbers, pixels in image_batches(images, self._decoders, bad, **options):
                yield numbers, pinned(torch.from_numpy(pixels), device)

        order: list[int] = []
        found: list[Tensor] = []
        with closing(Prefetch(ready(), most=2)) as batches:
            for numbers, whole in batches:

                def some(part: slice, whole: Tensor = whole) -> Tensor:
                    return encoder.embed(whole[part])

                found += self._sizes.run(some, len(whole), MOST)
                order += numbers
        rows: list[Floats | None] = [None] * len(images)
        if found:  # until here nothing has been waited for
            for number, vector in zip(order, torch.cat(found).cpu().numpy(), strict=True):
                rows[number] = vector
        cells = pa.array(rows, pa.large_list(pa.float32()))
        reasons = pa.array([bad.get(i) for i in range(len(images))], pa.string())
        return pa.table({"features": cells, "reason": reasons})

    def close(self) -> None:
        """Let the decoders go, if any were made."""
        if "_decoders" in self.__dict__:
            self._decoders.close()

    @cached_property
    def _encoder(self) -> ImageEncoder:
        return self._load()

    @cached_property
    def _decoders(self) -> Decoders[np.ndarray]:
        return choose_decoders(partial(prepared, self._encoder.preprocess))

    @cached_property
    def _sizes(self) -> Parts:
        return Parts("image")


def _same(encoder: ImageEncoder) -> ImageEncoder:
    return encoder


def image_batches(
    images: Images,
    decoders: Decoders[np.ndarray],
    bad: dict[int, str],
    *,
    allow_download: bool = False,
    batch: int = BATCH,
) -> Iterator[Batch]:
    """Batches of preprocessed images, each as its row; ``bad`` gets the reason of all others.

    ``batch`` images of 224 x 224 go together, and as many smaller ones as weigh the same.
    """
    found = read(images, allow_download=allow_download)
    decoded = decode_images(found, decoders, most=max(WAITING, 2 * batch))
    return batched(decoded, lambda h, w: min(MOST, max(batch, batch * AREA // (h * w))), bad)
