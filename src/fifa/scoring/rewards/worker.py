"""What a worker does: bytes to digests, prompts to features, images to rewards, shard by shard."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.config import Compute
from fifa.data.decoders import Decoders, choose_decoders
from fifa.data.images import Images, look, read
from fifa.data.prefetch import Batch, Prefetch, batched, decode_images
from fifa.models.optional import require
from fifa.models.runtime import Parts, Runtime, Tensor, pinned, read_back
from fifa.scoring.rewards import RewardModel
from fifa.scoring.rewards.pixels import prepared
from fifa.scoring.table import features_table

REWARDS = pa.schema([("reward", pa.float32()), ("sigma", pa.float32()), ("reason", pa.string())])
SIDE = 224  # pixels; what `Compute.batch` counts in
PROMPTS = 8  # times the batch: prompts are shorter than images
# Images in a batch, if `Compute.batch` does not say: a processor's caches are full, a GPU's cores
# are not before (ViT-H/14 in bfloat16 gains nothing beyond 128 on an H200).
USEFUL = {"cuda": 128}
FEW = 32
GAP = 2  # pixels of a fast decode for one of the model's, a side
SCALED = f"JPEGs scaled by their decoder, to no less than {GAP} times the input"  # an identity

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


def runtime_of(model: Any) -> Runtime:
    """Where a model computes; a model of your own that says nothing computes on the processor."""
    runtime: Runtime = getattr(model, "runtime", Runtime())
    return runtime


@contextmanager
def short_turns() -> Iterator[None]:
    """Python's lock changes hands after half a millisecond, while the block lasts.

    Otherwise whoever launches a model's kernels keeps it for 5 ms at a time, and every thread that
    speaks to a decoder's process waits so long for each of its few lines.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, 0.0005))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def images_at_a_time(compute: Compute, device: str) -> int:
    """``compute.batch``, or what is useful on the device."""
    return compute.batch or USEFUL.get(device.partition(":")[0], FEW)


