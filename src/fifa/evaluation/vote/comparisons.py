"""What is voted on: two models' images of one prompt and seed, and each voter's order of them."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from fifa.data.decode import BadImage
from fifa.data.images import file_images, read
from fifa.data.source import inside
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER, INDEX, read_index
from fifa.shards.files import digest

COMPARE, REPEAT, CHECK = "compare", "repeat", "check"
GAP = 5  # trials between a comparison and its repeat, where there are enough


@dataclass(frozen=True)
class Comparison:
    """Two models' images of the same prompt and seed.

    Parameters
    ----------
    key
        16 hex characters that name the two models, the prompt and the seed.
    ours, theirs
        The models: the later one of the index first, so that a base is always "theirs".
    prompt_id, prompt, seed, category
        Of both; the category may be None.
    file_0, file_1
        The image of ours and of theirs, below the evaluation's folder.
    """

    key: str
    ours: str
    theirs: str
    prompt_id: str
    prompt: str
    seed: int
    category: str | None
    file_0: str
    file_1: str


def load_comparisons(run: str | Path, models: Sequence[str] = ()) -> list[Comparison]:
    """Every two models' images of the same prompt and seed, in the order of the index.

    Parameters
    ----------
    run
        A run folder with an index of images (`fifa.evaluation.generate.read_index`).
    models
        Compare these only; all if empty.

    Raises
    ------
    FifaError
        Where the index is missing or broken, an image is not there or outside of the folder, or
        there is nothing to compare.
    """
    folder = Path(run) / FOLDER
    where, rows = str(folder / INDEX), read_index(folder).to_pylist()
    known = list(dict.fromkeys(row["model"] for row in rows))
    unknown = [model for model in models if model not in known]
    if unknown:
        raise FifaError(
            f"no model {', '.join(map(repr, unknown))} here",
            where=where,
            do=f"there are {', '.join(known)}",
        )
    wanted = [model for model in known if not models or model in models]
    by_prompt: dict[tuple[str, int], dict[str, dict[str, Any]]] = defaultdict(dict)
    for row in rows:
        images = by_prompt[row["prompt_id"], row["seed"]]
        if row["model"] in images:
            raise FifaError(
                f"two images of model {row['model']!r}, prompt {row['prompt_id']!r}, "
                f"seed {row['seed']}",
                where=where,
                do="run `fifa evaluate` again",
            )
        images[row["model"]] = row
    found = [
        _comparison(images[theirs], images[ours])
        for images in by_prompt.values()
        for theirs, ours in combinations([model for model in wanted if model in images], 2)
    ]
    if not found:
        raise FifaError(
            "nothing to compare: no prompt and seed has images of two models",
            where=where,
            do="run `fifa evaluate` with a base and at least one tuned model",
        )
    _check_files(folder, found)
    return found


def draw_comparisons(comparisons: Sequence[Comparison], count: int, seed: int) -> list[Comparison]:
    """``count`` comparisons, spread over models and prompts before a second seed of any."""
    order = np.random.default_rng(seed).permutation(len(comparisons)).tolist()
    seen: Counter[tuple[str, str, str]] = Counter()
    turn = {}
    for i in order:
        one = comparisons[i]
        turn[i] = seen[one.ours, one.theirs, one.prompt_id]
        seen[one.ours, one.theirs, one.prompt_id] += 1
    chosen = sorted(order, key=lambda i: turn[i])[:count]
    return [comparisons[i] for i in sorted(chosen)]


def read_file(folder: Path, name: str) -> bytes:
    """The bytes of an image below ``folder``; no path and no link leads out of it.

    Raises `FifaError`.
    """
    ((_, data),) = read(file_images(folder, [name]))
    if isinstance(data, BadImage):
        raise FifaError(f"an image cannot be read: {data.reason}", where=f"{folder}: {name}")
    return data


def _comparison(theirs: dict[str, Any], ours: dict[str, Any]) -> Comparison:
    return Comparison(
        key=digest([ours["model"], theirs["model"], ours["prompt_id"], ours["seed"]]),
        ours=ours["model"],
        theirs=theirs["model"],
        **{name: ours[name] for name in ("prompt_id", "prompt", "seed", "category")},
        file_0=ours["file"],
        file_1=theirs["file"],
    )


def _check_files(folder: Path, found: Sequence[Comparison]) -> None:
    missing, root = [], folder.resolve()
    for name in dict.fromkeys(name for one in found for name in (one.file_0, one.file_1)):
        try:
            path = (root / name).resolve()
            outside = not inside(root, path)
        except (OSError, ValueError, RuntimeError):  # a name that no path can have, a loop
            outside = True
        if outside:
            raise FifaError(
                f"the path of an image leaves the folder: {name!r}",
                where=str(folder / INDEX),
                do="take an index that `fifa evaluate` wrote",
            )
        if not path.is_file():
            missing.append(name)
    if missing:
        raise FifaError(
            f"{len(missing):,} images are missing, the first: {missing[0]}",
            where=str(folder),
            do="run `fifa evaluate` again: it makes the missing ones",
        )


@dataclass(frozen=True)
class Trial:
    """One pair that a voter sees.

    Parameters
    ----------
    type
        `COMPARE`; `REPEAT`, a comparison shown before, its sides swapped; `CHECK`, an image
        beside a destroyed version of itself.
    comparison
        The comparison's key.
    left
        Which image is on the left: 0 is ours, 1 theirs. Of a check: 0 is the intact one.
    image
        Of a check: which of the comparison's images.
    """

    type: str
    comparison: str
    left: int
    image: int = 0


def draw_trials(
    keys: Sequence[str],
    rng: np.random.Generator,
    hidden: np.random.Generator | None = None,
    *,
    repeats: float = 0,
    checks: float = 0,
) -> list[Trial]:
    """Every comparison once, in random order and on random sides.

    Parameters
    ----------
    keys
        The comparisons' keys.
    rng, hidden
        Of the voter: for the order, which voters see, and for the sides, which they must not
        work out from it (default: of the same).
    repeats, checks
        So many repeats and checks for every comparison, from 0 to 1. They are spread over the
        whole order, so that a voter who stops early has seen some.
    """
    n = len(keys)
    order, sides = rng.permutation(n).tolist(), (hidden or rng).integers(0, 2, n).tolist()
    gap = min(GAP, max(1, n // 2))
    again, check = _due(repeats, rng), _due(checks, rng)
    trials: list[Trial] = []
    open_to_repeat: list[tuple[int, Trial]] = []  # where a comparison stands, not repeated yet
    owed = 0
    for of, left in zip(order, sides, strict=True):
        open_to_repeat.append((len(trials), Trial(COMPARE, keys[of], left)))
        trials.append(open_to_repeat[-1][1])
        if next(check):
            other = keys[int(rng.integers(n))]
            trials.append(Trial(CHECK, other, int(rng.integers(2)), int(rng.integers(2))))
        owed += next(again)
        ready = [i for i, (at, _) in enumerate(open_to_repeat) if at + gap <= len(trials)]
        if owed and ready:
            _, first = open_to_repeat.pop(ready[int(rng.integers(len(ready)))])
            trials.append(Trial(REPEAT, first.comparison, 1 - first.left))
            owed -= 1
    return trials


def _due(share: float, rng: np.random.Generator) -> Iterator[bool]:
    """True for ``share`` of the calls, evenly spread from a random start."""
    owed = float(rng.random())
    while True:
        owed += share
        yield owed >= 1
        owed -= owed >= 1
