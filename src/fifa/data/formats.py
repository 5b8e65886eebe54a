"""The public preference data sets: which columns each is recognised by, and what a label means.

The rules, with their sources, are a table in docs/data-sets.md.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.columns import (
    Columns,
    Text,
    as_number,
    begins,
    check_columns,
    has,
    parsed,
    side_pairs,
)
from fifa.data.labels import (
    CLOSE,
    NOT_COUNTED,
    Labels,
    by_row,
    first_wins,
    label_numbers,
    not_counted,
    on_scale,
    own_label,
    two_labels,
)
from fifa.data.names import KNOWN, NAMES, shares
from fifa.data.pairs import FilePairs, pair_columns
from fifa.data.places import is_cell, keys_and_refs, leaf_of
from fifa.data.rankings import (
    NESTED,
    Ranked,
    nested_pairs,
    one_image_a_row,
    ranked_lists,
    rated,
)
from fifa.data.records import TAR_NAMES, WRITTEN_OUT
from fifa.data.winners import find_winner, named_winner
from fifa.errors import FifaError


@dataclass(frozen=True)
class Layout:
    """A format with a row a pair.

    Parameters
    ----------
    name
        The format's name.
    prompt
        The prompt's column.
    images
        The columns with cells, paths or URLs.
    label
        From a file's columns to its labels.
    needs
        The columns that ``label`` reads.
    reads
        Columns that ``label`` reads where they are there.
    keys
        Columns with the images' ids.
    links
        Columns with the images' URLs, beside or instead of ``images``.
    winner_first
        The first image is (often) the winner.
    ignore
        Columns of numbers that belong to the format and are no scores.
    numbers
        Columns of numbers that some files have as text.
    paths_are_ids
        The path beside an image's bytes names that image and no other.
    lacks
        A column that such a file does not have.
    """

    name: str
    prompt: str
    images: tuple[str, str]
    label: Callable[[Columns], Labels]
    needs: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    keys: tuple[str, str] | None = None
    links: tuple[str, str] | None = None
    winner_first: bool = False
    ignore: frozenset[str] = frozenset()
    numbers: tuple[str, ...] = ()
    paths_are_ids: bool = False
    lacks: str | None = None

    def fits(self, columns: Columns) -> bool:
        """True if the file has every column that the format cannot do without."""
        return self.lacks not in columns.names and not self.missing(columns)

    def missing(self, columns: Columns) -> list[str]:
        """The columns that the file would need to have."""
        lacks = [name for name in (self.prompt, *self.needs) if not has(columns, name)]
        named = _present(columns, self.keys) or _present(columns, self.images)
        return lacks + ([] if named else list(self.images))

    def read(self, columns: Columns, carried: dict[str, str]) -> FilePairs:
        """The pairs of one file; raises `FifaError` where a column is missing.

        ``carried`` are further columns to keep: the name to keep each under, and its name in the
        file.
        """
        lacks = [*self.missing(columns), *carried.values()]
        check_columns(columns, lacks, f" (format {self.name})")
        keys, links, images = (
            _present(columns, names) for names in (self.keys, self.links, self.images)
        )
        cells = [images is not None and is_cell(columns, name) for name in images or ("", "")]
        reads = (*self.reads, *(name for name in NOT_COUNTED if name in columns.names))
        known = {self.prompt, *self.needs, *reads, *self.ignore, *self.images}
        known |= {*(self.keys or ()), *(self.links or ()), *carried.values()}
        numbers = [name for name in columns.numeric() if name not in known]
        numbers += [name for name in self.numbers if name in columns.names and name not in numbers]
        wanted = [self.prompt, *self.needs, *numbers, *carried.values(), *(keys or ())]
        wanted += [name for name in reads if name in columns.names]
        wanted += [leaf for leaf in (leaf_of(columns, name) for name in images or ()) if leaf]
        wanted += () if all(cells) else (links or ())
        columns.load(wanted, prompt=self.prompt)
        uncounted = not_counted(columns)
        labels = self.label(columns)
        labels = on_scale(
            Labels(labels.value, labels.wrong | uncounted, labels.votes),
            columns.file,
            name=self.needs[0] if len(self.needs) == 1 else "",
        )
        sides = [
            keys_and_refs(
                columns,
                cells[side],
                *(names and names[side] for names in (keys, images, links)),
                paths_are_ids=self.paths_are_ids,
            )
            for side in (0, 1)
        ]
        prompt = columns.text(self.prompt)
        kept = {name: columns.extra(column) for name, column in carried.items()}
        for name, values in kept.items():
            none = pc.all(pc.is_null(values, nan_is_null=True)).as_py()
            if none and any(value is not None for value in columns.values(carried[name])):
                raise FifaError(
                    f"{name}={carried[name]} in --columns keeps a column of numbers, and there are "
                    "none in it",
                    where=columns.file,
                    do=f"did you mean one of {', '.join((*PAIR_COLUMNS, *COUNTS, *NAMES))}?",
                )
        return FilePairs(
            columns.file,
            pair_columns(
                columns.rows,
                prompt,
                [key for key, _ in sides],
                [ref for _, ref in sides],
                labels.value,
                labels.votes,
            ),
            scores={name: pa.array(columns.number(name)) for name in numbers} | kept,
            wrong=labels.wrong
            | (columns.no_texts(self.prompt) if prompt.null_count else {})
            | _written_out(sides[0][1], 0)
            | _written_out(sides[1][1], 1),
            swaps=side_pairs([*numbers, *carried]) if self.winner_first else [],
            winner_first=self.winner_first,
            cells=images if any(cells) else None,
        )

    def uses(self, columns: Columns) -> dict[str, str]:
        """The columns that are read, each with what it is."""
        names = [self.prompt, *self.needs, *(name for name in self.reads if has(columns, name))]
        used = dict.fromkeys(names, "label") | {self.prompt: "prompt"}
        for kind, sides in (("key", self.keys), ("image", self.images), ("URL", self.links)):
            there = _present(columns, sides) or ()
            used |= {name: f"{kind} of image {side}" for side, name in enumerate(there)}
        return used


def _present(columns: Columns, names: tuple[str, str] | None) -> tuple[str, str] | None:
    return names if names and all(has(columns, name) for name in names) else None


def _written_out(refs: Text, side: int) -> dict[int, str]:
    """The rows whose image is text: a ``data:`` URL, or base64 of a PNG, JPEG or WEBP."""
    found = np.asarray(pc.fill_null(begins(refs, WRITTEN_OUT), False))
    reason = f"image {side} is base64 text: write it to a file, or as bytes into Parquet"
    return dict.fromkeys(np.flatnonzero(found).tolist(), reason)


PAIR_COLUMNS = ("prompt", "image_0", "image_1", "label")
COUNTS = ("votes_0", "votes_1")  # of the votes for either image, instead of a label
RESPONSE_STATUS = "preference.responses.status"
RESPONSES = {"image_1": 1.0, "image_2": 0.0, "both_good": 0.5, "both_bad": 0.5}


@dataclass(frozen=True)
class Winner:
    """A table with a row a pair whose winner is a word that its own columns explain."""

    name: str = "winner"

    def fits(self, columns: Columns) -> bool:
        """True if it has a prompt, two images and a winner, one of each by its name."""
        return find_winner(columns) is not None

    def layout(self, columns: Columns) -> Layout:
        """What a table's columns that it fits mean; its labels are none where the words are not."""
        prompt, images, column = find_winner(columns) or ("", ("", ""), "")
        label = partial(named_winner, prompt=prompt, images=images, column=column)
        return Layout(self.name, prompt, images, label, needs=(column,))


