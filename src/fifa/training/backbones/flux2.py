"""FLUX.2 [dev]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder, transformers
from fifa.training.backbones.text import TextEncoder, chat_template, text_width

LENGTH = 512  # tokens, as in the pipeline
# The pipeline's own, which the model was trained with
SYSTEM = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation."
)


class Flux2(Backbone):
    """A transformer of image and text tokens; the VAE makes patches of latents already.

    Its text are three layers of a language model side by side, padded to 512 tokens of which none
    is masked out. FLUX.2 [dev] is distilled to take the guidance scale as an input: in training it
    is the family's, as in the pipeline, so that what is trained is what is sampled.
    """

    layers = (10, 20, 30)

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Mistral's, whose tokenizer is part of a processor for texts and images."""
        tokenizer = folder.read("tokenizer", transformers("AutoTokenizer"))
        model = folder.model("text_encoder", transformers("Mistral3ForConditionalGeneration"))
        written = chat_template(tokenizer, folder.path / "tokenizer", add_generation_prompt=False)

        def template(prompt: str) -> str:
            # images' places are no text, and are left out by the pipeline
            both = {"system": SYSTEM, "user": prompt.replace("[IMG]", "")}
            return written(
                [
                    {"role": role, "content": [{"type": "text", "text": text}]}
                    for role, text in both.items()
                ]
            )

        return [TextEncoder(model, tokenizer, LENGTH, template, special=False, masked=True)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``, float32 ``[n, 512, 3 d]``: the layers side by side, padding among them."""
        output = self.text[0](prompts, output_hidden_states=True, logits_to_keep=1)
        hidden = [output.hidden_states[layer].float() for layer in self.layers]
        return {"prompt": torch.cat(hidden, dim=-1)}

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        return {"prompt": (LENGTH, len(self.layers) * text_width(self.origin))}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        x = self.inputs({"noisy": noisy, **prompts})
        n, _, height, width = noisy.shape
        guidance = None
        if self.settings["guidance_embeds"]:
            guidance = torch.full((n,), self.family.guidance, device=self.device)
        predicted: Tensor = self.denoiser(
            hidden_states=x["noisy"].flatten(2).mT,
            timestep=time.to(self.device, x["noisy"].dtype),  # the model multiplies it by 1,000
            guidance=guidance,
            encoder_hidden_states=x["prompt"],
            txt_ids=positions(1, 1, x["prompt"].shape[1], self.device),
            img_ids=positions(height, width, 1, self.device),
            return_dict=False,
        )[0]
        return predicted.mT.contiguous().view(noisy.shape).float()


def positions(rows: int, columns: int, words: int, device: torch.device) -> Tensor:
    """0, row, column and word of every token, int64 ``[rows columns words, 4]``.

    Made where they are needed, as FLUX.1's.
    """
    axes = [torch.arange(n, device=device) for n in (1, rows, columns, words)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