class ScoreStep:
    """A `fifa.shards.pool.Step` over three types of shards.

    `Images` are to be told apart by their bytes, of a list of prompts the features are wanted,
    and an `ImageShard` is scored.

    Parameters
    ----------
    load
        Loads the model, when the first shard needs it.
    compute
        Its ``batch`` (after the device runs out of memory half as many, from then on), its
        ``workers`` and ``fast_decode``.
    allow_download
        Fetch images that the source only names by URL.
    apart
        Images may be decoded in processes (`fifa.data.decoders.choose_decoders`).
    """

    def __init__(
        self, load: Load, compute: Compute, allow_download: bool = False, *, apart: bool = False
    ) -> None:
        self._load, self._compute = load, compute
        self._how: Any = {"allow_download": allow_download, "cache_gb": compute.cache_gb}
        self._images, self._prompts, self._apart = Parts("image"), Parts("prompt"), apart

    def begin(self, shard: Any) -> Callable[[], pa.Table | Callable[[], pa.Table]]:
        """Start reading and decoding an `ImageShard`; returns what is left to do."""
        if isinstance(shard, Images):
            return partial(look, shard, sizes=False, **self._how)
        if isinstance(shard, list):
            return lambda: features_table(self._prompt_features(shard))
        bad: dict[int, str] = {}
        found = read(shard.images, **self._how)
        decoded = decode_images(found, self._decoders, most=2 * self._batch)
        # two: one is copied to the device while the next is stacked
        batches = Prefetch(self._pinned(batched(decoded, self._fits, bad)), most=2)
        return partial(self._rewards, shard, batches, bad)

    def finish(
        self, begun: Callable[[], pa.Table | Callable[[], pa.Table]]
    ) -> pa.Table | Callable[[], pa.Table]:
        """The shard's `fifa.data.images.FACTS`, prompt features or `REWARDS`."""
        return begun()

    @cached_property
    def _model(self) -> RewardModel:
        return self._load()

    @cached_property
    def _device(self) -> str:
        return runtime_of(self._model).device

    @cached_property
    def _batch(self) -> int:
        return images_at_a_time(self._compute, self._device)

    @cached_property
    def _decoders(self) -> Decoders[np.ndarray]:
        function = partial(prepared, self._model.preprocess)
        least = GAP * getattr(self._model, "side", 0) if self._compute.fast_decode else 0
        return choose_decoders(function, self._compute.workers, apart=self._apart, least=least)

    def _pinned(self, batches: Iterator[Batch]) -> Iterator[tuple[list[int], Tensor]]:
        """The batches as tensors, in memory that a device copies from while it computes."""
        torch = require("torch")
        for numbers, pixels in batches:
            yield numbers, pinned(torch.from_numpy(pixels), self._device)

    def _prompt_features(self, prompts: list[str]) -> np.ndarray:
        torch = require("torch")
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))

        def features(part: slice) -> Any:
            return self._model.prompt_features([prompts[i] for i in order[part]])

        with torch.inference_mode():
            most = PROMPTS * self._batch
            found = torch.cat(list(self._prompts.run(features, len(prompts), most))).cpu()
        # numpy has no bfloat16
        rows: np.ndarray = (found.float() if found.dtype is torch.bfloat16 else found).numpy()
        in_order: np.ndarray = np.empty_like(rows)
        in_order[order] = rows
        return in_order

    def _rewards(
        self, shard: ImageShard, batches: Prefetch[tuple[list[int], Tensor]], bad: dict[int, str]
    ) -> Callable[[], pa.Table]:
        """Give the device all its work; what is returned waits for it, once."""
        torch = require("torch")
        # a copy: what comes through Ray is read-only; pinned: others would wait for the device
        prompts = pinned(torch.tensor(shard.features), self._device)
        prompts = prompts.to(self._device, non_blocking=True)
        asks: list[np.ndarray] = []
        found: list[Tensor] = []
        turns = short_turns() if self._decoders.apart else nullcontext()
        with closing(batches), turns, torch.inference_mode():
            for numbers, pixels in batches:
                own, row = _asks(shard.image, np.asarray(numbers))
                which = pinned(torch.from_numpy(np.stack([shard.prompt[own], row])), self._device)
                prompt, row = which.to(self._device, non_blocking=True)
                asks.append(own)
                found.append(self._of_batch(pixels, prompts[prompt], row).float())
            there = read_back(torch.cat(found)) if found else None

        def table() -> pa.Table:
            rewards = np.full((2, len(shard.image)), np.nan, np.float32)  # and their sigmas
            if there is not None:
                judged = there().numpy().T
                rewards[: 1 if judged.ndim == 1 else 2, np.concatenate(asks)] = judged
            reasons = pa.array([bad.get(image) for image in shard.image.tolist()], pa.string())
            return pa.table([*map(pa.array, rewards), reasons], schema=REWARDS)

        return table

    def _of_batch(self, pixels: Tensor, prompts: Tensor, row: Tensor) -> Tensor:
        """The reward of prompt i for image ``row[i]``; every image goes through its tower once."""
        most = self._fits(pixels.shape[-2], pixels.shape[-1])
        model = self._model

        def in_parts(function: Callable[[slice], Tensor], n: int) -> Tensor:
            joined: Tensor = require("torch").cat(list(self._images.run(function, n, most)))
            return joined

        images = in_parts(lambda part: model.image_features(pixels[part]), len(pixels))
        prompts, row = prompts.to(images.device), row.to(images.device)  # where a model says less
        return in_parts(lambda part: model.rewards(prompts[part], images[row[part]]), len(row))

    def _fits(self, height: int, width: int) -> int:
        """How many images of this size go into a batch."""
        batch = self._batch
        return max(1, min(batch, batch * SIDE * SIDE // (height * width)))


def _asks(image: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The asks (positions in ``image``, sorted) of some images, and which image each is of."""
    low = np.searchsorted(image, numbers, side="left")
    count = np.searchsorted(image, numbers, side="right") - low
    row = np.repeat(np.arange(len(numbers)), count)
    # low[i], low[i] + 1, ... for every image i
    within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
    return low[row] + within, row
