"""The models of the family, untrained, at the shipped size or smaller.

The shipped weights and the tests' tiny models are of the same classes and come from the same
functions; a `Size` says how wide they are.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fifa.models.optional import require
from fifa.moji.world import WORLD
from fifa.shards.files import write_json, write_text
from moji.prompts import vocabulary


@dataclass(frozen=True)
class Size:
    """How wide the models are.

    Attributes
    ----------
    vae
        Channels of the autoencoder, which makes 4 latent channels of a quarter of the width.
    unet
        Channels of the UNet's two levels; the lower one, 4x4 for 32-pixel pictures, attends to
        the prompt.
    text
        Width of the text encoder and of the UNet's cross-attention.
    text_layers
        Layers of the text encoder.
    clip
        Width of moji-clip's two towers.
    clip_layers
        Layers of each tower of moji-clip.
    tokens
        The longest prompt, in tokens; the rest is cut off.
    """

    vae: int = 48
    unet: tuple[int, int] = (64, 128)
    text: int = 128
    text_layers: int = 2
    clip: int = 128
    clip_layers: int = 4
    tokens: int = 32


SHIPPED = Size()
TINY = Size(vae=8, unet=(16, 32), text=16, text_layers=1, clip=16, clip_layers=1)


def stable_diffusion(size: Size, tokenizer: Path) -> Any:
    """A `diffusers.StableDiffusionPipeline` with random weights; seed torch before.

    Parameters
    ----------
    size
        How wide it is.
    tokenizer
        A folder that `write_tokenizer` filled.

    Returns
    -------
    diffusers.StableDiffusionPipeline
        Without a safety checker: what is unsafe in this world is known.
    """
    diffusers, transformers = require("diffusers"), require("transformers")
    words = transformers.CLIPTokenizer.from_pretrained(tokenizer)
    text = transformers.CLIPTextConfig(
        **_text_config(words, size.tokens), **_tower(size.text, size.text_layers)
    )
    channels = (size.vae,) * 3
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=WORLD.size // 4,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=size.unet,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=size.text,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        tokenizer=words,
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def scheduler() -> Any:
    """The noise schedule of Stable Diffusion 1.5, epsilon prediction, sampled with DDIM."""
    return require("diffusers").DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def clip_model(size: Size, tokenizer: Path) -> Any:
    """A `transformers.CLIPModel` with random weights for the world's pictures."""
    transformers = require("transformers")
    words = transformers.CLIPTokenizer.from_pretrained(tokenizer)
    tower = _tower(size.clip, size.clip_layers)
    config = transformers.CLIPConfig(
        text_config={**_text_config(words, size.tokens), **tower, "projection_dim": size.clip},
        vision_config={
            **tower,
            "image_size": WORLD.size,
            "patch_size": 4,
            "projection_dim": size.clip,
        },
        projection_dim=size.clip,
    )
    return transformers.CLIPModel(config)


def write_tokenizer(folder: Path, size: Size = SHIPPED) -> None:
    """Write a CLIP tokenizer that has every word of the world as one token.

    Other text falls apart into pieces of words and, in the end, into bytes, so every text has
    tokens. The files are those of CLIP's: ``vocab.json``, ``merges.txt``.
    """
    tokenizers = require("tokenizers")
    letters = sorted(require("tokenizers").pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Whitespace(), tokenizers.pre_tokenizers.Digits(True)]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=4096, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    merges = json.loads(bpe.to_str())["model"]["merges"]
    # CLIP's order: bytes, bytes at a word's end, merges, start and end of text
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    tokens += [left + right for left, right in merges]
    tokens = list(dict.fromkeys([*tokens, START, END]))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: i for i, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    write_text(folder / "merges.txt", "\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": size.tokens,
        "do_lower_case": True,
        **special,
    }
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special)


START, END = "<|startoftext|>", "<|endoftext|>"


def _text_config(words: Any, tokens: int) -> dict[str, Any]:
    return {
        "vocab_size": len(words),
        "max_position_embeddings": tokens,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "pad_token_id": words.pad_token_id,
    }


def _tower(width: int, layers: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
    }


def write_tiny(folder: Path, size: Size = TINY, *, seed: int = 0) -> tuple[Path, Path]:
    """Write an untrained moji-sd and moji-clip of another size, for tests.

    Parameters
    ----------
    folder
        Gets ``moji-sd`` and ``moji-clip``.
    size
        How wide they are.
    seed
        Of the random weights.

    Returns
    -------
    tuple
        The two folders: a diffusers pipeline and a transformers CLIP.
    """
    torch = require("torch")
    tokenizer = folder / "tokenizer"
    write_tokenizer(tokenizer, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = stable_diffusion(size, tokenizer)
        clip = clip_model(size, tokenizer)
    sd, pair = folder / "moji-sd", folder / "moji-clip"
    pipe.save_pretrained(sd)
    save_clip(clip, pipe.tokenizer, pair)
    return sd, pair


def save_clip(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a CLIP with its tokenizer and OpenAI's preprocessing at the world's size."""
    transformers = require("transformers")
    side = model.config.vision_config.image_size
    images = transformers.CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    images.save_pretrained(folder)
