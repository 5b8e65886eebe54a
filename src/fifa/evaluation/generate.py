"""Images of every model for the same prompts and seeds, resumable image by image.

The plan is cut into groups before anything is made, and a group's images are always made
together: how many share a batch may change the last bit of a sum, so an image is named by the
whole of its group. A group of which an image is missing is made again. So a run that was killed
ends with the bytes of an unbroken one.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fifa.config import Evaluate
from fifa.console import note, progress
from fifa.errors import FifaError
from fifa.evaluation.models import Model
from fifa.evaluation.prompts import Prompts, draw_seeds
from fifa.evaluation.sampling import PipelineLoader, Settings, make_images
from fifa.shards.files import digest, sweep, write_bytes, write_table

FOLDER = "evaluate"  # in the run folder
INDEX = "images.parquet"
CURVE = "curve.parquet"
IMAGES = pa.schema(
    [
        ("model", pa.string()),  # `base` first, then the checkpoints as they were named
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),  # of torch's generator on the CPU
        ("file", pa.string()),  # below the index's own folder
        ("category", pa.string()),  # null where the prompt has none
    ]
)


@dataclass(frozen=True)
class Planned:
    """One image to make: its prompt, its seed, and its file below the folder of the index."""

    prompt_id: str
    prompt: str
    category: str | None
    seed: int
    file: str


def generate(
    asked: Evaluate,
    models: Sequence[Model],
    prompts: Prompts,
    settings: Settings,
    folder: Path,
    *,
    index: str = INDEX,
    most: int | None = None,
) -> pa.Table:
    """Make the images of some models that are not there yet, and write their index.

    Parameters
    ----------
    asked
        Its seeds, batch and device are read.
    models
        Base first; checkpoints with the same weights share their images.
    prompts
        What is drawn.
    settings
        How images are made.
    folder
        Gets ``images/<weights and settings>/<prompt>-<seed>-<group>.png`` and the index.
    index
        The index's name.
    most
        Of about so many prompts only, in whole groups spread over all: their images are those
        of an evaluation on all prompts.

    Returns
    -------
    pyarrow.Table
        `IMAGES`: by model, then by prompt, then by seed.

    Raises
    ------
    FifaError
        For models that cannot be loaded, images that are not finite, and too little memory;
        what was made until then is kept.
    """
    sweep(folder)  # a write of the index that was killed
    loader = PipelineLoader(models[0].base, settings, asked.generate.device)
    plans = [plan(model, prompts, settings, asked) for model in models]
    if most is not None:
        plans = [_spread(groups, most * asked.seeds) for groups in plans]
    for model, groups in zip(models, plans, strict=True):
        _make(model, groups, folder, settings, loader)
    rows = [
        {"model": model.name, **vars(image)}
        for model, groups in zip(models, plans, strict=True)
        for group in groups
        for image in group
    ]
    table = pa.Table.from_pylist(rows, schema=IMAGES)
    write_table(folder / index, table)
    return table


def plan(
    model: Model, prompts: Prompts, settings: Settings, asked: Evaluate
) -> list[list[Planned]]:
    """All images of a model, in the groups that they are made in.

    A group is whole prompts with all their seeds where these fit into a batch, so further
    prompts leave the groups before them as they are.
    """
    seeds, batch = asked.seeds, asked.generate.batch
    place = f"images/{digest(model.weights, asdict(settings))}"
    rows = [
        (row["prompt_id"], row["prompt"], row["category"], seed)
        for row in prompts.table.to_pylist()
        for seed in draw_seeds(row["prompt_id"], seeds, asked.first_seed)
    ]
    size = batch if seeds > batch else batch // seeds * seeds
    groups = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        # the spelling counts: prompt_id folds case and white space, a text encoder may not
        group = digest([[prompt, seed] for _, prompt, _, seed in part])[:8]
        groups.append(
            [
                Planned(name, prompt, category, seed, f"{place}/{name}-{seed:08x}-{group}.png")
                for name, prompt, category, seed in part
            ]
        )
    return groups


def read_index(folder: Path, index: str = INDEX) -> pa.Table:
    """The `IMAGES` of an evaluation's folder; without a category where the file has no such column.

    Raises `FifaError` where there are none, and for an index that is broken.
    """
    path = folder / index
    if not path.exists():
        raise FifaError(
            "no generated images here",
            where=str(path),
            do="run `fifa evaluate` first: it makes them",
        )
    try:
        table = pq.read_table(path)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are among these
        raise FifaError(
            "the index of the images cannot be read", where=str(path), do="run `fifa evaluate`"
        ) from error
    if "category" not in table.column_names:
        table = table.append_column("category", pa.nulls(len(table), pa.string()))
    lacks = [name for name in IMAGES.names if name not in table.column_names]
    if lacks:
        raise FifaError(f"no column {', '.join(map(repr, lacks))}", where=str(path))
    try:
        table = table.select(IMAGES.names).cast(IMAGES)
    except (ValueError, NotImplementedError) as error:
        brief = str(error).partition("\n")[0][:200]
        raise FifaError(f"a column has the wrong type: {brief}", where=str(path)) from error
    for name in IMAGES.names[:-1]:
        if table[name].null_count:
            raise FifaError(f"column {name!r} has empty cells", where=str(path))
    return table


def png(pixels: npt.NDArray[np.uint8], level: int = 6) -> bytes:
    """An image as a PNG file: the same pixels give the same bytes."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=level, optimize=False)
    return stream.getvalue()


def _spread(groups: list[list[Planned]], most: int) -> list[list[Planned]]:
    """Groups with ``most`` images or a few more, at equal distances; all if there are no more."""
    count = min(len(groups), -(-most // len(groups[0])))
    return [groups[i * len(groups) // count] for i in range(count)]


def _make(
    model: Model,
    groups: Sequence[Sequence[Planned]],
    folder: Path,
    settings: Settings,
    loader: PipelineLoader,
) -> None:
    """Make the groups of which an image is missing."""
    there = _there(folder, groups)
    missing = [group for group in groups if any(image.file not in there for image in group)]
    done = sum(map(len, groups)) - sum(map(len, missing))
    if not missing:
        return
    with (
        loader.use(model) as pipe,
        progress(f"images of {model.name}", sum(map(len, groups))) as advance,
    ):
        advance(done)
        for group in missing:
            prompts, seeds = [i.prompt for i in group], [i.seed for i in group]
            pixels = make_images(pipe, settings, prompts, seeds)
            for image, picture in zip(group, pixels, strict=True):
                write_bytes(folder / image.file, png(picture))
            advance(len(group))
            note(images_made=len(group))


def _there(folder: Path, groups: Sequence[Sequence[Planned]]) -> set[str]:
    """The files that are there; what a killed write left is removed."""
    place = Path(groups[0][0].file).parent if groups else Path()
    if not (folder / place).is_dir():
        return set()
    sweep(folder / place)
    return {f"{place.as_posix()}/{path.name}" for path in (folder / place).iterdir()}
