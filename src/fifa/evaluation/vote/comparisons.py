"""What is voted on: two models' images of one prompt and seed, from the index of an evaluation."""

from __future__ import annotations

import os
import stat
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.data.decode import MAX_BYTES
from fifa.data.source import inside
from fifa.errors import FifaError
from fifa.shards.files import digest

INDEX = "images.parquet"
TEXT = ("model", "prompt_id", "prompt", "file")


@dataclass(frozen=True)
class Comparison:
    """Two models' images of the same prompt and seed.

    Parameters
    ----------
    key
        16 hex characters that name the two models, the prompt and the seed.
    ours, theirs
        The models: the later one of the index first, so that a base is always "theirs".
    prompt_id, prompt, seed, category
        Of both; the category may be None.
    file_0, file_1
        The image of ours and of theirs, below the evaluation's folder.
    """

    key: str
    ours: str
    theirs: str
    prompt_id: str
    prompt: str
    seed: int
    category: str | None
    file_0: str
    file_1: str


def evaluation_folder(run: str | Path) -> Path:
    """``RUN/evaluate``; raises `FifaError` where no images were generated yet."""
    folder = Path(run) / "evaluate"
    if not (folder / INDEX).is_file():
        raise FifaError(
            "no generated images here",
            where=str(folder / INDEX),
            do="run `fifa evaluate` first: it makes the images that people vote on",
        )
    return folder


def load_comparisons(run: str | Path, models: Sequence[str] = ()) -> list[Comparison]:
    """Every two models' images of the same prompt and seed, in the order of the index.

    Parameters
    ----------
    run
        A run folder with ``evaluate/images.parquet``: a row an image, with ``model``,
        ``prompt_id``, ``prompt``, ``seed``, ``file`` (below ``evaluate/``) and perhaps
        ``category``. The base comes first.
    models
        Compare these only; all if empty.

    Raises
    ------
    FifaError
        Where the index is missing or broken, an image is not there or outside of the folder, or
        there is nothing to compare.
    """
    folder = evaluation_folder(run)
    where = str(folder / INDEX)
    rows = _rows(folder / INDEX)
    known = list(dict.fromkeys(row["model"] for row in rows))
    unknown = [model for model in models if model not in known]
    if unknown:
        raise FifaError(
            f"no model {', '.join(map(repr, unknown))} here",
            where=where,
            do=f"there are {', '.join(known)}",
        )
    wanted = [model for model in known if not models or model in models]
    by_prompt: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        images = by_prompt[row["prompt_id"], row["seed"]]
        if row["model"] in images:
            raise FifaError(
                f"two images of model {row['model']!r}, prompt {row['prompt_id']!r}, "
                f"seed {row['seed']}",
                where=where,
                do="run `fifa evaluate` again",
            )
        images[row["model"]] = row
    found = [
        _comparison(images[theirs], images[ours])
        for images in by_prompt.values()
        for theirs, ours in combinations([model for model in wanted if model in images], 2)
    ]
    if not found:
        raise FifaError(
            "nothing to compare: no prompt and seed has images of two models",
            where=where,
            do="run `fifa evaluate` with a base and at least one tuned model",
        )
    _check_files(folder, found)
    return found


def draw(comparisons: Sequence[Comparison], count: int, seed: int) -> list[Comparison]:
    """``count`` comparisons, spread over models and prompts before a second seed of any."""
    order = np.random.default_rng(seed).permutation(len(comparisons)).tolist()
    seen: Counter[tuple[str, str, str]] = Counter()
    turn = {}
    for i in order:
        one = comparisons[i]
        turn[i] = seen[one.ours, one.theirs, one.prompt_id]
        seen[one.ours, one.theirs, one.prompt_id] += 1
    chosen = sorted(order, key=lambda i: turn[i])[:count]
    return [comparisons[i] for i in sorted(chosen)]


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of an image below ``folder``; no path and no link leads out of it.

    Raises `FifaError`.
    """
    try:
        path = _resolved(folder, name)
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, ValueError, RuntimeError) as error:
        raise FifaError("an image cannot be read", where=f"{folder}: {name}") from error
    with os.fdopen(handle, "rb") as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_BYTES:
            raise FifaError("not an image, or too large a file", where=str(path))
        return file.read()


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        table = pq.read_table(path)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's errors are among these
        raise FifaError(
            "the index of the images cannot be read", where=str(path), do="run `fifa evaluate`"
        ) from error
    lacks = [name for name in (*TEXT, "seed") if name not in table.column_names]
    if lacks:
        raise FifaError(f"no column {', '.join(map(repr, lacks))}", where=str(path))
    names = [*TEXT, "seed"] + ["category"] * ("category" in table.column_names)
    fields = [(name, pa.int64() if name == "seed" else pa.string()) for name in names]
    try:
        table = table.select(names).cast(pa.schema(fields))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        brief = str(error).partition("\n")[0][:200]
        raise FifaError(f"a column has the wrong type: {brief}", where=str(path)) from error
    for name in (*TEXT, "seed"):
        if table[name].null_count:
            raise FifaError(f"column {name!r} has empty cells", where=str(path))
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _comparison(theirs: dict[str, Any], ours: dict[str, Any]) -> Comparison:
    seed = int(ours["seed"])
    return Comparison(
        key=digest([ours["model"], theirs["model"], ours["prompt_id"], seed]),
        ours=ours["model"],
        theirs=theirs["model"],
        prompt_id=ours["prompt_id"],
        prompt=ours["prompt"],
        seed=seed,
        category=ours.get("category"),
        file_0=ours["file"],
        file_1=theirs["file"],
    )


def _resolved(folder: Path, name: str) -> Path:
    """The real path of ``name``; ValueError where it lies outside of ``folder``."""
    path = (folder / name).resolve(strict=True)
    if Path(name).is_absolute() or not inside(folder.resolve(), path):
        raise ValueError(name)
    return path


def _check_files(folder: Path, found: Sequence[Comparison]) -> None:
    missing = []
    for name in dict.fromkeys(name for one in found for name in (one.file_0, one.file_1)):
        try:
            if not _resolved(folder, name).is_file():
                missing.append(name)
        except (ValueError, RuntimeError) as error:
            raise FifaError(
                f"the path of an image leaves the folder: {name!r}",
                where=str(folder / INDEX),
                do="take an index that `fifa evaluate` wrote",
            ) from error
        except OSError:
            missing.append(name)
    if missing:
        raise FifaError(
            f"{len(missing):,} images are missing, the first: {missing[0]}",
            where=str(folder),
            do="run `fifa evaluate` again: it makes what is not there",
        )
