"""What every format is turned into: one file's pairs, before they have ids."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import pyarrow as pa

from fifa.data.columns import Text, text_array

# Words by which the columns of the two sides tell themselves apart.
SIDES = (
    ("0", "1"),
    ("1", "2"),
    ("a", "b"),
    ("chosen", "rejected"),
    ("winner", "loser"),
    ("left", "right"),
)


@dataclass
class Batch:
    """One file's pairs, as the source has them: n rows.

    Parameters
    ----------
    file
        The source file, relative to the root.
    row
        int64 [n], the rows in it.
    prompt
        Strings [n], maybe dictionary-encoded; null where there is no text.
    keys
        Strings [n] a side, the images' keys; null where an image is missing.
    refs
        Strings [n] a side: path, URL or tar member; null for a cell of the row.
    label
        float64 [n], the probability that a person prefers side 0; NaN where there is none.
    votes
        int32 [n], the votes in each label.
    wrong
        Rows (positions in the batch) that are to be rejected, and why.
    scores
        float64 [n] a column.
    extras
        Further columns that the user named, as they are.
    swaps
        Columns of ``scores`` and ``extras`` that change places when the sides do.
    winner_first
        The source's order gives the winner away: sides are assigned by the images' keys.
    cells
        The columns with image bytes; None without.
    rejected
        Rows that never became a pair; row None is the whole file.
    """

    file: str
    row: np.ndarray
    prompt: Text
    keys: tuple[Text, Text]
    refs: tuple[Text, Text]
    label: np.ndarray
    votes: np.ndarray
    wrong: dict[int, str] = field(default_factory=dict)
    scores: dict[str, np.ndarray] = field(default_factory=dict)
    extras: dict[str, pa.Array] = field(default_factory=dict)
    swaps: list[tuple[str, str]] = field(default_factory=list)
    winner_first: bool = False
    cells: tuple[str, str] | None = None
    rejected: list[tuple[int | None, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.row)


@dataclass
class Ranking:
    """One prompt's images, ranked by people.

    Parameters
    ----------
    row
        The row in the file.
    prompt
        The prompt.
    keys, refs
        An image each; a ref None is a cell of the row ``rows`` names.
    orders
        An annotator each: the images' ranks, lower is better.
    scores
        Numbers of each image, by name.
    """

    row: int
    prompt: str
    keys: Sequence[str]
    refs: Sequence[str | None]
    orders: Sequence[Sequence[float]]
    scores: dict[str, list[float]] = field(default_factory=dict)


def from_rankings(
    file: str, rankings: list[Ranking], rejected: list[tuple[int | None, str]]
) -> Batch:
    """All pairs of every ranking; the label is the share of annotators who rank side 0 better.

    Rankings are often listed best first, so sides are assigned by the images' keys.
    """
    out: dict[str, list[object]] = {
        name: [] for name in ("row", "prompt", "k0", "k1", "r0", "r1", "label", "votes")
    }
    names = sorted({name for ranking in rankings for name in ranking.scores})
    scores: dict[str, list[float]] = {f"{name}_{side}": [] for name in names for side in (0, 1)}
    for ranking in rankings:
        ranks = np.asarray(ranking.orders, np.float64)
        for i, j in combinations(range(len(ranking.keys)), 2):
            # label = (annotators with rank_i < rank_j + half of those with a tie) / annotators
            label = np.mean(0.5 * (np.sign(ranks[:, j] - ranks[:, i]) + 1.0))
            out["row"].append(ranking.row)
            out["prompt"].append(ranking.prompt)
            for side, image in enumerate((i, j)):
                out[f"k{side}"].append(ranking.keys[image])
                out[f"r{side}"].append(ranking.refs[image])
                for name in names:
                    values = ranking.scores.get(name)
                    scores[f"{name}_{side}"].append(values[image] if values else float("nan"))
            out["label"].append(label)
            out["votes"].append(len(ranks))
    return Batch(
        file=file,
        row=np.asarray(out["row"], np.int64),
        prompt=text_array(out["prompt"]),
        keys=(text_array(out["k0"]), text_array(out["k1"])),
        refs=(text_array(out["r0"]), text_array(out["r1"])),
        label=np.asarray(out["label"], np.float64),
        votes=np.asarray(out["votes"], np.int32),
        scores={name: np.asarray(values, np.float64) for name, values in scores.items()},
        swaps=[(f"{name}_0", f"{name}_1") for name in names],
        winner_first=True,
        rejected=rejected,
    )


def side_pairs(names: Sequence[str]) -> list[tuple[str, str]]:
    """Columns that hold the same thing for side 0 and side 1: their names differ in one word.

    ``hpsv2_0`` goes with ``hpsv2_1``, ``chosen_score`` with ``rejected_score``, ``image1_model``
    with ``image2_model``. Every name is used once, the first of `SIDES` that fits wins.
    """
    left = list(names)
    pairs = []
    for zero, one in SIDES:
        edge = r"(?<![0-9])" if zero.isdigit() else r"(?<![A-Za-z])"
        after = r"(?![0-9])" if zero.isdigit() else r"(?![A-Za-z])"
        for name in list(left):
            for match in re.finditer(edge + zero + after, name):
                other = name[: match.start()] + one + name[match.end() :]
                if name in left and other in left:
                    pairs.append((name, other))
                    left.remove(name)
                    left.remove(other)
    return pairs
