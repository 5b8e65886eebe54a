"""Weights of reward models: found in a folder or on the hub, read without pickle's powers."""

from __future__ import annotations

import zipfile
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.hub import model_folder
from fifa.models.networks import loading, named_keys, working
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


class Shell:
    """Stands for a class or function that a checkpoint names: it does nothing with what it gets."""

    def __new__(cls, *arguments: object) -> Shell:
        """An empty one; unpickling puts attributes into it."""
        return object.__new__(cls)


def read_weights(path: Path, *, whole: bool = False) -> dict[str, Tensor]:
    """The tensors in a safetensors file or a torch checkpoint (``weights_only``, memory-mapped).

    A checkpoint that holds them under ``state_dict`` or ``model`` is unwrapped.

    Parameters
    ----------
    path
        The file.
    whole
        The checkpoint may be a whole module that was pickled with its classes: none of them is
        imported and no code of the file is run, each is read as a `Shell`.

    Raises
    ------
    FifaError
        For a file that is damaged or holds anything but tensors and plain values.
    """
    torch = require("torch")
    with working("cannot read the weights", path):
        if path.suffix == ".safetensors":
            loaded: Any = require("safetensors.torch").load_file(path)
        else:
            mappable = zipfile.is_zipfile(path)  # torch's format before 2020 is not
            with _shells(path) if whole else nullcontext():
                loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mappable)
        if isinstance(loaded, Shell):
            loaded = _state_of(loaded)
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    named = loaded.items() if isinstance(loaded, dict) else ()
    tensors = {k: v for k, v in named if isinstance(k, str) and isinstance(v, torch.Tensor)}
    if not tensors:
        raise FifaError("no tensors in the file", where=str(path))
    return tensors


def _shells(path: Path) -> AbstractContextManager[None]:
    """The context in which ``weights_only`` takes every name in a checkpoint for a `Shell`."""
    serialization = require("torch").serialization
    names = serialization.get_unsafe_globals_in_checkpoint(path)
    context: AbstractContextManager[None] = serialization.safe_globals([(Shell, n) for n in names])
    return context


def _state_of(module: Shell) -> dict[str, Any]:
    """The state dict of a module of which only the attributes are there."""
    found: dict[str, Any] = {}
    waiting, seen = [("", module)], {id(module)}
    while waiting:
        prefix, module = waiting.pop()
        own = vars(module)
        lasting = {**own["_parameters"], **own["_buffers"]}
        for name in own.get("_non_persistent_buffers_set", ()):
            lasting.pop(name)
        found |= {prefix + name: tensor for name, tensor in lasting.items()}
        for name, part in own["_modules"].items():
            if isinstance(part, Shell) and id(part) not in seen:
                seen.add(id(part))
                waiting.append((f"{prefix}{name}.", part))
    return found


def below(tensors: dict[str, Any], *prefixes: str) -> list[dict[str, Any]]:
    """The tensors below each prefix, named without it."""
    return [
        {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
        for prefix in prefixes
    ]


def all_below(
    tensors: dict[str, Any], prefixes: Sequence[str], model: str, where: Path
) -> list[dict[str, Any]]:
    """`below`; `FifaError` for tensors that are below none of the prefixes, or if one has none."""
    parts = below(tensors, *prefixes)
    foreign = [key for key in tensors if not key.startswith(tuple(prefixes))]
    lacking = [prefix for prefix, part in zip(prefixes, parts, strict=True) if not part]
    if foreign or lacking:
        wrong = named_keys(missing=lacking, unused=foreign)
        raise FifaError(f"not the weights of {model}: {wrong}", where=str(where))
    return parts


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


def tokenizer_files(folder: Path) -> dict[str, Path]:
    """The files of a tokenizer that are in a folder, by their names."""
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def load_tokenizer(folder: Path, type_name: str = "AutoTokenizer") -> Any:
    """The tokenizer in a local folder, by the transformers class of that name; no remote code."""
    with loading("the tokenizer", folder):
        return getattr(require("transformers"), type_name).from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