def own_layout(columns: dict[str, str]) -> Layout:
    """A table of the user's own; what ``columns`` leaves out goes by its own name."""
    prompt, first, second, label = (columns.get(name, name) for name in PAIR_COLUMNS)
    if counts := [columns[name] for name in COUNTS if name in columns]:
        if "label" in columns or len(counts) < len(COUNTS):
            raise FifaError(
                f"{' and '.join(sorted(columns.keys() & {'label', *COUNTS}))} in --columns",
                do="name label=..., or the counts of both images: votes_0=...,votes_1=...",
            )
        label = "{0}/({0}+{1})".format(*counts)
    needs, function = own_label(label)
    winner_first = function is first_wins
    return Layout(
        "columns", prompt, (first, second), function, needs=needs, winner_first=winner_first
    )


def _path1_wins(columns: Columns) -> Labels:
    """HPDv3: path1 wins, by its share of ``choice_dist`` where there are votes; ties say so."""

    def share(value: Any) -> tuple[float, float]:
        counts = _counts(value)
        return (max(counts) / sum(counts), sum(counts)) if counts else (1.0, 1)

    there = "choice_dist" in columns.names
    labels = by_row(share, columns.values("choice_dist") if there else columns.rows)
    if "tie_case" in columns.names:
        labels.value[columns.number("tie_case") == 1] = 0.5
    return labels


