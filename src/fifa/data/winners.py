"""Tables of no known data set whose own columns say who won: `image_a`, `image_b`, `winner`: A."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any, TypeAlias

from fifa.data.columns import Columns, has, side_pairs
from fifa.data.labels import NO_VALUE, TIE, Labels, by_row, looks_like, other_scale
from fifa.data.records import encodable

Sides: TypeAlias = tuple[str, str]

PROMPTS = ("prompt", "caption", "text")
IMAGES: tuple[Sides, ...] = (
    ("image_0", "image_1"),
    ("image_1", "image_2"),
    ("image0", "image1"),
    ("image1", "image2"),
    ("image_a", "image_b"),
    ("left_image", "right_image"),
    ("image_left", "image_right"),
)
MODELS: tuple[Sides, ...] = (("model_a", "model_b"), ("left_model", "right_model"))
SAID = "pref|win|label|choice|vote|better|score|weight"
WINNERS = ("winner", "preference", "preferred", "choice", "vote")


def find_winner(columns: Columns) -> tuple[str, Sides, str] | None:
    """The columns of the prompt, the images and the winner, where the table has one of each."""
    prompts = [name for name in PROMPTS if name in columns.names]
    images = [names for names in IMAGES if all(has(columns, name) for name in names)]
    winners = [name for name in WINNERS if name in columns.names]
    if len(images) == 1 and prompts and len(winners) == 1:
        return prompts[0], images[0], winners[0]
    return None


def named_winner(columns: Columns, prompt: str, images: Sides, column: str) -> Labels:
    """Labels from words that name a side as the table's own columns do, or a tie.

    A word names a side if it is the name of that side's image or model (``image_a``, ``model_a``),
    or the word in which the two names differ (``a``, ``left``). A number is no such word: 1 may be
    the first image, the second one, or the first one's share. Raises `FifaError` for the whole file
    where a value is anything else.
    """
    own = [images, *(names for names in MODELS if all(name in columns.names for name in names))]
    meaning = {
        _plain(word): 1.0 - side for names in own for side in (0, 1) for word in _words(names, side)
    }

    def named(value: Any) -> tuple[float, float] | str:
        text = "" if value is None else str(value).strip().lower()
        if text in NO_VALUE:
            return "no label"
        label = 0.5 if TIE.fullmatch(text) else meaning.get(_plain(text))
        return "" if label is None else (label, 1)

    values = columns.values(column)
    labels = by_row(named, values)
    if "" in labels.wrong.values():
        given = [value for value in values if value is not None]
        counts = Counter(str(value).strip().lower()[:40] for value in given)
        what, option = looks_like(counts, column)
        what = f"{what}, and not the names of the columns {images[0]} and {images[1]}"
        option = f"--columns prompt={prompt},image_0={images[0]},image_1={images[1]},{option}"
        do = "name the values in the other order if it is the other image"
        raise other_scale(column, given, columns.file, do, looks=(what, option))
    return labels


def _words(names: Sides, side: int) -> list[str]:
    """What a side of these columns is called: ``image_a``, ``a`` and ``model_a``; ``image_1``."""
    words = [re.split(r"[^A-Za-z]+", name) for name in names]
    own = [word for word in words[side] if word and word not in words[1 - side]]
    return [names[side], *own, *(f"model_{word}" for word in own)]


def _plain(word: str) -> str:
    return re.sub(r"[\W_]+", "", word.lower())


def likely_columns(columns: Columns) -> str:
    """What to say to a table that may have a row a pair: the option that would read it."""
    texts = sorted(columns.names.difference(columns.numeric()))
    images = [name for name in texts if re.search("image|img|jpg|pic", name)]
    prompts = [name for name in PROMPTS if name in columns.names]
    if len(images) != 2 or not prompts:
        return ""
    said = [n for n in sorted(columns.names) if re.search(SAID, n)]
    said = [name for name in said if name not in images]
    option = "label=:first if the first image is always the better one"
    if said:
        columns.load(said)
        values = [value for value in columns.values(said[0]) if value is not None][:1000]
        seen = Counter(str(value).strip().lower()[:40] for value in values)
        _, option = looks_like(seen, said[0], side_pairs(said))
        option = f"label={said[0]} if true means image_0" if columns.truths(said[0]) else option
    names = f"prompt={prompts[0]},image_0={images[0]},image_1={images[1]}"
    return encodable(f" (it looks like a row a pair: --columns {names},{option})")
