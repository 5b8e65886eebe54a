"""Votes as feedback: a preference data set in Pick-a-Pic's columns, which `fifa filter` reads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from fifa.console import progress
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.pairs import row_groups
from fifa.evaluation.vote.ballot import changed_images
from fifa.evaluation.vote.comparisons import Comparison, read_file
from fifa.evaluation.vote.results import count_votes, counted_votes, outcome
from fifa.evaluation.vote.store import open_store
from fifa.shards.files import atomic_path
from fifa.shards.lock import only_writer

COLUMNS = pa.schema(
    [
        ("jpg_0", pa.binary()),  # the original bytes, whatever the image format
        ("jpg_1", pa.binary()),
        ("label_0", pa.float64()),  # the share of votes for image 0; a tie is half a vote
        ("label_1", pa.float64()),
        ("caption", pa.string()),
        ("has_label", pa.bool_()),  # Pick-a-Pic's; always true
        ("image_0_uid", pa.string()),  # XXH3-128 of the bytes
        ("image_1_uid", pa.string()),
        ("label_votes", pa.int32()),  # averaged into the labels
        ("model_0", pa.string()),
        ("model_1", pa.string()),
        ("category", pa.string()),
    ]
)


@dataclass(frozen=True)
class ExportedVotes:
    """Feedback that was written: how many pairs, the votes in them, and those left out."""

    path: Path
    pairs: int
    votes: int
    left_out: int


def export_votes(
    run: str | Path, path: str | Path, *, everybody: bool = False, database: str | None = None
) -> ExportedVotes:
    """Write every comparison with a vote as a preference pair with a soft label.

    Images are on sides by the digest of their bytes, so the side says nothing of the model. The
    same votes and images give the same bytes.

    Parameters
    ----------
    run
        A run folder that people voted on.
    path
        The Parquet file to write.
    everybody
        Count voters who failed their attention checks as well.
    database
        As for `open_store`.

    Raises
    ------
    FifaError
        Where nobody has voted, or an image is gone or another one than was voted on.
    """
    folder, path = Path(run) / FOLDER, Path(path)
    store = open_store(run, database)
    said = store.read()  # one moment of it, where people go on voting
    changed_images(said.digests, folder)
    results = count_votes(said, everybody=everybody)
    counted = counted_votes(said.votes, results.voters)
    outcomes: dict[str, list[float]] = defaultdict(list)
    for vote in counted:
        outcomes[vote.trial.comparison].append(outcome(vote))
    if not outcomes:
        raise FifaError("no vote counts yet", where=store.database.where, do="run `fifa vote RUN`")
    rows = _rows(folder, said.comparisons, outcomes)
    with (
        only_writer(path, beside=True),
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, COLUMNS, compression="zstd") as writer,
        progress("writing pairs", len(outcomes)) as advance,
    ):
        for table in row_groups(rows, COLUMNS):
            writer.write_table(table)
            advance(table.num_rows)
    return ExportedVotes(path, len(outcomes), len(counted), results.left_out)


def _rows(
    folder: Path, comparisons: dict[str, Comparison], outcomes: dict[str, list[float]]
) -> Iterator[dict[str, object]]:
    for key, one in comparisons.items():
        if key not in outcomes:
            continue
        votes = outcomes[key]
        # label = (votes for ours + half of the ties) / votes
        share = sum(votes) / len(votes)
        sides = []
        ours, theirs = (one.file_0, one.ours, share), (one.file_1, one.theirs, 1 - share)
        for name, model, label in (ours, theirs):
            data = read_file(folder, name)
            sides.append((xxhash.xxh3_128_hexdigest(data), model, label, data))
        row: dict[str, object] = {"caption": one.prompt, "has_label": True}
        for i, (uid, model, label, data) in enumerate(sorted(sides, key=lambda side: side[:2])):
            row |= {f"image_{i}_uid": uid, f"model_{i}": model}
            row |= {f"label_{i}": label, f"jpg_{i}": data}
        yield row | {"label_votes": len(votes), "category": one.category}
