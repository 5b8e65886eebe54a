"""Models as folders: found here or on the hub, named by the content of their files."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fifa.errors import FifaError
from fifa.models.families import FAMILIES
from fifa.models.optional import require
from fifa.shards.files import files_digest, read_json
from fifa.shards.mirror import local

MODEL_FILES = (".safetensors", ".json", ".txt", ".model")  # weights, configs, tokenizers
CONFIG_AND_WEIGHTS = MODEL_FILES[:2]
PART_FILES = (*MODEL_FILES, ".jinja")  # of a diffusion model's parts: chat templates too
_PARTS = dict.fromkeys(part for f in FAMILIES for part in (*f.parts, *f.optional))
_BESIDE = re.compile(r"[^/\\\0]+\.safetensors")
_SHARD = re.compile(r"-\d+-of-\d+$")
_WEIGHTS = ("diffusion_pytorch_model", "model")
SINGLE_FILE = "make one: fifa convert FILE --out FOLDER"
AGAIN = "download the model again"
VARIANTS = ("fp16", "bf16")  # copies in half precision, the best first
# What is fetched of a diffusion model: not the .bin, fp16, non-ema and single-file copies of the
# weights. `fetch_variants` fetches what of these is needed.
HUB_SETTINGS = (
    "model_index.json",
    *(f"{part}/*{suffix}" for part in _PARTS for suffix in PART_FILES[1:]),
)
HUB_FILES = (
    *HUB_SETTINGS,
    *(f"{part}/{name}.safetensors" for part in _PARTS for name in _WEIGHTS),
    *(f"{part}/{name}-*-of-*.safetensors" for part in _PARTS for name in _WEIGHTS),
)


def model_folder(model: str | Path, patterns: Sequence[str] | None = None) -> Path:
    """The folder of a model: local as it is, or a hub id's files, fetched once.

    ``patterns`` are the names (with ``*``) to fetch; default: `MODEL_FILES`. Raises `FifaError`
    where there is no such model.
    """
    path = local(model)
    if path.is_dir():
        check_files(path)
        return path
    if path.is_file():
        raise FifaError(
            "the model is a single file; a folder of parts is needed",
            where=str(path),
            do=f"name its folder, or {SINGLE_FILE}",
        )
    hub = require("huggingface_hub")
    try:
        names = list(patterns or (f"*{suffix}" for suffix in MODEL_FILES))
        folder = Path(hub.snapshot_download(str(model), allow_patterns=names))
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        no_id = isinstance(error, hub.errors.HFValidationError)
        raise FifaError(
            f"no such model: {model} is neither a folder nor on the hub",
            where=str(path.absolute()) if no_id else str(error).splitlines()[0],
            do="name a folder with safetensors weights, or a hub id while online",
        ) from error
    check_files(folder)
    return folder


def check_files(folder: Path) -> None:
    """Raise `FifaError` if one of a model's files is none, or an index names another folder's.

    What a library would then open is not what the model is named by, or has no end.
    """
    for depth in ("", "*/"):
        for suffix in MODEL_FILES:
            for file in folder.glob(f"{depth}*{suffix}"):
                if not file.is_file():
                    raise FifaError("a link to nowhere, or no file", where=str(file), do=AGAIN)
        for file in folder.glob(f"{depth}*.safetensors.index*.json"):
            index = read_json(file, "the index of the weights")
            shards = index.get("weight_map")
            names = shards.values() if isinstance(shards, dict) else [None]
            if not all(isinstance(name, str) and _BESIDE.fullmatch(name) for name in names):
                raise FifaError(
                    "the index of the weights names no files beside it", where=str(file), do=AGAIN
                )


def pipeline_folder(model: str | Path, variant: str | None = None) -> Path:
    """`model_folder` of a diffusion model, with half precision where the hub has nothing else.

    With a ``variant``, of parts on the hub that have it only those copies are fetched.
    """
    if variant is None:
        return fetch_variants(model, model_folder(model, HUB_FILES), HUB_FILES)
    return fetch_variants(model, model_folder(model, HUB_SETTINGS), HUB_SETTINGS, (variant, ""))


def fetch_variants(
    model: str | Path,
    folder: Path,
    patterns: Sequence[str],
    variants: Sequence[str] = VARIANTS,
) -> Path:
    """Fetch copies of the weights of parts that came from the hub without any.

    Parameters
    ----------
    model
        A folder, which is left as it is, or a hub id.
    folder
        What `model_folder` gave for it.
    patterns
        The names that were fetched.
    variants
        Of the copies, the best first; empty: those without a variant in their name.
    """
    patterns = list(patterns)
    for variant in variants:
        lacking = [
            file.parent.name
            for file in sorted(folder.glob("*/config.json"))
            if file.parent.name in _PARTS and not any(file.parent.glob("*.safetensors"))
        ]
        if not lacking or local(model).is_dir():
            break
        ends = (f"*.{variant}*",) if variant else ("", "-*-of-*")
        copies = [f"{p}/{n}{end}.safetensors" for p in lacking for n in _WEIGHTS for end in ends]
        patterns += copies
        folder = model_folder(model, patterns)
    return folder


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a network's weights.

    Parameters
    ----------
    variant
        None, or what stands in their names: ``fp16``.
    paths
        The files, sorted.
    """

    variant: str | None
    paths: tuple[Path, ...]


def weight_copies(folder: Path) -> dict[str | None, list[Path]]:
    """The safetensors in a network's folder, sorted, by the variant in their names."""
    copies: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        # model.fp16.safetensors, model.fp16-00001-of-2.safetensors, model-00001-of-2.fp16....
        _, _, middle = path.name.removesuffix(".safetensors").partition(".")
        copies.setdefault(_SHARD.sub("", middle) or None, []).append(path)
    return copies


def weight_files(folder: Path) -> WeightFiles:
    """The safetensors that a network is loaded from, of all the copies in its folder.

    Those without a variant in their name where there are any, as libraries write them; else the
    first of `VARIANTS` that is there, else any other. No paths where there are none.
    """
    copies = weight_copies(folder)
    for variant in (None, *VARIANTS, *copies):
        if variant in copies:
            return WeightFiles(variant, tuple(copies[variant]))
    return WeightFiles(None, ())


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
