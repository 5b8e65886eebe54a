"""HPSv3: Qwen2-VL reads the image and a rubric, a head judges at the ``<|Reward|>`` token.

The arithmetic is that of hpsv3 1.0.0 (``Qwen2VLRewardModelBT``, ``HPSv3RewardInferencer``) on
transformers 4.45, here on today's `Qwen2VLModel`. Two things differ from Qwen2-VL itself, and the
weights were trained with both: positions simply count (no M-RoPE), and rotary frequencies are
rounded to bfloat16, because the original casts the whole model.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from fifa.console import note
from fifa.errors import FifaError
from fifa.models.optional import require, wheel_path
from fifa.models.runtime import Runtime, Tensor
from fifa.models.transformer import CHARACTERS_PER_TOKEN
from fifa.scoring.rewards import PublishedReward, weights
from fifa.scoring.rewards.pixels import MEAN, STD, Preprocess, fit_area, standardise
from fifa.scoring.specs import Spec
from fifa.shards.files import digest, files_digest, read_json

FILES = ("HPSv3.safetensors",)
BASE_HUB = "Qwen/Qwen2-VL-7B-Instruct"
AREA = 256 * 28 * 28  # pixels, least and most
TOKENS = 1536  # of the rubric (378 words) with the prompt in it
REWARD_TOKEN = "<|Reward|>"
# 3584-1024-16-2 with ReLU; where the original's nn.Sequential has the linear layers
LINEAR = (0, 3, 5)
# Qwen2-VL's chat template around one image and one text; the answer's beginning is left out
CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
)
# of the template; none of them is left in a prompt
MARKS = (REWARD_TOKEN, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
RUBRIC = "rubric.txt"


class HPSv3(PublishedReward):
    """A reward by a vision-language model: a `fifa.scoring.rewards.RewardModel`.

    Image features are the vision tower's tokens in their grid, ``[b, h / 28, w / 28, d]``, so
    only images of one shape make a batch; prompt features are token ids.

    Parameters
    ----------
    spec
        The checkpoint: a file, a folder with it, or a hub id. Config and tokenizer lie beside it
        or come from the hub's `BASE_HUB`.
    runtime
        Where and how it computes: ``dtype`` is that of the weights; the head always in float32.
    """

    side = math.isqrt(AREA)
    has_sigma = True

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self._weights = weights.find_weights(self.model, FILES)
        self._base = weights.companion_folder(
            self._weights, ("config.json",), BASE_HUB, ("config.json", *weights.TOKENIZER_FILES)
        )
        # pixels, uint8 [3, h, w]; `BadImage` for a sliver
        self.preprocess: Preprocess = partial(fit_area, area=AREA, factor=self._factor)
        self.preprocessing = (
            f"area {AREA}, factor {self._factor}, mean {MEAN}, std {STD}; {TOKENS} tokens"
        )

    @property
    def weights_digest(self) -> str:
        """Of weights, config and tokenizer."""
        names = ("config.json", *weights.TOKENIZER_FILES)
        base = {n: self._base / n for n in names if (self._base / n).is_file()}
        return files_digest({"model": self._weights, **base})

    @cached_property
    def identity(self) -> dict[str, Any]:
        """That of every published model, and the rubric."""
        return {**super().identity, "rubric": digest(*self._rubric)}

    def image_features(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens, ``[b, h / 28, w / 28, d]``."""
        torch = require("torch")
        patches, grid = self._patches(standardise(self.runtime.pixels(pixels)))
        with torch.inference_mode():
            out = self._model["visual"](patches.to(self._dtype), grid_thw=grid)
        b, height, width = len(pixels), *pixels.shape[2:]
        shape = (b, height // self._factor, width // self._factor, -1)
        tokens: Tensor = out.pooler_output.reshape(shape)
        return tokens

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Token ids up to ``<|Reward|>``, int32 ``[n, 1536]``, -1 where there is none.

        The image is one token here. What follows ``<|Reward|>`` in the original cannot change
        the reward, because attention only looks back. A prompt too long loses its end.
        """
        torch = require("torch")
        ids: Tensor = torch.full((len(prompts), TOKENS), -1, dtype=torch.int32)
        before, after = self._rubric
        tail = len(self._tokenizer(after)["input_ids"])
        cut = 0
        for row, prompt in enumerate(prompts):
            plain = prompt[: TOKENS * CHARACTERS_PER_TOKEN]
            for mark in MARKS:
                plain = plain.replace(mark, "")
            own = self._tokenizer(CHAT + before + plain + after)["input_ids"]
            if len(own) > TOKENS:
                own = own[: TOKENS - tail] + own[-tail:]
                cut += 1
            ids[row, : len(own)] = torch.tensor(own)
        note(prompts_at_token_limit=cut)
        return ids.to(self.runtime.device)

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n, 2]``: mu and sigma. All of ``images`` have one grid."""
        torch = require("torch")
        language = self._model["language"]
        b, h, w, d = images.shape
        lengths = (prompts >= 0).sum(1)
        ids = prompts[:, : int(lengths.max())].long().clamp(min=0)
        image_token = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")
        place = int((ids[0] == image_token).nonzero()[0, 0])
        with torch.inference_mode():
            embedded = self._model["embedding"](ids)
            tokens = images.reshape(b, h * w, d).to(embedded.dtype)
            states = torch.cat([embedded[:, :place], tokens, embedded[:, place + 1 :]], 1)
            lengths = lengths + h * w - 1
            mask = torch.arange(states.shape[1], device=ids.device) < lengths[:, None]
            # without position_ids the language model counts 0, 1, 2, ... image tokens and all
            out = language(inputs_embeds=states, attention_mask=mask.long(), use_cache=False)
            last = out.last_hidden_state[torch.arange(b, device=ids.device), lengths - 1]
            # (mu, log sigma) = W3 relu(W2 relu(W1 state))
            mu, log_sigma = self._model["head"](last.float()).unbind(1)
            judged: Tensor = torch.stack([mu, log_sigma.exp()], 1)
        return judged

    def _patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels ``[b, 3, h, w]`` as Qwen2-VL's rows of patches, and each image's grid."""
        torch = require("torch")
        vision = self._config["vision_config"]
        patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
        frames = vision.get("temporal_patch_size", 2)
        b, c, height, width = pixels.shape
        h, w = height // patch, width // patch
        split = pixels.reshape(b, c, h // merge, merge, patch, w // merge, merge, patch)
        # image, block row, block column, row and column in the block, channel, pixels
        rows = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
        rows = rows.expand(-1, -1, -1, -1, -1, -1, frames, -1, -1)
        grid = torch.tensor([[1, h, w]] * b, device=pixels.device)
        return rows.reshape(b * h * w, -1), grid

    @cached_property
    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = read_json(self._base / "config.json", "the model's settings")
        return config

    @property
    def _factor(self) -> int:
        vision = self._config.get("vision_config", {})
        return int(vision.get("patch_size", 14) * vision.get("spatial_merge_size", 2))

    @property
    def _dtype(self) -> Any:
        return getattr(require("torch"), self.runtime.dtype)

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = weights.load_tokenizer(self._base)
        tokenizer.add_special_tokens({"extra_special_tokens": [REWARD_TOKEN]})
        return tokenizer

    @cached_property
    def _rubric(self) -> tuple[str, str]:
        """What stands before and after the prompt, up to ``<|Reward|>``."""
        text = _rubric_text(self._weights.parent / RUBRIC)
        before, found, after = text.partition("{text_prompt}")
        after, ends, _ = after.partition(REWARD_TOKEN)
        if not found or not ends:
            raise FifaError("the rubric has no {text_prompt} or no <|Reward|> after it")
        return before, after + REWARD_TOKEN

    @cached_property
    def _model(self) -> dict[str, Any]:
        qwen, head = build(weights.read_weights(self._weights), self._config, self._weights)
        qwen = qwen.to(self._dtype)
        plain = Runtime(self.runtime.device)
        return {
            "visual": self.runtime.place(qwen.visual),
            "language": self.runtime.place(qwen.language_model),
            "embedding": plain.place(qwen.language_model.embed_tokens),
            "head": plain.place(head),
        }


def build(tensors: dict[str, Any], settings: dict[str, Any], where: Path) -> tuple[Any, Any]:
    """Qwen2-VL without its language head, and the reward head, with HPSv3's weights.

    Its checkpoint's names are those of transformers 4.45: ``visual``, ``model``, ``lm_head``,
    ``rm_head``. Raises `FifaError` for weights that are not HPSv3's.
    """
    torch, transformers = require("torch"), require("transformers")
    vision, language, head = weights.below(tensors, "visual.", "model.", "rm_head.")
    embedding = language.get("embed_tokens.weight")
    if embedding is None or not all(f"{place}.weight" in head for place in LINEAR):
        raise FifaError("not the weights of HPSv3", where=str(where))
    config = transformers.Qwen2VLConfig.from_dict(dict(settings))
    # the tokenizer with <|Reward|> has fewer entries than Qwen2-VL has rows
    config.text_config.vocab_size = embedding.shape[0]
    with torch.device("meta"):
        qwen = transformers.Qwen2VLModel(config)
    named = {f"visual.{key}": tensor for key, tensor in vision.items()}
    named |= {f"language_model.{key}": tensor for key, tensor in language.items()}
    weights.fill(qwen, named, where)
    _restore_buffers(qwen, config)
    return qwen, weights.linear_head(head, LINEAR, where, relu=True)


def _restore_buffers(qwen: Any, config: Any) -> None:
    """The frequencies of both rotary embeddings, which no checkpoint holds, in bfloat16.

    The original calls ``model.to(bfloat16)`` in training and inference, buffers included: the
    text half rounds frequencies, the vision half angles, cosines and sines too.
    """
    torch = require("torch")
    text = type(qwen.language_model.rotary_emb)(config=config.text_config)
    text.inv_freq = text.inv_freq.to(torch.bfloat16).float()
    vision = type(qwen.visual.rotary_pos_emb)(config.vision_config)
    frequencies = vision.inv_freq.to(torch.bfloat16)

    def rotate(x: Any, position_ids: Any) -> tuple[Any, Any]:
        positions = position_ids[..., None].to(torch.bfloat16)
        angles = vision.recomposition_frequencies(positions * frequencies.to(positions.device))
        return angles.cos().float(), angles.sin().float()

    vision.forward = rotate
    qwen.language_model.rotary_emb, qwen.visual.rotary_pos_emb = text, vision


def _rubric_text(path: Path) -> str:
    """What the model was trained to be asked, from ``path`` or from the hpsv3 package.

    The package is not imported (it needs transformers 4.45): its two strings are read out of its
    source.
    """
    if path.is_file():
        return path.read_text("utf-8")
    source = wheel_path("hpsv3", "dataset/data_collator_qwen.py")
    if source is None:
        raise FifaError(
            "HPSv3's rubric is not here",
            where=str(path),
            do="pip install --no-deps hpsv3==1.0.0 (only its text is read), or write that file",
        )
    found = {}
    for node in ast.parse(source.read_text("utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                found[name] = text
    try:
        return found["INSTRUCTION"] + found["prompt_with_special_token"]
    except KeyError as error:
        raise FifaError(f"no {error} in this hpsv3", where=str(source)) from error
