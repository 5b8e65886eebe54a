"""Shards of tensors in a folder: safetensors files, there whole or not at all, mapped when read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fifa.console import echo
from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import atomic_path
from fifa.shards.sealed import BLANK, SEAL, is_whole, seal
from fifa.training.backbones.base import Tensors


class TensorShards:
    """Some of the shards in a folder, numbered as they are added.

    Parameters
    ----------
    folder
        Where they are, ``<name>.safetensors`` each: tensors with the same number of rows.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._open: dict[int, Any] = {}

    def add(self, name: str) -> int:
        """The number of the shard ``name``, which may be written later."""
        self.names.append(name)
        return len(self.names) - 1

    def path(self, shard: int) -> Path:
        """Where a shard is, or will be."""
        return self.folder / f"{self.names[shard]}.safetensors"

    def write(self, shard: int, tensors: Tensors) -> None:
        """Write a shard, atomically: the same tensors give the same bytes."""
        save = require("safetensors.torch", "train")
        whole = {name: value.contiguous() for name, value in tensors.items()}
        with atomic_path(self.path(shard)) as temporary:
            save.save_file(whole, temporary, metadata={SEAL: BLANK})
            with temporary.open("r+b") as file:
                seal(file)

    def is_whole(self, shard: int) -> bool:
        """Whether a shard is there, as it was written."""
        try:
            with self.path(shard).open("rb") as file:
                if is_whole(file):
                    return True
        except FileNotFoundError:
            return False
        except OSError as error:
            raise FifaError(
                f"a shard of the cache cannot be read: {error.strerror}",
                where=str(self.path(shard)),
            ) from error
        echo(f"a shard of the cache is damaged, and made again: {self.path(shard)}")
        return False

    def row(self, shard: int, row: int) -> Tensors:
        """One row of every tensor in a shard, without the dimension of rows; a copy.

        Of prompts that were kept without padding, ``mask`` is all 1.
        """
        file = self._file(shard)
        if "ends" in file.keys():  # noqa: SIM118 - no dict
            start, end = [0, *file.get_slice("ends")[:].tolist()][row : row + 2]
            return {"prompt": file.get_slice("prompt")[start:end], "mask": torch.ones(end - start)}
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no dict

    def check(self) -> int:
        """Bytes of all files; raises `FifaError` if a shard is missing or damaged."""
        for shard in range(len(self.names)):
            self._file(shard)
        return sum(self.path(shard).stat().st_size for shard in range(len(self.names)))

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            safetensors = require("safetensors", "train")
            try:
                self._open[shard] = safetensors.safe_open(self.path(shard), framework="pt")
            except (OSError, safetensors.SafetensorError) as error:
                raise FifaError(
                    f"a shard of the cache cannot be read: {error}",
                    where=str(self.path(shard)),
                    do="remove the file; it will be made again",
                ) from error
        return self._open[shard]
