"""The folder of a diffusion model: what it should hold, and its parts as their real classes.

Which class a part has is decided by the family's row and file, never by code that the folder
names; weights come from safetensors files only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fifa.console import quiet
from fifa.errors import FifaError
from fifa.models.families import PIPELINES, Family
from fifa.models.frozen import BYTES, OFFLOAD, offload_blocks, quantization, quantized_parts
from fifa.models.hub import pipeline_folder, weight_files
from fifa.models.joints import check_joints
from fifa.models.networks import load_network, loading, weights_in
from fifa.models.optional import require
from fifa.shards.files import read_json


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder in diffusers layout.

    Parameters
    ----------
    path
        Where it is.
    family
        What ``model_index.json`` says that it is.
    parts
        The parts of its family that it has: some may be lacking (SD3 works without its T5).
    device
        Where its parts are put.
    dtype, encoding
        The floating type of the denoiser's weights, and of those that only encode.
    kept
        How the denoiser is kept if it is frozen: see `fifa.models.frozen`.
    """

    path: Path
    family: Family
    parts: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype
    encoding: torch.dtype
    kept: str | None = None

    @property
    def quantized(self) -> str | None:
        """In what the denoiser's weights are: as asked for, or as the folder has them."""
        settings = self.path / self.family.part / "config.json"
        known = read_json(settings, "the denoiser's settings", missing={}).get(
            "quantization_config"
        )
        if isinstance(known, dict):
            return "nf4" if known.get("load_in_4bit") else "int8"
        return self.kept if self.kept in BYTES else None

    def check(self) -> None:
        """Raise `FifaError` unless all parts are there, fit together, and have whole weights.

        Of the weights only headers are read: a part is loaded when it is needed, hours later.
        """
        for part in dict.fromkeys((*self.family.parts, *self.parts)):
            folder = self.path / part
            if part not in self.parts:
                raise self._lacks(part, "model_index.json does not name it")
            if not folder.is_dir():
                raise self._lacks(part, f"there is no folder {part}")
            if part.startswith("tokenizer"):
                continue
            config = "scheduler_config.json" if part == "scheduler" else "config.json"
            if not (folder / config).is_file():
                raise self._lacks(part, f"there is no {part}/{config}")
            if part != "scheduler" and not weight_files(folder).paths:
                raise self._lacks(part, f"{part} has no safetensors (pickled weights stay closed)")
            shapes_in(folder)
        check_joints(self.path, self.family)
        quantized_parts(self.path)

    def model(self, part: str, cls: Any, dtype: torch.dtype | None = None) -> Any:
        """A network of the folder: frozen, in evaluation mode, on the device.

        Parameters
        ----------
        part
            Its folder.
        cls
            Its class, of diffusers or transformers.
        dtype
            Of its weights; default: `encoding`.
        """
        dtype = dtype or self.encoding
        if part == self.family.part and (self.kept or self.quantized):
            return self._loaded(part, partial(self._kept, cls, dtype)).requires_grad_(False)
        read = self._read_as(part, dtype)

        def load() -> Any:
            module = load_network(cls, self.path / part, read).to(self.device)
            # not by diffusers' own ``to``, which warns of weights to be kept, if of none
            return module if read == dtype else torch.nn.Module.to(module, dtype)

        return self._loaded(part, load).eval().requires_grad_(False)

    def _kept(self, cls: Any, dtype: torch.dtype) -> Any:
        """The denoiser, quantised or with its blocks in CPU memory."""
        options: dict[str, Any] = {}
        if self.quantized:
            options = quantization(self.kept, dtype, self.device)
        network = load_network(cls, self.path / self.family.part, dtype, **options)
        if self.quantized:
            del network.hf_device_map  # accelerate knows no cuda without a number
        if self.kept == OFFLOAD:
            offload_blocks(network, self.device)
        return network

    def _read_as(self, part: str, dtype: torch.dtype) -> torch.dtype:
        """The floating type to read weights in that shall have ``dtype`` on the device.

        Nine tenths of the time it takes to load a UNet are the cast on the CPU, so half precision
        goes to another device as it is in the file. Not where it should become float16: then
        transformers keeps some of T5's weights in float32.
        """
        kinds = kinds_in(self.path / part)
        if self.device.type == "cpu" or dtype == torch.float16 or len(kinds) != 1:
            return dtype
        return {"F16": torch.float16, "BF16": torch.bfloat16}.get(kinds.pop(), dtype)

    def read(self, part: str, cls: Any) -> Any:
        """A part without weights, as ``cls`` reads it: a tokenizer, a network's configuration."""
        return self._loaded(part, lambda: cls.from_pretrained(self.path / part))

    def config(self, part: str) -> dict[str, Any]:
        """A part's configuration as it stands in its JSON."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config: dict[str, Any] = read_json(self.path / part / name, f"the settings of {part}")
        return config

    def settings(self, part: str, cls: Any) -> dict[str, Any]:
        """A part's configuration, and what its class of diffusers takes where that says nothing."""
        known = signature(cls.__init__).parameters.items()
        defaults = {name: p.default for name, p in known if p.default is not p.empty}
        return defaults | self.config(part)

    def _loaded(self, part: str, load: Any) -> Any:
        libraries = (require(name, "train") for name in ("diffusers", "transformers"))
        again = "download the model again, or name another"
        with (
            quiet(*libraries, warnings=True),
            loading(f"the model's {part}", self.path / part, again),
        ):
            return load()

    def _lacks(self, part: str, why: str) -> FifaError:
        return FifaError(
            f"the model lacks its {part}: {why}",
            where=str(self.path),
            do="name a complete folder in diffusers layout, or a hub id",
        )


