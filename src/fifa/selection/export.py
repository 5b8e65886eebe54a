"""EXPORT: the selected pairs as a data set that public trainers read, and its rebuilding."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field, TypeAdapter

from fifa.config import Export, Read, Recipe, Score, Select, build
from fifa.console import echo, note, progress
from fifa.data.decode import BadImage
from fifa.data.images import Door, Found, has_pixels, pair_images, read, where_images
from fifa.data.read import read_source
from fifa.data.records import OURS
from fifa.data.source import is_url
from fifa.data.subset import SUBSET_FILE
from fifa.data.table import Pairs
from fifa.errors import FifaError
from fifa.scoring.table import Scores, score_files
from fifa.selection.card import About, about, dataset_card
from fifa.selection.labels import LabelFacts, label_facts
from fifa.selection.table import reason_counts
from fifa.selection.trainers import COLUMNS, FROM_SELECTION, GROUP_ROWS, IMAGES, Chosen, target
from fifa.shards.files import (
    atomic_folder,
    content_digest,
    digest,
    read_json,
    write_json,
    write_text,
)
from fifa.shards.lock import only_writer
from fifa.shards.mapped import take
from fifa.shards.sealed import check_whole

Integers = npt.NDArray[np.int64]
Contents = npt.NDArray[np.uint64]

_OURS = re.compile(  # what an export may consist of, whichever trainer it is for
    r"README\.md|(subset|multidatabackend|concepts)\.json|train\.parquet"
    r"|(data|images|win|lose|train-\w+|prompts-\w+)(/[^/]+)?"
)
NAMED = ("model_0", "model_1", "category")  # after `COLUMNS`, as text, where the source has them


def subset_rows(
    pairs: Pairs, rows: Integers, columns: dict[str, pa.Array], names: Sequence[str] = ()
) -> pa.Table:
    """`COLUMNS` without the images, then ``names``, for some rows of the pairs.

    Parameters
    ----------
    pairs
        The pairs, whole.
    rows
        int64 [subset], rows of ``pairs.table`` in the subset's order.
    columns
        `FROM_SELECTION`, [subset] each.
    names
        Some of `NAMED`.
    """
    there = ["label", "votes", "pair_id", "prompt", "prompt_id", "image_0", "image_1"]
    there += ["image_0_ref", "image_1_ref", *names]
    chosen = take(pairs.table.select(there), rows)
    label = chosen["label"].to_numpy()
    first_wins = (label > 0.5).astype(np.float64)  # no ties here: one side is above a half
    yes = pa.array(np.ones(len(rows), bool))
    made: dict[str, pa.Array | pa.ChunkedArray] = {
        "label_0": pa.array(first_wins),
        "label_1": pa.array(1 - first_wins),
        "caption": chosen["prompt"].cast(pa.string()),
        "are_different": yes,
        "has_label": yes,
        "image_0_uid": chosen["image_0"],
        "image_1_uid": chosen["image_1"],
        "image_0_url": _named(chosen["image_0_ref"]),
        "image_1_url": _named(chosen["image_1_ref"]),
        "pair_id": chosen["pair_id"],
        "prompt_id": chosen["prompt_id"].cast(pa.string()),
        "label": chosen["label"],
        "votes": chosen["votes"],
        **columns,
        **{name: chosen[name].cast(pa.string()) for name in names},
    }
    fields = [field for field in COLUMNS if field.name not in IMAGES]
    schema = pa.schema([*fields, *((name, pa.string()) for name in names)])
    return pa.table([made[name] for name in schema.names], schema=schema).combine_chunks()


def _named(refs: pa.ChunkedArray) -> pa.ChunkedArray:
    # where a cell or a tar member lies is the source's business; a URL or a path is a name
    ours = pc.match_substring_regex(refs, f"^(?:{'|'.join(OURS)})")
    return pc.if_else(ours, pa.scalar(None, pa.string()), refs)


@contextmanager
def read_images(
    folder: Path, pairs: Pairs, rows: Integers, table: pa.Table, door: Door
) -> Iterator[tuple[Integers, Callable[[int], tuple[bytes, bytes]]]]:
    """Read the images of some pairs, in the source's own order, for writing in another.

    Parameters
    ----------
    folder
        Where to keep them meanwhile, in a file that has no name.
    pairs, rows
        Where the images are.
    table
        `subset_rows` of them.
    door
        `fifa.data.images.read`, as it is to be called.

    Yields
    ------
    sizes
        int64 [rows], bytes of both images of a row.
    images
        From a row to the bytes of its two images.

    Raises
    ------
    FifaError
        If an image cannot be read.
    """
    with tempfile.TemporaryFile(dir=folder) as spool:
        places = np.zeros((len(rows), 2, 2), np.int64)  # offset and size of every image
        slots = np.stack([2 * rows, 2 * rows + 1], axis=1).reshape(-1)
        images = pair_images(pairs.table, pairs.origin, slots)
        _fill(spool, places, table["pair_id"], door(images))
        yield places[..., 1].sum(axis=1), lambda row: _read_both(spool, places[row])


def _fill(
    spool: IO[bytes],
    places: Integers,
    pair_id: pa.ChunkedArray,
    found: Iterable[Found],
) -> None:
    """Image ``side`` of pair i, number 2 i + side of what was found, at ``places[i, side]``."""
    bad: list[tuple[int, BadImage]] = []
    with progress("reading images", 2 * len(places)) as advance:
        for image, data in found:
            advance(1)
            if isinstance(data, BadImage):
                bad.append((image, data))
                continue
            places[image // 2, image % 2] = spool.tell(), len(data)
            spool.write(data)
    if bad:
        image, error = min(bad, key=lambda found: found[0])
        raise FifaError(
            f"{len(bad):,} images of the selected pairs cannot be read; the first: {error}",
            where=f"pair {pair_id[image // 2]}, image {image % 2}",
            do="select again: pairs with unreadable images are then replaced",
        )


def _read_both(spool: IO[bytes], place: Integers) -> tuple[bytes, bytes]:
    found = []
    for offset, size in place.tolist():
        spool.seek(offset)
        found.append(spool.read(size))
    return found[0], found[1]


def pair_contents(table: pa.Table, images: Callable[[int], tuple[bytes, bytes]] | None) -> Contents:
    """uint64 [pairs]: XXH3-64 of what the source gave of every pair, its images included."""
    known = table.select(["caption", "label", "votes", "image_0_uid", "image_1_uid"])
    found = np.empty(len(table), np.uint64)
    for start in range(0, len(table), GROUP_ROWS):  # as objects they take ten times the memory
        columns = (column.to_pylist() for column in known.slice(start, GROUP_ROWS).columns)
        for row, facts in enumerate(zip(*columns, strict=True), start):
            content = digest(list(facts), *(images(row) if images else (b"", b"")))
            found[row] = xxhash.xxh3_64_intdigest(content.encode())
    return found


FORMAT = 2  # of subset.json; 1 had no digest of its own


@dataclass(frozen=True)
class Subset:
    """What is in ``subset.json``.

    Parameters
    ----------
    fifa_subset
        The format of the file.
    pairs, images, digest
        As in `Exported`.
    files
        ``name``, ``bytes`` and ``xxh3_128`` of each data file that `datasets` loads.
    versions
        Of what wrote it.
    recipe
        How the pairs were read, scored and selected.
    source
        ``source``, ``format`` and ``fingerprint`` of the pairs' `Origin`.
    scores
        `score_files`.
    reasons
        `reason_counts` of the selection.
    pair_id
        The pairs by rank.
    content
        uint64 [pairs] in base64, see `pair_contents`.
    columns
        `FROM_SELECTION`, [pairs] each, in base64.
    about
        For the card.
    labels
        What the run could tell of its labels; None in files that were written before it did.
    to
        The trainer that it was written for, where that is not the default one.
    names
        Those of `NAMED` that it has.
    """

    fifa_subset: Literal[2]
    pairs: Annotated[int, Field(ge=1)]
    images: bool
    digest: str
    files: list[dict[str, str | int]]
    versions: dict[str, str]
    recipe: dict[str, Any]
    source: dict[str, str]
    scores: dict[str, Any]
    reasons: dict[str, int]
    pair_id: list[str]
    content: str
    columns: dict[str, str]
    about: About = field(default_factory=About)
    labels: LabelFacts | None = None
    to: str | None = None
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Exported:
    """A subset that was written.

    Parameters
    ----------
    folder
        Where it is.
    pairs
        How many pairs it has.
    images
        Whether it has their images, or references only.
    bytes
        The size of its data files.
    digest
        16 hex characters that name what it holds.
    """

    folder: Path
    pairs: int
    images: bool
    bytes: int
    digest: str


def export(
    pairs: Pairs,
    selection: pa.Table,
    scores: Scores,
    folder: str | Path,
    *,
    recipe: Recipe | None = None,
    allow_download: bool = False,
    door: Door | None = None,
    to: str | None = None,
) -> Exported:
    """Write the selected pairs as a data set for a trainer.

    Parameters
    ----------
    pairs
        The pairs, whole.
    selection
        Their `fifa.selection.table.SELECTION`, row by row.
    scores
        What they were selected by; its files are named in ``subset.json``.
    folder
        Where to write: absent, empty, or a subset that fifa wrote (then replaced as a whole).
    recipe
        How the pairs were read, scored and selected; None takes it from the three.
    allow_download
        Fetch images that the source only names by URL.
    door
        `fifa.data.images.read` as it is to be called, where that is not as usual.
    to
        The trainer, one of `fifa.selection.trainers.TARGETS`; None: the default of
        `fifa.config.Export`.

    Returns
    -------
    Exported

    Raises
    ------
    FifaError
        For a folder with other things in it, a selection of other pairs or of none, an unknown
        trainer, one that needs images where the source only has their URLs, and selected images
        that cannot be read.
    """
    folder, to = Path(folder), to or Export().to
    made_for = target(to)
    refuse_others(folder)
    if not selection["pair_id"].equals(pairs.table["pair_id"]):
        raise FifaError("the selection was made from other pairs", do="run `fifa select` again")
    rows = _by_rank(selection)
    if len(rows) == 0:
        raise FifaError("the selection keeps no pair: nothing to export")
    chosen = selection.select(FROM_SELECTION).take(rows)
    columns = {name: chosen[name].combine_chunks() for name in FROM_SELECTION}
    origin = pairs.origin
    recipe = recipe or _recipe(pairs, selection, scores)
    plain = TypeAdapter(Recipe).dump_python(recipe, mode="json")
    plain.pop("compute")  # what it ran on changes nothing
    facts = {
        "recipe": plain,
        "source": {name: getattr(origin, name) for name in ("source", "format", "fingerprint")},
        "scores": score_files(scores),
        "reasons": reason_counts(selection),
        "about": asdict(about(pairs, rows, scores)),
        "labels": asdict(label_facts(pairs, selection, scores, recipe.select.margin_unit)),
    }
    if names := [name for name in NAMED if name in pairs.table.column_names]:
        facts["names"] = names
    images = allow_download or has_pixels(pairs.table, pairs.origin)
    if made_for.images == "needed" and not images:
        raise FifaError(
            f"{to} needs the images, and the source only has their URLs",
            where=origin.source,
            do="fetch them with --allow-download, or name a source with images",
        )
    door = door or partial(read, allow_download=allow_download)
    images = images and made_for.images != "unused"
    return _write(folder, pairs, rows, columns, facts, door if images else None, to)


def _recipe(pairs: Pairs, selection: pa.Table, scores: Scores) -> Recipe:
    """The recipe as far as the pairs, their scores and the selection know it."""
    origin = pairs.origin
    used = json.loads((selection.schema.metadata or {}).get(b"fifa.select", b"{}"))
    return Recipe(
        read=Read(
            origin.source,
            origin.format,
            origin.columns,
            label_aspect=origin.label_aspect,
            annotators=origin.annotators,
        ),
        score=scores.knobs or Score(tuple(scores.margins)),
        select=build(Select, used.get("select", {}), where="the selection's metadata"),
    )


def rebuild(
    subset_json: str | Path,
    folder: str | Path,
    source: str | None = None,
    *,
    allow_download: bool = False,
) -> Exported:
    """Write a subset again from its ``subset.json`` and the source: the same bytes.

    Parameters
    ----------
    subset_json
        What `export` wrote.
    folder
        As for `export`.
    source
        Where the source is now; None reads it where it was.
    allow_download
        Fetch images that the source only names by URL.

    Raises
    ------
    FifaError
        If the file is none of fifa's, or the source lacks some of the pairs or has others in
        their place.
    """
    path, folder = Path(subset_json), Path(folder)
    known = load_subset(path)
    was = build(Recipe, known.recipe, where=str(path)).read
    columns = {name: _unpacked(path, known, name) for name in FROM_SELECTION}
    _check_values(path, columns)
    refuse_others(folder)
    if source is None and is_url(was.source) and not was.source.startswith("file://"):
        _refuse_address(path, was.source, allow_download)
    # whoever made the file does not say where the reader's own rights are to be used
    pairs = read_source(replace(was, images_from=()), source)
    rows = _rows(pairs, known.pair_id)
    if known.images and not (allow_download or has_pixels(pairs.table, pairs.origin)):
        raise FifaError(
            "the subset has images, and this source only has their URLs",
            where=pairs.origin.source,
            do="name a source with images, or add --allow-download",
        )
    facts = {name: getattr(known, name) for name in ("recipe", "source", "scores", "reasons")}
    facts["about"] = asdict(known.about)
    if known.labels:
        facts["labels"] = asdict(known.labels)
    if known.names:
        _check_names(path, known.names, pairs)
        facts["names"] = list(known.names)
    door = partial(read, allow_download=allow_download) if known.images else None
    check = partial(_refuse_changed, path, pairs, known)
    return _write(folder, pairs, rows, columns, facts, door, known.to or Export().to, check)


def _write(
    folder: Path,
    pairs: Pairs,
    rows: Integers,
    columns: dict[str, pa.Array],
    facts: dict[str, Any],
    door: Door | None,
    to: str,
    check: Callable[[Contents, str], None] = lambda content, digest: None,
) -> Exported:
    """The subset of some rows for a target; without ``door`` its images are not read."""
    from fifa import __version__

    table = subset_rows(pairs, rows, columns, facts.get("names", ()))
    facts = json.loads(json.dumps(facts, sort_keys=True))  # as it is when it is read again
    made_for, is_default = target(to), to == Export().to
    with ExitStack() as stack:
        stack.enter_context(only_writer(folder, beside=True))
        made = stack.enter_context(atomic_folder(folder))
        sizes, images = np.zeros(len(rows), np.int64), None
        if door is not None:
            reading = read_images(made, pairs, rows, table, door)
            sizes, images = stack.enter_context(reading)
        content = pair_contents(table, images)
        packed = {name: _packed(columns[name]) for name in FROM_SELECTION}
        told = digest(to, content.tobytes(), packed)
        chosen = Chosen(table, sizes, images, folder.resolve(), told[:8])
        files = [_file(made, name) for name in made_for.write(made, chosen)]
        told = digest(files) if is_default else told
        check(content, told)
        size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        subset = {
            "fifa_subset": FORMAT,
            "pairs": len(rows),
            "images": door is not None,
            "digest": told,
            "files": files,
            "versions": {"fifa": __version__, "pyarrow": pa.__version__},
            **facts,
            "pair_id": table["pair_id"].to_pylist(),
            "content": base64.b64encode(content.astype("<u8").tobytes()).decode(),
            "columns": packed,
        }
        if not is_default:
            subset["to"] = to
        write_text(made / "README.md", dataset_card(subset, made_for))
        write_json(made / SUBSET_FILE, subset, sealed=True)
    note(subset_pairs=len(rows), subset_bytes=size, subset_images=door is not None)
    if not is_default:
        note(subset_to=to)
        echo(f"{to}: {made_for.layout}\n  {made_for.keeps}")
    elif door is None:
        where = where_images(pairs.table, pairs.origin)
        echo(f"images are {where}: the subset keeps references (image_0_url, image_1_url)")
    return Exported(folder, len(rows), door is not None, size, str(subset["digest"]))


def _file(folder: Path, name: str) -> dict[str, Any]:
    path = folder / name
    return {"name": name, "bytes": path.stat().st_size, "xxh3_128": content_digest(path)}


def _rows(pairs: Pairs, names: list[str]) -> Integers:
    """Where the pairs with these ids are; raises `FifaError` if some are not there."""
    ids = pa.array(names, pa.string())
    rows = pc.index_in(ids, value_set=pairs.table["pair_id"].combine_chunks())
    if rows.null_count:
        first = ids.filter(rows.is_null())[0].as_py()
        raise FifaError(
            f"{rows.null_count:,} of the subset's {len(ids):,} pairs are not in the source",
            where=f"{pairs.origin.source}; the first is pair {first}",
            do="name the data set that the subset was made from with --source",
        )
    return np.asarray(rows.to_numpy(), np.int64)


def _refuse_changed(path: Path, pairs: Pairs, known: Subset, content: Contents, now: str) -> None:
    """Raises `FifaError` where a pair's content, or what is written of it, is not what it was."""
    then = _numbers(path, known.content, "<u8", len(content))
    changed = np.flatnonzero(then != content)
    if len(changed):
        raise FifaError(
            f"{len(changed):,} of the subset's {len(then):,} pairs have changed in the source",
            where=f"{pairs.origin.source}; the first is pair {known.pair_id[int(changed[0])]}",
            do="name the data set as it was with --source",
        )
    written_by = known.versions.get("pyarrow")
    if now == known.digest:
        return
    if written_by == pa.__version__:
        raise FifaError(
            "the margins, weights or digests in the file are not those that it was written with",
            where=str(path),
            do="take the file from where the subset was made",
        )
    echo(
        f"every pair is the same, but the files are not byte for byte: they were written by "
        f"pyarrow {written_by}, and this is {pa.__version__}"
    )


