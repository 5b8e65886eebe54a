"""Qwen-Image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.flux import pack, unpack
from fifa.training.backbones.parts import ModelFolder, transformers
from fifa.training.backbones.text import TextEncoder, padded, text_width

# As in the pipeline, whose tokenizer has SKIP tokens for all that is before a prompt
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
SKIP = 34
LENGTH = 1024


class QwenImage(Backbone):
    """A transformer of image and text tokens on 2 x 2 patches of latents (arXiv:2508.02324).

    Its text is the last layer of a Qwen2.5-VL that is told to describe an image; what is padded
    is masked out.
    """

    patch = 2

    def load_reader(self, folder: ModelFolder) -> TextEncoder:
        """Qwen's tokenizer and the pipeline's template."""
        tokenizer = folder.read("tokenizer", transformers("Qwen2Tokenizer"))
        return TextEncoder(
            None, tokenizer, LENGTH + SKIP, TEMPLATE.format, masked=True, pad=True, skip=SKIP
        )

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Qwen2.5-VL's."""
        model = folder.model("text_encoder", transformers("Qwen2_5_VLForConditionalGeneration"))
        return [replace(self.load_reader(folder), model=model)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``, the last layer, float32 ``[n, longest, d]``, and ``mask``."""
        text = self.text[0]
        output, mask = text.read(prompts, output_hidden_states=True, logits_to_keep=1)
        hidden = output.hidden_states[-1]
        return padded([one[there][SKIP:] for one, there in zip(hidden, mask.bool(), strict=True)])

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        return {"prompt": (LENGTH, text_width(self.origin))}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        x = self.inputs({"noisy": noisy, **prompts})
        n, _, height, width = noisy.shape
        predicted = self.denoiser(
            hidden_states=pack(x["noisy"]),
            timestep=time.to(self.device, x["noisy"].dtype),  # the model multiplies it by 1,000
            encoder_hidden_states=x["prompt"],
            encoder_hidden_states_mask=x["mask"].bool() if "mask" in x else None,
            img_shapes=[[(1, height // 2, width // 2)]] * n,
            return_dict=False,
        )[0]
        return unpack(predicted, height, width).float()
