"""Tables with a row a pair: any columns that a layout names become a batch of pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.batch import Batch, side_pairs
from fifa.data.columns import Frame, Text
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
        From a frame to its labels.
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
    label: Callable[[Frame], Labels]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    keys: tuple[str, str] | None = None
    links: tuple[str, str] | None = None
    winner_first: bool = False
    ignore: frozenset[str] = frozenset()

    def fits(self, frame: Frame) -> bool:
        """True if the frame has every column that the format cannot do without."""
        return not self.missing(frame)

    def missing(self, frame: Frame) -> list[str]:
        """The columns that the frame would need to have."""
        lacks = [name for name in (self.prompt, *self.needs) if not has(frame, name)]
        named = _present(frame, self.keys) or _present(frame, self.images)
        return lacks + ([] if named else list(self.images))


def has(frame: Frame, name: str) -> bool:
    """True if the column, or the struct that a dotted name goes into, is there."""
    return name in frame.names or name.partition(".")[0] in frame.names


@dataclass(frozen=True)
class Plan:
    """What is read of one file.

    Parameters
    ----------
    layout
        Its format.
    wanted
        The columns to read.
    numbers
        Those of them that are scores.
    carried
        Further columns to keep: the name to keep each under, and its name in the file.
    cells
        The columns with image bytes, which are not read.
    """

    layout: Layout
    wanted: tuple[str, ...]
    numbers: tuple[str, ...]
    carried: dict[str, str]
    cells: tuple[str, str] | None


def plan(frame: Frame, layout: Layout, carried: dict[str, str]) -> Plan:
    """What to read of a file for its pairs; raises `FifaError` where a column is missing."""
    lacks = layout.missing(frame) + [name for name in carried.values() if not has(frame, name)]
    if lacks:
        raise missing_columns(frame, layout.name, lacks)
    images = _present(frame, layout.images)
    cells = images if images and all(_is_cell(frame, name) for name in images) else None
    known = {layout.prompt, *layout.needs, *layout.reads, *layout.ignore, *layout.images}
    known |= {*(layout.keys or ()), *(layout.links or ()), *carried.values()}
    numbers = tuple(name for name in frame.numeric() if name not in known)
    wanted = [layout.prompt, *layout.needs, *numbers, *carried.values()]
    wanted += _present(frame, layout.keys) or ()
    wanted += [name for name in layout.reads if has(frame, name)]
    wanted += [leaf for leaf in (_leaf(frame, name) for name in images or ()) if leaf]
    wanted += () if cells else (_present(frame, layout.links) or ())
    return Plan(layout, tuple(wanted), numbers, carried, cells)


def from_layout(frame: Frame, plan: Plan) -> Batch:
    """The pairs of one file, whose planned columns have been loaded."""
    layout = plan.layout
    keys, links, images = (
        _present(frame, names) for names in (layout.keys, layout.links, layout.images)
    )
    labels = layout.label(frame)
    first, second = (
        _side(frame, plan.cells, *(names and names[side] for names in (keys, images, links)))
        for side in (0, 1)
    )
    ones = np.ones(len(frame.rows), np.int32)
    return Batch(
        file=frame.file,
        row=frame.rows,
        prompt=frame.text(layout.prompt),
        keys=(first[0], second[0]),
        refs=(first[1], second[1]),
        label=labels.value,
        votes=ones if labels.votes is None else labels.votes,
        wrong=labels.wrong,
        scores={name: frame.number(name) for name in plan.numbers},
        extras={name: frame.extra(column) for name, column in plan.carried.items()},
        swaps=side_pairs([*plan.numbers, *plan.carried]) if layout.winner_first else [],
        winner_first=layout.winner_first,
        cells=plan.cells,
    )


def missing_columns(frame: Frame, name: str, lacks: list[str]) -> FifaError:
    """The message for a file that lacks columns of its format."""
    return FifaError(
        f"no column {', '.join(repr(column) for column in lacks)} (format {name})",
        where=frame.file,
        do="it has "
        + ", ".join(sorted(frame.names))
        + "; say which is which with --columns prompt=...,image_0=...,image_1=...,label=...",
    )


def _present(frame: Frame, names: tuple[str, str] | None) -> tuple[str, str] | None:
    return names if names and all(has(frame, name) for name in names) else None


def _is_cell(frame: Frame, name: str) -> bool:
    return frame.image(name) != "text" and frame.holds_bytes(name)


def _leaf(frame: Frame, name: str) -> str | None:
    """What may be read of an image column: all of a text, the path of a struct, no bytes."""
    kind = frame.image(name)
    if kind == "text":
        return name
    return f"{name}.path" if kind == "struct" else None


def _side(
    frame: Frame,
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
    nothing = pa.nulls(len(frame.rows), pa.string())
    leaf = _leaf(frame, image) if image else None
    path = frame.text(leaf) if leaf else nothing
    if cells:
        ref = nothing
        place = pc.binary_join_element_wise(
            f"{frame.file}#", pa.array(frame.rows).cast(pa.string()), f":{image}", ""
        )
        named = pc.fill_null(pc.match_substring(path, "/"), False)
        found = pc.if_else(named, path, place)
    else:
        ref = path if leaf else (frame.text(link) if link else nothing)
        found = _member_keys(frame.file, ref) if frame.kind == "tar" else ref
    return (frame.text(key) if key else found), ref


def _member_keys(file: str, refs: Text) -> pa.Array:
    members = (tar_ref(ref or "") for ref in refs.to_pylist())
    return pa.array([f"{file}#{member[2]}" if member else None for member in members], pa.string())
