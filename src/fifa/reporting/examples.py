"""Pairs to look at, from both ends: their prompts, their numbers, and small pictures of them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.config import UNSAFE_FLAGS
from fifa.data.table import FILES, PROMPTS, Pairs, load_origin
from fifa.formatting import shorten
from fifa.reporting.data import Columns, first_by, take_rows

THUMBNAIL = 224  # pixels of the longer side: sharp enough at the 150 or so that a phone gives it
QUALITY = 68  # JPEG; about 8 kB a picture


@dataclass(frozen=True)
class Example:
    """One pair on the page.

    Parameters
    ----------
    row
        The pair's row in ``pairs.parquet``.
    prompt
        Its prompt, shortened, without control characters.
    reason
        Why it was kept or dropped.
    where
        Its file and row in the source.
    label
        Probability that a person prefers image 0.
    numbers
        The selection's numbers, NaN where there is none, and 0 for no rank.
    flags
        What the rater flagged of `fifa.config.UNSAFE_FLAGS`; None if no rater judged the prompt.
    images
        A data URI a side, or why there is no picture; None without pixels.
    """

    row: int
    prompt: str
    reason: str
    where: str
    label: float
    numbers: dict[str, float]
    flags: tuple[str, ...] | None
    images: tuple[str, str] | None = None

    @property
    def unsafe(self) -> bool:
        """Whether the prompt is hidden until asked for, and its pictures are left out."""
        return bool(self.flags)


@dataclass(frozen=True)
class Group:
    """Examples under one heading."""

    name: str
    reason: str
    examples: tuple[Example, ...]


def choose_rows(columns: Columns, n: int, n_gated: int) -> list[tuple[str, str, list[int]]]:
    """Rows of ``pairs.parquet`` by group: (name, reason, rows), a prompt once in each.

    The first and last kept and the first below the cut by rank; of the pairs that a gate
    dropped, the most important where that is known, the first ones otherwise.
    """
    kept = np.flatnonzero(columns.kept)
    groups = [
        ("kept_first", "selected", first_by(kept, columns.rank, columns.prompt, n)),
        ("kept_last", "selected", first_by(kept, -columns.rank, columns.prompt, n)[::-1]),
    ]
    for reason in columns.reasons:
        if reason == "selected":
            continue
        rows = np.flatnonzero(columns.because(reason))
        if reason == "below_cutoff":
            first = first_by(rows, columns.rank, columns.prompt, n)
            groups.insert(2, ("dropped_first", reason, first))
        else:
            first = first_by(rows, -columns.importance, columns.prompt, n_gated)
            groups.append(("gated", reason, first))
    shown = set(groups[0][2])
    return [
        (name, reason, [row for row in rows if name != "kept_last" or row not in shown])
        for name, reason, rows in groups
    ]


def load_examples(
    folder: Path,
    columns: Columns,
    quality: Path | None,
    doubted: Sequence[int] = (),
    *,
    n: int = 6,
    n_gated: int = 2,
) -> list[Group]:
    """Examples with their prompts, flags and thumbnails; groups without any are left out.

    ``doubted`` are rows that a committee contradicts, the most doubtful first.
    """
    groups = [*choose_rows(columns, n, n_gated), ("doubted", "", list(doubted[:n]))]
    chosen = [group for group in groups if group[2]]
    rows = sorted({row for _, _, group in chosen for row in group})
    if not rows:
        return []
    table = take_rows(folder / FILES["table"], rows)
    flags = _flags(quality, [int(columns.prompt[row]) for row in rows])
    found = {
        row: _example(row, entry, flag, columns)
        for row, entry, flag in zip(rows, table.to_pylist(), flags, strict=True)
    }
    for row, images in _thumbnails(folder, table, rows, found).items():
        found[row] = replace(found[row], images=images)
    return [
        Group(name, reason, tuple(found[row] for row in group)) for name, reason, group in chosen
    ]


def _example(row: int, entry: dict[str, Any], flags: tuple[str, ...] | None, c: Columns) -> Example:
    numbers = {
        "rank": float(c.rank[row]),
        "importance": float(c.importance[row]),
        "margin": float(c.margin[row]),
        "signed": float(c.signed[row]),
        "quality": float(c.quality[row]),
        "diversity": float(c.diversity[row]),
    }
    return Example(
        row=row,
        prompt=shorten(entry["prompt"]),
        reason=c.reasons[c.reason[row]],
        where=shorten(f"{entry['file']}, row {entry['row']}", 120),
        label=float(c.label[row]),
        numbers=numbers,
        flags=flags,
    )


def _flags(quality: Path | None, prompts: Sequence[int]) -> list[tuple[str, ...] | None]:
    if quality is None:
        return [None] * len(prompts)
    told = take_rows(quality, prompts, ["flags"])["flags"].to_pylist()
    return [
        None if names is None else tuple(f for f in names.split(",") if f in UNSAFE_FLAGS)
        for names in told
    ]


def _thumbnails(
    folder: Path, table: pa.Table, rows: Sequence[int], found: dict[int, Example]
) -> dict[int, tuple[str, str]]:
    """Small pictures of the pairs whose prompts are not flagged; nothing is fetched for them."""
    from fifa.data.decode import BadImage
    from fifa.data.images import has_pixels, read_images

    origin = load_origin(folder)
    safe = [i for i, row in enumerate(rows) if not found[row].unsafe]
    if origin is None or "://" in origin.root or not safe:
        return {}
    pairs = Pairs(table=table, prompts=PROMPTS.empty_table(), origin=origin)
    if not has_pixels(pairs.table, pairs.origin):
        return {}
    sides: dict[int, list[str]] = {rows[i]: ["", ""] for i in safe}
    for i, side, data in read_images(pairs, safe):
        try:
            if isinstance(data, BadImage):
                raise data
            sides[rows[i]][side] = thumbnail(data)
        except BadImage as bad:
            sides[rows[i]][side] = shorten(bad.reason, 80)
    return {row: (first, second) for row, (first, second) in sides.items()}


def thumbnail(data: bytes, size: int = THUMBNAIL) -> str:
    """A JPEG data URI at most ``size`` pixels long.

    Decoded through the guarded door and encoded anew, so nothing of the file but its pixels
    reaches the page. Raises `fifa.data.decode.BadImage`.
    """
    from PIL import Image

    from fifa.data.decode import open_image

    with open_image(data) as image:
        transparent = "A" in image.getbands() or "transparency" in image.info
        pixels = image.convert("RGBA" if transparent else "RGB")
    if transparent:
        white = Image.new("RGBA", pixels.size, "white")
        pixels = Image.alpha_composite(white, pixels).convert("RGB")
    pixels.info = {}  # Pillow would write comments and profiles out again
    pixels.thumbnail((size, size), Image.Resampling.LANCZOS)
    small = io.BytesIO()
    pixels.save(small, "JPEG", quality=QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode("ascii")