def _counts(value: Any) -> list[float]:
    """Two counts of votes, as a list or as its text; nothing where there are none."""
    if isinstance(value, str):
        value = value.strip().strip("[]()").split(",")
    counts = [as_number(one) for one in value] if isinstance(value, list) else []
    return counts if len(counts) == 2 and min(counts) >= 0 and 0 < sum(counts) < np.inf else []


def _two_labels(columns: Columns) -> Labels:
    """Pick-a-Pic and diffusers: `two_labels`.

    ``label_votes``, which `fifa vote export` writes, says how many votes label_0 averages.
    """
    second, labelled = (
        columns.number(name) if name in columns.names else None for name in ("label_1", "has_label")
    )
    labels = two_labels(label_numbers(columns, "label_0"), second, labelled, columns.file)
    if "label_votes" not in columns.names:
        return labels
    votes = columns.number("label_votes")
    known = (votes >= 1) & (votes < 2**31)
    return Labels(labels.value, labels.wrong, np.where(known, votes, 1.0).astype(np.int32))


def _aggregated(column: str) -> Callable[[Columns], Labels]:
    """Rapidata: votes for either image by its file's name, as an object or its text."""

    def share(value: Any, first: str | None, second: str | None) -> tuple[float, float] | str:
        found = value if isinstance(value, dict) else {}
        sides = ({"image1", first}, {"image2", second})
        one, two = ([found[key] for key in found if key in side] for side in sides)
        counts = _counts([*one, *two])
        if len(found) != 2 or len(one) != 1 or len(two) != 1:
            return f"{column} does not give the votes for either image by its name"
        return (counts[0] / sum(counts), sum(counts)) if counts else "negative votes, or none"

    def labels(columns: Columns) -> Labels:
        names = (_file_names(columns, name) for name in ("image1", "image2"))
        return by_row(share, parsed(columns, column), *names)

    return labels


def _file_names(columns: Columns, image: str) -> list[str | None]:
    """The last part of every row's path or URL."""
    leaf = leaf_of(columns, image)
    refs = columns.text(leaf).to_pylist() if leaf else [None] * len(columns.rows)
    return [ref and re.split(r"[/\\\\]", ref)[-1] for ref in refs]


def _best_index(columns: Columns) -> Labels:
    """MJ-Bench: the label is the index of the better image."""
    index = on_scale(Labels(label_numbers(columns, "label"), {}), columns.file, name="label").value
    bad = np.flatnonzero(~np.isin(index, (0.0, 1.0))).tolist()
    return Labels(1.0 - index, dict.fromkeys(bad, "the label is neither 0 nor 1"))


def _responses(columns: Columns) -> Labels:
    """open-image-preferences: the mean over the annotators, either kind of "both" a half.

    Of the answers only those are counted that were submitted, where the tool tells.
    """

    def mean(own: Any, state: Any) -> tuple[float, float] | str:
        given = own if isinstance(own, list) else []
        if isinstance(state, list) and len(state) == len(given):
            given = [a for a, said in zip(given, state, strict=True) if said == "submitted"]
        known = [RESPONSES.get(answer) if isinstance(answer, str) else None for answer in given]
        shares = [share for share in known if share is not None]
        if not given:
            return "no submitted responses" if own and state else "no responses"
        if len(shares) < len(known):
            return "an unknown response"
        return sum(shares) / len(shares), len(shares)

    answers = parsed(columns, "preference.responses")
    told = RESPONSE_STATUS in columns.names
    return by_row(
        mean,
        answers,
        columns.values(RESPONSE_STATUS) if told else answers and [None] * len(answers),
    )


def _two_paths(paths: str) -> Layout:
    """HPDv2's training set: a list of two paths, and [1, 0] or [0, 1] beside it."""

    def first(images: Any, shares: Any) -> tuple[float, float] | str:
        if not isinstance(images, list) or len(images) != 2:
            return "it does not name two images"
        numbers = [as_number(share) for share in shares] if isinstance(shares, list) else []
        if len(numbers) != 2 or not abs(sum(numbers) - 1.0) <= CLOSE:
            return "human_preference does not sum to 1"
        return numbers[0], 1

    def labels(columns: Columns) -> Labels:
        return by_row(first, parsed(columns, paths), parsed(columns, "human_preference"))

    images = f"{paths}.0", f"{paths}.1"
    return Layout("hpdv2", "prompt", images, labels, needs=(paths, "human_preference"))


