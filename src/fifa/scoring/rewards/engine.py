"""Score images against prompts with a reward model: each image once, each prompt once.

Three passes over shards, each kept as it is done, so that a run may be killed at any moment:
the bytes of every image (to tell images apart), the features of every prompt, and, image by
image, the rewards of every prompt that it is asked for.

The same image goes by several keys where a source names images by row or path, so images are told
apart by their bytes: a pass that reads every image and decodes none (`fifa.data.images.look`).
Where the key is an id of the image (Pick-a-Pic's uids) or reading is a download, the key is taken
at its word.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fifa.config import Compute
from fifa.console import echo, echo_once, note
from fifa.data.images import FACTS, Images, Integers, unique_images
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.rewards import RewardModel
from fifa.scoring.rewards.worker import (
    REWARDS,
    SCALED,
    ImageShard,
    Load,
    ScoreStep,
    images_at_a_time,
    runtime_of,
)
from fifa.scoring.table import MARGIN, SIGMAS, array_once, score_path, scored_once, table_features
from fifa.shards.files import column_digest, digest, write_table
from fifa.shards.ledger import Ledger
from fifa.shards.pool import Executor, LocalPool, Shard, run_shards
from fifa.shards.sealed import DamagedError, check_whole

__all__ = ["Engine", "score_pairs", "unreadable_path"]

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
class Distinct:
    """Every different image among some images.

    Parameters
    ----------
    contents
        What tells each apart (digest of its bytes, or its key), in order of first appearance,
        strings [distinct].
    first
        The row of the images where each appears first, int64 [distinct].
    of_image
        The different image behind every row of the images, int64 [images].
    """

    contents: pa.Array
    first: Integers
    of_image: Integers

    def __len__(self) -> int:
        return len(self.contents)

    @property
    def identity(self) -> str:
        """Names the images and their order."""
        return column_digest(pa.chunked_array([self.contents]))


@dataclass(frozen=True)
class Engine:
    """A reward model, and how images and prompts are fed to it.

    Parameters
    ----------
    model
        The reward model; None only to tell images apart.
    folder
        Where scores are kept; None keeps nothing. Beside the scores it gets ``images-*.parquet``
        (which images are the same), ``prompts-*.npy`` (`prompt_features`) and
        ``unreadable-*.parquet`` (`unreadable_path`). A run that was killed goes on where it was,
        and ends with the same bytes.
    compute
        ``batch``, ``workers`` and ``fast_decode`` feed the model; ``store`` keeps finished shards
        meanwhile. Only ``fast_decode`` changes a reward by more than rounding.
    executor
        Who runs it: by default this process; `fifa.shards.pool.LocalPool` or
        `fifa.shards.ray.RayPool`.
    load
        Loads the model in other processes; without it the model itself travels there.
    shard
        Images between two points where a run can be resumed.
    trust_keys
        True: an image key is one image. False: images are told apart by their bytes, by a pass
        that reads them all and decodes none. None: True for Pick-a-Pic, whose keys are uids, and
        for images that have to be fetched: by their URLs, or from a remote source to score them.
    allow_download
        Fetch images that the source only names by URL.
    """

    model: RewardModel | None = None
    folder: Path | None = None
    compute: Compute = field(default_factory=Compute)
    executor: Executor | None = None
    load: Load | None = None
    shard: int = 512
    trust_keys: bool | None = None
    allow_download: bool = False

    def __post_init__(self) -> None:
        if self.shard < 1:
            raise FifaError("shard has to be at least 1 image")

    def score_pairs(self, pairs: Pairs) -> pa.Table:
        """What the model gives both images of every pair; raises as `score` does.

        Returns
        -------
        pyarrow.Table
            `fifa.scoring.table.MARGIN`, with `SIGMAS` of a model that says how sure it is, row
            by row with ``pairs.table``. NaN where an image could not be read.
        """
        images, of_slot = unique_images(pairs)

        def arrange(*columns: Rewards) -> pa.Table:
            sides = [pa.array(column[side::2]) for column in columns for side in (0, 1)]
            schema = pa.schema([*MARGIN, *SIGMAS][: 1 + len(sides)])
            return pa.table([pairs.table["pair_id"], *sides], schema=schema)

        prompt = np.repeat(pairs.table["prompt_index"].to_numpy().astype(np.int64), 2)
        asked = (images, pairs.prompts["prompt"], of_slot, prompt)
        return self.score(*asked, kind="margin", identity=(pairs.pairs_digest,), arrange=arrange)

    def score(
        self,
        images: Images,
        prompts: pa.ChunkedArray,
        image: Integers,
        prompt: Integers,
        *,
        kind: str = "rewards",
        identity: Sequence[object] = (),
        arrange: Callable[..., pa.Table] = lambda rewards, *_: pa.table([rewards], schema=REWARD),
    ) -> pa.Table:
        """What the model gives images for prompts: request i is ``image[i]`` for ``prompt[i]``.

        Parameters
        ----------
        images
            Where they are; readable from wherever the executor's workers are.
        prompts
            Strings [prompts].
        image, prompt
            Rows of ``images`` and of ``prompts``, int64 [requests]. Any may come again.
        kind, identity
            Of the file that is kept: what it begins with, and what its name depends on beside
            the model, the images and the prompts.
        arrange
            From float32 [requests], NaN where an image could not be read, to the table that is
            kept. Of a model that says how sure it is, their standard deviations come second.

        Raises
        ------
        FifaError
            Where the folder cannot be written (what is done is kept), where a single image does
            not fit into memory, and where workers keep dying.
        """
        with self._kept() as engine:
            model, n = _same(engine.model), max(1, len(prompts))
            # to tell images apart by their bytes would fetch all of a remote source once more
            far = engine.trust_keys is None and bool(images.remote)
            distinct = (replace(engine, trust_keys=True) if far else engine).distinct(images)
            seen = engine._identity
            facts = {"scorer": model.name, "scale": model.scale, "identity": seen}
            # prompt_id folds case and white space, a model may not: the spelling counts as well.
            content = (seen, *identity, distinct.identity, column_digest(prompts))
            path = engine._path(kind, model.name, *content)

            def make(ledger: Ledger) -> pa.Table:
                # every image and prompt that is asked for together, once
                unique, of_request = np.unique(
                    distinct.of_image[image] * n + prompt, return_inverse=True
                )
                which = np.divmod(unique, n)
                rewards, bad = engine._rewards(images, distinct, prompts, *which, ledger)
                write_table(unreadable_path(path), bad)
                return arrange(*(column[of_request.reshape(-1)] for column in rewards))

            _forget_half(path)
            return scored_once(path, make, facts, engine.compute.store)

    def distinct(self, images: Images) -> Distinct:
        """Which images are the same: by their bytes, or by their keys where those are ids."""
        trust = self.trust_keys
        if images.keyed if trust is None else trust:
            return tell_apart(images, None)
        source = images.identity
        shards = [
            Shard(digest(source, part.start, len(part)), len(part), part)
            for part in _parts(len(images), DIGEST_SHARD)
        ]

        with self._kept() as engine:

            def make(ledger: Ledger) -> pa.Table:
                tables = engine._run("telling images apart", ledger, shards, images.take)
                return pa.concat_tables([FACTS.empty_table(), *tables]).select(["content"])

            path = engine._path("images", "bytes", source)
            table = scored_once(path, make, store=engine.compute.store)
        return tell_apart(images, table["content"].combine_chunks())

    def distinct_of(self, pairs: Pairs) -> tuple[Images, Integers]:
        """The different images of ``pairs``, and which of them stand in each, int64 [pairs, 2]."""
        images, of_slot = unique_images(pairs)
        distinct = self.distinct(images)
        return images.take(distinct.first), distinct.of_image[of_slot].reshape(-1, 2)

    def prompt_features(self, prompts: pa.ChunkedArray) -> np.ndarray:
        """The model's features of prompts, ``[prompts, ...]``, each made once.

        They lie in the folder, which has to be one, as ``prompts-<model>-<fingerprint>.npy`` and
        are mapped from there, not loaded: other steps may read them, and memory stays flat.
        """
        model = _same(self.model)
        identity = (model.identity, column_digest(prompts))
        path = self._path("prompts", model.name, *identity).with_suffix(".npy")

        def make(ledger: Ledger) -> Iterator[np.ndarray]:
            parts = [prompts.slice(i, PROMPT_SHARD) for i in range(0, len(prompts), PROMPT_SHARD)]
            shards = [
                Shard(digest(model.identity, i, column_digest(part)), len(part), part)
                for i, part in enumerate(parts)
            ]
            what = f"prompts through {model.name}"
            tables = self._run(what, ledger, shards, lambda part: part.to_pylist())
            note(prompts_embedded=len(prompts))
            return map(table_features, tables)

        return array_once(path, make, len(prompts), self.compute.store)

    def _rewards(
        self,
        images: Images,
        distinct: Distinct,
        prompts: pa.ChunkedArray,
        image: Integers,
        prompt: Integers,
        ledger: Ledger,
    ) -> tuple[Rewards, pa.Table]:
        """The rewards of different images for prompts, sorted by image; and `UNREADABLE`.

        float32 [1, rewards]; [2, rewards] with the standard deviations, where the model has them.
        """
        model, n = _same(self.model), len(distinct)
        features = self.prompt_features(prompts) if n else np.empty((0, 1), np.float32)

        def of_part(part: range) -> slice:
            return slice(*np.searchsorted(image, [part.start, part.stop]).tolist())

        def key(part: range) -> str:
            own = of_part(part)
            contents = distinct.contents[part.start : part.stop].to_pylist()
            texts = prompts.take(pa.array(prompt[own])).to_pylist()
            local = (image[own] - part.start).tobytes()
            return digest(self._identity, images.fingerprint, contents, local, texts)

        def prepare(part: range) -> ImageShard:
            own = of_part(part)
            unique, local = np.unique(prompt[own], return_inverse=True)
            places = images.take(distinct.first[part.start : part.stop])
            which = image[own] - part.start
            return ImageShard(places, np.array(features[unique]), which, local.reshape(-1))

        shards = [Shard(key(part), len(part), part) for part in _parts(n, self.shard)]
        runtime = runtime_of(model)
        many = images_at_a_time(self.compute, runtime.device)
        where = f"{runtime.device}, {runtime.precision}"
        echo_once(f"{model.name}: {where}, {many} images at a time")
        tables = self._run(f"images through {model.name}", ledger, shards, prepare)
        columns = REWARDS.names[: 2 if getattr(model, "has_sigma", False) else 1]
        rewards = np.empty((len(columns), len(image)), np.float32)
        reasons: dict[int, str] = {}
        start = 0
        for table in tables:
            stop = start + table.num_rows
            rewards[:, start:stop] = [table[column].to_numpy() for column in columns]
            for position, reason in enumerate(table["reason"].to_pylist(), start):
                if reason is not None:
                    reasons[int(image[position])] = reason
            start = stop
        if start != len(image):
            raise FifaError("files of finished shards are missing", do="run it again")
        bad = unreadable(images, distinct, reasons)
        note(images=n, images_unreadable=bad.num_rows, rewards=len(image))
        lost = f"; {bad.num_rows:,} could not be read" if bad.num_rows else ""
        echo(f"margin {model.name}: {n:,} images, {len(image):,} rewards{lost}")
        return rewards, bad

    def _run(
        self, what: str, ledger: Ledger, shards: Sequence[Shard], prepare: Callable[[Any], Any]
    ) -> Iterator[pa.Table]:
        return run_shards(what, self._make, shards, ledger, self.executor, prepare)

    @cached_property  # executors keep their workers as long as it is the same
    def _make(self) -> Callable[[], ScoreStep]:
        executor = self.executor
        here = executor is None or (isinstance(executor, LocalPool) and not executor.processes)
        load = partial(_same, self.model) if self.load is None or here else self.load
        # processes of its own, where this is the only worker or the user has shared out the cores
        many = isinstance(executor, LocalPool) and not here
        apart = here or (self.compute.workers > 0 and not many)
        return partial(ScoreStep, load, self.compute, self.allow_download, apart=apart)

    @property
    def _identity(self) -> dict[str, Any]:
        """The model's, and how images are decoded where that is not in full."""
        identity = _same(self.model).identity
        return {**identity, "decode": SCALED} if self.compute.fast_decode else identity

    def _path(self, kind: str, name: str, *identity: object) -> Path:
        assert self.folder is not None
        return score_path(self.folder, kind, name, *identity)

    @contextlib.contextmanager
    def _kept(self) -> Iterator[Engine]:
        """The same with a folder: without one a temporary folder."""
        if self.folder is not None:
            yield self
            return
        with tempfile.TemporaryDirectory() as folder:
            yield replace(self, folder=Path(folder))


