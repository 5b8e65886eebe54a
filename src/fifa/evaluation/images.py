"""Generated images as what the rest of the house reads: pairs for scorers, pictures for judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from fifa.data.decode import BadImage
from fifa.data.ids import pair_ids
from fifa.data.images import Images, file_images, read
from fifa.data.prefetch import decode_images
from fifa.data.table import PAIRS, PROMPTS, Origin, Pairs
from fifa.errors import FifaError
from fifa.scoring.table import score_path, scored_once
from fifa.shards.files import column_digest, digest
from fifa.shards.pool import Shard, map_shards

SHARD = 64  # images measured between two points where a run can be resumed

Look = Callable[[list[str], list[Image.Image]], dict[str, Any]]


def image_pairs(images: pa.Table, folder: Path) -> Pairs:
    """Every image as a pair with itself: what `fifa.scoring.rewards` scores once each.

    Parameters
    ----------
    images
        Rows of `fifa.evaluation.generate.IMAGES`.
    folder
        What their files are below.
    """
    ids: dict[str, int] = {}
    first: list[str] = []
    numbers: list[int] = []
    for name, prompt in zip(
        images["prompt_id"].to_pylist(), images["prompt"].to_pylist(), strict=True
    ):
        if name not in ids:
            ids[name] = len(first)
            first.append(prompt)
        numbers.append(ids[name])
    file = images["file"].combine_chunks()
    prompt_id = images["prompt_id"].combine_chunks()
    prompt = images["prompt"].combine_chunks()
    n = len(file)
    columns = {
        "pair_id": pair_ids(prompt, file, file),
        "prompt": prompt,
        "prompt_id": prompt_id,
        "prompt_index": numbers,
        "image_0": file,
        "image_1": file,
        "image_0_ref": file,
        "image_1_ref": file,
        "file": ["images"] * n,
        "row": np.arange(n),
        "swapped": np.zeros(n, bool),
        "label": np.full(n, 0.5, np.float32),
        "votes": np.zeros(n, np.int32),
        "repeat": np.zeros(n, bool),
    }
    arrays = [_cast(columns[field.name], field.type) for field in PAIRS]
    prompts = pa.table([list(ids), first], schema=PROMPTS)
    origin = Origin(
        source=str(folder),
        root=str(folder.resolve()),
        format="generated",
        fingerprint=column_digest(images["file"]),  # files are named by their content
        rows=n,
    )
    return Pairs(pa.table(arrays, schema=PAIRS), prompts, origin=origin)


def each_image(
    images: pa.Table,
    folder: Path,
    scores: Path,
    kind: str,
    name: str,
    identity: object,
    look: Look,
) -> pa.Table:
    """What ``look`` says of every image, kept in ``scores`` and resumable.

    Parameters
    ----------
    images, folder
        As for `image_pairs`.
    scores
        Where the finished table is kept.
    kind, name, identity
        Name the table, and all that its numbers depend on beside the images.
    look
        From the prompts and images of a shard (RGB) to float32 columns.
    """
    files = images["file"].to_pylist()
    prompts = images["prompt"].to_pylist()
    path = score_path(scores, kind, name, identity, files, prompts)

    def measure(part: slice) -> pa.Table:
        count = len(files[part])
        found = look(prompts[part], open_pictures(generated_images(images[part], folder)))
        columns = {key: np.asarray(value, np.float32) for key, value in found.items()}
        if any(column.shape != (count,) for column in columns.values()):
            shapes = {key: column.shape for key, column in columns.items()}
            raise FifaError(f"{name} gave {shapes} for {count} images", do="one number an image")
        return pa.table(columns)

    parts = [slice(i, i + SHARD) for i in range(0, len(files), SHARD)]
    shards = [
        Shard(digest(identity, files[part], prompts[part]), len(files[part]), part)
        for part in parts
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


def _cast(values: Any, kind: pa.DataType) -> pa.Array:
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode().cast(kind)
    return pa.array(values, kind)
