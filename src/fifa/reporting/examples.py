"""Pairs to look at, from both ends: their prompts, their numbers, and small pictures of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from fifa.config import UNSAFE_FLAGS
from fifa.data.images import has_pixels, pair_images
from fifa.data.table import Pairs
from fifa.formatting import shorten
from fifa.reporting.numbers import Columns, Ints, first_by
from fifa.reporting.thumbnails import thumbnails

NUMBERS = ("rank", "importance", "margin", "quality", "diversity")


@dataclass(frozen=True)
class Example:
    """One pair on the page.

    Parameters
    ----------
    row
        The pair's row in the table of pairs.
    prompt
        Its prompt, shortened, without control characters.
    place
        Its file and row in the source.
    label
        Probability that a person prefers image 0.
    numbers
        `NUMBERS` of the selection, where there are any.
    contradicts
        Whether the scorers prefer the image that people did not.
    flags
        What the rater flagged of `fifa.config.UNSAFE_FLAGS`; None if no rater judged the prompt.
    images
        A data URI a side, or why there is no picture; None without pixels.
    """

    row: int
    prompt: str
    place: str
    label: float
    numbers: dict[str, float]
    contradicts: bool
    flags: tuple[str, ...] | None
    images: tuple[str, str] | None

    @property
    def unsafe(self) -> bool:
        """Whether the prompt is hidden until asked for, and its pictures are left out."""
        return bool(self.flags)


class Group(NamedTuple):
    """Examples under one heading."""

    name: str
    reason: str
    examples: list[Example]


def choose_rows(columns: Columns, n: int, n_gated: int) -> list[tuple[str, str, list[int]]]:
    """Rows of the pairs by group: (name, reason, rows), a prompt once in each.

    The first and last kept and the first below the cut by rank; of the pairs that a gate
    dropped, the most important where that is known, the first ones otherwise.
    """
    kept = np.flatnonzero(columns.kept)
    first = first_by(kept, columns.rank, columns.prompt, n)
    last = first_by(kept, -columns.rank, columns.prompt, n)[::-1]
    groups = [
        ("kept_first", "selected", first),
        ("kept_last", "selected", [row for row in last if row not in first]),
    ]
    for reason in columns.reasons:
        rows = np.flatnonzero(columns.because(reason))
        if reason == "below_cutoff":
            below = first_by(rows, columns.rank, columns.prompt, n)
            groups.insert(2, ("dropped_first", reason, below))
        elif reason != "selected":
            important = first_by(rows, -columns.importance, columns.prompt, n_gated)
            groups.append(("gated", reason, important))
    return groups


def load_examples(
    pairs: Pairs,
    columns: Columns,
    quality: pa.Table | None,
    contradicted: Sequence[int] = (),
    *,
    n: int = 6,
    n_gated: int = 2,
) -> list[Group]:
    """Examples with their prompts, flags and thumbnails; groups without any are left out.

    Parameters
    ----------
    pairs, columns
        The pairs, and what was selected of them.
    quality
        `fifa.scoring.table.QUALITY`; None without a rater.
    contradicted
        Rows that every scorer of a committee contradicts, the most doubtful first.
    n, n_gated
        Examples of a group at most, and of a gate's.
    """
    groups = [*choose_rows(columns, n, n_gated), ("mislabelled", "", list(contradicted[:n]))]
    rows = sorted({row for *_, group in groups for row in group})
    flags = _flags(quality, columns.prompt[rows])
    shown = pairs.table.take(pa.array(rows, pa.int64()))
    safe = [i for i, found in enumerate(flags) if not found]
    pictures: list[str] = []
    if "://" not in pairs.origin.root and has_pixels(pairs.table, pairs.origin):
        pictures = thumbnails(pair_images(shown.take(pa.array(safe, pa.int64())), pairs.origin))
    sides = zip(pictures[::2], pictures[1::2], strict=True)
    images = dict(zip([rows[i] for i in safe] if pictures else [], sides, strict=True))
    examples = {
        row: Example(
            row=row,
            prompt=shorten(entry["prompt"]),
            place=shorten(f"{entry['file']}, row {entry['row']}", 120),
            label=float(columns.label[row]),
            numbers={
                name: value
                for name in NUMBERS
                if np.isfinite(value := float(getattr(columns, name)[row]))
                and (value or name != "rank")
            },
            contradicts=bool(columns.signed_margin[row] < 0),
            flags=found,
            images=images.get(row),
        )
        for row, entry, found in zip(rows, shown.to_pylist(), flags, strict=True)
    }
    return [
        Group(name, reason, [examples[row] for row in group])
        for name, reason, group in groups
        if group
    ]


def _flags(quality: pa.Table | None, prompts: Ints) -> list[tuple[str, ...] | None]:
    if quality is None:
        return [None] * len(prompts)
    flags = quality["flags"].take(pa.array(prompts, pa.int64())).to_pylist()
    return [
        None if names is None else tuple(name for name in names.split(",") if name in UNSAFE_FLAGS)
        for names in flags
    ]
