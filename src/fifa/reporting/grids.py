"""Images of base and checkpoints side by side: the best, the median and the worst prompts."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.data.decode import BadImage, open_image
from fifa.evaluation.measure import UNSAFE_PROMPT, Measured, Scale
from fifa.evaluation.models import BASE
from fifa.evaluation.win_rates import UNSAFE
from fifa.formatting import shorten

EACH = 4  # prompts in a group
MODELS = 6  # shown side by side at most, the base among them
SIDE = 224  # pixels of the longer side
SMALL = 128  # an image up to this size goes in as it is: JPEG would blur it
QUALITY = 72
TITLES = {
    "best": "Where {model} gains most",
    "median": "In the middle",
    "worst": "Where {model} loses most",
}


@dataclass(frozen=True)
class Cell:
    """One image: its model's name and place in the index, its score, and a data URI or none."""

    model: str
    place: int
    score: float
    image: str | None
    why: str = ""


@dataclass(frozen=True)
class Shown:
    """A prompt with an image of every model at one seed, and the mean gain over all its seeds."""

    prompt: str
    category: str | None
    seed: int
    gain: float
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Group:
    """Prompts under one heading."""

    name: str
    title: str
    prompts: tuple[Shown, ...]


def draw_grids(
    folder: Path, images: pa.Table, measured: Measured, model: str, scale: Scale
) -> tuple[list[Group], int]:
    """The groups of `TITLES` by the gain of ``model`` over the base, and prompts left out.

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
    """
    rows = measured.table.to_pylist()
    unsafe = [s.column for s in measured.scales if s.kind == "unsafe"]
    by_prompt: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row, prompt in zip(rows, images["prompt"].to_pylist(), strict=True):
        row["prompt"] = prompt
        by_prompt.setdefault(row["prompt_id"], {}).setdefault(row["model"], []).append(row)
    flagged = {row["prompt_id"] for row in rows if row[UNSAFE_PROMPT]}
    gains = {
        name: _gain(of, model, scale.column)
        for name, of in by_prompt.items()
        if name not in flagged
    }
    order = sorted(
        (name for name, gain in gains.items() if np.isfinite(gain)),
        key=lambda name: (-gains[name], name),
    )
    names = list(dict.fromkeys(row["model"] for row in rows))
    shown = [BASE, model] + [name for name in names if name not in (BASE, model)]
    shown = sorted(shown[:MODELS], key=names.index)
    groups = []
    for group, chosen in _choose(order).items():
        prompts = tuple(
            _shown(folder, by_prompt[name], gains[name], shown, names, scale.column, unsafe)
            for name in chosen
        )
        title = TITLES[group].format(model=shorten(model, 40))
        if group == "worst" and all(prompt.gain >= 0 for prompt in prompts):
            title = title.replace("loses most", "gains least")
        groups.append(Group(group, title, prompts))
    return [group for group in groups if group.prompts], len(flagged)


def picture(path: Path) -> str:
    """A data URI of a generated image, made small and encoded anew; raises `BadImage`."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImage("the file is missing") from error
    with open_image(data) as image:
        pixels = image.convert("RGB")
    pixels.info = {}
    stream = io.BytesIO()
    small = max(pixels.size) <= SMALL
    if small:
        pixels.save(stream, "PNG", optimize=True)
    else:
        pixels.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        pixels.save(stream, "JPEG", quality=QUALITY, optimize=True)
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _choose(order: list[str]) -> dict[str, list[str]]:
    """Names for each group, none twice: with few prompts the groups are small."""
    each = min(EACH, len(order) // 3) or min(1, len(order))
    best = order[:each]
    rest = order[each:]
    worst = rest[max(0, len(rest) - each) :]
    rest = rest[: len(rest) - len(worst)]
    start = max(0, (len(rest) - each) // 2)
    return {"best": best, "median": rest[start : start + each], "worst": worst}


def _gain(of: dict[str, list[dict[str, Any]]], model: str, column: str) -> float:
    """The mean over seeds of the model's score minus the base's; NaN where one is missing."""
    base = {row["seed"]: row[column] for row in of.get(BASE, ())}
    found = [row[column] - base[row["seed"]] for row in of.get(model, ()) if row["seed"] in base]
    known = [value for value in found if np.isfinite(value)]
    return float(np.mean(known)) if known else float("nan")


def _shown(
    folder: Path,
    of: dict[str, list[dict[str, Any]]],
    gain: float,
    shown: list[str],
    names: list[str],
    column: str,
    unsafe: list[str],
) -> Shown:
    first = of[BASE][0]
    cells = []
    for name in shown:
        row = next((row for row in of.get(name, ()) if row["seed"] == first["seed"]), None)
        if row is None:
            continue
        image, why = None, ""
        if any(row[detector] > UNSAFE for detector in unsafe):
            why = "left out: the detector holds it for unsafe"
        else:
            try:
                image = picture(folder / row["file"])
            except BadImage as bad:
                why = f"no picture: {shorten(bad.reason, 80)}"
        cells.append(Cell(shorten(name, 40), names.index(name), row[column], image, why))
    return Shown(
        prompt=shorten(first["prompt"]),
        category=shorten(first["category"], 40) if first["category"] else None,
        seed=first["seed"],
        gain=gain,
        cells=tuple(cells),
    )
