"""Where finished shards are kept: a folder, or an object store that every worker can reach."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from fifa.errors import FifaError
from fifa.shards.files import cannot_write, sweep, write_table
from fifa.shards.ledger import forget


@dataclass(frozen=True)
class Store:
    """Finished shards, ``<key>.parquet`` each, below a path or a URL that fsspec knows.

    In a folder a file appears by an atomic rename, in an object store by a single upload: either
    way it is there whole or not at all, so being there is what finishes a shard.

    Parameters
    ----------
    place
        A folder (on a shared file system for a cluster) or ``s3://bucket/prefix`` and the like.
    """

    place: str

    def keys(self) -> frozenset[str]:
        """The keys of all finished shards, by one listing."""
        if "://" not in self.place:
            return frozenset(path.stem for path in Path(self.place).glob("[!.]*.parquet"))
        system, path = self._system()
        try:
            system.invalidate_cache()
            names = [str(name) for name in system.ls(path, detail=False)]
        except FileNotFoundError:
            return frozenset()
        except OSError as error:
            raise FifaError(f"cannot list the shards: {error}", where=self.place) from error
        files = (name.rpartition("/")[2] for name in names)
        return frozenset(name.removesuffix(".parquet") for name in files if ".parquet" in name)

    def read(self, key: str) -> pa.Table:
        """The table of a finished shard."""
        if "://" not in self.place:
            return pq.read_table(self._file(key))
        system, path = self._system()
        return pq.read_table(io.BytesIO(system.cat_file(f"{path}/{key}.parquet")))

    def write(self, key: str, table: pa.Table) -> None:
        """Keep a shard's table; raises `FifaError` where there is no room or no permission."""
        if "://" not in self.place:
            write_table(self._file(key), table)
            return
        system, path = self._system()
        data = io.BytesIO()
        pq.write_table(table.combine_chunks(), data, compression="zstd")
        try:
            system.pipe_file(f"{path}/{key}.parquet", data.getvalue())
        except OSError as error:
            raise cannot_write(Path(f"{self.place}/{key}.parquet"), error) from error

    def sweep(self) -> None:
        """Remove what writes that were killed have left."""
        if "://" not in self.place:
            sweep(Path(self.place))

    def forget(self) -> None:
        """Remove all shards, once what they were for is safely written."""
        if "://" not in self.place:
            forget(Path(self.place))
            return
        system, path = self._system()
        if system.exists(path):
            system.rm(path, recursive=True)

    def _file(self, key: str) -> Path:
        return Path(self.place) / f"{key}.parquet"

    def _system(self) -> tuple[Any, str]:
        import fsspec

        try:
            system, path = fsspec.core.url_to_fs(self.place)
        except (ValueError, ImportError, OSError) as error:
            raise FifaError(
                f"cannot open the store for shards: {error}",
                where=self.place,
                do="install the fsspec library that the message names, or name a shared folder",
            ) from error
        return system, str(path).rstrip("/")