def score_pairs(pairs: Pairs, model: RewardModel, **how: Any) -> pa.Table:
    """`Engine.score_pairs` of a model; ``how`` are the `Engine`'s other parameters."""
    return Engine(model, **how).score_pairs(pairs)


def tell_apart(images: Images, contents: pa.Array | None) -> Distinct:
    """The different ones among images: by ``contents`` (strings [images]), or by their keys.

    A null in ``contents`` (an image that could not be read) is an image of its own.
    """
    names = images.table["key"].combine_chunks()
    if contents is not None:
        names = pc.coalesce(contents.cast(pa.large_string()), names)
    encoded = names.dictionary_encode()
    of_image = encoded.indices.to_numpy().astype(np.int64)
    first = np.empty(len(encoded.dictionary), np.int64)
    first[of_image[::-1]] = np.arange(len(images))[::-1]  # written backwards: the earliest stays
    return Distinct(encoded.dictionary, first, of_image)


def unreadable_path(margin_path: Path) -> Path:
    """Where the images are listed that a file of rewards has none for: `UNREADABLE`."""
    return margin_path.with_name(f"unreadable-{margin_path.name.partition('-')[2]}")


def _forget_half(path: Path | None) -> None:
    """Remove a file of rewards whose list of unreadable images is damaged: both are made again."""
    if path is None or not path.exists() or not unreadable_path(path).exists():
        return
    try:
        check_whole(unreadable_path(path))
    except DamagedError as error:
        echo(f"{error.where} is damaged: {path.name} is made again with it")
        path.unlink()


def _same(model: RewardModel | None) -> RewardModel:
    assert model is not None, "telling images apart takes no model"
    return model


def _parts(n: int, size: int) -> list[range]:
    return [range(start, min(n, start + size)) for start in range(0, n, size)]


def unreadable(images: Images, distinct: Distinct, reasons: dict[int, str]) -> pa.Table:
    """`UNREADABLE`: every key whose image failed, where it stands first, and why.

    ``reasons`` are those of the different images that failed, by their rows in ``distinct``.
    """
    failed = np.flatnonzero(np.isin(distinct.of_image, list(reasons)))
    rows = images.take(failed).table.select(["key", "file", "row", "column"])
    why = [reasons[image] for image in distinct.of_image[failed].tolist()]
    return rows.append_column("reason", [why]).rename_columns(UNREADABLE.names).cast(UNREADABLE)
