"""What a source says beside the labels: who made the images, who judged them, and what they are of.

Here is which of a source's columns hold it. It becomes columns of the table of pairs, after `PAIRS`
and only where the source has it: the `NAMES`, dictionary-encoded, and a label an aspect,
``label_ASPECT``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fifa.data.columns import Columns, Text, check_columns
from fifa.data.labels import Labels, own_label, vote_share, weight_share
from fifa.errors import FifaError

NAMES = ("model_0", "model_1", "annotator", "category")
ASPECT = re.compile(r"label_(?!(?:0|1|votes)$)(\w+)")  # `PAIRS` and the public formats have three
# The generators of image 0 and image 1, in files that list the images side by side
SIDE_BY_SIDE = (
    ("model_0", "model_1"),
    ("model1", "model2"),
    ("model_1", "model_2"),
    ("model_a", "model_b"),
    ("left_model", "right_model"),
    ("model_left", "model_right"),
)
# and in files that list the winner first, by a column of that name
WINNER_FIRST = (
    ("chosen_model", "rejected_model"),
    ("model_chosen", "model_rejected"),
    ("winner_model", "loser_model"),
    ("model_win", "model_lose"),
)
# The generator of the image that a row is
OF_AN_IMAGE = (("model",), ("model_name",), ("generator",))
ONE_A_PAIR = {
    "annotator": ("annotator", "annotator_id", "user_id", "worker_id"),
    "category": ("category", "tags", "classification"),
}
KNOWN = {*chain(*SIDE_BY_SIDE, *WINNER_FIRST, *OF_AN_IMAGE, *ONE_A_PAIR.values())}
SHARES = re.compile(r"(weighted_results|votes)_image1_(\w+)")  # and _image2_: labels by aspect


Aspect = tuple[tuple[str, ...], Callable[[Columns], Labels]]


@dataclass(frozen=True)
class Names:
    """Which of a file's columns hold names and labels by aspect.

    Parameters
    ----------
    texts
        The file's column for each of `NAMES` that it has.
    aspects
        By aspect: the columns its label is made of, and how.
    ratings
        Where a row is an image, by aspect: the column of its rating.
    """

    texts: dict[str, str] = field(default_factory=dict)
    aspects: dict[str, Aspect] = field(default_factory=dict)
    ratings: dict[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        """The file's columns."""
        needs = [name for needs, _ in self.aspects.values() for name in needs]
        return [*self.texts.values(), *needs, *self.ratings.values()]

    def uses(self) -> dict[str, str]:
        """The file's columns, each with what it is."""
        used = {own: name for name, own in self.texts.items()}
        used |= {own: f"rating by {aspect}" for aspect, own in self.ratings.items()}
        for aspect, (needs, _) in self.aspects.items():
            used |= dict.fromkeys(needs, f"label by {aspect}")
        return used

    def read(self, columns: Columns) -> dict[str, Text]:
        """Names as text, labels and ratings as float64, a row for each of the file's."""
        found: dict[str, Text] = {name: columns.named(own) for name, own in self.texts.items()}
        for aspect, (_, function) in self.aspects.items():
            labels = function(columns)
            value = labels.value.copy()
            value[list(labels.wrong)] = np.nan
            value[~((value >= 0) & (value <= 1))] = np.nan
            found[f"label_{aspect}"] = pa.array(value, pa.float64())
        return found | {f"label_{a}": pa.array(columns.number(c)) for a, c in self.ratings.items()}


