"""Examples on the page: pairs from both ends, and base and checkpoints side by side.

Small pictures are encoded anew: nothing of a file but its pixels gets there.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.config import UNSAFE_FLAGS
from fifa.data.decode import BadImage, open_image
from fifa.data.images import Images, file_images, has_pixels, pair_images, read
from fifa.data.table import Pairs
from fifa.evaluation.measure import UNSAFE_PROMPT, Measured, Scale
from fifa.evaluation.models import BASE
from fifa.evaluation.win_rates import UNSAFE, model_names
from fifa.formatting import shorten
from fifa.reporting.numbers import Columns, Ints, first_by
from fifa.shards.mapped import take

NUMBERS = ("rank", "importance", "margin", "quality", "diversity")
EACH = 4  # prompts in a group
MODELS = 6  # shown side by side at most, the base among them
EXACT = 128  # an image of at most so many pixels a side is shown as it is: JPEG would blur it
OfPrompt = dict[tuple[str, int], dict[str, Any]]  # of one prompt, by model and seed
SIDES = (448, 320, 224)  # pixels of the longer side: the first one that takes no more than
LARGEST = 48_000  # bytes; 26 kB are usual, and 224 pixels of pure noise take 30 kB
QUALITY = 70  # JPEG


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
    makers
        The generators of both images; None where the source does not say.
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
    makers: tuple[str | None, str | None]
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
    shown = take(pairs.table, rows)
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
            makers=(entry.get("model_0"), entry.get("model_1")),
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


def side_by_side(
    folder: Path, images: pa.Table, measured: Measured, model: str, scale: Scale
) -> tuple[list[dict[str, Any]], int]:
    """Prompts by the gain of ``model`` over the base, and how many prompts are left out.

    A prompt's gain is its mean over seeds; the seed that is shown is the prompt's first, by its
    place and not by its looks. Prompts flagged as unsafe are left out, and of the others images
    that a detector holds for unsafe.

    Parameters
    ----------
    folder
        What the images' files are below.
    images
        The index.
    measured
        Its measures, row by row.
    model
        The checkpoint that the order is by.
    scale
        The scorer that the order is by.

    Returns
    -------
    Groups with a ``title`` and ``prompts`` (``prompt``, ``category``, ``seed``, ``gain`` and
    ``cells``: ``model``, ``score`` and ``image``, a data URI or why there is none), and the number
    of prompts flagged as unsafe.
    """
    by_prompt: dict[str, OfPrompt] = {}
    unsafe = set()
    for row, prompt in zip(measured.table.to_pylist(), images["prompt"].to_pylist(), strict=True):
        own = by_prompt.setdefault(row["prompt_id"], {})
        own[row["model"], row["seed"]] = row | {"prompt": prompt}
        if row[UNSAFE_PROMPT]:
            unsafe.add(row["prompt_id"])
    gains = {
        name: _gain(own, model, scale.column)
        for name, own in by_prompt.items()
        if name not in unsafe
    }
    finite = [name for name, gain in gains.items() if np.isfinite(gain)]
    best, median, worst = _choose(sorted(finite, key=lambda name: (-gains[name], name)))
    names = model_names(measured)
    shown = [BASE, model, *(name for name in names if name not in (BASE, model))][:MODELS]
    detectors = [scale.column for scale in measured.scales if scale.type == "unsafe"]

    def prompt_of(name: str) -> dict[str, Any]:
        first = next(row for (model, _), row in by_prompt[name].items() if model == BASE)
        rows = [by_prompt[name].get((model, first["seed"])) for model in names if model in shown]
        return {
            "prompt": shorten(first["prompt"]),
            "category": shorten(first["category"], 40),
            "seed": first["seed"],
            "gain": gains[name],
            "cells": [_cell(row, scale.column, detectors) for row in rows if row],
        }

    loses = "loses most" if any(gains[name] < 0 for name in worst) else "gains least"
    titled = {
        f"Where {shorten(model, 40)} gains most": best,
        "In the middle": median,
        f"Where {shorten(model, 40)} {loses}": worst,
    }
    groups: list[dict[str, Any]] = [
        {"title": title, "prompts": [prompt_of(name) for name in chosen]}
        for title, chosen in titled.items()
        if chosen
    ]
    cells = [
        cell
        for group in groups
        for prompt in group["prompts"]
        for cell in prompt["cells"]
        if not cell["image"]
    ]
    pictures = thumbnails(file_images(folder, [cell["file"] for cell in cells]), exact=EXACT)
    for cell, picture in zip(cells, pictures, strict=True):
        cell["image"] = picture
    return groups, len(unsafe)


def _choose(order: list[str]) -> tuple[list[str], list[str], list[str]]:
    """The first, middle and last names, none twice: with few prompts the groups are small."""
    each = min(EACH, len(order) // 3) or min(1, len(order))
    rest = order[each:]
    worst = rest[max(0, len(rest) - each) :]
    rest = rest[: len(rest) - len(worst)]
    start = max(0, (len(rest) - each) // 2)
    return order[:each], rest[start : start + each], worst


def _gain(images: OfPrompt, model: str, column: str) -> float:
    """The mean over seeds of the model's score minus the base's; NaN where one is missing."""
    gains = [
        row[column] - images[BASE, seed][column]
        for (name, seed), row in images.items()
        if name == model and (BASE, seed) in images
    ]
    finite = [gain for gain in gains if np.isfinite(gain)]
    return float(np.mean(finite)) if finite else float("nan")


def _cell(row: dict[str, Any], column: str, detectors: list[str]) -> dict[str, Any]:
    unsafe = any(row[detector] > UNSAFE for detector in detectors)
    why = "left out: the detector considers it unsafe" if unsafe else ""
    return {"model": row["model"], "score": row[column], "file": row["file"], "image": why}


def thumbnails(images: Images, *, exact: int = 0) -> list[str]:
    """`thumbnail` of each image, or why there is none; nothing is fetched for it."""
    found = [""] * len(images)
    for row, data in read(images):
        try:
            if isinstance(data, BadImage):
                raise data
            found[row] = thumbnail(data, exact=exact)
        except BadImage as bad:
            found[row] = shorten(bad.reason, 80)
    return found


def thumbnail(data: bytes, *, exact: int = 0) -> str:
    """A data URI of an image, at most ``SIDES[0]`` pixels long, white where it is transparent.

    An image of at most ``exact`` pixels a side keeps every pixel, as a PNG; others are JPEGs.
    Raises `fifa.data.decode.BadImage`.
    """
    with open_image(data) as image:
        transparent = "A" in image.getbands() or "transparency" in image.info
        pixels = image.convert("RGBA" if transparent else "RGB")
    if transparent:
        white = Image.new("RGBA", pixels.size, "white")
        pixels = Image.alpha_composite(white, pixels).convert("RGB")
    pixels.info = {}  # Pillow would write comments and profiles out again
    format = "PNG" if max(pixels.size) <= exact else "JPEG"
    for side in SIDES:
        encoded = io.BytesIO()
        if format == "JPEG":
            pixels.thumbnail((side, side), Image.Resampling.LANCZOS)
        pixels.save(encoded, format, quality=QUALITY, optimize=True)
        if encoded.tell() <= LARGEST:
            break
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"
