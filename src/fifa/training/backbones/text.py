"""Text encoders of diffusion models, which read prompts as the stock pipelines send them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fifa.errors import FifaError
from fifa.models.runtime import tf32
from fifa.shards.files import read_json
from fifa.training.backbones.parts import ModelFolder, transformers


@dataclass(frozen=True)
class TextEncoder:
    """A text encoder with its tokenizer.

    Parameters
    ----------
    model, tokenizer
        Of transformers; the model may be None where only tokens are counted.
    length
        Tokens of a prompt: shorter ones are padded, longer ones cut.
    template
        What a prompt is put into.
    special
        Whether the tokenizer adds tokens of its own: a template may have them already.
    masked
        Whether padding is masked out of the attention, whatever the model's configuration says.
    pad
        ``max_length``, or True for the longest of the prompts.
    skip
        How many of a prompt's tokens are the template's, and no part of what it becomes.
    """

    model: Any
    tokenizer: Any
    length: int
    template: Callable[[str], str] = str
    special: bool = True
    masked: bool = False
    pad: str | bool = "max_length"
    skip: int = 0

    def __call__(self, prompts: Sequence[str], **options: Any) -> Any:
        """The model's output; padding is masked out where the pipelines do so."""
        return self.read(prompts, **options)[0]

    def read(self, prompts: Sequence[str], **options: Any) -> tuple[Any, Tensor]:
        """The model's output, and which of its tokens are the prompts': int64 ``[n, length]``."""
        tokens = self.tokenizer(
            [self.template(prompt) for prompt in prompts],
            padding=self.pad,
            max_length=self.length,
            truncation=True,
            add_special_tokens=self.special,
            return_tensors="pt",
        )
        config = self.model.config
        words = (getattr(config, "text_config", None) or config).vocab_size
        found = int(tokens.input_ids.max())
        if found >= words:  # on a GPU it would end the process
            raise FifaError(
                f"the tokenizer gives word {found:,}, the text encoder knows {words:,}",
                do="take both from one model",
            )
        there = tokens.attention_mask.to(self.model.device)
        masked = self.masked or getattr(config, "use_attention_mask", False)
        ids = tokens.input_ids.to(self.model.device)
        with torch.no_grad(), tf32(self.model.device):
            output = self.model(ids, attention_mask=there if masked else None, **options)
        return output, there

    def counts(self, prompts: Sequence[str]) -> list[int]:
        """How many tokens of each prompt are kept."""
        lengths = map(len, self._tokens(prompts))
        return [min(length, self.length) - self.skip for length in lengths]

    def _tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """All tokens of prompts, however many."""
        texts = [self.template(prompt) for prompt in prompts]
        found = self.tokenizer(texts, add_special_tokens=self.special, verbose=False)
        tokens: list[list[int]] = found["input_ids"]
        return tokens

    def cut(self, prompts: Sequence[str]) -> tuple[int, int]:
        """How many prompts are not read to their end, and how many of these are then as another.

        ``prompts`` are all different.
        """
        tokens = self._tokens(prompts)
        read = [tuple(own[: self.length - 1]) for own in tokens]  # the last one is the end's
        often = Counter(read)
        cut = [key for key, own in zip(read, tokens, strict=True) if len(own) > self.length]
        return len(cut), sum(often[key] > 1 for key in cut)


def padded(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    """Prompts of ``[tokens, d]`` each, as families have them that mask padding out.

    ``prompt`` float32 ``[n, longest, d]``, filled up with zeros, and ``mask`` ``[n, longest]``, 1
    for a token and 0 for filling.
    """
    both = {
        "prompt": [row.float() for row in rows],
        "mask": [row.new_ones(len(row)) for row in rows],
    }
    return {name: pad_sequence(list(parts), batch_first=True) for name, parts in both.items()}


def chat_template(tokenizer: Any, where: Path, **options: bool) -> Callable[[Any], str]:
    """From messages to the text that a language model reads, by its tokenizer's own template.

    Raises `FifaError` where it has none.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise FifaError(
            "the tokenizer has no chat template, which prompts are put into",
            where=str(where),
            do="download the model again: it is in tokenizer_config.json or chat_template.jinja",
        )

    def written(messages: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    return written


def text_width(folder: ModelFolder) -> int:
    """The width of the folder's language model, which is not loaded."""
    config = folder.config("text_encoder")
    return int(config.get("text_config", config)["hidden_size"])


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
    tokenizer = folder.read(f"tokenizer{number}", transformers("CLIPTokenizer"))
    model = folder.model(f"text_encoder{number}", cls)
    return TextEncoder(model, tokenizer, length or tokenizer.model_max_length)


def t5_text(folder: ModelFolder, number: str, length: int) -> TextEncoder:
    """The folder's T5 encoder ``text_encoder<number>``, for prompts of ``length`` tokens."""
    tokenizer = folder.read(f"tokenizer{number}", transformers("T5TokenizerFast"))
    model = folder.model(f"text_encoder{number}", transformers("T5EncoderModel"))
    return TextEncoder(model, tokenizer, length)


def clip_sizes(folder: ModelFolder, number: str = "") -> tuple[int, int, int]:
    """Tokens of a prompt, width and projected width of CLIP's encoder, which is not loaded."""
    tokenizer = f"tokenizer{number}"
    known = read_json(folder.path / tokenizer / "tokenizer_config.json", tokenizer, missing={})
    length = known.get("model_max_length")
    if length is None:  # a tokenizer of CLIP's 49,408 words takes its time
        length = folder.read(tokenizer, transformers("CLIPTokenizer")).model_max_length
    config = folder.read(f"text_encoder{number}", transformers("CLIPTextConfig"))
    return length, config.hidden_size, config.projection_dim


def t5_width(folder: ModelFolder, number: str) -> int:
    """The width of T5's encoder, which is not loaded."""
    width: int = folder.read(f"text_encoder{number}", transformers("T5Config")).d_model
    return width


def side_by_side(
    encoders: Sequence[TextEncoder], prompts: Sequence[str]
) -> tuple[Tensor, list[Tensor]]:
    """The last but one layers of CLIPs, and the first output of each (pooled if it projects).

    float32 ``[n, length, d1 + d2 + ...]``, and ``[n, d]`` of each.
    """
    outputs = [encoder(prompts, output_hidden_states=True) for encoder in encoders]
    tokens: Tensor = torch.cat([output.hidden_states[-2].float() for output in outputs], dim=-1)
    return tokens, [output[0].float() for output in outputs]