def find_names(
    columns: Columns,
    images: tuple[str, ...],
    given: Mapping[str, str],
    aspect: str | None = None,
) -> Names:
    """The names in a file.

    Parameters
    ----------
    columns
        The file.
    images
        Its columns of images, which tell whose generator is whose: two of a row a pair, one of a
        row an image (of which ``model`` is the generator, and ``label_ASPECT`` a rating, where more
        is better), none of a row a ranking.
    given
        What the user named: columns for `NAMES`, and for ``label_ASPECT`` a column or one of
        `fifa.data.labels.OTHER_SCALES`.
    aspect
        The one that gives the labels; a file's only aspect is not kept beside the label it is.

    Raises `FifaError` for a column that was named and is not there, or is of no such row.
    """
    by_winner = re.search("chosen|win", " ".join(images).lower()) is not None
    known = ((), OF_AN_IMAGE, WINNER_FIRST if by_winner else SIDE_BY_SIDE)[len(images)]
    sides = next((names for names in known if set(names) <= columns.names), ())
    own = ((), ("model",), ("model_0", "model_1"))[len(images)]
    refuse_names(
        set(given).difference(own, ONE_A_PAIR, label_columns(given) if images else ()),
        images,
        columns.file,
    )
    texts = dict(zip(own, sides, strict=False))
    for name, names_of in ONE_A_PAIR.items():
        if there := next((column for column in names_of if column in columns.names), None):
            texts[name] = there
    texts |= {name: column for name, column in given.items() if not ASPECT.fullmatch(name)}
    numbers = columns.numeric() if len(images) == 1 else []
    ratings = {name[: -len("_rating")]: name for name in numbers if name.endswith("_rating")}
    aspects: dict[str, Aspect] = {
        found[2]: shares(found[1], found[2])
        for found in map(SHARES.fullmatch, sorted(columns.names))
        if found and found[0].replace("_image1_", "_image2_") in columns.names
    }
    if len(aspects) == 1 and aspect not in aspects:
        aspects = {}
    own_aspects = {name.removeprefix("label_"): given[name] for name in label_columns(given)}
    if len(images) == 1:
        ratings |= own_aspects
    else:
        aspects |= {aspect: own_label(spec) for aspect, spec in own_aspects.items()}
    names = Names(texts, aspects, ratings)
    if len(texts.keys() & {"model_0", "model_1"}) == 1:
        raise FifaError("a generator of one image", do="name both: model_0=...,model_1=...")
    check_columns(columns, names.columns)
    return names


def refuse_names(names: Iterable[str], images: tuple[str, ...], file: str) -> None:
    """Raise `FifaError` where there are ``names`` in ``--columns`` that such a row has not."""
    if names := sorted(names):
        row = ("a ranking", "an image", "a pair")[len(images)]
        more = ": name its generator with model=COLUMN" if len(images) == 1 else ""
        raise FifaError(
            f"{', '.join(names)} in --columns, where a row is {row}",
            where=file,
            do=f"leave it out{more}",
        )


def shares(kind: str, aspect: str) -> Aspect:
    """The label by an aspect: of two columns of weights, or of counts of votes."""
    first, second = (f"{kind}_image{side}_{aspect}" for side in (1, 2))
    share = vote_share if kind == "votes" else weight_share
    return (first, second), lambda columns: share(columns, first, second)


def by_aspect(columns: dict[str, Text], aspect: str, file: str) -> Text:
    """Make the labels those of one aspect, and return those that they replace.

    Raises `FifaError` where there is no such aspect.
    """
    name, found = f"label_{aspect}", label_columns(columns)
    if name not in found:
        named = f"name its column with --columns {name}=COLUMN"
        there = f"take one of {', '.join(one.removeprefix('label_') for one in found)}"
        raise FifaError(
            f"no labels by the aspect {aspect!r}",
            where=file,
            do=there if found else f"the source has none: leave --label-aspect out, or {named}",
        )
    plain, columns["label"] = columns["label"], columns[name]
    return plain


def label_columns(names: Iterable[str]) -> list[str]:
    """Those of the names that are ``label_ASPECT``."""
    return [name for name in names if ASPECT.fullmatch(name)]


def labels_by_aspect(table: pa.Table | Mapping[str, Text]) -> list[str]:
    """`label_columns` of a table of pairs: float32, while a score of such a name is float64."""
    names = table.column_names if isinstance(table, pa.Table) else table
    return [name for name in label_columns(names) if table[name].type == pa.float32()]


def exchanged(sides: tuple[Text, Text], swapped: np.ndarray) -> tuple[Text, Text]:
    """Two columns of names [n], changed for one another in the rows that are ``swapped``."""
    both = pa.chunked_array(sides).unify_dictionaries()
    first, second = (chunk.indices for chunk in both.chunks)
    turn, names = pa.array(swapped), both.chunk(0).dictionary
    zero, one = pc.if_else(turn, second, first), pc.if_else(turn, first, second)
    return (
        pa.DictionaryArray.from_arrays(zero, names),
        pa.DictionaryArray.from_arrays(one, names),
    )
