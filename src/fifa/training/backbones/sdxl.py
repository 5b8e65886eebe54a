"""Stable Diffusion XL."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fifa.models.optional import require
from fifa.training.backbones.base import Tensors
from fifa.training.backbones.latent import LatentBackbone
from fifa.training.backbones.parts import ModelFolder, diffusers
from fifa.training.backbones.schedule import Diffusion
from fifa.training.backbones.text import clip_text, penultimate

if TYPE_CHECKING:
    from torch import Tensor

PARTS = (
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)


class StableDiffusionXL(LatentBackbone):
    """A UNet that attends to two CLIPs and is told sizes and crop (arXiv:2307.01952)."""

    kind = "sdxl"
    denoiser_name: Literal["unet", "transformer"] = "unet"
    lora_targets: tuple[str, ...] = ("to_k", "to_q", "to_v", "to_out.0")

    def __init__(self, folder: ModelFolder) -> None:
        folder.check(PARTS)
        super().__init__(
            folder,
            folder.model("unet", diffusers("UNet2DConditionModel")),
            Diffusion(folder.config("scheduler"), str(folder.path / "scheduler")),
            [clip_text(folder), clip_text(folder, "_2", projection=True)],
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt`` float32 ``[n, length, d1 + d2]``, ``pooled`` ``[n, d2]``.

        The last but one layers of both encoders side by side, and the second's projected output.
        The empty prompt is encoded like any other, as in training; the pipeline's zeros
        (``force_zeros_for_empty_prompt``) are for its negative prompt.
        """
        torch = require("torch")
        first, second = self.text
        one, _ = penultimate(first, prompts)
        two, pooled = penultimate(second, prompts)
        return {"prompt": torch.cat([one, two], dim=-1), "pooled": pooled}

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