def _refuse_address(path: Path, address: str, allow_download: bool) -> None:
    """Raise `FifaError` for an address that a file names, but for data sets on the hub.

    Whoever wrote the file may mean a machine that only we can reach. The hub's own is asked
    where downloads are allowed; any other is for the user to name.
    """
    on_hub = address.startswith("hf://datasets/") and "::" not in address
    if not (on_hub and allow_download):
        also = ", or add --allow-download" if on_hub else ""
        raise FifaError(
            "the subset's source is an address, and a file is not asked where to fetch from",
            where=f"{path} names {address[:500]}",
            do=f"if you trust the address, name it with --source{also}",
        )


def _check_names(path: Path, names: Sequence[str], pairs: Pairs) -> None:
    """Raise `FifaError` for names that a subset does not have, or that the source lacks now."""
    if not set(names) <= set(NAMED):
        raise FifaError("it names columns that no subset has", where=str(path))
    lacks = [name for name in names if name not in pairs.table.column_names]
    if lacks:
        raise FifaError(
            f"the subset has a column {lacks[0]!r}, and the source has none now",
            where=pairs.origin.source,
            do="name the data set as it was with --source",
        )


def _check_values(path: Path, columns: dict[str, pa.Array]) -> None:
    """Raise `FifaError` for ranks and weights that no selection has."""
    rank, weight = (np.asarray(columns[name].fill_null(0)) for name in ("rank", "weight"))
    if rank[0] < 1 or (np.diff(rank) < 1).any():
        raise FifaError("the ranks in the file do not ascend from 1", where=str(path))
    if not np.isfinite(weight).all() or (weight < 0).any() or not weight.any():
        raise FifaError(
            "the weights in the file are none: not finite, negative, or all 0", where=str(path)
        )


