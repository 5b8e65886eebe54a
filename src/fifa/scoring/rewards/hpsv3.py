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
from fifa.models.networks import loading
from fifa.models.optional import require, wheel_path
from fifa.models.runtime import Runtime, Tensor
from fifa.models.transformer import CHARACTERS_PER_TOKEN
from fifa.scoring.rewards import PublishedReward, weights
from fifa.scoring.rewards.pixels import MEAN, STD, Preprocess, fit_area, standardise
from fifa.scoring.specs import Spec
from fifa.shards.files import digest, files_digest, read_json

AREA = 256 * 28 * 28  # pixels, least and most
TOKENS = 1536  # of the rubric (378 words) with the prompt in it
REWARD_TOKEN = "<|Reward|>"
# 3584-1024-16-2 with ReLU; where the original's nn.Sequential has the linear layers
LINEAR = (0, 3, 5)
# Qwen's chat template around one image and one text; the answer's beginning is left out
USER = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
# of the template; none of them is left in a prompt
MARKS = (REWARD_TOKEN, "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
RUBRIC = "rubric.txt"
PARTS = ("visual.", "model.", "rm_head.")
COLLATOR = "data_collator_qwen.py"  # of the originals; holds the rubric


class HPSv3(PublishedReward):
    """A reward by a vision-language model: a `fifa.scoring.rewards.RewardModel`.

    Image features are the vision tower's tokens in their grid, ``[b, h / 28, w / 28, d]``, so
    only images of one shape make a batch; prompt features are token ids.

    Parameters
    ----------
    spec
        The checkpoint: a file, a folder with it, or a hub id. Config and tokenizer lie beside it
        or come from the hub's ``base``.
    runtime
        Where and how it computes: ``dtype`` is that of the weights; the head always in float32.
    """

    side = math.isqrt(AREA)
    has_sigma = True
    files: Sequence[str] = ("HPSv3.safetensors",)
    base = "Qwen/Qwen2-VL-7B-Instruct"
    beside = "config.json"  # what a folder has that needs nothing of ``base``
    chat = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{USER}"
    mean, std = MEAN, STD
    rubric = "pip install --no-deps hpsv3==1.0.0 (only its text is read), or write that file"

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        self._weights = weights.find_weights(self.model, self.files)
        self._base = weights.companion_folder(
            self._weights, (self.beside,), self.base, ("config.json", *weights.TOKENIZER_FILES)
        )
        # pixels, uint8 [3, h, w]; `BadImage` for a sliver
        self.preprocess: Preprocess = partial(fit_area, area=AREA, factor=self._factor)
        self.preprocessing = (
            f"area {AREA}, factor {self._factor}, mean {self.mean}, std {self.std}; {TOKENS} tokens"
        )

    @property
    def weights_digest(self) -> str:
        """Of weights, config and tokenizer."""
        files = {"model": self._weights, "config.json": self._base / "config.json"}
        return files_digest(files | weights.tokenizer_files(self._base))

    @cached_property
    def identity(self) -> dict[str, Any]:
        """That of every published model, and the rubric."""
        return {**super().identity, "rubric": digest(*self._rubric)}

    def image_features(self, pixels: Tensor) -> Tensor:
        """The vision tower's tokens in their grid, ``[b, h / 28, w / 28, d]``."""
        torch = require("torch")
        standard = standardise(self.runtime.pixels(pixels), self.mean, self.std)
        patches, grid = self._patches(standard)
        with torch.inference_mode():
            out = self._model["visual"](patches.to(self._dtype), grid_thw=grid)
            # Qwen3-VL has more of them for its text half's first layers
            layers = [out.pooler_output, *getattr(out, "deepstack_features", ())]
            joined: Tensor = torch.cat(layers, -1)
        b, height, width = len(pixels), *pixels.shape[2:]
        return joined.reshape(b, height // self._factor, width // self._factor, -1)

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
            own = self._tokenizer(self.chat + before + plain + after)["input_ids"]
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
        b, h, w, _ = images.shape
        lengths = (prompts >= 0).sum(1)
        ids = prompts[:, : int(lengths.max())].long().clamp(min=0)
        image_token = self._tokenizer.convert_tokens_to_ids("<|image_pad|>")
        place = int((ids[0] == image_token).nonzero()[0, 0])
        with torch.inference_mode():
            embedded = self._model["embedding"](ids)
            layers = images.reshape(b, h * w, -1).to(embedded.dtype)
            tokens, *deep = torch.split(layers, embedded.shape[-1], -1)
            states = torch.cat([embedded[:, :place], tokens, embedded[:, place + 1 :]], 1)
            lengths = lengths + h * w - 1
            mask = torch.arange(states.shape[1], device=ids.device) < lengths[:, None]
            more = self._places(states, place, (h, w), deep)
            out = language(
                inputs_embeds=states, attention_mask=mask.long(), use_cache=False, **more
            )
            last = out.last_hidden_state[torch.arange(b, device=ids.device), lengths - 1]
            mu, log_sigma = self._judge(last).unbind(1)
            judged: Tensor = torch.stack([mu, log_sigma.exp()], 1)
        return judged

    def _places(
        self, states: Tensor, place: int, grid: tuple[int, int], deep: list[Tensor]
    ) -> dict[str, Any]:
        """Nothing: without position_ids the text half counts 0, 1, 2, ... image tokens and all."""
        return {}

    def _judge(self, state: Tensor) -> Tensor:
        """(mu, log sigma) = W3 relu(W2 relu(W1 state)), float32 ``[b, 2]``."""
        judged: Tensor = self._model["head"](state.float())
        return judged

    def _patches(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels ``[b, 3, h, w]`` as Qwen2-VL's rows of patches, and each image's grid."""
        torch = require("torch")
        patch, merge, frames = self._sizes
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

    @cached_property
    def _sizes(self) -> tuple[int, int, int]:
        """Pixels of a patch and patches of a token, on a side, and frames of a patch."""
        with loading("the model's settings", self._base / "config.json"):
            vision = self._config.get("vision_config", {})
            known = {"patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
            patch, merge, frames = (int(vision.get(name, usual)) for name, usual in known.items())
            if min(patch, merge, frames) < 1:
                raise ValueError("a patch of no size")
        return patch, merge, frames

    @property
    def _factor(self) -> int:
        patch, merge, _ = self._sizes
        return patch * merge

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
        text = self._rubric_text()
        before, found, after = text.partition("{text_prompt}")
        after, ends, _ = after.partition(REWARD_TOKEN)
        if not found or not ends:
            raise FifaError("the rubric has no {text_prompt} or no <|Reward|> after it")
        return before, after + REWARD_TOKEN

    def _rubric_text(self) -> str:
        """What the model was trained to be asked: beside the weights, or in the hpsv3 package."""
        path, source = self._weights.with_name(RUBRIC), self._weights.with_name(COLLATOR)
        if path.is_file():
            return path.read_text("utf-8")
        found = source if source.is_file() else self._collator()
        if found is None:
            raise FifaError("the rubric is not here", where=str(path), do=self.rubric)
        return read_rubric(found)

    def _collator(self) -> Path | None:
        return wheel_path("hpsv3", f"dataset/{COLLATOR}")

    @cached_property
    def _model(self) -> dict[str, Any]:
        qwen, heads = self._build(weights.read_weights(self._weights))
        qwen = qwen.to(self._dtype)
        plain = Runtime(self.runtime.device)
        return {
            "visual": self.runtime.place(qwen.visual),
            "language": self.runtime.place(qwen.language_model),
            "embedding": plain.place(qwen.language_model.embed_tokens),
            **{name: plain.place(head) for name, head in heads.items()},
        }

    def _build(self, tensors: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Qwen2-VL without its language head, and the reward head, with HPSv3's weights.

        Its checkpoint's names are those of transformers 4.45: ``visual``, ``model``, ``lm_head``,
        ``rm_head``. Raises `FifaError` for weights that are not HPSv3's.
        """
        where = self._weights
        tensors.pop("lm_head.weight", None)
        vision, language, head = weights.all_below(tensors, PARTS, "HPSv3", where)
        named = {f"visual.{key}": tensor for key, tensor in vision.items()}
        named |= {f"language_model.{key}": tensor for key, tensor in language.items()}
        qwen = fill_qwen("Qwen2VL", named, self._config, where)
        return qwen, {"head": weights.linear_head(head, LINEAR, where, between="ReLU")}


def fill_qwen(name: str, tensors: dict[str, Any], settings: dict[str, Any], where: Path) -> Any:
    """The transformers model ``<name>Model`` of a vision-language Qwen with its weights.

    Raises `FifaError` for weights or settings that are not those of such a model.
    """
    torch, transformers = require("torch"), require("transformers")
    embedding = tensors.get("language_model.embed_tokens.weight")
    if embedding is None:
        raise FifaError(f"not the weights of a {name}", where=str(where))
    with loading("the model", where):
        config = getattr(transformers, f"{name}Config").from_dict(dict(settings))
        # the tokenizer with <|Reward|> has fewer entries than Qwen has rows
        config.text_config.vocab_size = embedding.shape[0]
        with torch.device("meta"):
            qwen = getattr(transformers, f"{name}Model")(config)
        weights.fill(qwen, tensors, where)
        _restore_buffers(qwen, config)
    return qwen


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


def read_rubric(source: Path) -> str:
    """The rubric in an original's `COLLATOR`, which is parsed and not run."""
    found = {}
    for node in ast.parse(source.read_text("utf-8")).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                found[name] = text
    try:
        return found["INSTRUCTION"] + found["prompt_with_special_token"]
    except KeyError as error:
        raise FifaError(f"no {error} in this hpsv3", where=str(source)) from error
