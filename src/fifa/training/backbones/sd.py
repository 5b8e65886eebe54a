"""Stable Diffusion 1.x and 2.x."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.text import TextEncoder, clip_sizes, clip_text


class StableDiffusion(Backbone):
    """A UNet that attends to CLIP's last layer (arXiv:2112.10752).

    Stable Diffusion 1.x predicts the noise, 2.x at 768 pixels predicts v: the model's scheduler
    configuration says which.
    """

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """CLIP's."""
        return [clip_text(folder)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``: the last layer with its norm, float32 ``[n, length, d]``."""
        (clip,) = self.text
        return {"prompt": clip(prompts)[0].float()}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        length, width, _ = clip_sizes(self.origin)
        return {"prompt": (length, width)}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The UNet's prediction, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        x = self.inputs({"noisy": noisy, **prompts})
        predicted: Tensor = self.denoiser(
            x["noisy"], time.to(self.device), x["prompt"], return_dict=False
        )[0]
        return predicted.float()
