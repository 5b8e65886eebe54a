"""FLUX.2 [klein]."""

from __future__ import annotations

from fifa.training.backbones.flux2 import LENGTH, Flux2
from fifa.training.backbones.parts import ModelFolder, transformers
from fifa.training.backbones.text import TextEncoder, chat_template


class Klein(Flux2):
    """FLUX.2's transformer, smaller, with a Qwen3 that is asked without thinking for its text."""

    layers = (9, 18, 27)

    def load_text(self, folder: ModelFolder) -> list[TextEncoder]:
        """Qwen3's."""
        tokenizer = folder.read("tokenizer", transformers("Qwen2Tokenizer"))
        model = folder.model("text_encoder", transformers("Qwen3ForCausalLM"))
        options = {"add_generation_prompt": True, "enable_thinking": False}
        written = chat_template(tokenizer, folder.path / "tokenizer", **options)

        def template(prompt: str) -> str:
            return written([{"role": "user", "content": prompt}])

        return [TextEncoder(model, tokenizer, LENGTH, template, masked=True)]
