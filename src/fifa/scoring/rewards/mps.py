"""MPS: the image is looked at through those words of the prompt that a condition speaks of.

The arithmetic is that of ``infer_one_sample`` in Kwai-Kolors/MPS (CVPR 2024), with which its
figures were measured, on transformers' `CLIPModel`. What the README shows instead has another
threshold (0.01, not 0.3); both take one prompt at a time. Its checkpoint is a module that was
pickled whole; the port RE-N-Y/mpsv1 has the same weights as safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

from fifa.console import note
from fifa.errors import FifaError
from fifa.models.networks import loading
from fifa.models.optional import require
from fifa.models.runtime import Runtime, Tensor
from fifa.scoring.rewards import PublishedReward, weights
from fifa.scoring.rewards.hps import TOKENIZER_HUB, clip_config
from fifa.scoring.rewards.pixels import MEAN, STD, Preprocess, convert_crop, standardise
from fifa.scoring.specs import Spec
from fifa.shards.files import files_digest

FILES = ("MPS_overall_checkpoint.pth", "model.safetensors")
SIZE, TOKENS = 224, 77
# of overall preference, the only one that was published
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3  # of a word's likeness to the condition, where that of the likest is 1
HEAD = 64  # width of an attention head of the cross model
PARTS = ("model.", "cross_model.layers.")
COMPUTED = ("position_ids", "inv_freq")


class MPS(PublishedReward):
    """A reward from cross attention under a mask: a `fifa.scoring.rewards.RewardModel`.

    Image features are the image half's projected states, prompt features token ids; the text half
    and the cross model run in `rewards`.

    Parameters
    ----------
    spec
        The checkpoint: a file, a folder with it, or a hub id. The tokenizer lies beside it or
        comes from the hub's `TOKENIZER_HUB`; ``condition.txt`` beside it takes the place of
        `CONDITION`, for weights that were trained with another one.
    runtime
        Where and how it computes.
    """

    side = SIZE

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        super().__init__(spec, runtime)
        # pixels, uint8 [3, 224, 224], of an image of any mode
        self.preprocess: Preprocess = partial(convert_crop, size=SIZE)
        self._weights = weights.find_weights(self.model, FILES)
        self._tokenizer_folder = weights.companion_folder(
            self._weights, ("tokenizer.json", "vocab.json"), TOKENIZER_HUB, weights.TOKENIZER_FILES
        )
        own = self._weights.with_name("condition.txt")
        self._condition = own.read_text("utf-8").strip() if own.is_file() else CONDITION
        self.preprocessing = (
            f"convert-crop {SIZE}, mean {MEAN}, std {STD}; {TOKENS} tokens; "
            f"condition {self._condition!r} above {THRESHOLD}"
        )

    @property
    def weights_digest(self) -> str:
        """Of the weights and the tokenizer."""
        files = weights.tokenizer_files(self._tokenizer_folder)
        return files_digest({"model": self._weights, **files})

    def image_features(self, pixels: Tensor) -> Tensor:
        """The image half's states, projected, ``[b, patches + 1, d]``."""
        torch = require("torch")
        with torch.inference_mode(), self.runtime.autocast():
            out = self._model["vision"](pixel_values=standardise(self.runtime.pixels(pixels)))
            states: Tensor = self._model["clip"].visual_projection(out.last_hidden_state)
        return states

    def prompt_features(self, prompts: Sequence[str]) -> Tensor:
        """Token ids, int64 ``[n, 77]``, padded as the tokenizer pads."""
        torch = require("torch")
        ids: Tensor = torch.empty(0, TOKENS, dtype=torch.long)
        if prompts:
            ids = self._tokenizer(
                list(prompts),
                padding="max_length",
                truncation=True,
                max_length=TOKENS,
                return_tensors="pt",
            )["input_ids"]
        note(prompts_at_token_limit=int((ids[:, -2] != ids[:, -1]).sum()))
        return ids.to(self.runtime.device)

    def rewards(self, prompts: Tensor, images: Tensor) -> Tensor:
        """float32 ``[n]``: exp(logit_scale) * cos(prompt, image through the prompt)."""
        torch = require("torch")
        # the images of a prompt share what is read of it
        prompts, row = torch.unique(prompts, dim=0, return_inverse=True)
        with torch.inference_mode(), self.runtime.autocast():
            text, whole = self._read(prompts)
            # s_i = max over j of t_i . c_j, and a word i counts where s_i / max s > 0.3
            like = (text @ self._conditions.T).float().amax(-1)
            seen = like / like.amax(-1, keepdim=True) > THRESHOLD
            x, text, mask = images, text[row], seen[row][:, None, None]
            for layer in self._model["layers"]:
                x = x + _cross_attention(layer["0"], x, text, mask)
                x = x + _parallel_block(layer["1"], x, self._model["angles"])
        with torch.inference_mode():
            image, whole = x[:, 0].float(), whole[row].float()
            # cos = t . v / (|t| |v|)
            cosine = torch.nn.functional.cosine_similarity(whole, image)
            reward: Tensor = cosine * self._model["clip"].logit_scale.float().exp()
        return reward

    def _read(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """The text half's projected states, ``[n, 77, d]``, and the last token's, ``[n, d]``."""
        clip = self._model["clip"]
        out = self._model["text"](input_ids=ids)
        return clip.text_projection(out.last_hidden_state), clip.text_projection(out.pooler_output)

    @cached_property
    def _conditions(self) -> Tensor:
        """The projected states of the condition's tokens, ``[77, d]``."""
        return self._read(self.prompt_features([self._condition]))[0][0]

    @cached_property
    def _tokenizer(self) -> Any:
        return weights.load_tokenizer(self._tokenizer_folder)

    @cached_property
    def _model(self) -> dict[str, Any]:
        clip, layers, angles = self._build(weights.read_weights(self._weights, whole=True))
        whole, parts = self.runtime, replace(self.runtime, compile=False)
        return {
            "vision": whole.place(clip.vision_model),
            "text": whole.place(clip.text_model),
            "clip": parts.place(clip),
            "layers": parts.place(layers),
            "angles": tuple(part.to(whole.device) for part in angles),
        }

    def _build(self, tensors: dict[str, Any]) -> tuple[Any, Any, tuple[Tensor, Tensor]]:
        """CLIP, the cross model's layers, and cosine and sine of their rotary angles.

        Raises `FifaError` for weights that are not MPS's.
        """
        torch, transformers = require("torch"), require("transformers")
        where = self._weights
        tensors = {key.removeprefix("mps."): tensor for key, tensor in tensors.items()}
        own, cross = weights.all_below(tensors, PARTS, "MPS", where)
        # of Residual, which the original wraps around each block
        blocks = {key.replace(".fn.", "."): tensor for key, tensor in cross.items()}
        try:
            inverse = blocks["0.1.rotary_emb.inv_freq"]
            queries = blocks["0.0.to_q.weight"]
            config = transformers.CLIPConfig(**clip_config(own))
        except (KeyError, ValueError, ZeroDivisionError) as error:
            raise FifaError(
                f"not the weights of MPS: {error} is missing", where=str(where)
            ) from error
        depth = 1 + max(int(key.partition(".")[0]) for key in blocks)
        with loading("the model", where), torch.device("meta"):
            clip = transformers.CLIPModel(config)
            layers = torch.nn.ModuleList(_layer(*queries.shape) for _ in range(depth))
        weights.fill(clip, {k: t for k, t in own.items() if not k.endswith(COMPUTED)}, where)
        weights.fill(layers, {k: t for k, t in blocks.items() if not k.endswith(COMPUTED)}, where)
        # buffers that no checkpoint has to hold do not survive the meta device
        for tower in (clip.text_model, clip.vision_model):
            positions = torch.arange(tower.embeddings.position_embedding.num_embeddings)
            tower.embeddings.position_ids = positions.expand(1, -1)
        # in the precision of the checkpoint: the original's is half, angles and all
        count = clip.vision_model.embeddings.position_embedding.num_embeddings
        angles = torch.outer(torch.arange(count, dtype=inverse.dtype), inverse).repeat(1, 2)
        return clip.float(), layers.float(), (angles.cos().float(), angles.sin().float())


def _layer(inner: int, width: int) -> Any:
    """The weights of a layer of the cross model, named as in the original."""
    nn = require("torch").nn

    def linear(into: int, out: int) -> Any:
        return nn.Linear(into, out, bias=False)

    feed = nn.ModuleDict({"0": linear(width, 8 * width), "2": linear(4 * width, width)})
    cross = {
        "norm": nn.LayerNorm(width),
        "to_q": linear(width, inner),
        "to_kv": linear(width, 2 * HEAD),
        "to_out": linear(inner, width),
        "ff": feed,
    }
    parallel = {
        "norm": nn.LayerNorm(width),
        "fused_attn_ff_proj": linear(width, inner + 2 * HEAD + 8 * width),
        "attn_out": linear(inner, width),
        "ff_out": nn.ModuleDict({"1": linear(4 * width, width)}),
    }
    return nn.ModuleDict({"0": nn.ModuleDict(cross), "1": nn.ModuleDict(parallel)})


def _cross_attention(part: Any, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
    """What the words give to the image's states, and the feed-forward beside it."""
    x = part["norm"](x)
    k, v = part["to_kv"](text).chunk(2, -1)
    out = _attend(part["to_q"](x), k, v, mask)
    found: Tensor = part["to_out"](out) + part["ff"]["2"](_swiglu(part["ff"]["0"](x)))
    return found


def _parallel_block(part: Any, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Attention among the image's states, and the feed-forward beside it."""
    width, inner = x.shape[-1], part["attn_out"].in_features
    fused = part["fused_attn_ff_proj"](part["norm"](x))
    q, k, v, feed = fused.split((inner, HEAD, HEAD, 8 * width), -1)
    out = _attend(q, k, v, None, angles)
    found: Tensor = part["attn_out"](out) + part["ff_out"]["1"](_swiglu(feed))
    return found


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    angles: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Many heads of queries ``[b, n, heads * 64]`` on one of keys and values ``[b, m, 64]``."""
    functional = require("torch.nn.functional")
    q, k, v = q.reshape(*q.shape[:2], -1, HEAD).transpose(1, 2), k[:, None], v[:, None]
    if angles is not None:
        q, k = (_rotated(t, *angles).to(v.dtype) for t in (q, k))
    k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
    out: Tensor = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2).flatten(2)


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    turned: Tensor = require("torch").cat((-second, first), -1)
    return x * cosine + turned * sine


def _swiglu(x: Tensor) -> Tensor:
    x, gate = x.chunk(2, -1)
    silu: Tensor = require("torch.nn.functional").silu(gate)
    return silu * x
