"""Shards of tensors: safetensors files, there whole or not at all, mapped when they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.models.optional import require
from fifa.shards.files import atomic_path
from fifa.training.backbones.base import Tensors

Place = tuple[int, int]  # a shard's number and a row in it


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

    def has(self, shard: int) -> bool:
        """Whether a shard is there."""
        return self.path(shard).is_file()

    def write(self, shard: int, tensors: Tensors) -> None:
        """Write a shard, atomically: the same tensors give the same bytes."""
        save = require("safetensors.torch", "train")
        with atomic_path(self.path(shard)) as temporary:
            save.save_file({name: value.contiguous() for name, value in tensors.items()}, temporary)

    def row(self, shard: int, row: int) -> Tensors:
        """One row of every tensor in a shard, without the dimension of rows; a copy."""
        file = self._file(shard)
        return {name: file.get_slice(name)[row] for name in file.keys()}  # noqa: SIM118 - no dict

    def check(self) -> int:
        """Bytes of all files; raises `FifaError` if a shard is missing or damaged."""
        for shard in range(len(self.names)):
            self._file(shard)
        return sum(self.path(shard).stat().st_size for shard in range(len(self.names)))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files do not travel to other processes

    def _file(self, shard: int) -> Any:
        if shard not in self._open:
            try:
                safetensors = require("safetensors", "train")
                self._open[shard] = safetensors.safe_open(self.path(shard), framework="pt")
            except Exception as error:
                if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
                    raise
                raise FifaError(
                    f"a shard of the cache cannot be read: {error}",
                    where=str(self.path(shard)),
                    do="remove the file; it will be made again",
                ) from error
        return self._open[shard]
