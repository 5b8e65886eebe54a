"""The seam between reward models and the engine that runs them over a data set.

`RewardModel` is what the engine calls; `PublishedReward` is the part that published models share.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from PIL import Image

from fifa.models.runtime import Runtime

if TYPE_CHECKING:
    import torch

    from fifa.scoring.specs import Spec


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

    def image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Features of a batch of preprocessed images, ``[b, ...]``, on the model's device."""
        ...

    def prompt_features(self, prompts: Sequence[str]) -> torch.Tensor:
        """Features of prompts, ``[n, ...]`` (token ids for a model that reads both together)."""
        ...

    def rewards(self, prompts: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        """float32 ``[n]``: the reward of image feature i for prompt feature i."""
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
            "dtype": self.runtime.dtype,
        }
