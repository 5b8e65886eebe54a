"""How many images are made together: found by trying, remembered, halved when memory runs out.

An image is named by its whole group, so what was found is kept beside the images before the first
one is made: a run that goes on, on another card too, makes the same groups.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from fifa.errors import FifaError
from fifa.evaluation.sampling import Settings, make_images
from fifa.models.optional import require
from fifa.models.runtime import largest_batch, out_of_memory
from fifa.shards.files import read_json, write_json

FILE = "batches.json"
USUAL = 4  # images made together where CUDA's memory is not asked
USEFUL = 64 * 512 * 512  # pixels made together, of at most
MOST = 64  # images: more make no device faster, and a group that is broken off is made again
STEPS = 2  # of the sampler, when a batch is tried: memory does not grow with them

# (the first image's place among all of a model's, images made together from there on)
Batches = tuple[tuple[int, int], ...]


def kept_batches(folder: Path, key: str) -> Batches | None:
    """What `keep_batches` wrote into an evaluation's folder; None if there is nothing."""
    found = read_json(
        folder / FILE, "how many images are made together", missing={}, sealed=True
    ).get(key)
    return found and tuple((int(row), int(size)) for row, size in found)


def keep_batches(folder: Path, key: str, batches: Batches) -> None:
    """Keep the batches of the images that ``key`` names: a base model and its settings."""
    write_json(folder / FILE, {**_known(folder), key: batches}, sealed=True)


def _known(folder: Path) -> dict[str, Any]:
    what = "how many images are made together"
    known: dict[str, Any] = read_json(folder / FILE, what, missing={}, sealed=True)
    return known


def halved(batches: Batches, row: int, count: int) -> Batches:
    """Batches that are half of ``count`` from image ``row`` on, and before as they were.

    Raises `FifaError` where memory did not suffice for a single image.
    """
    if count == 1:
        raise no_room()
    return (*(batch for batch in batches if batch[0] < row), (row, count // 2))


def find_batch(pipe: Any, settings: Settings, prompt: str) -> int:
    """The largest batch of use that fits beside a loaded pipeline on its CUDA device.

    It is tried with images of the real size, guidance included, in `STEPS` steps.

    Raises `FifaError` where not even one image fits.
    """
    quick = replace(settings, steps=min(STEPS, settings.steps or STEPS))

    def attempt(size: int) -> int:
        seeds = list(range(size))
        return int(make_images(pipe, quick, [prompt] * size, seeds)[0].size // 3)

    try:
        pixels = attempt(1)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise no_room() from error
    device = require("torch").device(pipe.device)
    most = min(MOST, max(1, USEFUL // pixels))
    return max(1, largest_batch(attempt, range(1, most + 1), device))


def no_room() -> FifaError:
    """The message where a single image does not fit."""
    return FifaError(
        "out of memory with a single image",
        do="a device with more memory, --dtype float16 or bfloat16, or a smaller --width, --height",
    )
