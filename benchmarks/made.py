"""Models and data that benchmarks make: real architectures with random weights, and JPEGs.

Every model has a tiny size as well, of the same classes, for machines without a GPU.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SIDE = 512  # pixels of a JPEG
WORDS = ("a red house", "the old boat", "two cats", "at night", "by the river", "under trees")

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
TINY_VAE = {**VAE, "block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4}
CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
}
CLIP_BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "projection_dim": 32,
}
TINY_UNET = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
SDXL_UNET = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
}
# Of each model: the denoiser, the VAE, its text encoders, and the same tiny.
SD = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {**VAE, "sample_size": 512},
    "texts": (CLIP_L,),
}
TINY_SD = {
    "unet": {
        **TINY_UNET,
        "sample_size": 64,  # the stock pipeline writes over smaller ones
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "vae": {**TINY_VAE, "sample_size": 64},
    "texts": (TINY_TEXT,),
}
SDXL = {
    "unet": {
        **SDXL_UNET,
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "vae": {**VAE, "sample_size": 1024, "scaling_factor": 0.13025},
    "texts": (CLIP_L, CLIP_BIG_G),
}
TINY_SDXL = {
    "unet": {
        **SDXL_UNET,
        **TINY_UNET,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "sample_size": 16,
        "transformer_layers_per_block": (1, 2),
        "attention_head_dim": (2, 4),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    "vae": {**TINY_VAE, "sample_size": 64, "scaling_factor": 0.13025},
    "texts": (TINY_TEXT, {**TINY_TEXT, "hidden_act": "gelu"}),
}
# PickScore's size, CLIP ViT-H/14
CLIP_H = {
    "vision_config": {
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "text_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "projection_dim": 1024,
        "hidden_act": "gelu",
    },
    "projection_dim": 1024,
}
TINY_CLIP = {
    "vision_config": {**TINY_TEXT, "patch_size": 32},
    "text_config": TINY_TEXT,
    "projection_dim": 32,
}
# SmolLM2-135M, the default rater's language model
SMOLLM = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
TINY_LM = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def write_diffusion(folder: Path, made: dict[str, Any] = SD, device: str = "cpu") -> Path:
    """A diffusion model in the hub's layout, random weights in half precision; once a folder.

    Parameters
    ----------
    folder
        Where; a model that is there already stays.
    made
        `SD`, `SDXL`, `TINY_SD` or `TINY_SDXL`.
    device
        Where the weights are drawn.
    """
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if (folder / "model_index.json").exists():
        return folder
    torch.manual_seed(0)
    xl = len(made["texts"]) > 1
    index = {
        "_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "PNDMScheduler"],
    }
    parts: dict[str, Any] = {
        "unet": lambda: UNet2DConditionModel(**made["unet"]),
        "vae": lambda: AutoencoderKL(**made["vae"]),
    }
    for number, settings in enumerate(made["texts"], 1):
        suffix = "" if number == 1 else f"_{number}"
        text = CLIPTextModelWithProjection if number > 1 else CLIPTextModel
        config = CLIPTextConfig(**settings)
        parts[f"text_encoder{suffix}"] = lambda text=text, config=config: text(config)
        index[f"text_encoder{suffix}"] = ["transformers", text.__name__]
        index[f"tokenizer{suffix}"] = ["transformers", "CLIPTokenizer"]
        write_clip_tokenizer(folder / f"tokenizer{suffix}")
    for name, make in parts.items():
        with torch.device(device):
            part = make()
        part.half().save_pretrained(folder / name)
        del part
    # SD1.5's own
    scheduler = PNDMScheduler(**BETAS, steps_offset=1, skip_prk_steps=True)
    scheduler.save_pretrained(folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def write_clip(
    folder: Path, device: str = "cpu", dtype: str = "float32", **towers: dict[str, Any]
) -> Path:
    """A CLIP of random weights (ViT-B/32 unless told); its tokenizer knows bytes only."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    if (folder / "config.json").exists():
        return folder
    write_clip_tokenizer(folder)
    torch.manual_seed(0)
    config = CLIPConfig(**towers)
    config.text_config.eos_token_id = 2  # pool at the highest token id, as the published CLIPs do
    with torch.device(device):
        model = CLIPModel(config).eval()
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def write_clip_tokenizer(folder: Path) -> None:
    """CLIP's tokenizer with a vocabulary of bytes."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*alphabet, *(c + "</w>" for c in alphabet), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77
    ).save_pretrained(folder)


def write_language_model(
    folder: Path, texts: Sequence[str], made: dict[str, Any] = SMOLLM, device: str = "cpu"
) -> Path:
    """A Llama of random weights, and a tokenizer trained on ``texts``: tokens of usual lengths."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "config.json").exists():
        return folder
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(4096, made["vocab_size"]),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|im_end|>")
    torch.manual_seed(0)
    config = LlamaConfig(**made, max_position_embeddings=8192, tie_word_embeddings=True)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    fast.save_pretrained(folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def jpeg(draw: np.random.Generator, side: int = SIDE) -> bytes:
    """About 70 KB: soft shapes under fine grain, as generated pictures have."""
    coarse = Image.fromarray(draw.integers(0, 256, (24, 24, 3), np.uint8))
    pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC), np.float32)
    grained = pixels + draw.normal(0, 6, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(grained.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def jpegs(count: int, side: int = SIDE, drawn: int = 512) -> list[bytes]:
    """``count`` JPEGs of which no two are the same bytes, made on all processors.

    So many are drawn; the others are these again with a comment in their header, so that they
    take as long to read and to decode as any.
    """
    drawn = min(count, drawn)
    work = [(seed, side) for seed in range(drawn)]
    if drawn < 64:
        found = [_jpeg(one) for one in work]
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4
        with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
            found = list(pool.map(_jpeg, work, chunksize=8))
    return [found[i % drawn] if i < drawn else commented(found[i % drawn], i) for i in range(count)]


def commented(data: bytes, number: int) -> bytes:
    """The same JPEG with a number in a comment after its first marker."""
    text = str(number).encode()
    return data[:2] + b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text + data[2:]


def _jpeg(work: tuple[int, int]) -> bytes:
    seed, side = work
    return jpeg(np.random.default_rng(seed), side)


def captions(count: int) -> list[str]:
    """Prompts of which none comes twice."""
    draw = np.random.default_rng(0)
    return [f"{i} {', '.join(draw.choice(WORDS, 4))}" for i in range(count)]


def write_pairs(path: Path, images: Sequence[bytes], a_prompt: int = 1) -> Path:
    """Pairs of images that stand in one pair each, in Pick-a-Pic's columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs = len(images) // 2
    texts = captions(-(-pairs // a_prompt))
    rows = {
        "caption": [texts[i // a_prompt] for i in range(pairs)],
        "jpg_0": images[: 2 * pairs : 2],
        "jpg_1": images[1 : 2 * pairs : 2],
        "image_0_uid": [f"{i}-0" for i in range(pairs)],
        "image_1_uid": [f"{i}-1" for i in range(pairs)],
        "label_0": [float(i % 2) for i in range(pairs)],
        "label_1": [1.0 - i % 2 for i in range(pairs)],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(rows), path, row_group_size=64, compression="none")
    return path
