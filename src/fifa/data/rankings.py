"""Data sets that rank a prompt's images: HPDv2, ImageReward and ImageRewardDB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa

from fifa.data.columns import Columns, has, text_array
from fifa.data.pairs import FilePairs, pair_columns
from fifa.data.records import outside

MAX_IMAGES = 256  # in one ranking: 32,640 pairs; a longer list is no ranking by people


@dataclass(frozen=True)
class Ranked:
    """A format whose rows are rankings.

    Parameters
    ----------
    name
        The format's name.
    needs
        Columns, each of which may be one of several.
    convert
        From a file's columns to its pairs.
    lacks
        A column that such a file does not have.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[Columns], FilePairs]
    lacks: str | None = None

    def fits(self, columns: Columns) -> bool:
        """True if the file has the columns."""
        if self.lacks in columns.names:
            return False
        return all(any(has(columns, name) for name in names) for names in self.needs)

    def read(self, columns: Columns, carried: dict[str, str]) -> FilePairs:
        """The pairs of one file; columns to be carried along are none of a ranking's."""
        return self.convert(columns)


@dataclass
class _Rankings:
    """A file's rankings, pair by pair.

    Parameters
    ----------
    pairs
        Row, prompt, both keys, both references, label and votes of each.
    scores
        The numbers of both images of each pair.
    rejected
        As in `FilePairs`.
    """

    pairs: list[tuple[Any, ...]] = field(default_factory=list)
    scores: list[tuple[dict[str, float], dict[str, float]]] = field(default_factory=list)
    rejected: list[tuple[int | None, str]] = field(default_factory=list)

    def add(
        self,
        row: int,
        prompt: Any,
        keys: Any,
        orders: Sequence[Any],
        refs: Sequence[str | None] | None = None,
        scores: Sequence[dict[str, float]] | None = None,
    ) -> None:
        """One prompt's images, ranked by people, or the reason why that is no ranking.

        The label of a pair is the share of annotators who rank side 0 better. ``orders`` are an
        annotator's ranks of the images each, lower is better; ``refs`` are as the keys if not
        given.
        """
        if not isinstance(prompt, str) or not prompt.strip():
            reason = "no prompt"
        elif isinstance(keys, str):
            reason = "a row an image, where this format has a row a prompt with all its images"
        elif not isinstance(keys, list) or not all(isinstance(key, str) and key for key in keys):
            reason = "an image is missing"
        elif not 2 <= len(keys) <= MAX_IMAGES:
            reason = f"{len(keys)} images of this prompt, where 2 to {MAX_IMAGES} make a ranking"
        elif not orders or not all(_is_order(order, len(keys)) for order in orders):
            reason = "the ranks do not match the images"
        else:
            ranks, refs = np.asarray(orders, np.float64), refs or [*map(outside, keys)]
            for i, j in combinations(range(len(keys)), 2):
                # label = (annotators with rank_i < rank_j + half of those with a tie) / annotators
                label = np.mean(0.5 * (np.sign(ranks[:, j] - ranks[:, i]) + 1.0))
                images = (keys[i], keys[j], refs[i], refs[j])
                self.pairs.append((row, prompt, *images, label, len(ranks)))
                self.scores.append((scores[i], scores[j]) if scores else ({}, {}))
            return
        self.rejected.append((row, reason))

    def file_pairs(self, file: str, names: Sequence[str] = ()) -> FilePairs:
        """All pairs, with the scores of these names.

        Rankings are often listed best first, so sides are assigned by the images' keys.
        """
        row, prompt, key_0, key_1, ref_0, ref_1, label, votes = (
            list(zip(*self.pairs, strict=True)) or [()] * 8
        )
        texts = [text_array(values) for values in (prompt, key_0, key_1, ref_0, ref_1)]
        scores = {
            f"{name}_{side}": pa.array([both[side][name] for both in self.scores], pa.float64())
            for name in names
            for side in (0, 1)
        }
        return FilePairs(
            file,
            pair_columns(row, texts[0], texts[1:3], texts[3:], label, votes),
            scores=scores,
            swaps=[(f"{name}_0", f"{name}_1") for name in names],
            winner_first=True,
            rejected=self.rejected,
        )


