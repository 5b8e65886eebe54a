"""The models that are compared: where their weights are, and what names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fifa.errors import FifaError
from fifa.models.hub import HUB_FILES, MODEL_FILES, model_folder
from fifa.shards.files import digest, files_digest, read_json

Method = Literal["base", "lora", "part", "pipeline"]

BASE = "base"
LORA = "pytorch_lora_weights.safetensors"  # what diffusers' and our trainer write
PARTS = ("unet", "transformer")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-*-of-*.safetensors")
CHECKPOINT_FILES = ("*.json", LORA, *(f"{part}/{name}" for part in PARTS for name in WEIGHTS))
UNUSED = ("safety_checker", "feature_extractor", "image_encoder")  # no part of making an image


@dataclass(frozen=True)
class Model:
    """One of the models that are compared.

    Parameters
    ----------
    name
        ``base``, or a checkpoint's name.
    method
        ``base``; ``lora``: weights added to the base; ``part``: a UNet or transformer in the
        base's place; ``pipeline``: all parts of its own.
    source
        What the user named.
    path
        The pipeline's or the part's folder, or the LoRA's file.
    base
        The base's folder.
    base_weights
        What names the base's weights: a LoRA or a part is nothing without them.
    """

    name: str
    method: Method
    source: str
    path: Path
    base: Path
    base_weights: str

    @property
    def pipeline(self) -> Path:
        """The folder that the pipeline is loaded from."""
        return self.path if self.method == "pipeline" else self.base

    @cached_property
    def weights(self) -> str:
        """16 hex characters that name all weights and settings, wherever they lie."""
        if self.method == "base":
            return self.base_weights
        if self.method == "pipeline":
            return files_digest(_pipeline_files(self.path))
        if self.method == "lora":
            return digest(self.base_weights, files_digest({"lora": self.path}))
        files = {file.name: file for file in _model_files(self.path)}
        return digest(self.base_weights, part_name(self.path), files_digest(files))

    @property
    def training(self) -> Path | None:
        """The folder with the checkpoint's ``train.json``, if our trainer made it."""
        if self.method == "base":
            return None
        near = (self.path, *list(self.path.parents)[:4])
        return next((folder for folder in near if (folder / "train.json").is_file()), None)


def find_models(base: str, tuned: Mapping[str, str]) -> list[Model]:
    """The base and its checkpoints, the base first.

    Parameters
    ----------
    base
        A folder in diffusers' layout, or a hub id.
    tuned
        Checkpoints by name: see `find_checkpoint`.

    Raises
    ------
    FifaError
        For a model that is not there, and for a checkpoint named ``base``.
    """
    folder = find_pipeline(base)
    if BASE in tuned:
        raise FifaError("a checkpoint cannot be named base", do="--tuned NAME=PATH names it")
    whole = files_digest(_pipeline_files(folder))
    first = Model(BASE, "base", base, folder, folder, whole)
    return [first, *(find_checkpoint(name, path, first) for name, path in tuned.items())]


def name_checkpoints(paths: Sequence[str]) -> dict[str, str]:
    """``NAME=PATH``, or the path alone, named by as much of its end as tells all apart."""
    given = [_named(path) for path in dict.fromkeys(paths)]
    parts = [_parts(path) for name, path in given if not name]
    most = max(map(len, parts), default=1)
    depth = next((d for d in range(1, most) if len({p[-d:] for p in parts}) == len(parts)), most)
    found: dict[str, str] = {}
    for own, path in given:
        name = own or "/".join(_parts(path)[-depth:]) or "tuned"
        if name in found:
            raise FifaError(f"two checkpoints are named {name}", do="--tuned NAME=PATH names them")
        found[name] = path
    return found


def find_pipeline(model: str) -> Path:
    """The folder of a pipeline in diffusers' layout: local as it is, or a hub id's files.

    Raises `FifaError` for one that is not there, or that brings code of its own.
    """
    path = model_folder(model, HUB_FILES)
    class_name(path)
    return path


def class_name(folder: Path) -> str:
    """The class of the pipeline in ``folder``."""
    name = _index(folder).get("_class_name")
    if not isinstance(name, str):
        raise FifaError(
            "the pipeline brings code of its own, which is never run",
            where=str(folder / "model_index.json"),
            do="choose one of diffusers' own pipelines",
        )
    return name


def find_checkpoint(name: str, source: str, base: Model) -> Model:
    """A checkpoint, told apart by what is there.

    A whole pipeline (``model_index.json``), a folder with ``unet/`` or ``transformer/`` or one
    of these itself, a LoRA's folder or file, or a hub id with one of these.

    Raises `FifaError` where none of these is there.
    """

    def found(method: Method, path: Path) -> Model:
        return Model(name, method, source, path, base.base, base.base_weights)

    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != ".safetensors":
            raise FifaError(
                "weights are read from .safetensors only", where=source, do="convert the file"
            )
        return found("lora", path)
    folder = path if path.is_dir() else model_folder(source, CHECKPOINT_FILES)
    if (folder / "model_index.json").is_file():
        return found("pipeline", find_pipeline(source))
    if (folder / LORA).is_file():
        return found("lora", folder / LORA)
    for part in (*(folder / part for part in PARTS), folder):
        if (part / "config.json").is_file() and part_name(part):
            return found("part", part)
    loose = sorted(folder.glob("*.safetensors"))
    if len(loose) == 1:
        return found("lora", loose[0])
    raise FifaError(
        "no checkpoint here",
        where=str(folder),
        do=f"a folder with {LORA}, unet/, transformer/ or model_index.json, or a LoRA's file",
    )


def part_name(folder: Path) -> str:
    """``unet`` or ``transformer``, by the class in the folder's config; empty for another."""
    settings = read_json(folder / "config.json", "the model's settings", missing={})
    name = settings.get("_class_name", "")
    return "unet" if "UNet" in name else "transformer" if "Transformer" in name else ""


def _named(text: str) -> tuple[str, str]:
    """The name (empty for none) and the path of ``NAME=PATH`` or ``PATH``."""
    name, equals, path = text.partition("=")
    return (name, path) if equals and name and "/" not in name else ("", text)


def _parts(path: str) -> tuple[str, ...]:
    parts = [part for part in Path(path).parts if part not in ("/", ".", "..")]
    while len(parts) > 1 and Path(parts[-1]).name in (*PARTS, LORA):
        parts.pop()
    return tuple(parts)


def _index(folder: Path) -> dict[str, Any]:
    path = folder / "model_index.json"
    if not path.exists():
        raise FifaError(
            "no pipeline in diffusers' layout",
            where=str(path),
            do="name the folder that save_pretrained wrote",
        )
    index: dict[str, Any] = read_json(path, "the pipeline's index")
    return index


def _pipeline_files(folder: Path) -> dict[str, Path]:
    """The files of the parts that make an image."""
    parts = [name for name in _index(folder) if name[0] != "_" and name not in UNUSED]
    files = [folder / "model_index.json"]
    files += [file for part in parts for file in _model_files(folder / part)]
    return {file.relative_to(folder).as_posix(): file for file in files}


def _model_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob("*")) if file.suffix in MODEL_FILES]
