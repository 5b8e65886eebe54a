"""FLUX.1 [dev] and [schnell]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.text import (
    TextEncoder,
    clip_sizes,
    clip_text,
    t5_text,
    t5_width,
)


class Flux(Backbone):
    """A transformer on 2 x 2 patches of latents, with positions by rotary embedding.

    FLUX.1 [dev] is distilled to take the guidance scale as an input: in training
    it is the family's, as in the pipeline, so that what is trained is what is sampled.
    """

    patch = 2

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        self.guided = bool(self.settings["guidance_embeds"])
        # tokens, as in the pipeline, of which schnell learned fewer
        self.length = 512 if self.guided else 256

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """CLIP's, and T5's."""
        return [clip_text(folder), t5_text(folder, "_2", self.length)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``, T5's last layer, float32 ``[n, length, d]``, and ``pooled``, CLIP's."""
        clip, t5 = self.text
        return {"prompt": t5(prompts)[0].float(), "pooled": clip(prompts).pooler_output.float()}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        _, pooled, _ = clip_sizes(self.origin)
        return {"prompt": (self.length, t5_width(self.origin, "_2")), "pooled": (pooled,)}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        x = self.inputs({"noisy": noisy, **prompts})
        n, _, height, width = noisy.shape
        dtype, guidance = x["noisy"].dtype, None
        if self.guided:
            guidance = torch.full((n,), self.family.guidance, device=self.device)
        predicted = self.denoiser(
            hidden_states=pack(x["noisy"]),
            timestep=time.to(self.device, dtype),  # the model multiplies it by 1,000 itself
            guidance=guidance,
            pooled_projections=x["pooled"],
            encoder_hidden_states=x["prompt"],
            txt_ids=torch.zeros(x["prompt"].shape[1], 3, device=self.device, dtype=dtype),
            img_ids=positions(height // 2, width // 2, self.device).to(dtype),
            return_dict=False,
        )[0]
        return unpack(predicted, height, width).float()


def pack(latents: Tensor) -> Tensor:
    """``[n, c, h, w]`` as a sequence of 2 x 2 patches, ``[n, h/2 w/2, 4c]``."""
    n, c, h, w = latents.shape
    patches = latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(n, (h // 2) * (w // 2), 4 * c)


def unpack(patches: Tensor, height: int, width: int) -> Tensor:
    """What `pack` made, back as ``[n, c, h, w]``."""
    n, _, wide = patches.shape
    grid = patches.reshape(n, height // 2, width // 2, wide // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(n, wide // 4, height, width)


def positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """0, row and column of every patch, float32 ``[rows columns, 3]``.

    Made where they are needed: a copy from the CPU would wait for all that is queued there.
    """
    axes = [torch.arange(n, device=device) for n in (rows, columns)]
    row, column = torch.meshgrid(*axes, indexing="ij")
    ids: Tensor = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return ids.reshape(-1, 3).float()
