"""LAION's aesthetic predictor v2: a linear stack on CLIP ViT-L/14; it does not see the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from fifa.models.optional import require
from fifa.models.runtime import Runtime
from fifa.scoring.encoders import model_folder
from fifa.scoring.rewards.base import PublishedReward
from fifa.scoring.rewards.clip import ImageTower
from fifa.scoring.rewards.weights import fill, find_weights, read_weights
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
WIDTHS = (1024, 128, 64, 16, 1)
PLACES = (0, 2, 4, 6, 7)  # of the linear layers in the original's nn.Sequential: dropout between


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
        torch = require("torch")
        tensors = read_weights(self._weights)
        first = tensors.get("layers.0.weight")
        width = 768 if first is None else first.shape[1]
        with torch.device("meta"):
            head = linear_stack((width, *WIDTHS))
        places = dict(zip(PLACES, range(len(PLACES)), strict=True))
        fill(head, renumbered(tensors, "layers.", places), self._weights)
        return head.float().eval().requires_grad_(False).to(self.runtime.device)


def linear_stack(widths: Sequence[int]) -> Any:
    """Linear layers of these widths with nothing between: dropout rests when nobody trains."""
    torch = require("torch")
    return torch.nn.Sequential(*(torch.nn.Linear(i, o) for i, o in pairwise(widths)))


def renumbered(tensors: dict[str, Any], prefix: str, places: dict[int, int]) -> dict[str, Any]:
    """``tensors`` below ``prefix`` with layer numbers changed from the keys to the values."""
    out = {}
    for key, tensor in tensors.items():
        number, _, kind = key.removeprefix(prefix).partition(".")
        if key.startswith(prefix) and number.isdigit() and int(number) in places:
            out[f"{places[int(number)]}.{kind}"] = tensor
        else:
            out[key] = tensor
    return out
