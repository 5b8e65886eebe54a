"""FLUX.1 [dev] and [schnell]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fifa.models.optional import require
from fifa.training.backbones.base import Tensors
from fifa.training.backbones.latent import LatentBackbone
from fifa.training.backbones.parts import ModelFolder, diffusers
from fifa.training.backbones.schedule import Flow
from fifa.training.backbones.text import clip_text, t5_text

if TYPE_CHECKING:
    from torch import Tensor

PARTS = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
GUIDANCE = 3.5  # what a guidance-distilled model is told: the pipeline's default


class Flux(LatentBackbone):
    """A transformer on 2 x 2 patches of latents, with positions by rotary embedding.

    FLUX.1 [dev] is distilled to take the guidance scale as an input: it is `GUIDANCE` in training
    as it is in the pipeline, so that what is trained is what is sampled.
    """

    kind = "flux"
    denoiser_name: Literal["unet", "transformer"] = "transformer"
    lora_targets: tuple[str, ...] = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    patch = 2

    def __init__(self, folder: ModelFolder) -> None:
        folder.check(PARTS)
        denoiser = folder.model("transformer", diffusers("FluxTransformer2DModel"))
        self.guided = bool(denoiser.config.guidance_embeds)
        # the pipeline takes 512 tokens, of which schnell was trained on 256
        length = 512 if self.guided else 256
        super().__init__(
            folder,
            denoiser,
            Flow(folder.config("scheduler"), str(folder.path / "scheduler")),
            [clip_text(folder), t5_text(folder, "_2", length)],
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``, T5's last layer, float32 ``[n, length, d]``, and ``pooled``, CLIP's."""
        clip, t5 = self.text
        return {"prompt": t5(prompts)[0].float(), "pooled": clip(prompts).pooler_output.float()}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        torch = require("torch")
        x = self.inputs({"noisy": noisy, **prompts})
        n, _, height, width = noisy.shape
        guidance = torch.full((n,), GUIDANCE, device=self.device) if self.guided else None
        kind = x["noisy"].dtype
        predicted = self.denoiser(
            hidden_states=pack(x["noisy"]),
            timestep=time.to(self.device, kind),  # the model multiplies it by 1,000 itself
            guidance=guidance,
            pooled_projections=x["pooled"],
            encoder_hidden_states=x["prompt"],
            txt_ids=torch.zeros(x["prompt"].shape[1], 3, device=self.device, dtype=kind),
            img_ids=positions(height // 2, width // 2).to(self.device, kind),
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


def positions(rows: int, columns: int) -> Tensor:
    """0, row and column of every patch, float32 ``[rows columns, 3]``."""
    torch = require("torch")
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    ids: Tensor = torch.stack([torch.zeros_like(row), row, column], dim=-1)
    return ids.reshape(-1, 3).float()
