"""Data sets that rank or rate a prompt's images: HPDv2, ImageReward, ImageRewardDB, EvalMuse."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import combinations, groupby, pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from fifa.data.columns import (
    Columns,
    as_name,
    as_number,
    check_columns,
    encoded,
    has,
    parsed,
    text_array,
)
from fifa.data.ids import fold_prompt
from fifa.data.labels import by_row
from fifa.data.names import ASPECT, NAMES, find_names
from fifa.data.pairs import MAX_KEY, MAX_PROMPT, NO_TEXT, FilePairs, Rejected, pair_columns
from fifa.data.places import is_cell, keys_and_refs, leaf_of
from fifa.data.records import encodable, in_file, outside
from fifa.errors import FifaError

ROW_AN_IMAGE = ("prompt", "prompt_id", "image", "score", "rank")  # of a table of the user's own
MAX_IMAGES = 256  # in one ranking: 32,640 pairs; a longer list is no ranking by people
PAIRINGS = ("all", "best-worst", "adjacent")
NESTED = ("prompt_content", "response_a", "response_b", "human_annotations", "chosen")
NEAR = 50_000  # images whose rankings are made into pairs at a time


@dataclass(frozen=True)
class Compare:
    """Which two images of a prompt make a pair.

    Parameters
    ----------
    pairs
        One of `PAIRINGS`. ``all`` or None: every two; ``best-worst``: the best and the worst one;
        ``adjacent``: neighbours in the order of their ratings.
    min_gap
        The least difference of their ratings (or ranks, the mean of all annotators'); None: the
        noise of the difference, where a rating is the mean of several.
    """

    pairs: str | None = None
    min_gap: float | None = None

    def chosen(
        self, ranks: np.ndarray, variance: np.ndarray | None
    ) -> tuple[list[tuple[int, int]], Counter[str]]:
        """The pairs of n images, and how many are not made for which reason.

        Parameters
        ----------
        ranks
            float64 [n], less is better.
        variance
            float64 [n], of each one's mean; None where it is not known.
        """
        images: list[int] = np.argsort(ranks, kind="stable").tolist()
        every: Iterable[tuple[int, ...]] = combinations(range(len(images)), 2)
        if self.pairs == PAIRINGS[1]:
            every = [(images[0], images[-1])]
        elif self.pairs == PAIRINGS[2]:
            every = pairwise(images)
        own = [(min(pair), max(pair)) for pair in every]
        others = len(ranks) * (len(ranks) - 1) // 2 - len(own)
        not_made = Counter({f"not one of the pairs {self.pairs}": others} if others else {})
        made = []
        for i, j in own:
            gap = abs(ranks[i] - ranks[j])
            noise = 0.0 if variance is None else float(np.sqrt(variance[i] + variance[j]))
            if self.min_gap is not None and gap < self.min_gap:
                not_made[f"the ratings differ by less than {self.min_gap:g}"] += 1
            elif self.min_gap is None and 0.0 < noise >= gap:
                not_made["the ratings differ by no more than their noise"] += 1
            else:
                made.append((i, j))
        return made, not_made


@dataclass(frozen=True)
class Ranked:
    """A format whose rows are rankings.

    Parameters
    ----------
    name
        The format's name.
    needs
        Columns; ``a|b`` is either.
    convert
        From a file's columns to its pairs.
    lacks
        A column that such a file does not have.
    truths
        The column that has to be one of truth values.
    own
        What a column is and its name, where a row is an image.
    images
        The columns of images, as for `fifa.data.names.find_names`: none of a row a ranking.
    """

    name: str
    needs: tuple[str, ...]
    convert: Callable[..., FilePairs]
    lacks: str | None = None
    truths: str | None = None
    own: tuple[tuple[str, str], ...] = ()
    images: tuple[str, ...] = ()

    def fits(self, columns: Columns) -> bool:
        """True if the file has the columns."""
        if self.lacks in columns.names:
            return False
        if not all(any(has(columns, n) for n in names.split("|")) for names in self.needs):
            return False
        return self.truths is None or columns.truths(self.truths)

    def read(
        self, columns: Columns, named: Mapping[str, str], compare: Compare = Compare()
    ) -> FilePairs:
        """The pairs or the images of one file, with its names; ``named`` are those of the user."""
        names = find_names(columns, self.images, named)
        columns.beside = names.columns
        own = self.convert(columns, compare)
        own.used = names.uses()
        table = own.columns if own.members is None else own.members
        if len(own) or own.members is not None:
            at = pa.array(np.searchsorted(columns.rows, np.asarray(table["row"])))
            found = {name: column.take(at) for name, column in names.read(columns).items()}
            if own.members is None:
                own.columns |= found
            else:
                for name, column in found.items():
                    kind = pa.float64() if ASPECT.fullmatch(name) else pa.string()
                    own.members = own.members.append_column(name, column.cast(kind))
        return own

    def uses(self, columns: Columns) -> dict[str, str]:
        """The columns that are read, each with what it is."""
        if self.own:
            return {column: what for what, column in self.own}
        needs = (names.split("|") for names in self.needs)
        there = [next((n for n in names if has(columns, n)), "") for names in needs]
        what = {"prompt": "prompt", "prompt_id": "prompt_id", "rank": "who is better"}
        return {name: what.get(name, "images and who is better") for name in there if name}


@dataclass
class _Rankings:
    """A file's rankings, pair by pair.

    Parameters
    ----------
    pairs
        Row, prompt, both keys, both references, label and votes of each.
    scores
        The ratings and names of both images of each pair.
    rejected, not_made
        As in `FilePairs`.
    """

    compare: Compare
    pairs: list[tuple[Any, ...]] = field(default_factory=list)
    scores: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    rejected: list[tuple[int | None, str]] = field(default_factory=list)
    not_made: Counter[str] = field(default_factory=Counter)

    def add(
        self,
        row: int,
        prompt: Any,
        keys: Any,
        orders: Sequence[Any],
        refs: Sequence[str | None] | None = None,
        scores: Sequence[dict[str, Any]] | None = None,
        variance: np.ndarray | None = None,
    ) -> str:
        """One prompt's images, ranked by people, or the reason why that is no ranking.

        The label of a pair is the share of annotators who rank side 0 better. ``orders`` are an
        annotator's ranks of the images each, lower is better; ``refs`` are as the keys if not
        given; ``variance`` is as for `Compare.chosen`.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            reason = "no prompt"
        elif encodable(prompt) != prompt:
            reason = NO_TEXT
        elif len(prompt.encode()) > MAX_PROMPT:
            reason = f"the prompt has more than {MAX_PROMPT:,} bytes"
        elif isinstance(keys, str):
            reason = "a row an image, where this format has a row a prompt with all its images: "
            reason += "--columns prompt=...,image=...,rank=... reads that"
        elif not isinstance(keys, list) or not all(map(_is_key, keys)):
            reason = "an image is missing, or its name is too long or no text"
        elif not 2 <= len(keys) <= MAX_IMAGES:
            reason = f"{len(keys)} images of this prompt, where 2 to {MAX_IMAGES} make a ranking"
        elif not orders or not all(_is_order(order, len(keys)) for order in orders):
            reason = "the ranks do not match the images"
        else:
            ranks, refs = np.asarray(orders, np.float64), refs or [*map(outside, keys)]
            made, not_made = self.compare.chosen(ranks.mean(axis=0), variance)
            self.not_made += not_made
            for i, j in made:
                # label = (annotators with rank_i < rank_j + half of those with a tie) / annotators
                label = np.mean(0.5 * (np.sign(ranks[:, j] - ranks[:, i]) + 1.0))
                images = (keys[i], keys[j], refs[i], refs[j])
                self.pairs.append((row, prompt, *images, label, len(ranks)))
                self.scores.append((scores[i], scores[j]) if scores else ({}, {}))
            return ""
        return reason

    def file_pairs(self, file: str, names: Sequence[str] = ()) -> FilePairs:
        """All pairs, with the ratings and names of these.

        Rankings are often listed best first, so sides are assigned by the images' keys.
        """
        row, prompt, key_0, key_1, ref_0, ref_1, label, votes = (
            list(zip(*self.pairs, strict=True)) or [()] * 8
        )
        texts = [text_array(values) for values in (prompt, key_0, key_1, ref_0, ref_1)]
        columns = pair_columns(row, texts[0], texts[1:3], texts[3:], label, votes)
        scores: dict[str, pa.Array] = {}
        for name in names:
            sides = [[both[side][name] for both in self.scores] for side in (0, 1)]
            if name == "model":
                for side in (0, 1):
                    columns[f"model_{side}"] = encoded(text_array(sides[side]))
            elif name in NAMES:  # of both images, each once
                whole = (dict.fromkeys(filter(None, both)) for both in zip(*sides, strict=True))
                columns[name] = encoded(text_array(", ".join(own) or None for own in whole))
            elif ASPECT.fullmatch(name):
                # label = 1 if the rating of image 0 is the higher one, 0.5 if they are equal
                one, two = (np.asarray(side, np.float64) for side in sides)
                columns[name] = pa.array(0.5 * (np.sign(one - two) + 1.0))
            else:
                scores |= {f"{name}_{i}": pa.array(sides[i], pa.float64()) for i in (0, 1)}
        return FilePairs(
            file,
            columns,
            scores=scores,
            swaps=[(one, f"{one[:-1]}1") for one in scores if one.endswith("_0")],
            winner_first=True,
            rejected=self.rejected,
            not_made=self.not_made,
        )


def nested_pairs(columns: Columns, compare: Compare) -> FilePairs:
    """MMRB2: a prompt and two answers as lists of parts; annotations from 1 (b) to 6 (a).

    Its README does not say so; in all 1,000 rows of t2i.json ``chosen`` is what the majority of
    them says, and a row where it is not is rejected.
    """
    source = "prompt_source"
    there = source in columns.names
    columns.load([*NESTED, *([source] if there else [])])
    rows = list(zip(*(parsed(columns, name) for name in NESTED), strict=True))
    texts = [[only_part(content, "text") for content, *_ in rows]]
    models = []
    for side in (1, 2):
        answers = [row[side] if isinstance(row[side], dict) else {} for row in rows]
        texts.append([only_part(answer.get("response_content"), "image") for answer in answers])
        made_by = (answer.get("model_name") or answer.get("model") for answer in answers)
        models.append(encoded(text_array(map(as_name, made_by))))

    def majority(notes: Any, chosen: Any) -> tuple[float, float] | str:
        notes = notes if isinstance(notes, list) else []
        if not notes or not all(isinstance(n, int | float) and 1 <= n <= 6 for n in notes):
            return "human_annotations are not numbers from 1 to 6"
        label = sum(note > 3.5 for note in notes) / len(notes)
        if {"A": 1, "B": -1}.get(chosen) != np.sign(label - 0.5):
            return "the annotators' majority is not the one in chosen"
        return label, len(notes)

    labels = by_row(majority, *([row[at] for row in rows] for at in (3, 4)))
    prompt, *keys = (text_array(values) for values in texts)
    refs = [text_array(key and outside(key) for key in side) for side in texts[1:]]
    found = pair_columns(columns.rows, prompt, keys, refs, labels.value, labels.votes)
    found |= {"model_0": models[0], "model_1": models[1]}
    if there:
        found["category"] = columns.named(source)
    return FilePairs(columns.file, found, wrong=labels.wrong)


def only_part(content: Any, kind: str) -> str | None:
    """The one part of a list of ``[kind, text]``; None if there are others, as of edits."""
    parts = content if isinstance(content, list) else []
    if len(parts) != 1 or not isinstance(parts[0], list) or len(parts[0]) != 2:
        return None
    return parts[0][1] if parts[0][0] == kind and isinstance(parts[0][1], str) else None


def ranked_lists(columns: Columns, compare: Compare) -> FilePairs:
    """HPDv2's test set and ImageReward's own json: images, and ranks of all judges or of each."""
    images = _first(columns, "image_path", "file_path", "generations")
    given = [name for name in ("raw_annotations", "rank", "ranking") if name in columns.names]
    columns.load(["prompt", images, *given])
    values = {name: parsed(columns, name) for name in given}
    notes_of = values.pop("raw_annotations", [None] * len(columns.rows))
    found = _Rankings(compare)
    prompts, paths = columns.text("prompt").to_pylist(), parsed(columns, images)
    for i, (row, prompt, notes) in enumerate(
        zip(columns.rows.tolist(), prompts, notes_of, strict=True)
    ):
        judges = (
            [n if isinstance(n, dict) else {} for n in notes] if isinstance(notes, list) else []
        )
        orders = [judge.get("rank") for judge in judges] or [own[i] for own in values.values()][:1]
        who = dict.fromkeys(filter(None, (as_name(judge.get("user_hash")) for judge in judges)))
        names = [{"annotator": ", ".join(who)}] * MAX_IMAGES
        if reason := found.add(row, prompt, paths[i], orders, scores=names):
            found.rejected.append((row, reason))
    return found.file_pairs(columns.file, ["annotator"] if given[0] == "raw_annotations" else ())


def one_image_a_row(
    columns: Columns, compare: Compare, own: dict[str, str] | None = None, gap: float | None = None
) -> FilePairs:
    """ImageRewardDB: the images of one prompt_id make a ranking, with ratings of each.

    They may be in several files, so here they become `FilePairs.members`: `join` makes the pairs.
    ``own`` are the columns of another table, as for `own_rankings`; ``gap`` is what ``min_gap`` is
    if nobody says it.
    """
    names = own or {"prompt_id": "prompt_id", "prompt": "prompt", "rank": "rank"}
    image = names.get("image") or _first(columns, "image_path", "image")
    check_columns(columns, names.values())
    number, sign = (names["rank"], 1.0) if "rank" in names else (names["score"], -1.0)
    id_ = names.get("prompt_id", names["prompt"])
    cell, leaf = is_cell(columns, image), leaf_of(columns, image)
    ratings = [name for name in columns.numeric() if name.endswith("_rating")]
    ratings = [number] if own else ratings
    wanted = [id_, names["prompt"], number, *ratings]
    columns.load([*wanted, leaf] if leaf else wanted)
    places = keys_and_refs(columns, cell, None, image, None, paths_are_ids=own is None)
    keys, refs = (place.to_pylist() for place in places)
    prompts = columns.text(names["prompt"]).to_pylist()
    groups = columns.values(id_) if "prompt_id" in names else [""] * len(prompts)
    mean, count, squares = _ratings(columns, number)
    rank = sign * mean
    pairs = FilePairs(columns.file, cells=(image, image) if cell else None, gap=gap)
    kept, texts, found = [], [], []
    for i, row in enumerate(columns.rows.tolist()):
        group = _group(groups[i])
        if not -1e9 < rank[i] < 1e9 or group is None or not _is_key(keys[i]):
            pairs.rejected.append((row, "no rank, prompt_id or image"))
        elif not isinstance(prompts[i], str) or not prompts[i].strip():
            pairs.rejected.append((row, NO_TEXT))
        else:
            kept.append(i)
            ref = f"cell:{row}:{image}" if cell and refs[i] is None else refs[i]
            texts.append((prompts[i], keys[i], ref))
            found.append(
                xxhash.xxh3_128_digest(f"{encodable(group)}\0{fold_prompt(prompts[i])}".encode())
            )
    by_column = list(zip(*texts, strict=True)) or [()] * 3
    pairs.members = pa.table(
        {
            "group": pa.array(found, pa.binary(16)),
            "row": columns.rows[kept],
            "rank": rank[kept],
            **dict(zip(("prompt", "key", "ref"), map(text_array, by_column), strict=True)),
            "count": count[kept],
            "squares": squares[kept],
            **{
                name: (mean if name == number else columns.number(name))[kept]
                for name in sorted(ratings)
            },
        }
    )
    return pairs


def _ratings(columns: Columns, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every row's ratings, one or a list: their mean, count and squared deviations, [n] each."""
    mean = columns.number(name)
    count, squares = np.ones(len(mean), np.int64), np.zeros(len(mean))
    if np.isnan(mean).any():
        for i, value in enumerate(parsed(columns, name)):
            given = [one for one in value if one is not None] if isinstance(value, list) else []
            own = np.array([as_number(one) for one in given])
            if len(own) and np.isfinite(own).all():
                mean[i], count[i] = own.mean(), len(own)
                squares[i] = np.square(own - mean[i]).sum()
    return mean, count, squares


def own_rankings(columns: dict[str, str]) -> Ranked | None:
    """A table of the user's own with a row an image; None where ``columns`` says nothing of it.

    It names the columns ``image`` and ``score`` (more is better) or ``rank`` (less is), maybe
    ``prompt`` and ``prompt_id``: the images of a prompt are compared in pairs.
    """
    one = columns.keys() & {"score", "rank"}
    if "image" not in columns or columns.keys() & {"image_0", "image_1"}:
        return None
    if len(one) != 1 or "label" in columns:
        raise FifaError(
            f"image with {', '.join(sorted({'label', *one} & columns.keys())) or 'nothing'} in "
            "--columns",
            do="name the number of each image: score=... (more is better) or rank=... (less is), "
            "or the two images of a row: image_0=...,image_1=...,label=...",
        )
    kept = {name: columns[name] for name in ROW_AN_IMAGE if name in columns}
    return rated("columns", None, None, **{"prompt": "prompt", **kept})


def rated(name: str, gap: float | None = None, truths: str | None = None, **own: str) -> Ranked:
    """A format with a row an image; ``own`` and ``gap`` are as for `one_image_a_row`."""
    convert = partial(one_image_a_row, own=own, gap=gap)
    images, items = (own["image"],), tuple(own.items())
    return Ranked(name, tuple(own.values()), convert, truths=truths, own=items, images=images)


def _group(value: Any) -> str | None:
    """A prompt's id as it is compared: 7 is "7", also where a column with gaps made it 7.0."""
    if value is None or value != value:
        return None
    return str(int(value) if isinstance(value, float) and value.is_integer() else value)


def join(files: Sequence[FilePairs], compare: Compare = Compare()) -> Iterator[FilePairs]:
    """The pairs of rankings whose images are rows, each ranking whole, wherever its images are.

    A ranking is a ``prompt_id`` together with its prompt, and stands where its first image does.
    An image of n in it is in n - 1 pairs, so n images make n (n - 1) / 2 of them, and

        rows = images of rankings + rejected,
        pairs + merged + not made = the sum of n (n - 1) / 2.

    The noise of a rating is one for all images: with c ratings x of each image, s^2 = (the sum of
    all (x - its image's mean)^2) / (the sum of all c - 1), and a mean has a variance of s^2 / c.

    Memory holds a record an image of all files (some 250 bytes), less than its pairs will have.
    """
    tables = [own.members for own in files if own.members is not None]
    table = pa.concat_tables(tables, promote_options="default") if tables else pa.table({"row": []})
    if not len(table):
        return
    if compare.min_gap is None:
        compare = replace(compare, min_gap=next((own.gap for own in files if own.members), None))
    more = pc.sum(table["count"]).as_py() - len(table)
    noise = pc.sum(table["squares"]).as_py() / more if more else None
    for i, name in enumerate(table.column_names):  # the texts of all files may have over 2 GB
        if pa.types.is_string(table[name].type):
            table = table.set_column(i, name, table[name].cast(pa.large_string()))
    file = np.repeat(np.arange(len(files)), [len(own.members or ()) for own in files])
    group = np.frombuffer(b"".join(table["group"].to_pylist()), np.dtype("V16"))
    _, first, number = np.unique(group, return_index=True, return_inverse=True)
    place = first[number.reshape(-1)]  # of every image, where its ranking begins
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.diff(place[order], prepend=-1))
    ends = [*starts[1:].tolist(), len(order)]
    ratings = table.column_names[8:]
    begun = file[place[order[starts]]].tolist()
    rankings = zip(begun, starts.tolist(), ends, strict=True)
    lot = groupby(rankings, key=lambda ranking: (ranking[0], ranking[1] // NEAR))
    for (home, _), some in lot:
        own = list(some)
        low = own[0][1]
        rows = order[low : own[-1][2]]
        images = table.take(pa.array(rows)).to_pylist()
        for image, number_ in zip(images, file[rows].tolist(), strict=True):
            image["file"] = files[number_].file
        made = _Rankings(compare)
        rejected: dict[str, Rejected] = defaultdict(list)
        for _, start, end in own:
            _rank(made, images[start - low : end - low], ratings, rejected, noise)
        pairs = made.file_pairs(files[home].file, ratings)
        pairs.cells = next((own.cells for own in files if own.cells), None)
        yield pairs
        yield from (FilePairs(name, rejected=rows) for name, rows in rejected.items())


def _rank(
    found: _Rankings,
    images: list[dict[str, Any]],
    ratings: Sequence[str],
    rejected: dict[str, Rejected],
    noise: float | None,
) -> None:
    """The pairs of one ranking; every image that is in none is rejected by its row."""
    once: dict[str, dict[str, Any]] = {}
    for image in images:
        before = once.setdefault(image["key"], image)
        if before is not image:
            other = "" if before["rank"] == image["rank"] else " with another rank"
            why = f"the prompt has this image{other} already, in row {before['row']} of "
            rejected[image["file"]].append((image["row"], why + before["file"]))
    own = list(once.values())
    reason = found.add(
        own[0]["row"],
        own[0]["prompt"],
        [image["key"] for image in own],
        [[image["rank"] for image in own]],
        [in_file(image["ref"], image["file"], own[0]["file"]) for image in own],
        [{name: image[name] for name in ratings} for image in own],
        None if noise is None else noise / np.array([image["count"] for image in own]),
    )
    for image in own if reason else ():
        rejected[image["file"]].append((image["row"], reason))


def _is_key(key: Any) -> bool:
    return (
        isinstance(key, str)
        and 0 < len(encodable(key).encode()) <= MAX_KEY
        and encodable(key) == key
    )


def _is_order(order: Any, n: int) -> bool:
    if not isinstance(order, list) or len(order) != n:
        return False
    return all(isinstance(rank, int | float) and -1e9 < rank < 1e9 for rank in order)


def _first(columns: Columns, *names: str) -> str:
    return next(name for name in names if name in columns.names)
