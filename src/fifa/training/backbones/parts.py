"""The folder of a diffusion model: what it should hold, and its parts as their real classes.

Which class a part has is decided by the family's table here, never by code that the folder
names; weights come from safetensors files only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from fifa.console import quiet
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.scoring.encoders import model_folder
from fifa.shards.files import read_json

if TYPE_CHECKING:
    import torch

WEIGHTS = ("diffusion_pytorch_model", "model")
PARTS = (
    "unet",
    "transformer",
    "vae",
    *(f"text_encoder{n}" for n in ("", "_2", "_3")),
    *(f"tokenizer{n}" for n in ("", "_2", "_3")),
    "scheduler",
)
# What is fetched from the hub: not the .bin, fp16, non-ema and single-file copies of the weights.
HUB_FILES = (
    "model_index.json",
    *(f"{part}/*.{suffix}" for part in PARTS for suffix in ("json", "txt", "model")),
    *(f"{part}/{name}.safetensors" for part in PARTS for name in WEIGHTS),
    *(f"{part}/{name}-*-of-*.safetensors" for part in PARTS for name in WEIGHTS),
)


@dataclass(frozen=True)
class ModelFolder:
    """A model's folder in diffusers layout.

    Parameters
    ----------
    path
        Where it is.
    index
        Its ``model_index.json``.
    device, dtype
        Where its parts are put, and the floating type of their weights.
    """

    path: Path
    index: dict[str, Any]
    device: torch.device
    dtype: torch.dtype

    @property
    def pipeline(self) -> str:
        """The class of its pipeline, as the folder names it."""
        return str(self.index.get("_class_name"))

    def has(self, part: str) -> bool:
        """Whether the model has this part at all (SD3 works without its T5)."""
        return (self.index.get(part) or [None])[-1] is not None

    def check(self, parts: Sequence[str]) -> None:
        """Raise `FifaError` unless all ``parts`` are there, with weights where they have some."""
        for part in parts:
            folder = self.path / part
            if not self.has(part):
                raise self._lacks(part, "model_index.json does not name it")
            if not folder.is_dir():
                raise self._lacks(part, f"there is no folder {part}")
            if part.startswith("tokenizer"):
                continue
            config = "scheduler_config.json" if part == "scheduler" else "config.json"
            if not (folder / config).is_file():
                raise self._lacks(part, f"there is no {part}/{config}")
            if part != "scheduler" and not any(folder.glob("*.safetensors")):
                raise self._lacks(part, f"{part} has no safetensors (pickled weights stay closed)")

    def model(self, part: str, cls: Any, dtype: torch.dtype | None = None) -> Any:
        """A network of the folder: frozen, in evaluation mode, on the device.

        Parameters
        ----------
        part
            Its folder.
        cls
            Its class, of diffusers or transformers.
        dtype
            Of its weights; default: the folder's.
        """
        kind = dtype or self.dtype
        settings = {"use_safetensors": True, "variant": self._variant(part), "dtype": kind}
        module = self._loaded(part, lambda: cls.from_pretrained(self.path / part, **settings))
        return module.eval().requires_grad_(False).to(self.device)

    def tokenizer(self, part: str, cls: Any) -> Any:
        """A tokenizer of the folder."""
        return self._loaded(part, lambda: cls.from_pretrained(self.path / part))

    def config(self, part: str) -> dict[str, Any]:
        """A part's configuration as it stands in its JSON."""
        name = "scheduler_config.json" if part == "scheduler" else "config.json"
        config: dict[str, Any] = read_json(self.path / part / name, f"the settings of {part}")
        return config

    def digest(self, part: str) -> str:
        """32 hex characters that name the content of a part's files."""
        h = xxhash.xxh3_128()
        for path in sorted((self.path / part).rglob("*")):
            if path.is_file() and path.suffix in (".json", ".txt", ".model", ".safetensors"):
                h.update(f"{path.relative_to(self.path)}:{_content(path)}\n".encode())
        return h.hexdigest()

    def _variant(self, part: str) -> str | None:
        names = [path.name for path in (self.path / part).glob("*.safetensors")]
        return "fp16" if names and all(".fp16" in name for name in names) else None

    def _loaded(self, part: str, load: Any) -> Any:
        libraries = (require(name, "train") for name in ("diffusers", "transformers"))
        try:
            with quiet(*libraries, warnings=True):
                return load()
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            raise FifaError(
                f"cannot load the model's {part}: {str(error).strip().splitlines()[0][:200]}",
                where=str(self.path / part),
                do="download the model again, or name another",
            ) from error

    def _lacks(self, part: str, why: str) -> FifaError:
        return FifaError(
            f"the model lacks its {part}: {why}",
            where=str(self.path),
            do="name a complete folder in diffusers layout, or a hub id",
        )


def open_folder(model: str | Path, device: torch.device, dtype: torch.dtype) -> ModelFolder:
    """The folder of a model, local or from the hub; `FifaError` where there is none."""
    path = model_folder(str(model), HUB_FILES)
    index = path / "model_index.json"
    if not index.is_file():
        raise FifaError(
            "not a diffusion model: there is no model_index.json",
            where=str(path),
            do="name a folder in diffusers layout (what its save_pretrained writes), or a hub id",
        )
    return ModelFolder(path, read_json(index, "the pipeline's index"), device, dtype)


def _content(path: Path) -> str:
    """Names a file's content: the hub's cache already does, in the name that its links lead to."""
    blob = path.resolve()
    if path.is_symlink() and blob.parent.name == "blobs":
        return blob.name
    h = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            h.update(block)
    return h.hexdigest()


def diffusers(name: str) -> Any:
    """A class of diffusers; `FifaError` with the pip command where it is not installed."""
    return getattr(require("diffusers", "train"), name)


def transformers(name: str) -> Any:
    """A class of transformers; `FifaError` with the pip command where it is not installed."""
    return getattr(require("transformers", "train"), name)
