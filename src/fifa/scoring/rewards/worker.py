"""What a worker does: bytes to digests, prompts to features, images to rewards, shard by shard."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.config import Compute
from fifa.data.images import Images, look, read
from fifa.data.prefetch import Batch, Prefetch, batched, decode_images
from fifa.models.optional import require
from fifa.models.runtime import Parts, Tensor
from fifa.scoring.rewards import RewardModel
from fifa.scoring.rewards.pixels import refuse_slivers
from fifa.scoring.table import features_table
from fifa.shards.pool import cores

REWARDS = pa.schema([("reward", pa.float32()), ("reason", pa.string())])
SIDE = 224  # pixels; what `Compute.batch` counts in
PROMPTS = 8  # times the batch: prompts are shorter than images

Load = Callable[[], RewardModel]


@dataclass(frozen=True)
class ImageShard:
    """Images, and the prompts that each is to be scored for.

    Parameters
    ----------
    images
        Where they are.
    features
        Of the prompts that occur, ``[n, ...]``.
    image, prompt
        Row of ``images`` and row of ``features`` of every reward, sorted by image, int64
        [rewards].
    """

    images: Images
    features: np.ndarray
    image: np.ndarray
    prompt: np.ndarray


class ScoreStep:
    """A `fifa.shards.pool.Step` over three types of shards.

    `Images` are to be told apart by their bytes, of a list of prompts the features are wanted,
    and an `ImageShard` is scored.

    Parameters
    ----------
    load
        Loads the model, when the first shard needs it.
    compute
        Its ``batch`` (after the device runs out of memory half as many, from then on) and its
        ``workers``.
    allow_download
        Fetch images that the source only names by URL.
    """

    def __init__(self, load: Load, compute: Compute, allow_download: bool = False) -> None:
        self._load, self._compute, self._download = load, compute, allow_download
        self._parts = Parts("image or prompt")
        self._threads = ThreadPoolExecutor(compute.workers or cores())

    def begin(self, shard: Any) -> Callable[[], pa.Table]:
        """Start reading and decoding an `ImageShard`; returns what is left to do."""
        if isinstance(shard, Images):
            return partial(look, shard, sizes=False, allow_download=self._download)
        if isinstance(shard, list):
            return lambda: features_table(self._prompt_features(shard))
        bad: dict[int, str] = {}
        decoded = decode_images(
            read(shard.images, allow_download=self._download),
            lambda image, row: self._model.preprocess(refuse_slivers(image)),
            pool=self._threads,
            most=2 * self._compute.batch,
        )
        batches = Prefetch(batched(decoded, self._fits, bad), most=1)
        return partial(self._rewards, shard, batches, bad)

    def finish(self, begun: Callable[[], pa.Table]) -> pa.Table:
        """The shard's `fifa.data.images.FACTS`, prompt features or `REWARDS`."""
        return begun()

    @cached_property
    def _model(self) -> RewardModel:
        return self._load()

    def _prompt_features(self, prompts: list[str]) -> np.ndarray:
        torch = require("torch")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

        def features(part: slice) -> Any:
            return self._model.prompt_features([prompts[i] for i in order[part]])

        with torch.inference_mode():
            most = PROMPTS * self._compute.batch
            found = torch.cat(list(self._parts.run(features, len(prompts), most))).cpu()
        # numpy has no bfloat16
        rows: np.ndarray = (found.float() if found.dtype is torch.bfloat16 else found).numpy()
        in_order: np.ndarray = np.empty_like(rows)
        in_order[order] = rows
        return in_order

    def _rewards(
        self, shard: ImageShard, batches: Prefetch[Batch], bad: dict[int, str]
    ) -> pa.Table:
        torch = require("torch")
        rewards = np.full(len(shard.image), np.nan, np.float32)
        prompts = torch.tensor(shard.features)  # a copy: what comes through Ray is read-only
        with closing(batches):
            for numbers, pixels in batches:
                asks, row = _asks(shard.image, np.asarray(numbers))
                with torch.inference_mode():
                    of_asks = prompts[torch.from_numpy(shard.prompt[asks])]
                    found = self._batch(torch.from_numpy(pixels), of_asks, torch.from_numpy(row))
                    rewards[asks] = found.float().cpu().numpy()
        reasons = pa.array([bad.get(image) for image in shard.image.tolist()], pa.string())
        return pa.table({"reward": pa.array(rewards), "reason": reasons}, schema=REWARDS)

    def _batch(self, pixels: Tensor, prompts: Tensor, row: Tensor) -> Tensor:
        """The reward of prompt i for image ``row[i]``; every image goes through its tower once."""
        most = self._fits(pixels.shape[-2], pixels.shape[-1])

        model = self._model

        def in_parts(function: Callable[[slice], Tensor], n: int) -> Tensor:
            joined: Tensor = require("torch").cat(list(self._parts.run(function, n, most)))
            return joined

        images = in_parts(lambda part: model.image_features(pixels[part]), len(pixels))
        prompts, row = prompts.to(images.device), row.to(images.device)
        return in_parts(lambda part: model.rewards(prompts[part], images[row[part]]), len(row))

    def _fits(self, height: int, width: int) -> int:
        """How many images of this size go into a batch."""
        batch = self._compute.batch
        return max(1, min(batch, batch * SIDE * SIDE // (height * width)))


def _asks(image: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The asks (positions in ``image``, sorted) of some images, and which image each is of."""
    low = np.searchsorted(image, numbers, side="left")
    count = np.searchsorted(image, numbers, side="right") - low
    row = np.repeat(np.arange(len(numbers)), count)
    # low[i], low[i] + 1, ... for every image i
    within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return low[row] + within, row