def _by_rank(selection: pa.Table) -> Integers:
    kept = np.flatnonzero(pc.equal(selection["status"].cast(pa.string()), "selected"))
    ranks = selection["rank"].take(kept).to_numpy()
    return np.asarray(kept[np.argsort(ranks)], np.int64)


def refuse_others(folder: Path) -> None:
    """Raise `FifaError` for a folder that is not empty and has other things in it than an export.

    Links are such things, as they show what lies elsewhere.
    """
    files = list(folder.rglob("*")) if folder.is_dir() else [folder] if folder.exists() else []
    names = {path.relative_to(folder).as_posix(): path for path in files}
    others = sorted(n for n, path in names.items() if not _OURS.fullmatch(n) or path.is_symlink())
    if others or (names and not {SUBSET_FILE, "README.md"} <= names.keys()):
        what = f": {others[0]}" if others else ", or no subset of fifa's"
        raise FifaError(
            f"the folder has other things in it{what}",
            where=str(folder),
            do="choose another folder, or remove them",
        )


def load_subset(path: Path) -> Subset:
    """What `export` wrote into ``subset.json``; `DamagedError` where it is not as it was then."""
    known = read_json(path, "the subset", object)
    if not isinstance(known, dict) or known.get("fifa_subset") != FORMAT:
        raise FifaError("not a subset.json that this version of fifa reads", where=str(path))
    again = "take it from where the subset was made, or export the subset again"
    check_whole(path, again)
    return build(Subset, known, where=str(path), what="the subset")


def _packed(column: pa.Array) -> str:
    values = column.to_numpy(zero_copy_only=False)  # nulls are NaN; rank has none
    kind = "<i4" if pa.types.is_integer(column.type) else "<f4"
    return base64.b64encode(values.astype(kind).tobytes()).decode()


def _unpacked(path: Path, known: Subset, name: str) -> pa.Array:
    kind = COLUMNS.field(name).type
    number = "<i4" if pa.types.is_integer(kind) else "<f4"
    values = _numbers(path, known.columns.get(name, ""), number, len(known.pair_id))
    return pa.array(values, kind, from_pandas=True)


def _numbers(path: Path, text: str, kind: str, n: int) -> npt.NDArray[Any]:
    try:
        values: npt.NDArray[Any] = np.frombuffer(base64.b64decode(text), kind)
    except ValueError:
        values = np.empty(0)
    if not n or len(values) != n:
        raise FifaError(f"the file has not {n:,} numbers in each column", where=str(path))
    return values
