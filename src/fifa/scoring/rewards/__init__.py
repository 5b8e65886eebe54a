"""Reward models: the seam between them and the engine that runs them over a data set.

`load_reward` makes one by its name, `score` runs it over a few images in memory. `RewardModel` is
what the engine calls; `PublishedReward` is the part that published models share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import Parts, Runtime, Tensor, make_runtime
from fifa.scoring.specs import REWARDS, Spec


class RewardModel(Protocol):
    """A model that says how good an image is for a prompt.

    An image goes through `preprocess` (in workers, on the CPU) and `image_features` (batched, on
    the device) once, a prompt through `prompt_features` once, however many pairs they stand in;
    `rewards` then joins them. For two towers the last is a dot product; a model that reads prompt
    and image together does that part of its work there.

    Attributes
    ----------
    name
        ``pickscore``, ``hpsv2.1``, ...
    identity
        JSON-able: digest of the weights, preprocessing, dtype. Part of every file name of its
        scores.
    scale
        What a reward is, in words and formula. Rewards of different scales are never mixed.
    has_sigma
        True for a model that says how sure it is; one that has no such attribute does not.
    """

    @property
    def name(self) -> str:
        """A short name for people and file names."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON that changes whenever a reward could."""

    @property
    def scale(self) -> str:
        """What a reward is."""

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Pixels for the model, ``[3, h, w]`` (uint8 or float32), from an image of any mode."""
        ...

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features of a batch of preprocessed images, ``[b, ...]``, on the model's device."""
        ...

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Features of prompts, ``[n, ...]`` (token ids for a model that reads both together)."""
        ...

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: the reward of image feature i for prompt feature i.

        ``[n, 2]`` of a model with ``has_sigma``: the reward, and its standard deviation.
        """
        ...


class PublishedReward:
    """What published reward models share: name, scale, and the identity of what they compute.

    Parameters
    ----------
    spec
        `fifa.scoring.specs.REWARDS` has the names, with default model and scale.
    runtime
        Where and how it computes.

    Attributes
    ----------
    model
        The file, folder or hub id that the weights come from.
    preprocessing
        In words; set by the model's own class. Part of the identity.
    """

    preprocessing: str

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        self.name, self.scale, self.runtime = spec.name, spec.entry.scale, runtime
        self.model = spec.model or spec.entry.hub

    @property
    def weights_digest(self) -> Any:
        """Names the content of all files that a reward depends on; JSON."""
        raise NotImplementedError

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Digest of the weights, preprocessing, scale and precision."""
        return {
            "scorer": self.name,
            "weights": self.weights_digest,
            "preprocessing": self.preprocessing,
            "scale": self.scale,
            "dtype": self.runtime.precision,
        }


def load_reward(spec: str, *, dtype: str | None = None, **runtime: Any) -> RewardModel:
    """The reward model that ``spec`` names; weights are loaded when they are first used.

    Parameters
    ----------
    spec
        A name of `fifa.scoring.specs.REWARDS`, alone or as ``NAME:MODEL``: a hub id, a folder or
        (where the original is one checkpoint) a file. ``proxy:FOLDER`` is one trained here.
    dtype
        ``float32``, or ``bfloat16`` or ``float16`` under autocast. The default is the model's own
        (``bfloat16`` for hpsv3 and hpsv3++, ``float32`` for proxies, as trained), else the device's
        `fifa.models.runtime.best_dtype`.
    runtime
        ``device``, ``compile`` and ``channels_last`` as for `fifa.models.runtime.make_runtime`.

    Raises
    ------
    FifaError
        For a name that is not there or looks at no image, weights that are neither here nor on
        the hub or do not fit, an unknown device or precision, and where the ``local`` extra is
        missing.
    """
    parsed = REWARDS.parse(spec)
    if not parsed.entry.maker:
        raise FifaError(
            f"{spec} does not look at images",
            do=f"one of: {REWARDS.made}",
        )
    if parsed.is_judge:  # which runs elsewhere
        judge: RewardModel = parsed.make()
        return judge
    made = make_runtime(dtype=dtype or parsed.entry.dtype or None, **runtime)
    model: RewardModel = parsed.make(made)
    return model


def score(
    model: RewardModel, prompts: Sequence[str], images: Sequence[Image.Image]
) -> npt.NDArray[np.float32]:
    """The rewards of some images, each for its prompt, float32 [n].

    Everything is held in memory at once, and goes through the model at once as long as the
    device has room; `fifa.scoring.rewards.engine` is for data sets. Raises
    `fifa.data.decode.BadImage` for an image that the model cannot take.
    """
    torch = require("torch")
    if len(prompts) != len(images):
        raise FifaError(f"{len(prompts)} prompts for {len(images)} images")
    pixels = [torch.from_numpy(model.preprocess(image)) for image in images]
    features, parts = model.prompt_features(prompts), Parts("image")
    out = np.empty(len(images), np.float32)
    # most models have one shape for all images, a vision-language model one an aspect ratio
    order = sorted(range(len(images)), key=lambda i: tuple(pixels[i].shape))
    for _, rows in groupby(order, key=lambda i: tuple(pixels[i].shape)):
        batch = list(rows)

        def rewards(part: slice, batch: list[int] = batch) -> Tensor:
            seen = model.image_features(torch.stack([pixels[i] for i in batch[part]]))
            judged = model.rewards(features[batch[part]], seen).float().cpu()
            return judged.reshape(len(judged), -1)[:, 0]

        out[batch] = torch.cat(list(parts.run(rewards, len(batch), len(batch)))).numpy()
    return out
