"""The ledger: which shards of a step are finished, in a folder or an object store.

A file is there whole or not at all (an atomic rename, or a single upload), so being there is what
finishes a shard: a step that was killed is run again and does only what is missing.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.errors import FifaError
from fifa.shards.files import (
    atomic_path,
    cannot_write,
    parse_table,
    sweep,
    table_bytes,
    write_table,
)
from fifa.shards.sealed import BLANK, SEAL, DamagedError, check_whole, seal
from fifa.shards.stores import patiently


@dataclass(frozen=True)
class Ledger:
    """Finished shards, ``<key>.parquet`` each.

    Parameters
    ----------
    place
        A folder (on a shared file system for a cluster), a URL that fsspec knows
        (``s3://bucket/prefix``), or None: in the memory of this process.
    """

    place: str | None = None
    _tables: dict[str, pa.Table] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def beside(cls, target: Path | None, above: str | None = None) -> Ledger:
        """The ledger of the shards that ``target`` is made of.

        It lies in ``.parts-NAME`` beside the file, or below ``above``, a folder or URL. Without
        a target it is in memory.
        """
        if target is None:
            return cls()
        name = f".parts-{target.stem}"
        return cls(f"{above.rstrip('/')}/{name}" if above else str(target.parent / name))

    def keys(self) -> frozenset[str]:
        """The keys of all finished shards, by one listing."""
        if self.place is None:
            return frozenset(self._tables)
        system, path = self._system()
        try:
            system.invalidate_cache()
            found = patiently(lambda: system.ls(path, detail=False), self.place)
        except FileNotFoundError:
            return frozenset()
        files = [Path(name) for name in found]
        done = (file for file in files if file.suffix == ".parquet" and file.name[0] != ".")
        return frozenset(file.stem for file in done)

    def read(self, key: str) -> pa.Table:
        """The table of a finished shard; `fifa.shards.sealed.DamagedError` where it is no more."""
        if self.place is None:
            return self._tables[key]
        system, path = self._system()
        where = f"{self.place}/{key}.parquet"
        system.invalidate_cache()  # of a listing from before it was there
        return parse_table(
            patiently(lambda: system.cat_file(f"{path}/{key}.parquet"), where), where
        )

    def write(self, key: str, table: pa.Table) -> None:
        """Keep a shard's table; raises `FifaError` where there is no room or no permission."""
        if self.place is None:
            self._tables[key] = table
        elif "://" not in self.place:
            write_table(Path(self.place, f"{key}.parquet"), table)
        else:
            system, path = self._system()
            where, data = f"{self.place}/{key}.parquet", table_bytes(table)
            try:
                patiently(lambda: system.pipe_file(f"{path}/{key}.parquet", data), where)
            except FileNotFoundError as error:
                raise cannot_write(Path(where), error) from error

    def lend(self, name: str, write: Callable[[Path], None]) -> None:
        """Keep a large file that every worker reads; one that is there and whole stays.

        It goes through the disk and not to the workers themselves, as a cluster's object store is
        memory. The ledger must not be in memory.

        Parameters
        ----------
        name
            Of the file. All its content depends on must be in the ledger's name.
        write
            Writes the file; what it wrote is sealed.
        """
        assert self.place is not None, "nobody else reads this process's memory"
        if "://" not in self.place:
            path = Path(self.place, name)
            try:
                check_whole(path)
            except DamagedError:
                with atomic_path(path) as temporary:
                    _write_sealed(temporary, write)
            return
        system, folder = self._system()
        if patiently(lambda: system.exists(f"{folder}/{name}"), self.place):
            return
        with tempfile.TemporaryDirectory() as here:
            path = Path(here, name)
            _write_sealed(path, write)
            where = f"{self.place}/{name}"
            try:
                patiently(lambda: system.put_file(str(path), f"{folder}/{name}"), where)
            except FileNotFoundError as error:
                raise cannot_write(Path(where), error) from error

    @contextmanager
    def borrowed(self, name: str) -> Iterator[Path]:
        """The file that `lend` kept: itself in a folder, else a copy for as long as the block.

        Raises `fifa.shards.sealed.DamagedError` where it is not as it was written.
        """
        assert self.place is not None, "nobody else reads this process's memory"
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as here:
            path = Path(self.place, name)
            if "://" in self.place:
                system, folder = self._system()
                path = Path(here, name)
                where = f"{self.place}/{name}"
                try:
                    patiently(lambda: system.get_file(f"{folder}/{name}", str(path)), where)
                except FileNotFoundError as error:
                    raise DamagedError(where, missing=True) from error
            check_whole(path)
            yield path

    def sweep(self) -> None:
        """Remove what writes that were killed have left."""
        if self.place is not None and "://" not in self.place:
            sweep(Path(self.place))

    def forget(self) -> None:
        """Remove all shards, once what they were for is safely written."""
        self._tables.clear()
        if self.place is None:
            return
        if "://" not in self.place:
            shutil.rmtree(self.place, ignore_errors=True)
            return
        system, path = self._system()
        with suppress(FileNotFoundError):
            patiently(lambda: system.rm(path, recursive=True), self.place)

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


def _write_sealed(path: Path, write: Callable[[Path], None]) -> None:
    write(path)
    with path.open("r+b") as file:
        file.seek(0, 2)
        file.write(f"{SEAL}: {BLANK}".encode())  # behind what a reader reads
        seal(file)