_INDEX = ("num_example_per_prompt", "__index_level_0__", "Unnamed: 0")
_TWO: dict[str, Any] = {
    "label": _two_labels,
    "reads": ("label_1", "has_label", "label_votes"),
    "ignore": frozenset(("ranking_id", "user_id", *_INDEX)),
}
_JPGS = ("jpg_0", "jpg_1")
_UIDS = ("image_0_uid", "image_1_uid")
_URLS = ("image_0_url", "image_1_url")


def _named(name: str, images: tuple[str, str], label: str, **more: Any) -> Layout:
    """A format whose label is a form that a user could write, too."""
    needs, function = own_label(label)
    return Layout(name, "prompt", images, function, needs=needs, **more)


Format: TypeAlias = Layout | Ranked | Winner

# A data set's format is an entry here. In this order: the first that fits is the file's format.
FORMATS: tuple[Format, ...] = (
    *map(_two_paths, ("file_path", "image_path")),
    Ranked(
        "hpdv2",
        ("prompt", "image_path|file_path", "raw_annotations|rank"),
        ranked_lists,
        lacks="prompt_id",
    ),
    Ranked("imagereward", ("prompt", "generations", "ranking"), ranked_lists),
    Ranked(
        "imagereward",
        ("prompt_id", "prompt", "rank", "image|image_path"),
        one_image_a_row,
        images=("image",),
    ),
    rated(
        "evalmuse", prompt_id="prompt_id", prompt="prompt", image="img_path", score="total_score"
    ),
    *(
        rated("laion", prompt="TEXT", image="URL", score=s)
        for s in ("aesthetic", "AESTHETIC_SCORE")
    ),
    *(
        rated("kto", 1.0, truths="label", prompt="prompt", image=image, score="label")
        for image in ("image", "image_path")
    ),
    Ranked("mmrb2", NESTED, nested_pairs, images=("response_a", "response_b")),
    *(
        Layout("rapidata", "prompt", ("image1", "image2"), label, needs=needs)
        for needs, label in (
            shares("weighted_results", "preference"),
            own_label("votes_image1/(votes_image1+votes_image2)"),
            *(((n,), _aggregated(n)) for n in ("aggregated_results", "aggregatedResults")),
        )
    ),
    _named(
        "hpdv2",
        ("image_left_id", "image_right_id"),
        "pref:1/-1/0",
        ignore=frozenset(("user_id", "ranking_id")),
    ),
    _named(
        "genai-arena",
        ("left_image", "right_image"),
        "vote_type:leftvote/rightvote/tievote/bothbad_vote",
    ),
    Layout(
        "open-image-preferences",
        "images.prompt",
        ("images.image_1", "images.image_2"),
        _responses,
        needs=("preference.responses",),
        reads=(RESPONSE_STATUS,),
        paths_are_ids=True,
    ),
    Layout(
        "hpdv3",
        "prompt",
        ("path1", "path2"),
        _path1_wins,
        reads=("choice_dist", "tie_case"),
        winner_first=True,
        numbers=("confidence",),
    ),
    Layout(
        "trl",
        "caption",
        ("images.0", "images.1"),
        needs=("label_0", "chosen", "rejected"),
        keys=_UIDS,
        **_TWO,
    ),
    Layout(
        "pickapic", "caption", _JPGS, needs=("label_0", *_UIDS), keys=_UIDS, links=_URLS, **_TWO
    ),
    Layout("diffusers", "caption", _JPGS, needs=("label_0",), links=_URLS, **_TWO),
    Layout(
        "mj-bench",
        "caption",
        ("image0", "image1"),
        _best_index,
        needs=("label",),
        winner_first=True,
    ),
    Layout(
        "open-image-preferences",
        "prompt",
        ("chosen", "rejected"),
        first_wins,
        needs=("chosen_model", "rejected_model", "category"),
        winner_first=True,
        ignore=frozenset(("id",)),
    ),
    Layout(
        "chosen-rejected",
        "prompt",
        ("chosen", "rejected"),
        first_wins,
        winner_first=True,
        lacks="images",
    ),
    Layout("win-lose", "prompt", ("img_win", "img_lose"), first_wins, winner_first=True),
    own_layout({}),
    Winner(),
)


def known_columns() -> frozenset[str]:
    """Every column that a format with a row a pair reads, names, and WebDataset's for some."""
    layouts = [form for form in FORMATS if isinstance(form, Layout)]
    some = [(form.prompt, *form.images, *form.needs, *form.reads) for form in layouts]
    return frozenset().union(TAR_NAMES, KNOWN, *some, *(form.keys or () for form in layouts))
