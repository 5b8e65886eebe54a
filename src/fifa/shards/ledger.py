"""The ledger: a step is a function from shard to table, and a folder of finished shards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from fifa.shards.files import write_table

Shard = TypeVar("Shard")


def map_shards(
    function: Callable[[Shard], pa.Table],
    shards: Iterable[tuple[str, Shard]],
    folder: Path | None,
    done: Callable[[int], None] = lambda rows: None,
) -> pa.Table:
    """Apply ``function`` to every shard once, whatever happens in between, and join the tables.

    Parameters
    ----------
    function
        From a shard to its table.
    shards
        ``(key, shard)``; the key names the shard's content and everything the result depends
        on, so a finished file is never taken for another's.
    folder
        Where finished shards are kept (``<key>.parquet``) until the caller has written the
        joined table and calls `forget`; None keeps nothing.
    done
        Called with the number of rows of every finished shard (for a progress bar).
    """
    tables = []
    for key, shard in shards:
        path = folder / f"{key}.parquet" if folder else None
        if path and path.exists():
            table = pq.read_table(path)
        else:
            table = function(shard)
            if path:
                write_table(path, table)
        tables.append(table)
        done(table.num_rows)
    return pa.concat_tables(tables)


def forget(folder: Path) -> None:
    """Remove a folder of finished shards, once their joined table is safely written."""
    shutil.rmtree(folder, ignore_errors=True)
