"""Data sets that rank a prompt's images: HPDv2, ImageReward and ImageRewardDB."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fifa.data.batch import Batch, Ranking, from_rankings
from fifa.data.columns import Frame, text_array
from fifa.data.formats import has

MAX_IMAGES = 256  # in one ranking: 32,640 pairs; a longer list is no ranking by people

Rejected = list[tuple[int | None, str]]


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
        From a frame to its pairs.
    lacks
        A column that such a file does not have.
    """

    name: str
    needs: tuple[tuple[str, ...], ...]
    convert: Callable[[Frame], Batch]
    lacks: str | None = None

    def fits(self, frame: Frame) -> bool:
        """True if the frame has the columns."""
        if self.lacks in frame.names:
            return False
        return all(any(has(frame, name) for name in names) for names in self.needs)


def _hpdv2_train(frame: Frame) -> Batch:
    """Two paths and a vote a row; human_preference is [1, 0] or [0, 1] beside the paths."""
    paths = _first(frame, "file_path", "image_path")
    numbers = frame.numeric()
    frame.load(["prompt", paths, "human_preference", *numbers], prompt="prompt")
    keys: list[list[str | None]] = [[], []]
    label = np.full(len(frame.rows), np.nan)
    wrong = {}
    for i, (images, shares) in enumerate(
        zip(frame.values(paths), frame.values("human_preference"), strict=True)
    ):
        bad = _not_two(images, shares)
        if bad:
            wrong[i] = bad
        else:
            label[i] = shares[0]
        for side in (0, 1):
            keys[side].append(None if bad else images[side])
    columns = (text_array(keys[0]), text_array(keys[1]))
    return Batch(
        file=frame.file,
        row=frame.rows,
        prompt=frame.text("prompt"),
        keys=columns,
        refs=columns,
        label=label,
        votes=np.ones(len(frame.rows), np.int32),
        wrong=wrong,
        scores={name: frame.number(name) for name in numbers},
    )


def _hpdv2_test(frame: Frame) -> Batch:
    """A list of images, every annotator's ranks and the ranks of all of them together."""
    images = _first(frame, "image_path", "file_path")
    columns = [name for name in ("rank", "raw_annotations") if name in frame.names]
    frame.load(["prompt", images, *columns])
    values = {name: frame.values(name) for name in columns}
    rankings: list[Ranking] = []
    rejected: Rejected = []
    for i, (prompt, paths) in enumerate(
        zip(frame.values("prompt"), frame.values(images), strict=True)
    ):
        notes = values["raw_annotations"][i] if "raw_annotations" in values else None
        orders = [note.get("rank") if isinstance(note, dict) else None for note in notes or ()]
        if not orders and "rank" in values:
            orders = [values["rank"][i]]
        _keep(int(frame.rows[i]), prompt, paths, orders, rankings, rejected)
    return from_rankings(frame.file, rankings, rejected)


def _imagereward(frame: Frame) -> Batch:
    """ImageReward's own json: generations and their ranking."""
    frame.load(["prompt", "generations", "ranking"])
    rankings: list[Ranking] = []
    rejected: Rejected = []
    columns = (frame.values(name) for name in ("prompt", "generations", "ranking"))
    for row, prompt, images, order in zip(frame.rows.tolist(), *columns, strict=True):
        _keep(row, prompt, images, [order], rankings, rejected)
    return from_rankings(frame.file, rankings, rejected)


def _imagerewarddb(frame: Frame) -> Batch:
    """A row an image; the images of one prompt_id make a ranking, with ratings of each."""
    image = _first(frame, "image_path", "image")
    cell = frame.image(image) != "text" and frame.holds_bytes(image)
    leaf = f"{image}.path" if frame.image(image) == "struct" else image
    ratings = [name for name in frame.numeric() if name.endswith("_rating")]
    wanted = ["prompt_id", "prompt", "rank", *ratings]
    frame.load(wanted if frame.image(image) == "cell" else [*wanted, leaf])
    paths = [None] * len(frame.rows) if frame.image(image) == "cell" else frame.values(leaf)
    prompts, groups = frame.values("prompt"), frame.values("prompt_id")
    rank = frame.number("rank")
    numbers = {name: frame.number(name) for name in ratings}
    rejected: Rejected = []
    found: dict[str, list[int]] = {}
    keys: dict[int, tuple[str, str | None]] = {}
    for i, row in enumerate(frame.rows.tolist()):
        path = paths[i] if isinstance(paths[i], str) and paths[i] else None
        if cell:
            named = path is not None and "/" in path
            keys[i] = (path if named and path else f"{frame.file}#{row}:{image}"), f"cell:{row}"
        elif path:
            keys[i] = (path, path)
        if not np.isfinite(rank[i]) or groups[i] is None or i not in keys:
            rejected.append((row, "no rank, prompt_id or image"))
        else:
            found.setdefault(str(groups[i]), []).append(i)
    rankings: list[Ranking] = []
    for members in found.values():
        first = members[0]
        ranking = _keep(
            int(frame.rows[first]),
            prompts[first],
            [keys[i][0] for i in members],
            [[float(rank[i]) for i in members]],
            rankings,
            rejected,
        )
        if ranking:
            refs = [f"{keys[i][1]}:{image}" if cell else keys[i][1] for i in members]
            scores = {name: [float(n[i]) for i in members] for name, n in numbers.items()}
            rankings[-1] = Ranking(
                ranking.row, ranking.prompt, ranking.keys, refs, ranking.orders, scores
            )
    batch = from_rankings(frame.file, rankings, rejected)
    batch.cells = (image, image) if cell else None
    return batch


def _keep(
    row: int,
    prompt: Any,
    images: Any,
    orders: Sequence[Any],
    rankings: list[Ranking],
    rejected: Rejected,
) -> Ranking | None:
    """Add a ranking, or the reason why it is none."""
    reason = None
    if not isinstance(prompt, str) or not prompt.strip():
        reason = "no prompt"
    elif not isinstance(images, list) or not all(isinstance(key, str) and key for key in images):
        reason = "an image is missing"
    elif not 2 <= len(images) <= MAX_IMAGES:
        reason = f"{len(images)} images of this prompt, where 2 to {MAX_IMAGES} make a ranking"
    elif not orders or not all(_is_order(order, len(images)) for order in orders):
        reason = "the ranks do not match the images"
    if reason:
        rejected.append((row, reason))
        return None
    rankings.append(Ranking(row, prompt, images, images, orders))
    return rankings[-1]


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


def _first(frame: Frame, *names: str) -> str:
    return next(name for name in names if name in frame.names)


# In this order: the first that fits is the file's format.
RANKINGS = (
    Ranked(
        "hpdv2", (("prompt",), ("file_path", "image_path"), ("human_preference",)), _hpdv2_train
    ),
    Ranked(
        "hpdv2",
        (("prompt",), ("image_path", "file_path"), ("raw_annotations", "rank")),
        _hpdv2_test,
        lacks="prompt_id",
    ),
    Ranked("imagereward", (("prompt",), ("generations",), ("ranking",)), _imagereward),
    Ranked(
        "imagereward",
        (("prompt_id",), ("prompt",), ("rank",), ("image", "image_path")),
        _imagerewarddb,
    ),
)
