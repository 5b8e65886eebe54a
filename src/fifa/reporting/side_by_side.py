"""Images of base and checkpoints side by side: the best, the median and the worst prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.data.images import file_images
from fifa.evaluation.measure import UNSAFE_PROMPT, Measured, Scale
from fifa.evaluation.models import BASE
from fifa.evaluation.win_rates import UNSAFE, model_names
from fifa.formatting import shorten
from fifa.reporting.thumbnails import thumbnails

EACH = 4  # prompts in a group
MODELS = 6  # shown side by side at most, the base among them
EXACT = 128  # an image of at most so many pixels a side is shown as it is: JPEG would blur it

Images = dict[tuple[str, int], dict[str, Any]]  # of one prompt, by model and seed


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
    by_prompt: dict[str, Images] = {}
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


def _gain(images: Images, model: str, column: str) -> float:
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
