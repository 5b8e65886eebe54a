"""The pairs to train on: a subset of ours, or any Parquet files in the diffusers schema."""

from __future__ import annotations

import glob
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config import RECIPE_FILE
from fifa.console import echo, note, progress
from fifa.data.decode import BadImage
from fifa.data.images import Images, cell_images, read
from fifa.data.labels import OTHER_SCALES as SCALES
from fifa.data.labels import Labels, on_scale, two_labels
from fifa.data.parquet import read_columns
from fifa.data.subset import check_subset
from fifa.errors import FifaError
from fifa.selection.trainers import IMAGES
from fifa.shards.files import digest
from fifa.shards.mirror import local

OTHER_SCALES = f"train on what `fifa filter` writes of it with --columns; {SCALES}"
NEEDED = (*IMAGES, "label_0", "caption")
COLUMNS = {
    "caption": pa.string(),
    "label_0": pa.float64(),
    "label_1": pa.float64(),
    "label": pa.float64(),
    "weight": pa.float64(),
    "pair_id": pa.string(),
    "has_label": pa.bool_(),
    "signed_margin": pa.float64(),
    "votes": pa.float64(),
}


@dataclass(frozen=True)
class TrainingPairs:
    """Pairs with a winner and a loser, never a tie; or images one by one, good or bad.

    Parameters
    ----------
    pair_id
        [n], all different: the source's, or a hash of prompt, winner and loser.
    caption
        [n], the prompts.
    label
        float32 [n], above 0.5: the probability that people prefer the winner; of a single image 1
        if it is good, 0 if it is bad.
    weight
        float32 [n], at least 0: each pair's weight in the loss; 1 where the source has none.
    margin
        float32 [n], the subset's ``signed_margin``: how much the scorers prefer the winner; NaN
        where the source has none.
    digest
        16 hex characters that name all of the above.
    fingerprint
        16 hex characters that name the files: their footers, sizes and times.
    dropped
        How many rows are not here, by reason: ``tie``, ``no_label``, ``no_prompt``,
        ``labels_disagree`` (label_0 and label_1 do not sum to 1), ``same_image`` (winner and loser
        have the same bytes).
    image_table
        Where the images are: row 2 i is pair i's winner, row 2 i + 1 its loser; of single images
        row i.
    folder
        The subset's folder if the source is one of ours, for its ``subset.json``.
    votes
        float32 [n], above 0: how many people's votes the label averages; 1 where that is unknown.
    sides
        Images of each: 2, or 1.
    """

    pair_id: list[str]
    caption: list[str]
    label: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    margin: npt.NDArray[np.float32]
    digest: str
    fingerprint: str
    dropped: dict[str, int]
    image_table: Images
    folder: Path | None
    votes: npt.NDArray[np.float32]
    sides: int = 2

    def __len__(self) -> int:
        return len(self.pair_id)

    @property
    def what(self) -> Literal["pairs", "images"]:
        """What they are, for people."""
        return "pairs" if self.sides == 2 else "images"

    def take(self, numbers: list[int]) -> TrainingPairs:
        """Some of them, in this order, with their images: small enough to travel."""
        rows = [self.sides * i + side for i in numbers for side in range(self.sides)]
        columns = {
            name: getattr(self, name)[numbers] for name in ("label", "weight", "margin", "votes")
        }
        return replace(
            self,
            pair_id=[self.pair_id[i] for i in numbers],
            caption=[self.caption[i] for i in numbers],
            digest=digest(self.digest, numbers),
            image_table=self.image_table.take(np.array(rows, np.int64)),
            **columns,
        )

    def unreadable(self, row: int, reason: str, count: int = 1) -> FifaError:
        """The error for a row of ``image_table`` that cannot be trained on, the first of some."""
        which = f"{self.what[:-1]} {self.pair_id[row // self.sides]}"
        if self.sides == 2:
            which += f", {('winner', 'loser')[row % 2]}"
        return FifaError(
            f"{count:,} of the images cannot be read; the first: {reason}",
            where=f"{which}: {self.image_table.place(row)}",
            do="rebuild the subset with images (`fifa export`, --allow-download for URLs), or "
            "take such pairs out of the source",
        )


