"""Weights of reward models: found in a folder or on the hub, read without pickle's powers."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.hub import model_folder
from fifa.models.networks import named_keys
from fifa.models.optional import require
from fifa.models.runtime import Tensor

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
)


def find_weights(model: str, names: Sequence[str]) -> Path:
    """The file with a model's weights.

    Parameters
    ----------
    model
        A file, a folder or a hub id.
    names
        What the file may be called, the best first; in a folder of one's own any other
        ``.safetensors``, ``.pt`` or ``.pth`` file will do if it is the only one.

    Raises
    ------
    FifaError
        Where there is none, or no saying which.
    """
    path = Path(model).expanduser()
    if path.is_file():
        return path
    folder = path if path.is_dir() else model_folder(model, names)
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt", ".pth"))
    if len(found) != 1:
        raise FifaError(
            f"no weights called {' or '.join(names)}"
            if not found
            else "there are several files of weights",
            where=str(folder),
            do=f"name the file itself{': ' if found else ''}{', '.join(p.name for p in found)}",
        )
    return found[0]


def companion_folder(
    weights: Path, wanted: Sequence[str], model: str, patterns: Sequence[str]
) -> Path:
    """Where what belongs to ``weights`` is: beside them if one of ``wanted`` is, or on the hub."""
    if any((weights.parent / name).is_file() for name in wanted):
        return weights.parent
    return model_folder(model, patterns)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file or a torch checkpoint (``weights_only``, memory-mapped).

    A checkpoint that holds them under ``state_dict`` or ``model`` is unwrapped. Raises
    `FifaError` for a file that is damaged or holds anything but tensors and plain values.
    """
    torch = require("torch")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = require("safetensors.torch").load_file(path)
        else:
            mappable = zipfile.is_zipfile(path)  # torch's format before 2020 is not
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
    except Exception as error:
        damaged = (OSError, ValueError, RuntimeError, EOFError, pickle.UnpicklingError)
        if not isinstance(error, damaged) and type(error).__name__ != "SafetensorError":
            raise
        brief = str(error).partition("\n")[0]
        raise FifaError(f"cannot read the weights: {brief}", where=str(path)) from error
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    tensors = {k: v for k, v in loaded.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise FifaError("no tensors in the file", where=str(path))
    return tensors


def below(tensors: dict[str, Any], *prefixes: str) -> list[dict[str, Any]]:
    """The tensors below each prefix, named without it."""
    return [
        {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]


def tower_shape(tensors: dict[str, Any], suffix: str, head_width: int) -> dict[str, int]:
    """Width, depth and heads of a transformer, from its layers' first linear layers.

    ``suffix`` is what those are called; `KeyError` where there are none.
    """
    layers = [tensor for key, tensor in tensors.items() if key.endswith(suffix)]
    if not layers:
        raise KeyError(suffix)
    width = layers[0].shape[1]
    return {
        "hidden_size": width,
        "intermediate_size": layers[0].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // head_width,
    }


def fill(module: Any, tensors: dict[str, Any], where: Path) -> None:
    """Give ``module`` (on the meta device) its weights; `FifaError` unless all fit."""
    try:
        missing, unexpected = module.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise FifaError(
            f"the weights do not fit: {str(error).splitlines()[-1].strip()}", where=str(where)
        ) from error
    if missing or unexpected:
        wrong = named_keys(missing=missing, unused=unexpected)
        raise FifaError(f"the weights do not fit: {wrong}", where=str(where))


def linear_head(
    tensors: dict[str, Any], places: Sequence[int | str], where: Path, *, between: str = ""
) -> Any:
    """A head of linear layers with its weights, float32, as its original's `Sequential` has them.

    Parameters
    ----------
    tensors
        ``PLACE.weight`` and ``PLACE.bias``, and nothing else.
    places
        Where the linear layers stand in the original. What stands between (dropout) rests when
        nobody trains,
    between
        but for an activation, if this is its name (``ReLU``, ``GELU``).
    where
        For `FifaError`, which is raised unless all weights fit.
    """
    torch = require("torch")
    layers: dict[str, Any] = {}
    width = 0
    with torch.device("meta"):
        for place in places:
            weight = tensors.get(f"{place}.weight")
            if weight is None or weight.dim() != 2:
                raise FifaError(f"the weights do not fit: no {place}.weight", where=str(where))
            if between and layers:
                layers[f"{between}-{place}"] = getattr(torch.nn, between)()
            layers[str(place)] = torch.nn.Linear(width or weight.shape[1], len(weight))
            width = len(weight)
        head = torch.nn.Sequential(OrderedDict(layers))
    fill(head, tensors, where)
    return head.float()


def load_tokenizer(folder: Path, type_name: str = "AutoTokenizer") -> Any:
    """The tokenizer in a local folder, by the transformers class of that name; no remote code."""
    try:
        return getattr(require("transformers"), type_name).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise FifaError(f"cannot load the tokenizer: {error}", where=str(folder)) from error
