"""HPSv2 and HPSv2.1: an open_clip ViT-H-14 checkpoint as a transformers CLIP.

The checkpoint is converted once, into a folder that transformers and every other part of FiFA
read like any CLIP. The mapping of names is that of open_clip's ``CLIP`` and ``VisionTransformer``
(the copies in hpsv2 1.2.0) to transformers' `CLIPModel`.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.models.runtime import Runtime
from fifa.scoring.rewards import weights
from fifa.scoring.rewards.clip import ClipReward
from fifa.scoring.specs import Spec
from fifa.shards.files import atomic_folder, cache_folder, files_digest, read_json, write_json

FILES = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
TOKENIZER_HUB = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104}  # open_clip's H, g and bigG; 64 for all others

TOWERS = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "transformer.resblocks.": "text_model.encoder.layers.",
}
# patterns of open_clip's whole names (layers are below their towers), and transformers' names
NAMES = {
    r"logit_scale": "logit_scale",
    r"text_projection": "text_projection.weight",
    r"token_embedding\.weight": "text_model.embeddings.token_embedding.weight",
    r"positional_embedding": "text_model.embeddings.position_embedding.weight",
    r"ln_final\.(weight|bias)": r"text_model.final_layer_norm.\1",
    r"visual\.proj": "visual_projection.weight",
    r"visual\.class_embedding": "vision_model.embeddings.class_embedding",
    r"visual\.conv1\.weight": "vision_model.embeddings.patch_embedding.weight",
    r"visual\.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    r"visual\.ln_pre\.(weight|bias)": r"vision_model.pre_layrnorm.\1",  # transformers spells it so
    r"visual\.ln_post\.(weight|bias)": r"vision_model.post_layernorm.\1",
    r"(\w+\.encoder\.layers\.\d+)\.ln_([12])\.(\w+)": r"\1.layer_norm\2.\3",
    r"(\w+\.encoder\.layers\.\d+)\.attn\.out_proj\.(\w+)": r"\1.self_attn.out_proj.\2",
    r"(\w+\.encoder\.layers\.\d+)\.mlp\.c_fc\.(\w+)": r"\1.mlp.fc1.\2",
    r"(\w+\.encoder\.layers\.\d+)\.mlp\.c_proj\.(\w+)": r"\1.mlp.fc2.\2",
}
# open_clip multiplies from the left (x @ proj), a linear layer holds the transpose
TRANSPOSED = ("text_projection", "visual.proj")


class HPSReward(ClipReward):
    """HPSv2 or HPSv2.1: its model is what `hps_folder` takes."""

    def __init__(self, spec: Spec, runtime: Runtime) -> None:
        model = hps_folder(spec.name, spec.model or spec.entry.hub)
        super().__init__(replace(spec, model=str(model)), runtime)


def hps_folder(name: str, model: str) -> Path:
    """A folder with HPSv2 as a transformers CLIP, converted if it has to be.

    Parameters
    ----------
    name
        ``hpsv2`` or ``hpsv2.1``.
    model
        A hub id, a folder with the checkpoint, the checkpoint itself, or a folder that is a
        transformers CLIP already. The tokenizer's files lie beside the checkpoint or come from
        the hub's `TOKENIZER_HUB`, an ``open_clip_config.json`` beside it may name a head width
        or QuickGELU.
    """
    if (Path(model).expanduser() / "config.json").is_file():
        return Path(model).expanduser()
    stem = FILES[name]
    checkpoint = weights.find_weights(model, (stem, stem.replace(".pt", ".safetensors")))
    tokenizer = weights.companion_folder(
        checkpoint, ("tokenizer.json", "vocab.json"), TOKENIZER_HUB, weights.TOKENIZER_FILES
    )
    settings = checkpoint.with_name("open_clip_config.json")
    files = weights.tokenizer_files(tokenizer)
    if not files:
        raise FifaError(
            "no tokenizer beside the checkpoint",
            where=str(tokenizer),
            do=f"put tokenizer.json of {TOKENIZER_HUB} there",
        )
    known = {"checkpoint": checkpoint, **files, **({"cfg": settings} if settings.exists() else {})}
    folder = cache_folder() / f"{name}-{files_digest(known)}"
    if not (folder / "model.safetensors").exists():
        echo(f"{name}: converting {checkpoint.name} once, into {folder}")
        own = read_json(settings, "the model's settings", missing={}).get("model_cfg", {})
        config, tensors = convert_open_clip(
            weights.read_weights(checkpoint),
            head_width=own.get("vision_cfg", {}).get("head_width"),
            text_heads=own.get("text_cfg", {}).get("heads"),
            quick_gelu=bool(own.get("quick_gelu")),
        )
        with atomic_folder(folder) as temporary:
            write_json(temporary / "config.json", config)
            for file in files.values():
                shutil.copyfile(file, temporary / file.name)
            save = require("safetensors.torch").save_file
            save(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    return folder


def convert_open_clip(
    tensors: dict[str, Any],
    *,
    head_width: int | None = None,
    text_heads: int | None = None,
    quick_gelu: bool = False,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """An open_clip CLIP's state dict as the config and state dict of a transformers `CLIPModel`.

    Parameters
    ----------
    tensors
        ``visual.*``, ``transformer.*``, ... as open_clip names them.
    head_width, text_heads
        What shapes do not tell. Default: open_clip's own (`HEAD_WIDTHS`; text width / 64).
    quick_gelu
        The activation; open_clip's ViT-H-14, and so HPSv2, has the exact GELU.

    Raises
    ------
    FifaError
        For a tensor whose name open_clip's plain CLIP does not have, or one that is missing.
    """
    out: dict[str, Any] = {}
    for key, tensor in tensors.items():
        if key in ("attn_mask", "input_resolution", "context_length", "vocab_size"):
            continue  # constants that some versions saved as well
        for name, value in _renamed(key, tensor):
            out[name] = value.float().contiguous().clone()
    try:
        config = clip_config(
            out, head_width=head_width, text_heads=text_heads, quick_gelu=quick_gelu
        )
    except (KeyError, ValueError) as error:
        raise FifaError(f"not the weights of an open_clip ViT: {error} is missing") from error
    return config, out


def clip_config(
    tensors: dict[str, Any],
    *,
    head_width: int | None = None,
    text_heads: int | None = None,
    quick_gelu: bool = False,
) -> dict[str, Any]:
    """The config of a transformers `CLIPModel` of open_clip's shapes with these weights.

    ``tensors`` as transformers names them, the rest as for `convert_open_clip`. Raises `KeyError`
    or `ValueError` where they are not those of such a model.
    """
    width, _, patch, _ = tensors["vision_model.embeddings.patch_embedding.weight"].shape
    context, text_width = tensors["text_model.embeddings.position_embedding.weight"].shape
    side = round((len(tensors["vision_model.embeddings.position_embedding.weight"]) - 1) ** 0.5)
    images, texts = weights.below(tensors, "vision_model.", "text_model.")
    text_head = text_width // text_heads if text_heads else 64
    common = {
        "hidden_act": "quick_gelu" if quick_gelu else "gelu",
        "projection_dim": len(tensors["text_projection.weight"]),
    }
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": common["projection_dim"],
        "vision_config": {
            "model_type": "clip_vision_model",
            **weights.tower_shape(
                images, ".mlp.fc1.weight", head_width or HEAD_WIDTHS.get(width, 64)
            ),
            **common,
            "patch_size": patch,
            "image_size": patch * side,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **weights.tower_shape(texts, ".mlp.fc1.weight", text_head),
            **common,
            "max_position_embeddings": context,
            "vocab_size": len(tensors["text_model.embeddings.token_embedding.weight"]),
            # transformers' sign for open_clip's pooling: at the highest token id
            "eos_token_id": 2,
        },
    }


def _renamed(key: str, tensor: Any) -> list[tuple[str, Any]]:
    """What one tensor of open_clip is called in transformers; q, k and v are three there."""
    name = key
    for prefix, target in TOWERS.items():
        if key.startswith(prefix):
            name = key.replace(prefix, target, 1)
    if joint := re.fullmatch(r"(\w+\.encoder\.layers\.\d+)\.attn\.in_proj_(weight|bias)", name):
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return [(f"{joint[1]}.self_attn.{p}_proj.{joint[2]}", part) for p, part in parts]
    for pattern, target in NAMES.items():
        if found := re.fullmatch(pattern, name):
            return [(found.expand(target), tensor.T if key in TRANSPOSED else tensor)]
    raise FifaError(f"not the weights of an open_clip ViT: {key} is unknown")
