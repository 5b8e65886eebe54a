"""Score every pair of a data set with a reward model: each image once, each prompt once.

Three passes over shards, each kept as it is done, so that a run may be killed at any moment:
the bytes of every image (to tell images apart), the features of every prompt, and, image by
image, the rewards of every prompt that it is paired with.
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
import pyarrow as pa
import pyarrow.parquet as pq

from fifa.console import echo, note
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.rewards.base import RewardModel
from fifa.scoring.rewards.dedup import Asked, Keys, ask, image_keys, keys_identity, places, trusted
from fifa.scoring.rewards.worker import (
    DIGESTS,
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

__all__ = ["EngineOptions", "prompt_features", "score_images", "unreadable_path"]

UNREADABLE = pa.schema(
    [
        ("image", pa.string()),  # its key
        ("file", pa.string()),  # where it stands first
        ("row", pa.int64()),
        ("side", pa.int8()),  # of the pair: 0 is image_0
        ("reason", pa.string()),
    ]
)
PROMPT_SHARD = 4096  # prompts
DIGEST_SHARD = 16_384  # images


@dataclass(frozen=True)
class _Job:
    """What all passes of one scoring share."""

    pairs: Pairs
    model: RewardModel
    folder: Path
    options: EngineOptions
    executor: Executor
    make: Callable[[], ScoreStep]

    def run(
        self,
        what: str,
        target: Path,
        shards: Sequence[Shard],
        prepare: Callable[[Any], Any],
    ) -> Iterator[pa.Table]:
        """The tables of all shards in order, for the file ``target``."""
        return run_shards(what, self.make, shards, self.ledger(target), self.executor, prepare)

    def ledger(self, target: Path) -> Ledger:
        """Of the shards of ``target``: forgotten once it is there."""
        return Ledger.beside(target, self.options.store)


def score_images(
    pairs: Pairs,
    model: RewardModel,
    *,
    folder: Path | None = None,
    options: EngineOptions | None = None,
    executor: Executor | None = None,
    load: Load | None = None,
) -> pa.Table:
    """What a reward model gives both images of every pair.

    Parameters
    ----------
    pairs
        The pairs; their images have to be readable from wherever the executor's workers are.
    model
        The reward model.
    folder
        Where scores are kept; None keeps nothing. Beside the margins it gets ``images-*.parquet``
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

    Returns
    -------
    pyarrow.Table
        `fifa.scoring.table.MARGIN`, row by row with ``pairs.table``. NaN where an image could not
        be read.

    Raises
    ------
    FifaError
        Where the folder cannot be written (what is done is kept), where a single image does not
        fit into memory, and where workers keep dying.
    """
    options = options or EngineOptions()
    here = executor is None or (isinstance(executor, LocalPool) and not executor.processes)
    load = partial(_same, model) if load is None or here else load
    with contextlib.ExitStack() as stack:
        kept = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        make = partial(ScoreStep, load, options)
        job = _Job(pairs, model, kept, options, executor or LocalPool(), make)
        keys = image_keys(pairs)
        asked = ask(pairs, keys, _contents(job, keys))
        path = _path(job, "margin", asked)
        facts = {"scorer": model.name, "scale": model.scale, "identity": model.identity}
        margins = partial(_margins, job, keys, asked, path)
        return scored_once(path, lambda ledger: margins(), facts, options.store)


def prompt_features(
    pairs: Pairs,
    model: RewardModel,
    folder: Path,
    *,
    options: EngineOptions | None = None,
    executor: Executor | None = None,
    load: Load | None = None,
) -> np.ndarray:
    """The model's features of ``pairs.prompts``, ``[prompts, ...]``, each made once.

    They lie in ``folder`` as ``prompts-<model>-<fingerprint>.npy`` and are mapped from there, not
    loaded: other steps may read them, and memory stays flat. Parameters as for `score_images`.
    """
    load = load or partial(_same, model)
    make = partial(ScoreStep, load, options or EngineOptions())
    job = _Job(pairs, model, folder, options or EngineOptions(), executor or LocalPool(), make)
    return _prompt_features(job)


def unreadable_path(margin_path: Path) -> Path:
    """Where the images are listed that a margin file has no reward for: `UNREADABLE`."""
    return margin_path.with_name(margin_path.name.replace("margin-", "unreadable-", 1))


def _path(job: _Job, kind: str, asked: Asked) -> Path:
    # prompt_id folds case and white space, a model may not: the spelling counts as well.
    spelling = column_digest(job.pairs.prompts["prompt"])
    identity = (job.model.identity, job.pairs.pairs_digest, asked.identity, spelling)
    return score_path(job.folder, kind, job.model.name, *identity)


def _same(model: RewardModel) -> RewardModel:
    return model


def _contents(job: _Job, keys: Keys) -> pa.Array | None:
    """A digest of every image's bytes (null where they cannot be read); None to trust the keys."""
    trust = job.options.trust_keys
    if trusted(job.pairs) if trust is None else trust:
        return None
    path = score_path(job.folder, "images", "bytes", keys_identity(job.pairs, keys))
    if not path.exists():
        starts = range(0, len(keys.first), DIGEST_SHARD)
        slots = [keys.first[start : start + DIGEST_SHARD] for start in starts]
        source = keys_identity(job.pairs, keys)
        tables = job.run(
            "telling images apart",
            path,
            [
                Shard(digest(source, start, len(part)), len(part), part)
                for start, part in zip(starts, slots, strict=True)
            ],
            lambda part: DigestShard(*places(job.pairs, part)),
        )
        write_table(path, pa.concat_tables([DIGESTS.empty_table(), *tables]))
    job.ledger(path).forget()
    contents: pa.Array = pq.read_table(path)["content"].combine_chunks()
    return contents


