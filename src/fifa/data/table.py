"""The table of preference pairs: its columns, and the folder it is kept in."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from fifa.config import Read
from fifa.errors import FifaError
from fifa.shards.files import column_digest, read_table, write_table
from fifa.shards.mapped import Shelf

PAIRS = pa.schema(
    [
        ("pair_id", pa.string()),  # 20 hex characters: prompt_id and both image keys, side-blind
        ("prompt", pa.dictionary(pa.int32(), pa.string())),
        ("prompt_id", pa.dictionary(pa.int32(), pa.string())),  # NFKC, spaces and case folded
        ("prompt_index", pa.int32()),  # the prompt's row in `Pairs.prompts`
        ("image_0", pa.string()),  # the image's key
        ("image_1", pa.string()),
        # path or URL; tar:OFFSET+SIZE:NAME; cell:ROW:COLUMN; null: in the row's own cell;
        # in:LENGTH:FILE:REF is REF in another file
        ("image_0_ref", pa.string()),
        ("image_1_ref", pa.string()),
        ("file", pa.dictionary(pa.int32(), pa.string())),  # the source file of the row
        ("row", pa.int64()),  # the row in it, from 0
        ("swapped", pa.bool_()),  # image_0 is the source's second image
        ("label", pa.float32()),  # probability that a person prefers image_0; 0.5 is a tie
        ("votes", pa.int32()),  # labels averaged into `label`
        ("repeat", pa.bool_()),  # the same two images as an earlier pair, or one image twice
    ]
)
PROMPTS = pa.schema([("prompt_id", pa.string()), ("prompt", pa.string())])
REJECTED = pa.schema([("file", pa.string()), ("row", pa.int64()), ("reason", pa.string())])
FILES = {"table": "pairs.parquet", "prompts": "prompts.parquet", "rejected": "rejected.parquet"}


@dataclass(frozen=True)
class Origin:
    """Where the pairs were read from, so that images can be opened and subsets rebuilt.

    Parameters
    ----------
    source
        What the user named.
    root
        The folder or URL prefix that files and relative image paths are below.
    format
        The format's name.
    columns
        The columns that the user named, for a table of their own.
    cells
        The two columns with image bytes in the source's own rows, or None. A dot goes into a
        struct (``images.image_1``).
    score_columns
        Columns of `Pairs.table` beyond `PAIRS` and the names: numbers that the source came with.
    fingerprint
        16 hex characters that change when a source file changes (name, size, time or etag) or
        when it is read in another way.
    rows, merged
        Rows (or rankings' pairs) read, and how many of them repeated an earlier pair and were
        merged into it: ``rows = pairs + merged + rejected``.
    not_made
        Of rankings: pairs of a prompt's images that were not made, by reason.
    pairs, min_gap
        Which pairs of rankings were to be made, as in `fifa.data.rankings.Compare`.
    used
        The columns that became pairs and labels, each with what it is.
    ignored
        The other columns, but those of ``score_columns``.
    remote
        Size and stamp of every file of a remote source, as `fifa.data.source.SourceFile` has them.
    images_from, label_aspect, annotators
        As in `fifa.config.Read`.
    reliability
        Of weighed annotators: how many ``annotators`` there are, their ``votes``, and the ``worst``
        of them: name, votes, and the share of these that is right.
    """

    source: str = ""
    root: str = ""
    format: str = "memory"
    columns: dict[str, str] = field(default_factory=dict)
    cells: tuple[str, str] | None = None
    score_columns: tuple[str, ...] = ()
    fingerprint: str = ""
    rows: int = 0
    merged: int = 0
    not_made: dict[str, int] = field(default_factory=dict)
    pairs: str | None = None
    min_gap: float | None = None
    used: dict[str, str] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    remote: dict[str, tuple[int, str]] = field(default_factory=dict)
    images_from: tuple[str, ...] = ()
    label_aspect: str | None = None
    annotators: Literal["count", "weigh"] = Read.annotators
    reliability: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pairs:
    """Preference pairs, read from any source.

    Parameters
    ----------
    table
        `PAIRS`, a row a pair; then, where the source has them, the names (`fifa.data.names`):
        ``model_0``, ``model_1``, ``annotator`` and ``category`` (dictionary of strings) and a
        ``label_ASPECT`` for each aspect (float32, as ``label``); then its scores (float64).
    prompts
        `PROMPTS`, a row a unique prompt, in order of first appearance; its spelling there.
    rejected
        `REJECTED`: every row of the source that could not be read, with the reason.
    origin
        Where they come from.
    """

    table: pa.Table
    prompts: pa.Table
    rejected: pa.Table = field(default_factory=REJECTED.empty_table)
    origin: Origin = field(default_factory=Origin)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __repr__(self) -> str:
        """What there is, in a line: a notebook would show the first rows of every column."""
        where = f" from {self.origin.source}" if self.origin.source else ""
        return (
            f"<{len(self):,} pairs of {self.prompts.num_rows:,} prompts{where}, "
            f"{self.rejected.num_rows:,} rows rejected>"
        )

    @property
    def pairs_digest(self) -> str:
        """Names the pairs and their order: part of a margin file's name."""
        return column_digest(self.table["pair_id"])


def save_pairs(pairs: Pairs, folder: Path) -> None:
    """Write `FILES` into ``folder``; ``pairs.parquet``, with the origin, last."""
    write_table(folder / FILES["prompts"], pairs.prompts)
    write_table(folder / FILES["rejected"], pairs.rejected)
    metadata = {"fifa.origin": json.dumps(pairs.origin.__dict__, sort_keys=True)}
    write_table(folder / FILES["table"], pairs.table.replace_schema_metadata(metadata))


def load_origin(folder: Path) -> Origin:
    """The origin of the pairs in ``folder``; raises `FifaError` if there are none yet."""
    return _origin(_read(folder, "table", []), folder)


def _read(folder: Path, name: str, columns: list[str] | None = None) -> pa.Table:
    path = folder / FILES[name]
    if name == "table" and not path.exists():
        raise FifaError("no pairs here", where=str(folder), do="run `fifa read SOURCE --out RUN`")
    shelf = Shelf(folder) if name == "table" and columns != [] else None
    do = f"run `fifa score {folder}`: it reads the source again"
    return read_table(path, columns, do=do, shelf=shelf)


def _origin(table: pa.Table, folder: Path) -> Origin:
    path, metadata = folder / FILES["table"], table.schema.metadata or {}
    plain = json.loads(metadata.get(b"fifa.origin", b"null"))
    if plain is None:
        raise FifaError("not a table of pairs that fifa wrote", where=str(path))
    for name in ("cells", "score_columns", "ignored"):
        plain[name] = tuple(plain[name]) if plain.get(name) is not None else None
    plain["images_from"] = tuple(plain.get("images_from", ()))
    plain["remote"] = {name: tuple(known) for name, known in plain.get("remote", {}).items()}
    return Origin(**plain)


def load_pairs(folder: Path, columns: list[str] | None = None) -> Pairs:
    """What `save_pairs` wrote; ``columns`` of the table only, if given."""
    table = _read(folder, "table", columns)
    prompts, rejected = (_read(folder, name) for name in ("prompts", "rejected"))
    return Pairs(table, prompts, rejected, _origin(table, folder))
