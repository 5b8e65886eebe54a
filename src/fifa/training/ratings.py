"""Images that were judged one by one, good or bad or by a rating: what Diffusion-KTO trains on."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import Train
from fifa.console import echo, note
from fifa.data.decode import BadImage
from fifa.data.images import Images, cell_images, read
from fifa.data.parquet import read_columns
from fifa.errors import FifaError
from fifa.shards.files import digest
from fifa.shards.mirror import local
from fifa.training.pairs import (
    TrainingPairs,
    find_files,
    find_subset,
    fingerprint,
    read_training_pairs,
    weights_of,
)

# What a column may be called; the first that a file has.
IMAGE = ("jpg", "image")
PROMPT = ("caption", "prompt", "text")
LABEL = ("label",)
RATING = ("rating", "score")


# What asks for a winner and a loser of one prompt.
OF_PAIRS = ("sdpo", "dpop", "beta_target", "sft", "weigh_labels", "order")


def read_training(train: Train) -> TrainingPairs:
    """What to train on: pairs, or images one by one where a row of the source has one image.

    Raises `FifaError` as `fifa.training.pairs.read_training_pairs` and `read_ratings`, and for a
    training that cannot use what the source has.
    """
    path = local(train.source)
    if find_subset(path) is not None or not is_rated(files := find_files(path)):
        if train.good_from is not None or train.good_share != Train.good_share:
            raise FifaError(
                "the source has pairs, and not good and bad images",
                where=train.source,
                do="leave --good-from and --good-share out",
            )
        return read_training_pairs(train.source)
    given = [name for name in OF_PAIRS if getattr(train, name) != getattr(Train, name)]
    if train.loss != "kto" or given:
        what = f"the loss {train.loss}" if train.loss != "kto" else given[0]
        raise FifaError(
            f"{what} needs pairs of images, and the source has images one by one",
            where=train.source,
            do="take --loss kto without " + ", ".join(OF_PAIRS) + ", or a source with pairs",
        )
    return read_ratings(files, train.source, train.good_from)


def is_rated(files: Sequence[Path]) -> bool:
    """Whether the first of some Parquet files has one image a row."""
    try:
        names = pq.read_schema(files[0]).names
    except (OSError, pa.ArrowException):
        return False  # whoever reads it says what is wrong
    return _first(names, IMAGE) is not None and not {"jpg_0", "jpg_1"} & set(names)


def read_ratings(files: Sequence[Path], source: str, good_from: float | None) -> TrainingPairs:
    """Images with a prompt and a judgement each, as `TrainingPairs` of one side.

    Parameters
    ----------
    files
        Parquet files with an image (`IMAGE`), a prompt (`PROMPT`), and a label in [0, 1], 1 for
        good (`LABEL`), or a rating (`RATING`); ``weight`` is used if it is there.
    source
        What they are, for messages.
    good_from
        The rating from which on an image is good; the others are bad. None: labels are read.

    Raises
    ------
    FifaError
        For columns that are missing, labels that are none, ratings without ``good_from``, and
        where no good or no bad image remains.
    """
    kind = LABEL if good_from is None else RATING
    table = pa.concat_tables([_rows(file, i, kind) for i, file in enumerate(files)])
    value = table["value"].to_numpy()  # NaN where null
    if good_from is None:
        wrong = np.flatnonzero((value < 0) | (value > 1))
        if len(wrong):
            raise FifaError(
                f"a label is {value[wrong[0]]:g}, and labels are 1 (good), 0 (bad) or between",
                where=source,
                do="rename the column to rating, and say with --good-from which ratings are good",
            )
    good = value > 0.5 if good_from is None else value >= good_from
    reasons = np.full(len(value), "", dtype="<U16")
    reasons[(value == 0.5) & (good_from is None)] = "undecided"
    reasons[~np.isfinite(value)] = "no_label"
    blank = pc.equal(pc.utf8_trim_whitespace(table["prompt"]), "")
    reasons[np.asarray(pc.fill_null(blank, True))] = "no_prompt"
    dropped = {name: n for name, n in sorted(Counter(reasons.tolist()).items()) if name}
    kept = np.flatnonzero(reasons == "")
    counts = int(good[kept].sum()), int((~good[kept]).sum())
    listed = ", ".join(f"{n:,} {name}" for name, n in dropped.items())
    echo(
        f"{len(value):,} images: {counts[0]:,} good, {counts[1]:,} bad"
        + (f" (dropped: {listed})" if listed else "")
    )
    if not len(kept):
        raise FifaError("no image has a prompt and a judgement", where=source)
    table = table.take(kept)
    label, weight = good[kept].astype(np.float32), weights_of(table, source)
    for name, some in (("good", label == 1), ("bad", label == 0)):
        if not weight[some].any():
            raise FifaError(
                f"no image is {name}, or has a weight: nothing to tell apart",
                where=source,
                do="choose another --good-from, or another source",
            )
    images = cell_images(
        files, table["file"].to_numpy(), table["row"].to_numpy(), table["column"].to_pylist()
    )
    caption: list[str] = table["prompt"].to_pylist()
    ids = _ids(caption, label, images)
    note(training_images=len(ids), **{f"training_images_{k}": v for k, v in dropped.items()})
    return TrainingPairs(
        pair_id=ids,
        caption=caption,
        label=label,
        weight=weight,
        margin=np.full(len(ids), np.nan, np.float32),
        digest=digest("one by one", ids, caption, label.tobytes(), weight.tobytes()),
        fingerprint=digest([fingerprint(file) for file in files]),
        dropped=dropped,
        image_table=images,
        folder=None,
        votes=np.ones(len(ids), np.float32),
        sides=1,
    )


def _ids(caption: list[str], label: npt.NDArray[np.float32], images: Images) -> list[str]:
    """An id for every image, of its prompt and bytes; it is told where people disagree on one."""
    ids: list[str] = []
    seen: defaultdict[str, list[float]] = defaultdict(list)
    for text, one, (_, data) in zip(caption, label.tolist(), read(images), strict=True):
        name = digest(text, b"" if isinstance(data, BadImage) else data)
        ids.append(digest(name, len(seen[name])) if seen[name] else name)
        seen[name].append(one)
    both = sum(len(set(judged)) > 1 for judged in seen.values())
    if both:
        echo(f"{both:,} images are good in one row and bad in another, for the same prompt")
    return ids


def balance(
    good: npt.NDArray[np.bool_], weight: npt.NDArray[np.float64], share: float
) -> npt.NDArray[np.float64]:
    """Weights with which good images have ``share`` of the loss, however many there are.

    KTO's lambda (Ethayarajh et al. 2024, arXiv 2402.01306), which it wants such that lambda_good
    n_good is 1 to 4/3 times lambda_bad n_bad: a share of 1/2 to 4/7. Diffusion-KTO's script (arXiv
    2404.04465) draws good images with a probability of 0.8 instead.
    """
    # lambda_good = share * W / W_good,  lambda_bad = (1 - share) * W / W_bad,  W: sums of weights
    total = weight.sum()
    parts = np.where(good, share / weight[good].sum(), (1 - share) / weight[~good].sum())
    return np.asarray(weight * total * parts)


def _rows(file: Path, number: int, kind: Sequence[str]) -> pa.Table:
    """Prompt, value and weight of one file's rows, and where their images are."""
    try:
        opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        names = opened.schema_arrow.names
        image, prompt, value = (_first(names, some) for some in (IMAGE, PROMPT, kind))
        if image is None or prompt is None or value is None:
            raise _missing(file, names, kind)
        weight = ["weight"] if "weight" in names else []
        table = read_columns(file, [prompt, value, *weight], str(file), metadata=opened.metadata)
        n = table.num_rows
        one = table[value]
        if pa.types.is_boolean(one.type):
            one = one.cast(pa.int8())
        weights = table["weight"] if weight else pa.nulls(n)
        return pa.table(
            {
                "prompt": table[prompt].cast(pa.string()),
                "value": one.cast(pa.float64()),
                "weight": weights.cast(pa.float64()),
                "file": np.full(n, number),
                "row": np.arange(n),
                "column": pa.array([image] * n, pa.string()),
            }
        )
    except (OSError, pa.ArrowException) as error:
        brief = str(error).partition("\n")[0][:150]
        raise FifaError(f"cannot read the Parquet file: {brief}", where=str(file)) from error


def _missing(file: Path, names: Sequence[str], kind: Sequence[str]) -> FifaError:
    if kind == LABEL and (rating := _first(names, RATING)):
        return FifaError(
            f"the column {rating} does not say which images are good",
            where=str(file),
            do="say from which rating on they are: --good-from 4",
        )
    lacks = [some[0] for some in (IMAGE, PROMPT, kind) if _first(names, some) is None]
    return FifaError(
        f"the file has no column {', '.join(lacks)}",
        where=str(file),
        do=f"images one by one need {' or '.join(IMAGE)}, {' or '.join(PROMPT)}, and label (1: "
        f"good, 0: bad) or, with --good-from, {' or '.join(RATING)}",
    )


def _first(names: Sequence[str], some: Sequence[str]) -> str | None:
    return next((name for name in some if name in names), None)
