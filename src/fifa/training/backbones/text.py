"""Prompts through CLIP and T5 text encoders, as the stock pipelines send them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fifa.training.backbones.parts import ModelFolder, transformers


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    Parameters
    ----------
    model, tokenizer
        Of transformers.
    length
        Tokens of a prompt: shorter ones are padded, longer ones cut.
    """

    model: Any
    tokenizer: Any
    length: int

    def __call__(self, prompts: Sequence[str], **options: bool) -> Any:
        """The model's output; padding is not masked out, as in the pipelines."""
        tokens = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.length,
            truncation=True,
            return_tensors="pt",
        )
        mask = None
        if getattr(self.model.config, "use_attention_mask", False):
            mask = tokens.attention_mask.to(self.model.device)
        with torch.no_grad():
            return self.model(
                tokens.input_ids.to(self.model.device), attention_mask=mask, **options
            )


def clip_text(
    folder: ModelFolder, number: str = "", *, projection: bool = False, length: int | None = None
) -> TextEncoder:
    """The folder's CLIP text encoder ``text_encoder<number>``.

    Parameters
    ----------
    folder
        The model's folder.
    number
        The suffix of its name: ``""`` or ``"_2"``.
    projection
        Whether it projects its pooled output (``CLIPTextModelWithProjection``).
    length
        Tokens of a prompt; default: the tokenizer's own limit.
    """
    cls = transformers("CLIPTextModelWithProjection" if projection else "CLIPTextModel")
    tokenizer = folder.tokenizer(f"tokenizer{number}", transformers("CLIPTokenizer"))
    model = folder.model(f"text_encoder{number}", cls)
    return TextEncoder(model, tokenizer, length or tokenizer.model_max_length)


def t5_text(folder: ModelFolder, number: str, length: int) -> TextEncoder:
    """The folder's T5 encoder ``text_encoder<number>``, for prompts of ``length`` tokens."""
    tokenizer = folder.tokenizer(f"tokenizer{number}", transformers("T5TokenizerFast"))
    model = folder.model(f"text_encoder{number}", transformers("T5EncoderModel"))
    return TextEncoder(model, tokenizer, length)


def side_by_side(
    encoders: Sequence[TextEncoder], prompts: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """The last but one layers of CLIPs, and the first output of each (pooled if it projects).

    float32 ``[n, length, d1 + d2 + ...]``, and ``[n, d]`` of each.
    """
    outputs = [encoder(prompts, output_hidden_states=True) for encoder in encoders]
    tokens: Tensor = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
    return tokens, [output[0].float() for output in outputs]
