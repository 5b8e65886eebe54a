"""Score images against prompts with a reward model: each image once, each prompt once.

Three passes over shards, each kept as it is done, so that a run may be killed at any moment:
the bytes of every image (to tell images apart), the features of every prompt, and, image by
image, the rewards of every prompt that it is asked for.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.console import echo, note
from fifa.data.images import FACTS, Images, Integers, unique_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.rewards.base import RewardModel
from fifa.scoring.rewards.dedup import Distinct, tell_apart
from fifa.scoring.rewards.worker import (
    DigestShard,
    EngineOptions,
    ImageShard,
    Load,
    PromptShard,
    ScoreStep,
    table_features,
)
from fifa.scoring.table import MARGIN, score_path, scored_once
from fifa.shards.files import atomic_path, column_digest, digest, write_table
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, LocalPool, Shard, run_shards

__all__ = ["EngineOptions", "prompt_features", "score_pairs", "score_requests", "unreadable_path"]

Rewards = npt.NDArray[np.float32]

UNREADABLE = pa.schema(
    [
        ("image", pa.string()),  # its key
        ("file", pa.string()),  # where it stands first
        ("row", pa.int64()),
        ("column", pa.string()),  # of the cell that it is in; null for a file, tar member or URL
        ("reason", pa.string()),
    ]
)
REWARD = pa.schema([("reward", pa.float32())])
PROMPT_SHARD = 4096  # prompts
DIGEST_SHARD = 16_384  # images


@dataclass(frozen=True)
class _Job:
    """What all passes of one scoring share."""

    folder: Path
    options: EngineOptions
    executor: Executor
    make: Callable[[], ScoreStep]

    def run(
        self,
        what: str,
        ledger: Ledger,
        shards: Sequence[Shard],
        prepare: Callable[[Any], Any],
    ) -> Iterator[pa.Table]:
        """The tables of all shards in order."""
        return run_shards(what, self.make, shards, ledger, self.executor, prepare)


@contextlib.contextmanager
def _job(
    model: RewardModel | None,
    folder: Path | None,
    options: EngineOptions | None = None,
    executor: Executor | None = None,
    load: Load | None = None,
) -> Iterator[_Job]:
    """The arguments of `score_requests` as a job; without a folder in a temporary one."""
    options = options or EngineOptions()
    here = executor is None or (isinstance(executor, LocalPool) and not executor.processes)
    load = partial(_same, model) if load is None or here else load
    with contextlib.ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield _Job(kept, options, executor or LocalPool(), partial(ScoreStep, load, options))


def score_requests(
    images: Images,
    prompts: pa.ChunkedArray,
    image: Integers,
    prompt: Integers,
    model: RewardModel,
    *,
    kind: str = "rewards",
    identity: Sequence[object] = (),
    arrange: Callable[[Rewards], pa.Table] = lambda rewards: pa.table([rewards], schema=REWARD),
    folder: Path | None = None,
    options: EngineOptions | None = None,
    executor: Executor | None = None,
    load: Load | None = None,
) -> pa.Table:
    """What a reward model gives images for prompts: request i is ``image[i]`` for ``prompt[i]``.

    Parameters
    ----------
    images
        Where they are; readable from wherever the executor's workers are.
    prompts
        Strings [prompts].
    image, prompt
        Rows of ``images`` and of ``prompts``, int64 [requests]. Any may come again.
    model
        The reward model.
    kind, identity
        Of the file that is kept: what it begins with, and what its name depends on beside the
        model, the images and the prompts.
    arrange
        From float32 [requests], NaN where an image could not be read, to the table that is kept.
    folder
        Where scores are kept; None keeps nothing. Beside the table it gets ``images-*.parquet``
        (which images are the same), ``prompts-*.npy`` (`prompt_features`) and
        ``unreadable-*.parquet`` (`unreadable_path`). A run that was killed goes on where it was,
        and ends with the same bytes.
    options
        How to feed the model.
    executor
        Who runs it: by default this process; `fifa.shards.pool.LocalPool` or
        `fifa.shards.ray.RayPool`.
    load
        Loads the model in other processes; without it the model itself travels there.

    Raises
    ------
    FifaError
        Where the folder cannot be written (what is done is kept), where a single image does not
        fit into memory, and where workers keep dying.
    """
    with _job(model, folder, options, executor, load) as job:
        distinct = _distinct(job, images)
        facts = {"scorer": model.name, "scale": model.scale, "identity": model.identity}
        # prompt_id folds case and white space, a model may not: the spelling counts as well.
        content = (model.identity, *identity, distinct.identity, column_digest(prompts))
        path = score_path(job.folder, kind, model.name, *content)

        def make(ledger: Ledger) -> pa.Table:
            # every image and prompt that is asked for together, once
            both = distinct.of_image[image] * max(1, len(prompts)) + prompt
            unique, of_request = np.unique(both, return_inverse=True)
            which = np.divmod(unique, max(1, len(prompts)))
            rewards = _rewards(job, model, images, distinct, prompts, *which, path, ledger)
            return arrange(rewards[of_request.reshape(-1)])

        return scored_once(path, make, facts, job.options.store)


def score_pairs(pairs: Pairs, model: RewardModel, **run: Any) -> pa.Table:
    """What a reward model gives both images of every pair.

    Parameters
    ----------
    pairs
        With images.
    model
        The reward model.
    run
        ``folder``, ``options``, ``executor`` and ``load`` as for `score_requests`.

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``. NaN where an image could not
        be read.
    """
    images, of_slot = unique_images(pairs)

    def arrange(rewards: Rewards) -> pa.Table:
        sides = [pa.array(rewards[side::2]) for side in (0, 1)]
        return pa.table([pairs.table["pair_id"], *sides], schema=MARGIN)

    return score_requests(
        images,
        pairs.prompts["prompt"],
        of_slot,
        np.repeat(pairs.table["prompt_index"].to_numpy().astype(np.int64), 2),
        model,
        kind="margin",
        identity=(pairs.pairs_digest,),
        arrange=arrange,
        **run,
    )


def distinct_images(images: Images, folder: Path | None = None, **run: Any) -> Distinct:
    """Which images are the same: by their bytes, or by their keys where those are ids."""
    with _job(None, folder, **run) as job:
        return _distinct(job, images)


def prompt_features(
    prompts: pa.ChunkedArray, model: RewardModel, folder: Path, **run: Any
) -> np.ndarray:
    """The model's features of prompts, ``[prompts, ...]``, each made once.

    They lie in ``folder`` as ``prompts-<model>-<fingerprint>.npy`` and are mapped from there, not
    loaded: other steps may read them, and memory stays flat. ``run`` as for `score_pairs`.
    """
    with _job(model, folder, **run) as job:
        return _prompt_features(job, model, prompts)


def unreadable_path(margin_path: Path) -> Path:
    """Where the images are listed that a file of rewards has none for: `UNREADABLE`."""
    return margin_path.with_name(f"unreadable-{margin_path.name.partition('-')[2]}")


def _same(model: RewardModel | None) -> RewardModel:
    assert model is not None, "telling images apart takes no model"
    return model


def _distinct(job: _Job, images: Images) -> Distinct:
    trust = job.options.trust_keys
    if images.keyed if trust is None else trust:
        return tell_apart(images, None)
    source = images.identity
    path = score_path(job.folder, "images", "bytes", source)
    shards = [
        Shard(digest(source, part.start, len(part)), len(part), part)
        for part in _parts(len(images), DIGEST_SHARD)
    ]

    def make(ledger: Ledger) -> pa.Table:
        def prepare(part: range) -> DigestShard:
            return DigestShard(images.take(part))

        tables = job.run("telling images apart", ledger, shards, prepare)
        return pa.concat_tables([FACTS.empty_table(), *tables]).select(["content"])

    table = scored_once(path, make, store=job.options.store)
    return tell_apart(images, table["content"].combine_chunks())


def _parts(n: int, size: int) -> list[range]:
    return [range(start, min(n, start + size)) for start in range(0, n, size)]


def _prompt_features(job: _Job, model: RewardModel, prompts: pa.ChunkedArray) -> np.ndarray:
    """The features of all prompts, mapped from their file."""
    identity = (model.identity, column_digest(prompts))
    path = score_path(job.folder, "prompts", model.name, *identity).with_suffix(".npy")
    ledger = Ledger.beside(path, job.options.store)
    if not path.exists():
        parts = [prompts.slice(i, PROMPT_SHARD) for i in range(0, len(prompts), PROMPT_SHARD)]
        shards = [
            Shard(digest(model.identity, i, column_digest(part)), len(part), part)
            for i, part in enumerate(parts)
        ]
        tables = job.run(
            f"prompts through {model.name}",
            ledger,
            shards,
            lambda part: PromptShard(part.to_pylist()),
        )
        note(prompts_embedded=len(prompts))
        _write_array(path, len(prompts), map(table_features, tables))
    ledger.forget()
    mapped: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _write_array(path: Path, n: int, parts: Iterator[np.ndarray]) -> None:
    """Write arrays one below the other as an ``.npy`` file of n rows, one in memory at a time.

    Not through a memory map: where the disk is full that ends in a signal, not in an error.
    """
    first = next(parts)
    header = {
        "descr": np.lib.format.dtype_to_descr(first.dtype),
        "fortran_order": False,
        "shape": (n, *first.shape[1:]),
    }
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.write(first.tobytes())
        for part in parts:
            file.write(part.tobytes())


def _rewards(
    job: _Job,
    model: RewardModel,
    images: Images,
    distinct: Distinct,
    prompts: pa.ChunkedArray,
    image: Integers,
    prompt: Integers,
    path: Path,
    ledger: Ledger,
) -> Rewards:
    """The rewards of different images for prompts, sorted by image; those that failed, listed."""
    n = len(distinct)
    features = _prompt_features(job, model, prompts) if n else np.empty((0, 1), np.float32)

    def of_part(part: range) -> slice:
        return slice(*np.searchsorted(image, [part.start, part.stop]).tolist())

    def key(part: range) -> str:
        own = of_part(part)
        contents = distinct.contents[part.start : part.stop].to_pylist()
        texts = prompts.take(pa.array(prompt[own])).to_pylist()
        local = (image[own] - part.start).tobytes()
        return digest(model.identity, images.fingerprint, contents, local, texts)

    def prepare(part: range) -> ImageShard:
        own = of_part(part)
        unique, local = np.unique(prompt[own], return_inverse=True)
        places = images.take(distinct.first[part.start : part.stop])
        which = image[own] - part.start
        return ImageShard(places, np.array(features[unique]), which, local.reshape(-1))

    shards = [Shard(key(part), len(part), part) for part in _parts(n, job.options.shard)]
    tables = job.run(f"images through {model.name}", ledger, shards, prepare)
    rewards = np.empty(len(image), np.float32)
    reasons: dict[int, str] = {}
    start = 0
    for table in tables:
        stop = start + table.num_rows
        rewards[start:stop] = table["reward"].to_numpy()
        for position, reason in enumerate(table["reason"].to_pylist(), start):
            if reason is not None:
                reasons[int(image[position])] = reason
        start = stop
    if start != len(rewards):
        raise FifaError("finished shards are missing", do="run it again")
    bad = _unreadable(images, distinct, reasons)
    write_table(unreadable_path(path), bad)
    note(images=n, images_unreadable=bad.num_rows, rewards=len(image))
    lost = f"; {bad.num_rows:,} could not be read" if bad.num_rows else ""
    echo(f"margin {model.name}: {n:,} images, {len(image):,} rewards{lost}")
    return rewards


def _unreadable(images: Images, distinct: Distinct, reasons: dict[int, str]) -> pa.Table:
    """`UNREADABLE`: every key whose image failed, where it stands first, and why."""
    failed = np.flatnonzero(np.isin(distinct.of_image, list(reasons)))
    rows = images.take(failed).table
    why = [reasons[image] for image in distinct.of_image[failed].tolist()]
    columns = [rows[name].cast(pa.string()) for name in ("key", "file")]
    return pa.table(
        [*columns, rows["row"], rows["column"].cast(pa.string()), pa.array(why, pa.string())],
        schema=UNREADABLE,
    )