def _prompt_features(job: _Job) -> np.ndarray:
    """The features of all prompts, mapped from their file."""
    prompts = job.pairs.prompts["prompt"]
    identity = (job.model.identity, job.pairs.prompts_digest, column_digest(prompts))
    path = score_path(job.folder, "prompts", job.model.name, *identity).with_suffix(".npy")
    if not path.exists():
        parts = [prompts.slice(i, PROMPT_SHARD) for i in range(0, len(prompts), PROMPT_SHARD)]
        tables = job.run(
            f"prompts through {job.model.name}",
            path,
            [
                Shard(digest(job.model.identity, i, column_digest(part)), len(part), part)
                for i, part in enumerate(parts)
            ],
            lambda part: PromptShard(part.to_pylist()),
        )
        note(prompts_embedded=len(prompts))
        _write_array(path, len(prompts), map(table_features, tables))
    job.ledger(path).forget()
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


def _margins(job: _Job, keys: Keys, asked: Asked, path: Path) -> pa.Table:
    """The rewards of all asks, put where the pairs want them; images that failed, listed."""
    images, size = len(asked.images), job.options.shard
    features = _prompt_features(job) if images else np.empty((0, 1), np.float32)
    spelling, source = job.pairs.prompts["prompt"], job.pairs.origin.fingerprint

    def key(start: int) -> str:
        part = asked.asks(start, start + size)
        contents = asked.images[start : start + size].to_pylist()
        texts = spelling.take(pa.array(asked.prompt[part])).to_pylist()
        counts = (asked.image[part] - start).tobytes()
        return digest(job.model.identity, source, contents, counts, texts)

    def prepare(start: int) -> ImageShard:
        part = asked.asks(start, start + size)
        unique, local = np.unique(asked.prompt[part], return_inverse=True)
        subset, sides = places(job.pairs, asked.first[start : start + size])
        image = asked.image[part] - start
        return ImageShard(subset, sides, np.array(features[unique]), image, local.reshape(-1))

    tables = job.run(
        f"images through {job.model.name}",
        path,
        [Shard(key(i), min(size, images - i), i) for i in range(0, images, size)],
        prepare,
    )
    rewards, reasons = _joined(asked, tables)
    bad = _unreadable(job.pairs, keys, asked, reasons)
    write_table(unreadable_path(path), bad)
    note(images=images, images_unreadable=bad.num_rows, rewards=len(asked.image))
    lost = f"; {bad.num_rows:,} could not be read" if bad.num_rows else ""
    echo(f"margin {job.model.name}: {images:,} images, {len(asked.image):,} rewards{lost}")
    # slot 2 * row + side
    margins = [pa.array(rewards[asked.of_slot[side::2]]) for side in (0, 1)]
    return pa.table([job.pairs.table["pair_id"], *margins], schema=MARGIN)


def _joined(asked: Asked, tables: Iterator[pa.Table]) -> tuple[np.ndarray, dict[int, str]]:
    """The reward of every ask, float32 [asks], and the reason of every image without one."""
    rewards = np.empty(len(asked.image), np.float32)
    reasons: dict[int, str] = {}
    start = 0
    for table in tables:
        stop = start + table.num_rows
        rewards[start:stop] = table["reward"].to_numpy()
        for position, reason in enumerate(table["reason"].to_pylist(), start):
            if reason is not None:
                reasons[int(asked.image[position])] = reason
        start = stop
    if start != len(rewards):
        raise FifaError("finished shards are missing", do="run it again")
    return rewards, reasons


def _unreadable(pairs: Pairs, keys: Keys, asked: Asked, reasons: dict[int, str]) -> pa.Table:
    """`UNREADABLE`: every key whose image failed, where it stands first, and why."""
    failed = np.flatnonzero(np.isin(asked.of_key, list(reasons)))
    rows = pairs.table.select(["file", "row"]).take(pa.array(keys.first[failed] // 2))
    return pa.table(
        [
            keys.names.take(pa.array(failed)).cast(pa.string()),
            rows["file"].cast(pa.string()).combine_chunks(),
            rows["row"].combine_chunks(),
            pa.array(keys.first[failed] % 2, pa.int8()),
            pa.array([reasons[image] for image in asked.of_key[failed].tolist()], pa.string()),
        ],
        schema=UNREADABLE,
    )
