"""The table of a selection: a row for every pair, kept or not, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.errors import FifaError
from fifa.shards.files import read_table, write_table

SELECTION_FILE = "selection.parquet"
# Gates in the order in which they are asked; a pair has the reason of the first that stops it.
GATES = (
    "tie",
    "duplicate",
    "other_generator",
    "aspects_disagree",
    "unreadable_image",
    "unsafe_prompt",
    "low_quality_prompt",
    "not_scored",
    "contradicts_label",
    "outside_margin_window",
)
REASONS = ("selected", "below_cutoff", "prompt_cap", *GATES)
STATUS = ("selected", "dropped")
SELECTED, BELOW_CUTOFF, PROMPT_CAP = range(3)

_named = pa.dictionary(pa.int32(), pa.string())
SELECTION = pa.schema(
    [
        ("pair_id", pa.string()),
        ("margin", pa.float32()),  # absolute; null where no scorer could say
        ("signed_margin", pa.float32()),  # positive: the scorers agree with the person
        ("agreement", pa.float32()),  # share of the scorers that agree with the person
        ("quality", pa.float32()),  # the prompt's rating
        ("diversity", pa.float32()),  # the prompt's entropy term
        ("importance", pa.float32()),  # null for a pair that a gate stopped
        ("rank", pa.int32()),  # from 1, in the strategy's order; null for a gated pair
        ("weight", pa.float32()),  # for the loss: 0 where dropped, 1 or a soft weight where kept
        ("status", _named),
        ("reason", _named),
    ]
)


def write_selection(folder: Path, selection: pa.Table, made_of: dict[str, Any]) -> pa.Table:
    """Write ``selection.parquet`` and return it, ``made_of`` as ``fifa.select`` in its metadata."""
    metadata = {"fifa.select": json.dumps(made_of, sort_keys=True)}
    selection = selection.replace_schema_metadata(metadata)
    # Random ids and floats hardly compress, and a dictionary helps the names only: 52 bytes a pair.
    write_table(
        folder / SELECTION_FILE,
        selection,
        compression="none",
        use_dictionary=["status", "reason"],
        write_statistics=["rank", "importance"],
        row_group_size=1 << 20,
    )
    return selection


def load_selection(folder: Path) -> pa.Table:
    """The selection of the run in ``folder``; `FifaError` if nothing has been selected yet."""
    path = folder / SELECTION_FILE
    if not path.exists():
        raise FifaError(
            "nothing has been selected yet", where=str(folder), do="run `fifa select` on it"
        )
    return read_table(path, do=f"run `fifa select {folder}`: it makes it again")


def reason_counts(selection: pa.Table) -> dict[str, int]:
    """How many pairs have each reason, in `REASONS` order; the counts add up to all pairs."""
    reason = selection["reason"].combine_chunks()
    names = reason.dictionary.to_pylist()
    found = dict(zip(names, np.bincount(reason.indices, minlength=len(names)), strict=True))
    return {name: int(found[name]) for name in REASONS if found.get(name)}


def code_counts(codes: np.ndarray) -> dict[str, int]:
    """`reason_counts` of an array of reason codes (uint8)."""
    counts = np.bincount(codes, minlength=len(REASONS))
    return {name: int(n) for name, n in zip(REASONS, counts, strict=True) if n}


def selection_table(
    pair_id: pa.ChunkedArray, codes: np.ndarray, columns: dict[str, np.ndarray | None]
) -> pa.Table:
    """Put a `SELECTION` together.

    Parameters
    ----------
    pair_id
        The pairs, in the table's order.
    codes
        uint8 [pairs], index into `REASONS`.
    columns
        The other columns by name, [pairs] each; what is not finite becomes null, and so does
        rank 0. None is a column of nulls.
    """
    status = np.minimum(codes, 1).astype(np.int32)  # REASONS[0] is "selected", all others dropped
    arrays: list[pa.Array | pa.ChunkedArray] = []
    for field in SELECTION:
        if field.name == "pair_id":
            arrays.append(pair_id)
        elif field.name == "status":
            arrays.append(pa.DictionaryArray.from_arrays(pa.array(status), list(STATUS)))
        elif field.name == "reason":
            indices = pa.array(codes.astype(np.int32))
            arrays.append(pa.DictionaryArray.from_arrays(indices, list(REASONS)))
        else:
            arrays.append(_nullable(columns[field.name], field.type, len(codes)))
    return pa.Table.from_arrays(arrays, schema=SELECTION)


def _nullable(values: np.ndarray | None, kind: pa.DataType, n: int) -> pa.Array:
    if values is None:
        return pa.nulls(n, kind)
    known = values != 0 if pa.types.is_integer(kind) else np.isfinite(values)
    if known.all():
        return pa.array(values, kind)
    # the values as they lie in memory, and a bit for each that is known
    bits = pa.py_buffer(np.packbits(known, bitorder="little"))
    return pa.Array.from_buffers(kind, n, [bits, pa.py_buffer(np.ascontiguousarray(values))])
