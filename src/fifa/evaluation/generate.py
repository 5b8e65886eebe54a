"""Images of every model for the same prompts and seeds, resumable image by image.

The plan is cut into groups before anything is made, and a group's images are always made
together: how many share a batch may change the last bit of a sum, so an image is named by the
whole of its group. A group of which an image is missing is made again. So a run that was killed
ends with the bytes of an unbroken one.
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from fifa.config import Evaluate
from fifa.console import echo, note, progress
from fifa.errors import FifaError
from fifa.evaluation.batches import (
    USUAL,
    Batches,
    find_batch,
    halved,
    keep_batches,
    kept_batches,
)
from fifa.evaluation.models import Model
from fifa.evaluation.prompts import Prompts, draw_seeds
from fifa.evaluation.sampling import PipelineLoader, Settings, make_images
from fifa.models.runtime import out_of_memory, release_memory
from fifa.shards.files import digest, read_table, sweep, write_bytes, write_table
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, Shard, cores, each_shard, map_shards, store_of

FOLDER = "evaluate"  # in the run folder
INDEX = "images.parquet"
CURVE = "curve.parquet"
WRITERS = 8  # threads, at most, that encode and write images while the next ones are made
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
    """One image to make: its prompt, its seed, and its file below the folder of the index.

    ``row`` is its place among all images of its model.
    """

    row: int
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
    loader: PipelineLoader | None = None,
    executor: Executor | None = None,
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
    loader
        One that has loaded the base model before.
    executor
        Who makes them; by default this process. Workers elsewhere read the models' folders by
        the same paths, and need not reach ``folder``.

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
    draw = Draw(models[0].base, settings, asked.generate.device, loader)
    there = executor if executor and not executor.is_here else None
    key = digest(models[0].weights, settings.identity, asked.generate.batch)
    batches = kept_batches(folder, key)
    if batches is None:
        batches = ((0, _first_batch(asked, models[0], prompts, folder, key, draw, there)),)
    while True:
        plans = [plan(model, prompts, settings, asked, batches) for model in models]
        if most is not None:
            plans = [_spread(groups, most * asked.seeds) for groups in plans]
        if there:
            short = _make_elsewhere(
                models, plans, folder, Ledger.beside(folder / index, there.store), draw, there
            )
        else:
            short = _make_all(models, plans, folder, draw)
        if short is None:
            break
        # All models' images are made in the same groups, those of finished models too.
        row, count = short[0].row, len(short)
        batches = halved(batches, row, count)
        keep_batches(folder, key, batches)
        echo(
            f"out of memory with {count} images at a time: {count // 2} from here on, of all "
            f"models (images after the first {row:,} that were made in larger groups do not count)"
        )
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
    model: Model,
    prompts: Prompts,
    settings: Settings,
    asked: Evaluate,
    batches: Batches = ((0, USUAL),),
) -> list[list[Planned]]:
    """All images of a model, in the groups that they are made in.

    A group is whole prompts with all their seeds where these fit into a batch, so further
    prompts leave the groups before them as they are.
    """
    seeds = asked.seeds
    place = f"images/{digest(model.weights, settings.identity)}"
    rows = [
        (row["prompt_id"], row["prompt"], row["category"], seed)
        for row in prompts.table.to_pylist()
        for seed in draw_seeds(row["prompt_id"], seeds, asked.first_seed)
    ]
    ends = [*(first for first, _ in batches[1:]), len(rows)]
    parts = []
    for (first, batch), end in zip(batches, ends, strict=True):
        size = batch if seeds > batch else batch // seeds * seeds
        parts += [
            (i, rows[i : min(i + size, end)]) for i in range(first, min(end, len(rows)), size)
        ]
    groups = []
    for start, part in parts:
        # the spelling counts: prompt_id folds case and white space, a text encoder may not
        group = digest([[prompt, seed] for _, prompt, _, seed in part])[:8]
        groups.append(
            [
                Planned(row, name, prompt, category, seed, f"{place}/{name}-{seed:08x}-{group}.png")
                for row, (name, prompt, category, seed) in enumerate(part, start)
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
    table = read_table(path, do="run the same `fifa evaluate` again: it makes the index again")
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


def _first_batch(
    asked: Evaluate,
    base: Model,
    prompts: Prompts,
    folder: Path,
    key: str,
    draw: Draw,
    executor: Executor | None,
) -> int:
    """How many images are made together at first; kept where it was found by trying."""
    given, settings = asked.generate.batch, draw.settings
    if given is not None or settings.device != "cuda" or len(prompts) * asked.seeds <= USUAL:
        return given or USUAL
    trial = Shard("batch", 1, (base, prompts.table["prompt"][0].as_py()))
    ledger = Ledger.beside(folder / "batch.parquet", store_of(executor))
    tried = map_shards("trying how many images fit", draw, [trial], ledger, executor)
    found = int(tried["batch"][0].as_py())
    ledger.forget()
    keep_batches(folder, key, ((0, found),))
    precision = settings.identity["dtype"]
    echo(f"{found} images are made together, in {precision} on {settings.device}")
    return found


def _make_all(
    models: Sequence[Model],
    plans: Sequence[Sequence[Sequence[Planned]]],
    folder: Path,
    draw: Draw,
) -> Sequence[Planned] | None:
    """Make what is missing; stops at a group that memory does not suffice for, and returns it."""
    for model, groups in zip(models, plans, strict=True):
        short = _make(model, groups, folder, draw)
        if short is not None:
            return short
    return None


def _make(
    model: Model,
    groups: Sequence[Sequence[Planned]],
    folder: Path,
    draw: Draw,
) -> Sequence[Planned] | None:
    """Make the groups of which an image is missing; as `_make_all` for one model."""
    there = _there(folder, groups)
    missing = [group for group in groups if any(image.file not in there for image in group)]
    done = sum(map(len, groups)) - sum(map(len, missing))
    if not missing:
        return None
    short = None
    with (
        draw.loader.use(model) as pipe,
        progress(f"images of {model.name}", sum(map(len, groups)), done) as advance,
        ThreadPoolExecutor(min(WRITERS, cores())) as writers,
    ):

        def finish(writing: Sequence[Future[None]]) -> None:
            for job in writing:
                job.result()
            advance(len(writing))
            note(images_made=len(writing))

        writing: list[Future[None]] = []
        for group in missing:
            pixels = _together(pipe, draw.settings, group)
            if pixels is None:
                short = group
                break
            finish(writing)  # no more than one group waits
            pictures = zip(group, pixels, strict=True)
            writing = [writers.submit(_write, folder / image.file, p) for image, p in pictures]
        finish(writing)
    return short


def _make_elsewhere(
    models: Sequence[Model],
    plans: Sequence[Sequence[Sequence[Planned]]],
    folder: Path,
    ledger: Ledger,
    draw: Draw,
    executor: Executor,
) -> Sequence[Planned] | None:
    """As `_make_all`, by workers that keep the files' bytes in ``ledger`` until all are made."""
    missing: dict[str, tuple[Model, Sequence[Planned]]] = {}  # equal weights share their images
    for model, groups in zip(models, plans, strict=True):
        there = _there(folder, groups)
        for group in groups:
            if any(image.file not in there for image in group):
                missing[digest([image.file for image in group])] = model, group
    shards = [Shard(key, len(given[1]), given) for key, given in missing.items()]
    made = each_shard("images", draw, shards, ledger, executor)
    short = None
    for (_, group), table in zip(missing.values(), made, strict=True):
        if table.num_rows == 0 and (short is None or group[0].row < short[0].row):
            short = group
        for image, data in zip(group, table["png"].to_pylist(), strict=False):
            write_bytes(folder / image.file, data)
        note(images_made=table.num_rows)
    ledger.forget()
    return short


