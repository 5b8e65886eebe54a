"""Tables with a row a pair: whatever columns a layout names become pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.columns import Columns, Text
from fifa.data.pairs import FilePairs, pair_columns, side_pairs
from fifa.data.records import tar_ref
from fifa.errors import FifaError


@dataclass(frozen=True)
class Labels:
    """The labels of n rows.

    Parameters
    ----------
    value
        float64 [n], the probability that a person prefers the first image; NaN for none.
    wrong
        Rows to reject, and why.
    votes
        int32 [n], the votes in each; None is one each.
    """

    value: np.ndarray
    wrong: dict[int, str]
    votes: np.ndarray | None = None


@dataclass(frozen=True)
class Layout:
    """A format with a row a pair.

    Parameters
    ----------
    name
        The format's name.
    prompt
        The prompt's column.
    images
        The columns with cells, paths or URLs.
    label
        From a file's columns to its labels.
    needs
        The columns that ``label`` reads.
    reads
        Columns that ``label`` reads where they are there.
    keys
        Columns with the images' ids.
    links
        Columns with the images' URLs, beside or instead of ``images``.
    winner_first
        The first image is (often) the winner.
    ignore
        Columns of numbers that belong to the format and are no scores.
    """

    name: str
    prompt: str
    images: tuple[str, str]
    label: Callable[[Columns], Labels]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    keys: tuple[str, str] | None = None
    links: tuple[str, str] | None = None
    winner_first: bool = False
    ignore: frozenset[str] = frozenset()

    def fits(self, columns: Columns) -> bool:
        """True if the file has every column that the format cannot do without."""
        return not self.missing(columns)

    def missing(self, columns: Columns) -> list[str]:
        """The columns that the file would need to have."""
        lacks = [name for name in (self.prompt, *self.needs) if not has(columns, name)]
        named = _present(columns, self.keys) or _present(columns, self.images)
        return lacks + ([] if named else list(self.images))

    def read(self, columns: Columns, carried: dict[str, str]) -> FilePairs:
        """The pairs of one file; raises `FifaError` where a column is missing.

        ``carried`` are further columns to keep: the name to keep each under, and its name in the
        file.
        """
        lacks = self.missing(columns) + [
            name for name in carried.values() if not has(columns, name)
        ]
        if lacks:
            raise _missing_columns(columns, self.name, lacks)
        keys, links, images = (
            _present(columns, names) for names in (self.keys, self.links, self.images)
        )
        cells = images if images and all(_is_cell(columns, name) for name in images) else None
        known = {self.prompt, *self.needs, *self.reads, *self.ignore, *self.images}
        known |= {*(self.keys or ()), *(self.links or ()), *carried.values()}
        numbers = [name for name in columns.numeric() if name not in known]
        wanted = [self.prompt, *self.needs, *numbers, *carried.values(), *(keys or ())]
        wanted += [name for name in self.reads if has(columns, name)]
        wanted += [leaf for leaf in (_leaf(columns, name) for name in images or ()) if leaf]
        wanted += () if cells else (links or ())
        columns.load(wanted, prompt=self.prompt)
        labels = self.label(columns)
        sides = [
            _side(columns, cells, *(names and names[side] for names in (keys, images, links)))
            for side in (0, 1)
        ]
        return FilePairs(
            columns.file,
            pair_columns(
                columns.rows,
                columns.text(self.prompt),
                [key for key, _ in sides],
                [ref for _, ref in sides],
                labels.value,
                labels.votes,
            ),
            scores={name: pa.array(columns.number(name)) for name in numbers}
            | {name: columns.extra(column) for name, column in carried.items()},
            wrong=labels.wrong,
            swaps=side_pairs([*numbers, *carried]) if self.winner_first else [],
            winner_first=self.winner_first,
            cells=cells,
        )


def has(columns: Columns, name: str) -> bool:
    """True if the column, or the struct that a dotted name goes into, is there."""
    return name in columns.names or name.partition(".")[0] in columns.names


def _missing_columns(columns: Columns, name: str, lacks: list[str]) -> FifaError:
    """The message for a file that lacks columns of its format."""
    return FifaError(
        f"no column {', '.join(repr(column) for column in lacks)} (format {name})",
        where=columns.file,
        do="it has "
        + ", ".join(sorted(columns.names))
        + "; say which is which with --columns prompt=...,image_0=...,image_1=...,label=...",
    )


def _present(columns: Columns, names: tuple[str, str] | None) -> tuple[str, str] | None:
    return names if names and all(has(columns, name) for name in names) else None


def _is_cell(columns: Columns, name: str) -> bool:
    return columns.image(name) != "text" and columns.holds_bytes(name)


def _leaf(columns: Columns, name: str) -> str | None:
    """What may be read of an image column: all of a text, the path of a struct, no bytes."""
    kind = columns.image(name)
    if kind == "text":
        return name
    return f"{name}.path" if kind == "struct" else None


def _side(
    columns: Columns,
    cells: tuple[str, str] | None,
    key: str | None,
    image: str | None,
    link: str | None,
) -> tuple[Text, Text]:
    """Keys and references of one side's images.

    The key is the image's id if there is one, else its path or URL, else ``file#row:column``.
    The path in a cell that also has the bytes is a key only if it names a folder: `datasets`
    keeps the last part of the path there, and ``0001.jpg`` is many images' name.
    """
    nothing = pa.nulls(len(columns.rows), pa.string())
    leaf = _leaf(columns, image) if image else None
    path = columns.text(leaf) if leaf else nothing
    if cells:
        ref = nothing
        place = pc.binary_join_element_wise(
            f"{columns.file}#", pa.array(columns.rows).cast(pa.string()), f":{image}", ""
        )
        named = pc.fill_null(pc.match_substring(path, "/"), False)
        found = pc.if_else(named, path, place)
    else:
        ref = path if leaf else (columns.text(link) if link else nothing)
        found = _member_keys(columns.file, ref) if columns.kind == "tar" else ref
    return (columns.text(key) if key else found), ref


def _member_keys(file: str, refs: Text) -> pa.Array:
    members = (tar_ref(ref or "") for ref in refs.to_pylist())
    return pa.array([f"{file}#{member[2]}" if member else None for member in members], pa.string())
