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

from fifa.data.columns import Columns, Text, as_number, begins, has, parsed, side_pairs
from fifa.data.labels import (
    NOT_COUNTED,
    Labels,
    first_wins,
    label_numbers,
    not_counted,
    on_scale,
    own_label,
    two_labels,
    vote_share,
    weight_share,
)
from fifa.data.names import KNOWN, NAMES
from fifa.data.pairs import FilePairs, pair_columns
from fifa.data.rankings import (
    NESTED,
    Ranked,
    generations,
    nested_pairs,
    one_image_a_row,
    ranked_paths,
    rated,
    two_paths,
)
from fifa.data.records import TAR_NAMES, WRITTEN_OUT, tar_ref
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
        lacks = self.missing(columns) + [
            name for name in carried.values() if not has(columns, name)
        ]
        if lacks:
            raise _missing_columns(columns, self.name, lacks)
        keys, links, images = (
            _present(columns, names) for names in (self.keys, self.links, self.images)
        )
        is_cell = [images is not None and _is_cell(columns, name) for name in images or ("", "")]
        reads = (*self.reads, *(name for name in NOT_COUNTED if name in columns.names))
        known = {self.prompt, *self.needs, *reads, *self.ignore, *self.images}
        known |= {*(self.keys or ()), *(self.links or ()), *carried.values()}
        numbers = [name for name in columns.numeric() if name not in known]
        numbers += [name for name in self.numbers if name in columns.names and name not in numbers]
        wanted = [self.prompt, *self.needs, *numbers, *carried.values(), *(keys or ())]
        wanted += [name for name in reads if name in columns.names]
        wanted += [leaf for leaf in (_leaf(columns, name) for name in images or ()) if leaf]
        wanted += () if all(is_cell) else (links or ())
        columns.load(wanted, prompt=self.prompt)
        uncounted = not_counted(columns)
        labels = self.label(columns)
        labels = on_scale(
            Labels(labels.value, labels.wrong | uncounted, labels.votes),
            columns.file,
            name=self.needs[0] if len(self.needs) == 1 else "",
        )
        sides = [
            _side(
                columns,
                is_cell[side],
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
            cells=images if any(is_cell) else None,
        )

    def uses(self, columns: Columns) -> dict[str, str]:
        """The columns that are read, each with what it is."""
        names = [self.prompt, *self.needs, *(name for name in self.reads if has(columns, name))]
        used = dict.fromkeys(names, "label") | {self.prompt: "prompt"}
        for kind, sides in (("key", self.keys), ("image", self.images), ("URL", self.links)):
            there = _present(columns, sides) or ()
            used |= {name: f"{kind} of image {side}" for side, name in enumerate(there)}
        return used


def _missing_columns(columns: Columns, name: str, lacks: list[str]) -> FifaError:
    """The message for a file that lacks columns of its format."""
    return FifaError(
        f"no column {', '.join(repr(column) for column in lacks)} (format {name})",
        where=columns.file,
        do="it has "
        + ", ".join(sorted(columns.names))
        + "; say which is which with --columns prompt=...,image_0=...,image_1=...,label=...",
    )


def _present(columns: Columns, names: tuple[str, str] | None) -> tuple[str, str] | None:
    return names if names and all(has(columns, name) for name in names) else None


def _is_cell(columns: Columns, name: str) -> bool:
    return columns.image(name) != "text" and columns.holds_bytes(name)


def _leaf(columns: Columns, name: str) -> str | None:
    """What may be read of an image column: all of a text, the path of a struct, no bytes."""
    kind = columns.image(name)
    if kind == "text":
        return name
    return f"{name}.path" if kind == "struct" else None


def _side(
    columns: Columns,
    is_cell: bool,
    key: str | None,
    image: str | None,
    link: str | None,
    *,
    paths_are_ids: bool,
) -> tuple[Text, Text]:
    """Keys and references of one side's images.

    The key is the image's id if there is one, else its path or URL, else ``file#row:column``.
    The path in a cell that also has the bytes is a key only if it is a URL, or if the format
    vouches for it and it names a folder: `datasets` keeps the last part of the path there, and
    ``0001.jpg`` or ``tmp/left.png`` is many images' name.
    """
    nothing = pa.nulls(len(columns.rows), pa.string())
    leaf = _leaf(columns, image) if image else None
    path = columns.reference(leaf) if leaf else nothing
    if is_cell and image and columns.image(image) == "written":
        path = columns.paths_among(image)
    if is_cell and image:
        place = pc.binary_join_element_wise(
            f"{columns.file}#", pa.array(columns.rows).cast(pa.string()), f":{image}", ""
        )
        named = pc.fill_null(pc.match_substring(path, "/" if paths_are_ids else "://"), False)
        lacks = columns.lacks_bytes(image) if leaf else np.asarray(path.is_valid())
        bare = pa.array(lacks & np.asarray(path.is_valid()))  # only a path, among rows with bytes
        ref = pc.if_else(bare, path, nothing)
        found = pc.if_else(pc.or_(named, bare), path, place)
    else:
        ref = path if leaf else (columns.reference(link) if link else nothing)
        found = _keys(columns, ref)
    return (columns.text(key) if key else found), ref


def _written_out(refs: Text, side: int) -> dict[int, str]:
    """The rows whose image is text: a ``data:`` URL, or base64 of a PNG, JPEG or WEBP."""
    found = np.asarray(pc.fill_null(begins(refs, WRITTEN_OUT), False))
    reason = f"image {side} is base64 text: write it to a file, or as bytes into Parquet"
    return dict.fromkeys(np.flatnonzero(found).tolist(), reason)


def _keys(columns: Columns, refs: Text) -> Text:
    """References as keys: ``FILE#NAME`` for what is in the file; in a tar nothing else counts."""
    if columns.kind != "tar" and not pc.any(pc.starts_with(refs, "tar:")).as_py():
        return refs
    texts = refs.to_pylist()
    places = [tar_ref(ref or "") for ref in texts]
    named = [
        f"{columns.file}#{place.name}" if place else None if columns.kind == "tar" else ref
        for ref, place in zip(texts, places, strict=True)
    ]
    return pa.array(named, pa.string())


PAIR_COLUMNS = ("prompt", "image_0", "image_1", "label")
COUNTS = ("votes_0", "votes_1")  # of the votes for either image, instead of a label
VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tievote": 0.5, "bothbad_vote": 0.5}
RESPONSE_STATUS = "preference.responses.status"
RESPONSES = {"image_1": 1.0, "image_2": 0.0, "both_good": 0.5, "both_bad": 0.5}


@dataclass(frozen=True)
class Winner:
    """A table with a row a pair whose winner is a word that its own columns explain."""

    name: str = "winner"

    def fits(self, columns: Columns) -> bool:
        """True if it has a prompt, two images and a winner, one of each by its name."""
        return find_winner(columns) is not None

    def uses(self, columns: Columns) -> dict[str, str]:
        """As `Layout.uses`."""
        return self.layout(columns).uses(columns)

    def layout(self, columns: Columns) -> Layout:
        """What its columns and words mean; raises `FifaError` where the words say nothing."""
        found = find_winner(columns)
        if found is None:
            raise _missing_columns(columns, self.name, ["image_a", "image_b", "winner"])
        prompt, images, column = found
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
    label, votes = np.ones(len(columns.rows)), np.ones(len(columns.rows), np.int32)
    if "choice_dist" in columns.names:
        for i, value in enumerate(columns.values("choice_dist")):
            counts = _counts(value)
            if counts:
                label[i], votes[i] = max(counts) / sum(counts), min(sum(counts), 2**31 - 1)
    if "tie_case" in columns.names:
        label[columns.number("tie_case") == 1] = 0.5
    return Labels(label, {}, votes)


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

    def labels(columns: Columns) -> Labels:
        names = [_file_names(columns, name) for name in ("image1", "image2")]
        values = parsed(columns, column)
        label, votes = np.full(len(values), np.nan), np.ones(len(values), np.int32)
        wrong = {}
        for i, value in enumerate(values):
            found = value if isinstance(value, dict) else {}
            sides = [{name, own[i]} for name, own in zip(("image1", "image2"), names, strict=True)]
            counts = [[as_number(found[key]) for key in found if key in side] for side in sides]
            if len(found) != 2 or [len(count) for count in counts] != [1, 1]:
                wrong[i] = f"{column} does not give the votes for either image by its name"
            elif not _counts([counts[0][0], counts[1][0]]):
                wrong[i] = "negative votes, or none"
            else:
                total = counts[0][0] + counts[1][0]
                label[i], votes[i] = counts[0][0] / total, max(1, min(total, 2**31 - 1))
        return Labels(label, wrong, votes)

    return labels


def _file_names(columns: Columns, image: str) -> list[str | None]:
    """The last part of every row's path or URL."""
    leaf = _leaf(columns, image)
    refs = columns.text(leaf).to_pylist() if leaf else [None] * len(columns.rows)
    return [ref and re.split(r"[/\\\\]", ref)[-1] for ref in refs]


def _one_vote(columns: Columns) -> Labels:
    """HPDv2, a row a vote: pref is 1 for the left image, -1 for the right one, 0 for neither."""
    pref = label_numbers(columns, "pref")
    bad = dict.fromkeys(np.flatnonzero(~np.isin(pref, (1, 0, -1))).tolist(), "pref is not 1 or -1")
    return Labels(np.where(np.isin(pref, (1, 0, -1)), 0.5 * (pref + 1), np.nan), bad)


def _best_index(columns: Columns) -> Labels:
    """MJ-Bench: the label is the index of the better image."""
    index = on_scale(Labels(label_numbers(columns, "label"), {}), columns.file, name="label").value
    bad = np.flatnonzero(~np.isin(index, (0.0, 1.0))).tolist()
    return Labels(1.0 - index, dict.fromkeys(bad, "the label is neither 0 nor 1"))


def _by_value(column: str, function: Callable[[Any], tuple[float, int] | str]) -> Any:
    """Labels from a column's Python values; ``function`` gives (label, votes) or what is wrong."""

    def labels(columns: Columns) -> Labels:
        values = columns.values(column)
        label, votes = np.full(len(values), np.nan), np.ones(len(values), np.int32)
        wrong = {}
        for i, value in enumerate(values):
            found = function(value)
            if isinstance(found, str):
                wrong[i] = found
            else:
                label[i], votes[i] = found
        return Labels(label, wrong, votes)

    return labels


def _arena_vote(vote: Any) -> tuple[float, int] | str:
    known = VOTES.get(vote) if isinstance(vote, str) else None
    return (known, 1) if known is not None else f"unknown vote_type {str(vote)[:40]!r}"


def _responses(columns: Columns) -> Labels:
    """open-image-preferences: the mean over the annotators, either kind of "both" a half.

    Of the answers only those are counted that were submitted, where the tool tells.
    """
    answers = parsed(columns, "preference.responses")
    states: list[Any] = [None] * len(answers)
    if RESPONSE_STATUS in columns.names:
        states = columns.values(RESPONSE_STATUS)
    label, votes = np.full(len(answers), np.nan), np.ones(len(answers), np.int32)
    wrong = {}
    for i, (own, state) in enumerate(zip(answers, states, strict=True)):
        given = own if isinstance(own, list) else []
        if isinstance(state, list) and len(state) == len(given):
            given = [a for a, said in zip(given, state, strict=True) if said == "submitted"]
        known = [RESPONSES.get(answer) if isinstance(answer, str) else None for answer in given]
        shares = [share for share in known if share is not None]
        if not given:
            wrong[i] = "no submitted responses" if own and state else "no responses"
        elif len(shares) < len(known):
            wrong[i] = "an unknown response"
        else:
            label[i], votes[i] = sum(shares) / len(shares), len(shares)
    return Labels(label, wrong, votes)


_PICKAPIC = frozenset(
    ("ranking_id", "user_id", "num_example_per_prompt", "__index_level_0__", "Unnamed: 0")
)
_EVALMUSE = {
    "prompt_id": "prompt_id",
    "prompt": "prompt",
    "image": "img_path",
    "score": "total_score",
}
_UIDS = ("image_0_uid", "image_1_uid")
_URLS = ("image_0_url", "image_1_url")

Format: TypeAlias = Layout | Ranked | Winner

# A data set's format is an entry here. In this order: the first that fits is the file's format.
FORMATS: tuple[Format, ...] = (
    Ranked(
        "hpdv2",
        (("prompt",), ("file_path", "image_path"), ("human_preference",)),
        two_paths,
        images=("first", "second"),
    ),
    Ranked(
        "hpdv2",
        (("prompt",), ("image_path", "file_path"), ("raw_annotations", "rank")),
        ranked_paths,
        lacks="prompt_id",
    ),
    Ranked("imagereward", (("prompt",), ("generations",), ("ranking",)), generations),
    Ranked(
        "imagereward",
        (("prompt_id",), ("prompt",), ("rank",), ("image", "image_path")),
        one_image_a_row,
        images=("image",),
    ),
    rated("evalmuse", _EVALMUSE),
    *(
        rated("laion", {"prompt": "TEXT", "image": "URL", "score": score})
        for score in ("aesthetic", "AESTHETIC_SCORE")
    ),
    *(
        rated("kto", {"prompt": "prompt", "image": image, "score": "label"}, 1.0, truths="label")
        for image in ("image", "image_path")
    ),
    Ranked(
        "mmrb2",
        tuple((name,) for name in NESTED),
        nested_pairs,
        images=("response_a", "response_b"),
    ),
    Layout(
        "rapidata",
        "prompt",
        ("image1", "image2"),
        lambda columns: weight_share(
            columns, "weighted_results_image1_preference", "weighted_results_image2_preference"
        ),
        needs=("weighted_results_image1_preference", "weighted_results_image2_preference"),
    ),
    Layout(
        "rapidata",
        "prompt",
        ("image1", "image2"),
        lambda columns: vote_share(columns, "votes_image1", "votes_image2"),
        needs=("votes_image1", "votes_image2"),
    ),
    *(
        Layout("rapidata", "prompt", ("image1", "image2"), _aggregated(name), needs=(name,))
        for name in ("aggregated_results", "aggregatedResults")
    ),
    Layout(
        "hpdv2",
        "prompt",
        ("image_left_id", "image_right_id"),
        _one_vote,
        needs=("pref",),
        ignore=frozenset(("user_id", "ranking_id")),
    ),
    Layout(
        "genai-arena",
        "prompt",
        ("left_image", "right_image"),
        _by_value("vote_type", _arena_vote),
        needs=("vote_type",),
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
        _two_labels,
        needs=("label_0", "chosen", "rejected"),
        reads=("label_1", "has_label", "label_votes"),
        keys=_UIDS,
        ignore=_PICKAPIC,
    ),
    Layout(
        "pickapic",
        "caption",
        ("jpg_0", "jpg_1"),
        _two_labels,
        needs=("label_0", "image_0_uid", "image_1_uid"),
        reads=("label_1", "has_label", "label_votes"),
        keys=_UIDS,
        links=_URLS,
        ignore=_PICKAPIC,
    ),
    Layout(
        "diffusers",
        "caption",
        ("jpg_0", "jpg_1"),
        _two_labels,
        needs=("label_0",),
        reads=("label_1", "has_label", "label_votes"),
        links=_URLS,
        ignore=_PICKAPIC,
    ),
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