def read_training_pairs(source: str | Path) -> TrainingPairs:
    """Pairs to train on, with their images where they lie.

    Parameters
    ----------
    source
        A run folder (its ``subset``), a subset that `fifa export` wrote, or a Parquet file, a
        folder or a glob of them with the columns that public Diffusion-DPO trainers read:
        ``jpg_0``, ``jpg_1`` (bytes, or structs with ``bytes``), ``label_0`` (1: image 0 won, 0:
        image 1, 0.5: a tie) and ``caption``. Used if they are there: ``label`` (the probability
        that people prefer image 0), ``weight``, ``pair_id``, ``has_label``, ``signed_margin``,
        ``votes``.

    Raises
    ------
    FifaError
        For a source without such files or columns, or without images, a label that is no
        probability, a negative weight, a pair id that comes twice, and where no pair remains.
    """
    path = local(source)
    folder = find_subset(path)
    if folder is not None:
        check_subset(folder)
    files = find_files(folder or path)
    tables = [_rows(file, number) for number, file in enumerate(files)]
    parts = [_winners(rows, file) for rows, file in zip(tables, files, strict=True)]
    reasons, winner, first = (np.concatenate(column) for column in zip(*parts, strict=True))
    table = pa.concat_tables(tables)
    kept = np.flatnonzero(reasons == "")
    if len(kept) == 0:
        raise _no_pair(source, reasons)
    images = _images(table.take(kept), files, winner[kept])
    ids, same, against = _told_apart(table.take(kept), images, ours=folder is not None)
    reasons[kept[same]] = "same_image"
    kept = kept[~same]
    dropped = {name: n for name, n in sorted(Counter(reasons.tolist()).items()) if name}
    if dropped:
        listed = ", ".join(f"{count:,} {name}" for name, count in dropped.items())
        echo(f"{table.num_rows:,} rows, {len(kept):,} pairs with a winner (dropped: {listed})")
    if against:
        echo(f"{against:,} pairs say the opposite of another: its prompt and images, the other won")
    if len(kept) == 0:
        raise _no_pair(source, reasons)
    table, ids = table.take(kept), [ids[i] for i in np.flatnonzero(~same).tolist()]
    images = _images(table, files, winner[kept]) if same.any() else images
    label = np.where(winner[kept] == 0, first[kept], 1 - first[kept]).astype(np.float32)
    weight = weights_of(table, str(source))
    margin = table["signed_margin"].to_numpy().astype(np.float32)
    caption = table["caption"].to_pylist()
    note(training_pairs=len(ids), **{f"training_pairs_{k}": v for k, v in dropped.items()})
    return TrainingPairs(
        pair_id=ids,
        caption=caption,
        label=label,
        weight=weight,
        margin=margin,
        digest=digest(ids, caption, label.tobytes(), weight.tobytes(), margin.tobytes()),
        fingerprint=digest([fingerprint(file) for file in files]),
        dropped=dropped,
        image_table=images,
        folder=folder,
        votes=table["votes"].fill_null(1.0).to_numpy().astype(np.float32).clip(min=1),
    )


def find_subset(path: Path) -> Path | None:
    """The subset's folder, if the source is a run or a subset of ours."""
    if (path / RECIPE_FILE).is_file():
        if not (path / "subset" / "subset.json").is_file():
            raise FifaError(
                "the run has no subset yet", where=str(path), do="run `fifa export` on it"
            )
        return path / "subset"
    return path if (path / "subset.json").is_file() else None


def find_files(path: Path) -> list[Path]:
    """The Parquet files of a folder, a glob or a name; `FifaError` where there are none."""
    if path.is_dir():
        files = sorted(path.rglob("*.parquet"))
    elif path.is_file():
        files = [path]
    else:
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 - of the whole path
    files = [file for file in files if not any(part.startswith(".") for part in file.parts[-2:])]
    if not files:
        raise FifaError(
            "no Parquet files to train on",
            where=str(path),
            do="name a run folder, a subset, or Parquet files with jpg_0, jpg_1, label_0, caption",
        )
    return files


def _rows(file: Path, number: int) -> pa.Table:
    """`COLUMNS` of one file, its number and the rows; null where it lacks a column."""
    try:
        opened = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        _check_columns(file, opened.schema_arrow.names)
        schema = opened.schema_arrow
        names = [name for name in COLUMNS if name in schema.names]
        if "votes" in names and not pa.types.is_integer(schema.field("votes").type):
            names.remove("votes")  # somebody else's, of another kind
        table = read_columns(file, names, str(file), metadata=opened.metadata)
        n = table.num_rows
        columns = {
            name: table[name].cast(dtype) if name in table.column_names else pa.nulls(n, dtype)
            for name, dtype in COLUMNS.items()
        }
    except (OSError, pa.ArrowException) as error:
        brief = str(error).partition("\n")[0][:150]
        raise FifaError(f"cannot read the Parquet file: {brief}", where=str(file)) from error
    return pa.table({**columns, "file": np.full(n, number), "row": np.arange(n)})


def _check_columns(file: Path, names: list[str]) -> None:
    """Raise `FifaError` if one that is needed is missing."""
    missing = [name for name in NEEDED if name not in names]
    if set(missing) & set(IMAGES) and "image_0_url" in names:
        raise FifaError(
            "the subset has no images, only their references",
            where=str(file),
            do="rebuild it with images: `fifa export` from a source that has them, or with "
            "--allow-download",
        )
    if missing:
        raise FifaError(
            f"the file has no column {', '.join(missing)}",
            where=str(file),
            do="columns to train on are jpg_0, jpg_1, label_0 and caption",
        )


