"""SANA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from fifa.models.networks import loading
from fifa.training.backbones.base import Backbone, Tensors
from fifa.training.backbones.parts import ModelFolder, transformers
from fifa.training.backbones.text import TextEncoder, padded, text_width

LENGTH = 300  # tokens, as in the pipeline
# What the pipeline tells the language model before a prompt
INSTRUCTION = "\n".join(
    (
        "Given a user prompt, generate an 'Enhanced prompt' that provides detailed visual "
        "descriptions suitable for image generation. Evaluate the level of detail in the user "
        "prompt:",
        "- If the prompt is simple, focus on adding specifics about colors, shapes, sizes, "
        "textures, and spatial relationships to create vivid and concrete scenes.",
        "- If the prompt is already detailed, refine and enhance the existing details slightly "
        "without overcomplicating.",
        "Here are examples of how to transform or refine prompts:",
        "- User Prompt: A cat sleeping -> Enhanced: A small, fluffy white cat curled up in a round "
        "shape, sleeping peacefully on a warm sunny windowsill, surrounded by pots of blooming red "
        "flowers.",
        "- User Prompt: A busy city street -> Enhanced: A bustling city street scene at dusk, "
        "featuring glowing street lamps, a diverse crowd of people in colorful clothing, and a "
        "double-decker bus passing by towering glass skyscrapers.",
        "Please generate only the enhanced description for the prompt below and avoid including "
        "any additional commentary or evaluations:",
        "User Prompt: ",
    )
)


class Sana(Backbone):
    """A transformer with linear attention on latents of 32 x 32 pixels (arXiv:2410.10629).

    Its text is the last layer of a Gemma 2 that reads an instruction before the prompt, of which
    the first token is kept and the last 299; what is padded is masked out. The empty prompt is
    read without the instruction, as that of the pipeline's guidance is.
    """

    def __init__(self, folder: ModelFolder) -> None:
        super().__init__(folder)
        with loading("the model's transformer", folder.path / folder.family.part):
            self.patch = int(self.settings["patch_size"])

    def load_reader(self, folder: ModelFolder) -> TextEncoder:
        """Gemma's tokenizer, and the instruction."""
        tokenizer = folder.read("tokenizer", transformers("AutoTokenizer"))
        tokenizer.padding_side = "right"
        skip = len(tokenizer.encode(INSTRUCTION)) - 2
        return TextEncoder(
            None, tokenizer, skip + LENGTH, lambda p: INSTRUCTION + plain(p), masked=True, skip=skip
        )

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Gemma 2's."""
        model = folder.model("text_encoder", transformers("Gemma2Model"))
        return [replace(self.load_reader(folder), model=model)]

    def encode_prompts(self, prompts: Sequence[str]) -> Tensors:
        """``prompt``, the last layer, float32 ``[n, longest, d]``, and ``mask``."""
        told = self.text[0]
        bare = replace(told, template=plain, length=LENGTH)
        keep = [0, *range(1 - LENGTH, 0)]
        rows: dict[int, Tensor] = {}
        for text in (told, bare):
            numbers = [i for i, prompt in enumerate(prompts) if bool(prompt) == (text is told)]
            if numbers:
                output, mask = text.read([prompts[i] for i in numbers])
                hidden, there = output[0][:, keep], mask[:, keep].bool()
                rows |= {i: hidden[k][there[k]] for k, i in enumerate(numbers)}
        return padded([rows[i] for i in range(len(prompts))])

    def prompt_shapes(self) -> dict[str, tuple[int, ...]]:
        """As `encode_prompts` has them, from the configurations."""
        return {"prompt": (LENGTH, text_width(self.origin))}

    def predict(self, noisy: Tensor, time: Tensor, prompts: Tensors, frames: Tensor) -> Tensor:
        """The transformer's flow, float32 ``[n, c, h, w]``; ``frames`` do not matter."""
        x = self.inputs({"noisy": noisy, **prompts})
        predicted: Tensor = self.denoiser(
            x["noisy"],
            encoder_hidden_states=x["prompt"],
            encoder_attention_mask=x.get("mask"),
            timestep=time.to(self.device) * self.schedule.steps * self.settings["timestep_scale"],
            return_dict=False,
        )[0]
        return predicted.float()


def plain(prompt: str) -> str:
    """As the pipeline reads a prompt: in small letters."""
    return prompt.lower().strip()
