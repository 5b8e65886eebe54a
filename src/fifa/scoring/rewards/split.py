"""Folds over prompts, so that nothing is judged by a model that saw its label."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Reward
from fifa.console import echo
from fifa.errors import FifaError
from fifa.shards.files import digest

Integers = npt.NDArray[np.int64]


def prompt_folds(
    prompt_ids: pa.ChunkedArray | pa.Array,
    prompt: Integers,
    images: Integers,
    *,
    folds: int = Reward.folds,
    seed: int = 0,
) -> Integers:
    """A fold for every prompt.

    Prompts that share an image go together, for a person's verdict on an image under one prompt
    says something of it under another. They are dealt out in the order of a hash of ``(seed,
    prompt_id)``, each group to the fold with the fewest pairs: the same prompts with the same
    pairs get the same folds, wherever they stand in the table. Where so many prompts hang
    together that a group would be larger than two folds, groups are given up, with a warning.

    Parameters
    ----------
    prompt_ids
        `Pairs.prompts`' ids, [prompts].
    prompt
        Of every pair: its row in ``prompt_ids``, int64 [pairs].
    images
        Of every pair: what tells its two images apart, int64 [pairs, 2].
    folds
        How many, at least 2.
    seed
        Another one gives other folds.

    Returns
    -------
    numpy.ndarray
        int64 [prompts], 0 to folds - 1; -1 for a prompt without pairs.

    Raises `FifaError` for fewer prompts with pairs than folds.
    """
    present = np.unique(prompt)
    if folds < 2 or len(present) < folds:
        raise FifaError(
            f"{folds} folds need as many prompts; there are {len(present)}",
            do="fewer folds (at least 2), or more data",
        )
    pairs_of = np.bincount(prompt, minlength=len(prompt_ids))
    group = _groups(prompt, images, len(prompt_ids))
    size = np.bincount(group, weights=pairs_of)
    several = len(np.unique(group[present])) < folds
    if several or size.max() > max(2 * len(prompt) / folds, pairs_of.max()):
        echo("too many prompts share images: folds keep prompts together, but not images")
        group = np.arange(len(prompt_ids))
    ids = prompt_ids.to_pylist()
    rank = {int(p): digest(seed, ids[p]) for p in present}
    members: dict[int, list[int]] = {}
    for p in sorted(rank, key=lambda p: (rank[p], ids[p])):
        members.setdefault(int(group[p]), []).append(p)
    fold = np.full(len(prompt_ids), -1, np.int64)
    load = np.zeros(folds, np.int64)
    for prompts in members.values():
        target = int(load.argmin())
        fold[prompts] = target
        load[target] += pairs_of[prompts].sum()
    return fold


def _groups(prompt: Integers, images: Integers, prompts: int) -> Integers:
    """The smallest prompt that each prompt hangs together with through shared images."""
    group = np.arange(prompts)
    _, image = np.unique(images, return_inverse=True)
    image = image.reshape(-1)
    of_slot = np.repeat(prompt, 2)
    while True:
        smallest = np.full(int(image.max()) + 1, prompts)
        np.minimum.at(smallest, image, group[of_slot])
        new = group.copy()
        np.minimum.at(new, of_slot, smallest[image])
        new = np.minimum(new, new[new])  # a group's group: halves the rounds
        if np.array_equal(new, group):
            return group
        group = new
