"""Models as folders: found here or on the hub, named by the content of their files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fifa.errors import FifaError
from fifa.models.families import FAMILIES
from fifa.models.optional import require
from fifa.shards.files import files_digest

MODEL_FILES = (".safetensors", ".json", ".txt", ".model")  # weights, configs, tokenizers
CONFIG_AND_WEIGHTS = MODEL_FILES[:2]
_PARTS = dict.fromkeys(part for f in FAMILIES for part in (*f.parts, *f.optional))
_WEIGHTS = ("diffusion_pytorch_model", "model")
# What is fetched of a diffusion model: not the .bin, fp16, non-ema and single-file copies of the
# weights.
HUB_FILES = (
    "model_index.json",
    *(f"{part}/*{suffix}" for part in _PARTS for suffix in MODEL_FILES[1:]),
    *(f"{part}/{name}.safetensors" for part in _PARTS for name in _WEIGHTS),
    *(f"{part}/{name}-*-of-*.safetensors" for part in _PARTS for name in _WEIGHTS),
)


def model_folder(model: str | Path, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a model: local as it is, or a hub id's files, fetched once.

    ``patterns`` are the names (with ``*``) to fetch; default: `MODEL_FILES`. Raises `FifaError`
    where there is no such model.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    hub = require("huggingface_hub")
    try:
        names = list(patterns or (f"*{suffix}" for suffix in MODEL_FILES))
        return Path(hub.snapshot_download(str(model), allow_patterns=names))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise FifaError(
            f"no such model: {model} is neither a folder nor on the hub",
            where=str(error).splitlines()[0],
            do="name a folder with safetensors weights, or a hub id while online",
        ) from error


def weights_folder(model: str, what: str) -> Path:
    """`model_folder` of an ``encoder``, ``language model``, ...; refused without safetensors."""
    folder = model_folder(model)
    if not any(folder.rglob("*.safetensors")):
        raise FifaError(
            f"the {what} has no safetensors weights (pickled ones are never opened)",
            where=str(folder),
            do="convert it with its save_pretrained, or choose another",
        )
    return folder


def model_digest(
    model: Path, suffixes: Sequence[str] = MODEL_FILES, *, nested: bool = False
) -> str:
    """16 hex characters that name a model by the content of its files, wherever they lie.

    The names of score files depend on it, so what counts for a model must stay as it is.

    Parameters
    ----------
    model
        Its folder, or its only file.
    suffixes
        Of the files that count.
    nested
        Whether files in the folder's own folders count.
    """
    if model.is_file():
        return files_digest({model.suffix[1:]: model})
    files = sorted(model.rglob("*") if nested else model.glob("*"))
    return files_digest(
        {
            file.relative_to(model).as_posix(): file
            for file in files
            if file.suffix in suffixes and file.is_file()
        }
    )
