"""Z-Image and Z-Image Turbo."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder, transformers
from fifa.training.backbones.text import TextEncoder, chat_template, padded, text_width

LENGTH = 512  # tokens, as in the pipeline


class ZImage(Backbone):
    """A transformer on one sequence of image and text tokens (arXiv:2511.22699).

    Its text is the last but one layer of a Qwen3 that is asked by its chat template, thinking
    allowed; what is padded is left out.
    """

    patch = 2

    def load_reader(self, folder: ModelFolder) -> TextEncoder:
        """Qwen3's tokenizer and chat template."""
        tokenizer = folder.read("tokenizer", transformers("Qwen2Tokenizer"))
        options = {"add_generation_prompt": True, "enable_thinking": True}
        written = chat_template(tokenizer, folder.path / "tokenizer", **options)

        def template(prompt: str) -> str:
            return written([{"role": "user", "content": prompt}])

        return TextEncoder(None, tokenizer, LENGTH, template, masked=True)

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Qwen3's."""
        model = folder.model("text_encoder", transformers("Qwen3Model"))
        return [replace(self.load_reader(folder), model=model)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``, the last but one layer, float32 ``[n, longest, d]``, and ``mask``."""
        output, mask = self.text[0].read(prompts, output_hidden_states=True)
        hidden = output.hidden_states[-2]
        return padded([one[there] for one, there in zip(hidden, mask.bool(), strict=True)])

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        return {"prompt": (LENGTH, text_width(self.origin))}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter.

        It counts time from noise to image and predicts the flow in that direction.
        """
        x = self.inputs({"noisy": noisy, **prompts})
        text = list(x["prompt"])
        if "mask" in prompts:
            counts = prompts["mask"].sum(1).int().tolist()
            text = [one[:count] for one, count in zip(text, counts, strict=True)]
        predicted = self.denoiser(
            list(x["noisy"].unsqueeze(2)), 1 - time.to(self.device), text, return_dict=False
        )[0]
        return -torch.stack(predicted).squeeze(2).float()
