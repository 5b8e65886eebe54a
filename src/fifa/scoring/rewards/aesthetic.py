"""LAION's aesthetic predictor v2: a linear stack on CLIP ViT-L/14; it does not see the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fifa.models.hub import model_folder
from fifa.models.optional import require
from fifa.models.runtime import Runtime
from fifa.scoring.rewards.base import PublishedReward
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.weights import find_weights, linear_head, read_weights
from fifa.shards.files import files_digest

if TYPE_CHECKING:
    from torch import Tensor

    from fifa.scoring.specs import Spec

FILES = (
    "sac+logos+ava1-l14-linearMSE.safetensors",
    "sac+logos+ava1-l14-linearMSE.pth",
    "aesthetic-model.pth",
)
CLIP_HUB = "openai/clip-vit-large-patch14"
LINEAR = (0, 2, 4, 6, 7)  # where the original has linear layers: dropout between


class AestheticReward(PublishedReward):
    """A reward of the image alone: a `fifa.scoring.rewards.base.RewardModel`.

    Parameters
    ----------
    spec
        The head's weights: a file, a folder with them, or a hub id. CLIP ViT-L/14 lies in the
        folder ``clip`` beside them or comes from the hub.
    runtime
        Where and how it computes; the head always in float32.
    """

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self._weights = find_weights(self.model, FILES)
        beside = self._weights.parent / "clip"
        folder = beside if beside.is_dir() else model_folder(CLIP_HUB)
        # simple_inference.py of christophschuhmann/improved-aesthetic-predictor uses OpenAI's
        # own preprocessing
        self._images = ImageTower(folder, "crop-convert", runtime)
        self.preprocessing = self._images.description

    @property
    def weights_digest(self) -> list[str]:
        """Of the head and of the CLIP."""
        return [files_digest({"head": self._weights}), self._images.digest]

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """Pixels, uint8 ``[3, size, size]``, of an image of any mode."""
        return self._images.preprocess(image)

    def image_features(self, pixels: Tensor) -> Tensor:
        """The points, float32 ``[b, 1]``."""
        torch = require("torch")
        embeddings = self._images.embed(pixels)
        with torch.inference_mode():
            points: Tensor = self._head(embeddings)
        return points

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Zeros, ``[n, 1]``: nothing is read in them."""
        torch = require("torch")
        nothing: Tensor = torch.zeros(len(prompts), 1, device=self.runtime.device)
        return nothing

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: the points."""
        return images[:, 0]

    @cached_property
    def _head(self) -> Any:
        tensors = {k.removeprefix("layers."): t for k, t in read_weights(self._weights).items()}
        head = linear_head(tensors, LINEAR, self._weights)
        return head.eval().requires_grad_(False).to(self.runtime.device)