def shapes_in(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that a network is loaded from, by name; reads headers only.

    Raises `FifaError` for a file that is damaged.
    """
    return {name: tuple(entry.get_shape()) for name, entry in _entries(folder)}


def kinds_in(folder: Path) -> set[str]:
    """The types of the weights that a network is loaded from, as their headers name them."""
    return {entry.get_dtype() for _, entry in _entries(folder)}


def tensors_in(folder: Path, names: Sequence[str]) -> list[Tensor]:
    """Some of the weights that a network is loaded from, without the rest.

    Raises `FifaError` where one is missing.
    """
    found = {name: entry[:] for name, entry in _entries(folder) if name in names}
    if missing := sorted(set(names) - found.keys()):
        raise FifaError(f"the weights lack {', '.join(missing)}", where=str(folder))
    return [found[name] for name in names]


def _entries(folder: Path) -> Iterator[tuple[str, Any]]:
    return weights_in(weight_files(folder).paths)


def open_folder(
    model: str | Path,
    device: torch.device,
    dtype: torch.dtype,
    encoding: torch.dtype | None = None,
    kept: str | None = None,
) -> ModelFolder:
    """The folder of a model, local or from the hub; ``encoding`` is ``dtype`` if not given.

    Raises `FifaError` where there is none, and for a family that is not known.
    """
    path = pipeline_folder(model)
    index = path / "model_index.json"
    if not index.is_file():
        raise FifaError(
            "not a diffusion model: there is no model_index.json",
            where=str(path),
            do="name a folder in diffusers layout (what its save_pretrained writes), or a hub id",
        )
    known = read_json(index, "the pipeline's index")
    family = PIPELINES.get(str(known.get("_class_name")))
    if family is None:
        raise FifaError(
            f"a model of class {known.get('_class_name')} is not known",
            where=str(index),
            do=f"one of {', '.join(PIPELINES)}",
        )
    family.check_version()
    named = {
        part for part, entry in known.items() if isinstance(entry, list) and entry[-1:] != [None]
    }
    parts = [part for part in family.parts if part in named]
    if named.intersection(family.optional):
        parts += family.optional
    return ModelFolder(path, family, tuple(parts), device, dtype, encoding or dtype, kept)


def diffusers(name: str) -> Any:
    """A class of diffusers; `FifaError` with the pip command where it is not installed."""
    return getattr(require("diffusers", "train"), name)


def transformers(name: str) -> Any:
    """A class of transformers; `FifaError` with the pip command where it is not installed."""
    return getattr(require("transformers", "train"), name)
