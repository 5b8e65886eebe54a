"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.text import (
    TextEncoder,
    clip_sizes,
    clip_text,
    side_by_side,
)


class StableDiffusionXL(Backbone):
    """A UNet that attends to two CLIPs and takes sizes and crop as inputs (arXiv:2307.01952)."""

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Two CLIPs', of which the second projects."""
        return [clip_text(folder), clip_text(folder, "_2", projection=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt`` float32 ``[n, length, d1 + d2]``, ``pooled`` ``[n, d2]``.

        The last but one layers of both encoders side by side, and the second's projected output.
        The empty prompt is encoded like any other, as in training; the pipeline's zeros
        (``force_zeros_for_empty_prompt``) are for its negative prompt.
        """
        tokens, (_, pooled) = side_by_side(self.text, prompts)
        return {"prompt": tokens, "pooled": pooled}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        (length, one, _), (_, two, pooled) = (clip_sizes(self.origin, n) for n in ("", "_2"))
        return {"prompt": (length, one + two), "pooled": (pooled,)}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The UNet's prediction, float32 ``[n, c, h, w]``.

        ``frames`` are its time ids: original height and width, crop top and left, target height
        and width.
        """
        x = self.inputs({"noisy": noisy, "frames": frames, **prompts})
        predicted: Tensor = self.denoiser(
            x["noisy"],
            time.to(self.device),
            x["prompt"],
            added_cond_kwargs={"text_embeds": x["pooled"], "time_ids": x["frames"]},
            return_dict=False,
        )[0]
        return predicted.float()
