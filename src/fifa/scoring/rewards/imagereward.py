"""ImageReward: BLIP-large reads the prompt while it looks at the image, a linear stack judges.

The arithmetic is that of ImageReward 1.5 (``ImageReward.inference_rank``), on transformers' BLIP
classes. Its checkpoint's names are those of Salesforce's BLIP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import Runtime, Tensor
from fifa.scoring.rewards import PublishedReward, weights
from fifa.scoring.rewards.clip import AESTHETIC_LINEAR
from fifa.scoring.rewards.pixels import MEAN, STD, Preprocess, crop_convert, standardise
from fifa.scoring.specs import Spec
from fifa.shards.files import files_digest

FILES = ("ImageReward.safetensors", "ImageReward.pt")
TOKENIZER_HUB = "google-bert/bert-base-uncased"
TOKENS = 35
SIZE = 224
REWARD_MEAN, REWARD_STD = 0.16717362830052426, 1.0333394966054072
HEAD_WIDTH = 64  # of an attention head, in BLIP's image and text halves
VISUAL = {
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^norm\.": "post_layernorm.",
    r"^blocks\.": "encoder.layers.",
    r"\.norm(\d)\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}


class ImageReward(PublishedReward):
    """A reward from cross attention: a `fifa.scoring.rewards.RewardModel`.

    Image features are the image half's states, prompt features token ids; the text half runs in
    `rewards`.

    Parameters
    ----------
    spec
        The checkpoint: a file, a folder with it, or a hub id. The tokenizer lies beside it or
        comes from the hub's `TOKENIZER_HUB`.
    runtime
        Where and how it computes; the head always in float32.
    """

    side = SIZE
    preprocessing = f"crop-convert {SIZE}, mean {MEAN}, std {STD}; {TOKENS} tokens"

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        # pixels, uint8 [3, 224, 224], of an image of any mode
        self.preprocess: Preprocess = partial(crop_convert, size=SIZE)
        self._weights = weights.find_weights(self.model, FILES)
        self._tokenizer_folder = weights.companion_folder(
            self._weights, ("vocab.txt",), TOKENIZER_HUB, weights.TOKENIZER_FILES
        )

    @property
    def weights_digest(self) -> str:
        """Of the weights and the vocabulary."""
        vocabulary = self._tokenizer_folder / "vocab.txt"
        return files_digest({"model": self._weights, "vocabulary": vocabulary})

    def image_features(self, pixels: Tensor) -> Tensor:
        """The image half's states, ``[b, patches + 1, d]``."""
        torch = require("torch")
        with torch.inference_mode(), self.runtime.autocast():
            out = self._model["image"](pixel_values=standardise(self.runtime.pixels(pixels)))
            states: Tensor = out.last_hidden_state
        return states

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Token ids and attention mask, int64 ``[n, 2, 35]``."""
        torch = require("torch")
        if not prompts:
            none: Tensor = torch.empty(0, 2, TOKENS, dtype=torch.long)
            return none.to(self.runtime.device)
        read = self._tokenizer(
            list(prompts),
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        features: Tensor = torch.stack([read["input_ids"], read["attention_mask"]], 1)
        return features.to(self.runtime.device)

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: the head's value at the first token, standardised."""
        torch = require("torch")
        with torch.inference_mode(), self.runtime.autocast():
            out = self._model["text"](
                input_ids=prompts[:, 0],
                attention_mask=prompts[:, 1],
                encoder_hidden_states=images,
            )
        with torch.inference_mode():
            raw: Tensor = self._model["head"](out.last_hidden_state[:, 0].float())[:, 0]
            # (r - mean) / std
            return (raw - REWARD_MEAN) / REWARD_STD

    @cached_property
    def _tokenizer(self) -> Any:
        """BERT's, with the two marks that BLIP added to it."""
        tokenizer = weights.load_tokenizer(self._tokenizer_folder, "BertTokenizer")
        tokenizer.add_special_tokens({"bos_token": "[DEC]"})
        tokenizer.add_special_tokens({"extra_special_tokens": ["[ENC]"]})
        return tokenizer

    @cached_property
    def _model(self) -> dict[str, Any]:
        tensors = weights.read_weights(self._weights)
        image, text, head = build(tensors, self._weights)
        place = self.runtime.place
        plain = Runtime(self.runtime.device)
        return {"image": place(image), "text": place(text), "head": plain.place(head)}


def build(tensors: dict[str, Any], where: Path) -> tuple[Any, Any, Any]:
    """BLIP's image half, text half and ImageReward's head, with the weights of its checkpoint.

    Raises `FifaError` for weights that are not ImageReward's.
    """
    torch, transformers = require("torch"), require("transformers")
    blocks, text_tensors, head = weights.below(
        tensors, "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
    )
    image_tensors = {_visual(key): tensor for key, tensor in blocks.items()}
    text_tensors = {k: t for k, t in text_tensors.items() if not k.endswith("position_ids")}
    try:
        vision, text_config = _configs(image_tensors, text_tensors)
    except KeyError as error:
        raise FifaError(
            f"not the weights of ImageReward: {error} is missing", where=str(where)
        ) from error
    with torch.device("meta"):
        image = transformers.BlipVisionModel(transformers.BlipVisionConfig(**vision))
        text = transformers.models.blip.modeling_blip_text.BlipTextModel(
            transformers.BlipTextConfig(**text_config), add_pooling_layer=False
        )
    weights.fill(image, image_tensors, where)
    weights.fill(text, text_tensors, where)
    # a buffer that no checkpoint holds does not survive the meta device
    length = text_config["max_position_embeddings"]
    text.embeddings.position_ids = torch.arange(length).expand(1, -1)
    return image.float(), text.float(), weights.linear_head(head, AESTHETIC_LINEAR, where)


def _visual(key: str) -> str:
    for pattern, name in VISUAL.items():
        key = re.sub(pattern, name, key)
    return key


def _configs(image: dict[str, Any], text: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shapes of both halves, from the weights; the rest is BLIP's and BERT's."""
    patch = image["embeddings.patch_embedding.weight"]
    positions = image["embeddings.position_embedding"].shape[1]
    embedding = text["embeddings.word_embeddings.weight"]
    vision = {
        **weights.tower_shape(image, ".mlp.fc1.weight", HEAD_WIDTH),
        "image_size": patch.shape[-1] * round((positions - 1) ** 0.5),
        "patch_size": patch.shape[-1],
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }
    language = {
        "vocab_size": embedding.shape[0],
        "encoder_hidden_size": patch.shape[0],
        **weights.tower_shape(text, ".intermediate.dense.weight", HEAD_WIDTH),
        "max_position_embeddings": text["embeddings.position_embeddings.weight"].shape[0],
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "is_decoder": True,  # which is how these classes spell cross attention
    }
    return vision, language