class Draw:
    """Makes a group of images in a worker, or tries how many it can make together.

    Parameters
    ----------
    base, settings, device
        As in `PipelineLoader`.
    loader
        One that has loaded the base model before; it does not travel.
    """

    def __init__(
        self,
        base: Path,
        settings: Settings,
        device: str | None,
        loader: PipelineLoader | None = None,
    ) -> None:
        self.base, self.settings, self.device = base, settings, device
        self._loader, self._held, self._name = loader, ExitStack(), ""

    def __reduce__(self) -> tuple[Any, ...]:
        return Draw, (self.base, self.settings, self.device)

    @property
    def loader(self) -> PipelineLoader:
        """Made when it is first wanted."""
        self._loader = self._loader or PipelineLoader(self.base, self.settings, self.device)
        return self._loader

    def __call__(self, given: tuple[Model, Any]) -> pa.Table:
        """``png`` of a model and a group, without rows where memory ran out.

        Or ``batch``, of a model and a prompt: how many images of that size fit.
        """
        model, asked = given
        if isinstance(asked, str):
            with self.loader.use(model) as pipe:
                return pa.table({"batch": [find_batch(pipe, self.settings, asked)]})
        pixels = _together(self._pipe(model), self.settings, asked)
        files = [] if pixels is None else list(map(png, pixels))
        return pa.table({"png": pa.array(files, pa.large_binary())})

    def _pipe(self, model: Model) -> Any:
        """The pipeline, with the weights of the last group left in where they are the same."""
        if self._name != model.weights:
            self._held.close()
            self._pipeline = self._held.enter_context(self.loader.use(model))
            self._name = model.weights
        return self._pipeline


def _together(
    pipe: Any, settings: Settings, group: Sequence[Planned]
) -> npt.NDArray[np.uint8] | None:
    """A group's images; None where memory ran out twice: once, it may only lie in pieces."""
    for _ in range(2):
        try:
            return make_images(pipe, settings, [i.prompt for i in group], [i.seed for i in group])
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
        # only now: the error kept what the attempt had allocated
        release_memory()
    return None


def _write(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    write_bytes(path, png(pixels))


def _there(folder: Path, groups: Sequence[Sequence[Planned]]) -> set[str]:
    """The files that are there and whole; what a killed write left is removed."""
    place = Path(groups[0][0].file).parent if groups else Path()
    if not (folder / place).is_dir():
        return set()
    sweep(folder / place)
    listed = {path.name for path in (folder / place).iterdir()}
    files = [image.file for group in groups for image in group if Path(image.file).name in listed]
    with ThreadPoolExecutor(min(WRITERS, cores())) as readers:
        whole = list(readers.map(lambda file: _is_png((folder / file).read_bytes()), files))
    damaged = [file for file, good in zip(files, whole, strict=True) if not good]
    if damaged:
        echo(f"{len(damaged):,} images are damaged and made again, the first: {damaged[0]}")
    return set(files) - set(damaged)


def _is_png(data: bytes) -> bool:
    """Whether bytes are a PNG file, each chunk with its right checksum, to its end and no further.

    https://www.w3.org/TR/png-3/#5Chunk-layout: length, type, data, CRC-32 of type and data.
    """
    start = 8
    while data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= start + 12:
        end = start + 12 + int.from_bytes(data[start : start + 4])
        if zlib.crc32(data[start + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            return False
        if data[start + 4 : start + 8] == b"IEND":
            return len(data) == end
        start = end
    return False
