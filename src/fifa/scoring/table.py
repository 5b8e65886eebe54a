"""The tables of scores, and the files they are kept in.

A file's name carries the fingerprint of everything its numbers depend on, so one scorer never
overwrites or mixes with another, and scoring again what is scored costs nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Score
from fifa.console import echo
from fifa.data.table import PAIRS, Pairs
from fifa.shards.files import atomic_path, digest, read_table, write_table
from fifa.shards.ledger import Ledger
from fifa.shards.mapped import follow
from fifa.shards.sealed import BLANK, SEAL, DamagedError, check_whole, seal

NUMERIC = (pa.types.is_floating, pa.types.is_integer)
MARGIN = pa.schema(
    [("pair_id", pa.string()), ("reward_0", pa.float32()), ("reward_1", pa.float32())]
)
# behind them, of a model that says how sure it is: the standard deviation of each reward
SIGMAS = pa.schema([("sigma_0", pa.float32()), ("sigma_1", pa.float32())])
# A further column of a scorer whose rewards know the person's choice: the difference without it
BLIND = "blind"
# flags: comma-joined names in alphabetical order, "" for none, null where the prompt was not rated
QUALITY = pa.schema([("prompt_id", pa.string()), ("rating", pa.float32()), ("flags", pa.string())])
DIVERSITY = pa.schema(
    [("prompt_id", pa.string()), ("distance", pa.float32()), ("entropy", pa.float32())]
)


@dataclass(frozen=True)
class Scores:
    """What the pairs and prompts are worth.

    Parameters
    ----------
    margins
        A `MARGIN` table a scorer (`SIGMAS` may follow), by its name, row by row with
        `Pairs.table`; NaN or infinite rewards where it could not score.
    quality
        `QUALITY` (more columns may follow), row by row with `Pairs.prompts`; None without a rater.
    diversity
        `DIVERSITY`, row by row with `Pairs.prompts`; None without an encoder.
    knobs
        What they were made with, if that is known.
    """

    margins: dict[str, pa.Table] = field(default_factory=dict)
    quality: pa.Table | None = None
    diversity: pa.Table | None = None
    knobs: Score | None = None

    def __repr__(self) -> str:
        """What there is, in a line."""
        found = [f"{table.num_rows:,} margins of {name}" for name, table in self.margins.items()]
        for what, prompts in (("qualities", self.quality), ("diversities", self.diversity)):
            if prompts is not None:
                found.append(f"{prompts.num_rows:,} {what}")
        return f"<{', '.join(found) or 'no scores'}>"


def source_columns(pairs: Pairs, *types: Callable[[pa.DataType], bool]) -> list[str]:
    """The columns that the source brought itself, of one of some types (`NUMERIC`, ...)."""
    fields = (field for field in pairs.table.schema if field.name not in PAIRS.names)
    return [field.name for field in fields if any(is_type(field.type) for is_type in types)]


def score_path(folder: Path, content: str, name: str, *identity: object) -> Path:
    """``<content>-<name>-<fingerprint>.parquet``, the fingerprint over ``identity``."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-.")[:60] or "unnamed"
    return folder / f"{content}-{plain}-{digest(content, name, *identity)}.parquet"


def scored_once(
    path: Path | None,
    make: Callable[[Ledger], pa.Table],
    facts: dict[str, Any] | None = None,
    store: str | None = None,
) -> pa.Table:
    """The table in ``path``, or ``make(ledger)`` written there; ``path`` None keeps nothing.

    The ledger keeps finished shards of the table until it is written, beside it or in ``store``
    (`fifa.shards.pool.Executor.store`).

    The table's metadata (`score_facts`) says what made it: ``facts``, any facts that ``make``
    put there itself, and ``file``, the file's name.
    """
    ledger = Ledger.beside(path, store)
    if path is not None and path.exists():
        try:
            table = read_table(path)
        except DamagedError:
            echo(f"{path} is damaged: made again")
        else:
            ledger.forget()  # a run may have been killed before it did
            return table
    table = make(ledger)
    known = {**score_facts(table), **(facts or {}), "file": path.name if path else None}
    table = table.replace_schema_metadata({"fifa.score": json.dumps(known, sort_keys=True)})
    if path is not None:
        write_table(path, table)
    ledger.forget()
    return table


def score_facts(table: pa.Table) -> dict[str, Any]:
    """What `scored_once` knows of a table of scores; empty for a table it did not make."""
    facts: dict[str, Any] = json.loads((table.schema.metadata or {}).get(b"fifa.score", b"{}"))
    return facts


def score_files(scores: Scores) -> dict[str, Any]:
    """The files that hold the scores: ``margins`` by their specs, ``quality`` and ``diversity``."""

    def name(table: pa.Table | None) -> str | None:
        return None if table is None else score_facts(table).get("file")

    return {
        "margins": {spec: name(table) for spec, table in scores.margins.items()},
        "quality": name(scores.quality),
        "diversity": name(scores.diversity),
    }


def array_once(
    path: Path | None,
    make: Callable[[Ledger], Iterable[npt.NDArray[Any]]],
    rows: int,
    store: str | None = None,
) -> npt.NDArray[Any]:
    """The array in the file ``path`` (``.npy``), or what ``make(ledger)`` gives written there.

    The parts that ``make`` gives stand one below the other, ``rows`` in all; one at a time is in
    memory. The array is mapped, not loaded, so that memory stays flat; ``path`` None keeps
    nothing. The ledger is that of `scored_once`.
    """
    ledger = Ledger.beside(path, store)
    if path is None:
        return np.concatenate(list(make(ledger)))
    try:
        mapped = map_array(path)
    except DamagedError:
        if path.exists():
            echo(f"{path} is damaged: made again")
        _write_array(path, rows, iter(make(ledger)))
        mapped = map_array(path)
    ledger.forget()
    return mapped


def map_array(path: Path) -> npt.NDArray[Any]:
    """The array that `array_once` wrote, mapped; `DamagedError` where there is no such file."""
    check_whole(path, "score again with `fifa score`")
    mapped: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    base: Any = mapped.base
    if isinstance(base, mmap):  # an empty array is not mapped
        follow(base)
    return mapped


def features_table(features: np.ndarray) -> pa.Table:
    """Features ``[n, ...]`` as a table with a row each; `table_features` gives them back."""
    rows = np.ascontiguousarray(features).reshape(len(features), -1)
    cells = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), rows.shape[1])
    form = {"fifa.features": json.dumps([features.dtype.str, features.shape[1:]])}
    return pa.table({"features": cells}).replace_schema_metadata(form)


def table_features(table: pa.Table) -> np.ndarray:
    """What `features_table` was given."""
    dtype, shape = json.loads(table.schema.metadata[b"fifa.features"])
    flat = table["features"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, np.dtype(dtype)).reshape(table.num_rows, *shape)


def _write_array(path: Path, n: int, parts: Iterator[np.ndarray]) -> None:
    """Write arrays one below the other as an ``.npy`` file of n rows, one in memory at a time.

    Not through a memory map: where the disk is full that ends in a signal, not in an error.
    """
    first = np.ascontiguousarray(next(parts))
    header = np.lib.format.header_data_from_array_1_0(first) | {"shape": (n, *first.shape[1:])}
    with atomic_path(path) as temporary, temporary.open("w+b") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(first.tobytes())
        for part in parts:
            file.write(part.tobytes())
        file.write(f"{SEAL}: {BLANK}".encode())  # behind what `np.load` reads
        seal(file)
