"""Generated images, opened through the image table, and what a function says of each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.data.decode import BadImage
from fifa.data.images import Images, file_images, read
from fifa.data.prefetch import decode_images
from fifa.errors import FifaError
from fifa.scoring.table import score_path, scored_once
from fifa.shards.files import digest
from fifa.shards.pool import Shard, map_shards

SHARD = 64  # images measured between two points where a run can be resumed

JudgeImages = Callable[[list[str], list[Image.Image]], dict[str, Any]]


def each_image(
    images: pa.Table,
    folder: Path,
    scores: Path | None,
    role: str,
    name: str,
    identity: object,
    judge: JudgeImages,
) -> pa.Table:
    """What a function says of every image, kept and resumable.

    Parameters
    ----------
    images
        Rows of `fifa.evaluation.generate.IMAGES`.
    folder
        What their files are below.
    scores
        Where the finished table is kept; None keeps nothing.
    role, name, identity
        Name the table, and all that its numbers depend on beside the images.
    judge
        From the prompts and images of a shard (RGB) to columns of a float32 each image; `FifaError`
        where it gives something else.
    """
    files, prompts = images["file"].to_pylist(), images["prompt"].to_pylist()
    path = scores and score_path(scores, role, name, identity, files, prompts)

    def measure(part: slice) -> pa.Table:
        count = len(files[part])
        found = judge(prompts[part], open_pictures(generated_images(images[part], folder)))
        columns = {key: np.asarray(value, np.float32) for key, value in found.items()}
        if any(column.shape != (count,) for column in columns.values()):
            shapes = {key: column.shape for key, column in columns.items()}
            raise FifaError(f"{name} gave {shapes} for {count} images", do="one number an image")
        return pa.table(columns)

    shards = [
        Shard(digest(identity, files[part], prompts[part]), len(files[part]), part)
        for part in (slice(i, i + SHARD) for i in range(0, len(files), SHARD))
    ]
    what = f"images through {name}"
    return scored_once(path, lambda ledger: map_shards(what, measure, shards, ledger))


def generated_images(images: pa.Table, folder: Path) -> Images:
    """Rows of `fifa.evaluation.generate.IMAGES` as a table of images; files are named by content.

    ``folder`` is what their files are below.
    """
    return file_images(folder, images["file"].to_pylist(), keyed=True)


def open_pictures(images: Images) -> list[Image.Image]:
    """Generated images, RGB; `FifaError` where one is missing or damaged."""
    pictures: list[Any] = [None] * len(images)
    for row, picture in decode_images(read(images), lambda image, row: image.convert("RGB")):
        if isinstance(picture, BadImage):
            raise FifaError(
                f"cannot open a generated image: {picture}",
                where=str(Path(images.root) / images.place(row)),
                do="delete it, if it is there, and run `fifa evaluate` again",
            )
        pictures[row] = picture
    return pictures
