"""Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fifa.errors import FifaError
from fifa.models.networks import loading
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder
from fifa.training.backbones.text import (
    TextEncoder,
    clip_sizes,
    clip_text,
    side_by_side,
    t5_text,
    t5_width,
)

T5_LENGTH = 256  # tokens, as in the pipeline


class StableDiffusion3(Backbone):
    """A transformer of image and text tokens on a straight flow (arXiv:2403.03206).

    Its text is two CLIPs side by side and, if the folder has one, a T5 behind them; without it
    zeros stand there, as in the pipeline.
    """

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        with loading("the model's transformer", folder.path / folder.family.part):
            self.patch = int(self.settings["patch_size"])
            self.text_width = int(self.settings["joint_attention_dim"])
            if self.patch < 1:
                raise ValueError(f"its patch_size is {self.patch}")

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Two CLIPs', and T5's if the folder has it."""
        first = clip_text(folder, projection=True)
        # both CLIPs are given prompts of the first one's length
        text = [first, clip_text(folder, "_2", projection=True, length=first.length)]
        if "text_encoder_3" in folder.parts:
            text.append(t5_text(folder, "_3", T5_LENGTH))
        return text

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``clip`` float32 ``[n, length, d1 + d2]``, ``pooled`` ``[n, d1 + d2]``, ``t5`` if any.

        ``t5`` is ``[n, 256, d]``. They are put together in `predict`, as most of the whole would
        be zeros.
        """
        tokens, pooled = side_by_side(self.text[:2], prompts)
        encoded = {"clip": tokens, "pooled": torch.cat(pooled, dim=-1)}
        for t5 in self.text[2:]:
            encoded["t5"] = t5(prompts)[0].float()
        return encoded

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        folder = self.origin
        (length, one, first), (_, two, second) = (clip_sizes(folder, n) for n in ("", "_2"))
        if one + two > self.text_width:
            raise FifaError(
                f"the text encoders give {one} + {two} numbers, the transformer takes "
                f"{self.text_width}",
                where=str(folder.path),
                do="take all of its parts from one model",
            )
        shapes: dict[str, tuple[int, ...]] = {
            "clip": (length, one + two),
            "pooled": (first + second,),
        }
        if "text_encoder_3" in folder.parts:
            shapes["t5"] = (T5_LENGTH, t5_width(folder, "_3"))
        return shapes

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        x = self.inputs({"noisy": noisy, **prompts})
        predicted: Tensor = self.denoiser(
            hidden_states=x["noisy"],
            timestep=time.to(self.device) * self.schedule.steps,
            encoder_hidden_states=self._joined(x),
            pooled_projections=x["pooled"],
            return_dict=False,
        )[0]
        return predicted.float()

    def _joined(self, x: Tensors) -> Tensor:
        """CLIP's tokens, widened by zeros, then T5's: ``[n, length + 256, d]``."""
        clip = x["clip"]
        wide = torch.nn.functional.pad(clip, (0, self.text_width - clip.shape[-1]))
        t5 = x.get("t5")
        if t5 is None:
            t5 = clip.new_zeros(len(clip), T5_LENGTH, self.text_width)
        return torch.cat([wide, t5], dim=1)