def _winners(
    table: pa.Table, file: Path
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Why each row of a file is dropped ("": it stays), its winner's column, and 0's label."""
    first, second, soft, labelled = (
        table[name].cast(pa.float64()).to_numpy()  # NaN where null
        for name in ("label_0", "label_1", "label", "has_label")
    )
    other = None if np.isnan(second).all() else second
    labels = two_labels(first, other, labelled, str(file), OTHER_SCALES)
    first = labels.value
    soft = on_scale(Labels(soft, labels.wrong), str(file), "label", OTHER_SCALES).value
    # what trainers read and what people said must name one winner
    both = np.isfinite(first) & np.isfinite(soft)
    wrong = both & ((first > 0.5) != (soft > 0.5)) & (soft != 0.5)
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise FifaError(
            f"label_0 {first[i]:g} and label {soft[i]:g} name two winners",
            where=f"row {table['row'][i].as_py()} of {file}",
            do="label_0 is 1 if image 0 won, 0 if image 1 won, 0.5 for a tie; label is the "
            "probability that people prefer image 0",
        )
    reasons = np.full(len(first), "", dtype="<U16")
    reasons[(first == 0.5) | (soft == 0.5)] = "tie"
    reasons[list(labels.wrong)] = "labels_disagree"
    reasons[(labelled == 0) | ~np.isfinite(first)] = "no_label"
    blank = pc.equal(pc.utf8_trim_whitespace(table["caption"]), "")
    reasons[np.asarray(pc.fill_null(blank, True))] = "no_prompt"
    label = np.where(np.isfinite(soft), soft, first)
    return reasons, (first < 0.5).astype(np.int64), label


def weights_of(table: pa.Table, where: str) -> npt.NDArray[np.float32]:
    """The column ``weight``, float32 [rows], 1 where it is null; `FifaError` for a wrong one."""
    weight: npt.NDArray[np.float32] = table["weight"].fill_null(1.0).to_numpy().astype(np.float32)
    bad = ~np.isfinite(weight) | (weight < 0)
    if bad.any():
        raise FifaError(
            f"{int(bad.sum()):,} pairs have a weight that is negative or not finite", where=where
        )
    if not weight.any():
        raise FifaError("every row has weight 0: nothing to learn from", where=where)
    return weight


def _images(table: pa.Table, files: list[Path], winner: npt.NDArray[np.int64]) -> Images:
    sides = np.stack([winner, 1 - winner], axis=1).reshape(-1)
    return cell_images(
        files,
        np.repeat(table["file"].to_numpy(), 2),
        np.repeat(table["row"].to_numpy(), 2),
        [IMAGES[side] for side in sides.tolist()],
    )


def _no_pair(source: str | Path, reasons: npt.NDArray[np.str_]) -> FifaError:
    counts = Counter(reasons.tolist()).most_common()
    listed = ", ".join(f"{count:,} {name}" for name, count in counts)
    why = f" (dropped: {listed})" if listed else ""
    return FifaError(f"no pair with a winner{why}", where=str(source), do="choose another source")


def _told_apart(
    table: pa.Table, images: Images, *, ours: bool
) -> tuple[list[str], npt.NDArray[np.bool_], int]:
    """The pairs' ids, which have the same bytes on both sides, and how many contradict another.

    The ids are the source's, or hashes of prompt, winner, loser and how often they came before. A
    subset of ``ours`` with ids is believed: the selection has dropped such pairs.
    """
    given = table["pair_id"]
    ids: list[str] = given.to_pylist() if given.null_count == 0 else []
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise FifaError(f"{len(twice):,} pair ids come twice", where=f"pair {twice[0]}")
    same = np.zeros(len(table), bool)
    if ids and ours:
        return ids, same, 0
    bytes_of = (b"" if isinstance(data, BadImage) else data for _, data in read(images))
    made: list[str] = []
    seen: Counter[str] = Counter()
    against = 0
    with progress("telling pairs apart", len(table)) as advance:
        for i, caption in enumerate(table["caption"].to_pylist()):
            winner, loser = next(bytes_of), next(bytes_of)
            same[i] = winner == loser != b""
            name = digest(caption, winner, loser)
            made.append(digest(name, seen[name]) if seen[name] else name)
            against += seen[digest(caption, loser, winner)] > 0 and not same[i]
            seen[name] += 1
            advance(1)
    return ids or made, same, against


def fingerprint(file: Path) -> list[object]:
    """What tells a file apart from another, or from itself after a change."""
    status = file.stat()
    metadata = pq.read_metadata(file)
    groups = [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]
    return [file.name, status.st_size, status.st_mtime_ns, metadata.num_rows, groups]