def two_paths(columns: Columns) -> FilePairs:
    """HPDv2's training set: two paths and a vote a row.

    human_preference is [1, 0] or [0, 1] beside the paths.
    """
    paths = _first(columns, "file_path", "image_path")
    numbers = columns.numeric()
    columns.load(["prompt", paths, "human_preference", *numbers], prompt="prompt")
    keys: list[list[str | None]] = [[], []]
    label = np.full(len(columns.rows), np.nan)
    wrong = {}
    for i, (images, shares) in enumerate(
        zip(columns.values(paths), columns.values("human_preference"), strict=True)
    ):
        bad = _not_two(images, shares)
        if bad:
            wrong[i] = bad
        else:
            label[i] = shares[0]
        for side in (0, 1):
            keys[side].append(None if bad else images[side])
    texts = [text_array(side) for side in keys]
    refs = [text_array(key and outside(key) for key in side) for side in keys]
    return FilePairs(
        columns.file,
        pair_columns(columns.rows, columns.text("prompt"), texts, refs, label),
        scores={name: pa.array(columns.number(name)) for name in numbers},
        wrong=wrong,
    )


def ranked_paths(columns: Columns) -> FilePairs:
    """HPDv2's test set: images, every annotator's ranks and the ranks of all of them together."""
    images = _first(columns, "image_path", "file_path")
    given = [name for name in ("rank", "raw_annotations") if name in columns.names]
    columns.load(["prompt", images, *given])
    values = {name: columns.values(name) for name in given}
    found = _Rankings()
    for i, (prompt, paths) in enumerate(
        zip(columns.values("prompt"), columns.values(images), strict=True)
    ):
        notes = values["raw_annotations"][i] if "raw_annotations" in values else None
        orders = [note.get("rank") if isinstance(note, dict) else None for note in notes or ()]
        if not orders and "rank" in values:
            orders = [values["rank"][i]]
        found.add(int(columns.rows[i]), prompt, paths, orders)
    return found.file_pairs(columns.file)


def generations(columns: Columns) -> FilePairs:
    """ImageReward's own json: generations and their ranking."""
    columns.load(["prompt", "generations", "ranking"])
    found = _Rankings()
    values = (columns.values(name) for name in ("prompt", "generations", "ranking"))
    for row, prompt, images, order in zip(columns.rows.tolist(), *values, strict=True):
        found.add(row, prompt, images, [order])
    return found.file_pairs(columns.file)


def one_image_a_row(columns: Columns) -> FilePairs:
    """ImageRewardDB: the images of one prompt_id make a ranking, with ratings of each."""
    image = _first(columns, "image_path", "image")
    form = columns.image(image)
    cell = form != "text" and columns.holds_bytes(image)
    leaf = f"{image}.path" if form == "struct" else image
    ratings = [name for name in columns.numeric() if name.endswith("_rating")]
    wanted = ["prompt_id", "prompt", "rank", *ratings]
    columns.load(wanted if form == "cell" else [*wanted, leaf])
    paths = [None] * len(columns.rows) if form == "cell" else columns.values(leaf)
    prompts, groups = columns.values("prompt"), columns.values("prompt_id")
    rank = columns.number("rank")
    numbers = {name: columns.number(name) for name in ratings}
    found = _Rankings()
    members: dict[str, list[int]] = {}
    keys: dict[int, tuple[str, str | None]] = {}
    for i, row in enumerate(columns.rows.tolist()):
        path = paths[i] if isinstance(paths[i], str) and paths[i] else None
        if cell:
            named = path if path and "/" in path else f"{columns.file}#{row}:{image}"
            keys[i] = named, f"cell:{row}:{image}"
        elif path:
            keys[i] = (path, outside(path))
        if not np.isfinite(rank[i]) or groups[i] is None or i not in keys:
            found.rejected.append((row, "no rank, prompt_id or image"))
        else:
            members.setdefault(str(groups[i]), []).append(i)
    for own in members.values():
        found.add(
            int(columns.rows[own[0]]),
            prompts[own[0]],
            [keys[i][0] for i in own],
            [[float(rank[i]) for i in own]],
            [keys[i][1] for i in own],
            [{name: float(values[i]) for name, values in numbers.items()} for i in own],
        )
    pairs = found.file_pairs(columns.file, sorted(ratings))
    pairs.cells = (image, image) if cell else None
    pairs.groups = frozenset(members)
    return pairs


def _is_order(order: Any, n: int) -> bool:
    if not isinstance(order, list) or len(order) != n:
        return False
    return all(isinstance(rank, int | float) and -1e9 < rank < 1e9 for rank in order)


def _not_two(images: Any, shares: Any) -> str:
    if not isinstance(images, list) or len(images) != 2:
        return "it does not name two images"
    if not all(isinstance(key, str) for key in images):
        return "an image is missing"
    if not _is_order(shares, 2) or abs(sum(shares) - 1.0) > 1e-6:
        return "human_preference does not sum to 1"
    return ""


def _first(columns: Columns, *names: str) -> str:
    return next(name for name in names if name in columns.names)
