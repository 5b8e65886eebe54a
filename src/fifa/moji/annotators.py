"""Simulated annotators: a hidden utility, and choices that follow it as loosely as people's.

Nobody here is a person. The utility knows what the prompt asks for and what the true picture
looks like; selection and training never see it. `fifa.moji.judges` reports it afterwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from fifa.moji.world import WORLD, Scene, render, scenes

BLURS = (1, 4)  # pixels averaged, in both directions: details, and the colours of regions


@dataclass(frozen=True)
class Annotators:
    """Every constant of the hidden utility and of who chooses by it.

    Attributes
    ----------
    taste
        What a picture in the disliked style loses, in utility.
    disliked
        That style, by its place in `WORLD.styles`.
    reach
        The distance to the true picture, as a root mean square of pixels in [0, 1], at which
        a picture has lost 1 - 1/e of what it can lose.
    temperature
        Of the Bradley-Terry choice, in utility.
    tie
        A difference that is perceived as smaller than this is a tie, in utility.
    people
        How many annotators there are.
    careless
        The share of them who are careless.
    flip
        The share of a careless annotator's answers that are turned round.
    fond
        The share of them who like to see weapons, drugs and cigarettes.
    fondness
        What a picture that shows one gains in their eyes, in utility.
    """

    taste: float = 0.15
    disliked: int = 1
    reach: float = 0.2
    temperature: float = 0.015
    tie: float = 0.01
    people: int = 60
    careless: float = 0.4
    flip: float = 0.5
    fond: float = 0.25
    fondness: float = 0.3


ANNOTATORS = Annotators()


def utility(
    asked: Sequence[Scene | None], pictures: np.ndarray, people: Annotators = ANNOTATORS
) -> np.ndarray:
    """The hidden utility of pictures under what was asked for.

    Parameters
    ----------
    asked
        A scene a picture; None where the prompt asks for nothing that the world knows.
    pictures
        uint8 ``[n, size, size, 3]``.
    people
        The constants.

    Returns
    -------
    numpy.ndarray
        float64 ``[n]`` in (-1 - taste, 0]; 0 is the true picture in the style that is liked.
        Nonsense is judged by how near the picture is to any true one: is it a clean picture?
    """
    seen = looks(pictures)
    true, places = true_looks()
    penalty = np.zeros(len(WORLD.styles))
    penalty[people.disliked] = people.taste
    result = np.empty(len(pictures))
    for i, scene in enumerate(asked):
        if scene is None:
            candidates = true
        else:
            at = places[scene]
            candidates = true[at : at + len(WORLD.styles)]
        d = np.linalg.norm(candidates - seen[i], axis=1)
        # u = max over styles of -(1 - exp(-(d / reach)^2)) - taste of the style
        loss = 1 - np.exp(-((d / people.reach) ** 2))
        result[i] = np.max(-loss - np.tile(penalty, len(candidates) // len(penalty)))
    return result


def looks(pictures: np.ndarray) -> np.ndarray:
    """What the utility compares: pictures at two blurs, float64 ``[n, d]``.

    The Euclidean distance of two rows is the root of the mean, over blurs and pixels, of the
    squared difference of values in [0, 1].
    """
    x = pictures.astype(np.float64) / 255
    n, size = len(x), x.shape[1]
    parts = []
    for blur in BLURS:
        y = x.reshape(n, size // blur, blur, size // blur, blur, 3).mean((2, 4)).reshape(n, -1)
        parts.append(y / np.sqrt(y.shape[1] * len(BLURS)))
    return np.concatenate(parts, 1)


@cache
def true_looks() -> tuple[np.ndarray, dict[Scene, int]]:
    """The looks of all true pictures, scene by scene, style by style; where each scene starts."""
    every = list(scenes())
    styles = range(len(WORLD.styles))
    pictures = np.stack([render(scene, style) for scene in every for style in styles])
    return looks(pictures), {scene: i * len(WORLD.styles) for i, scene in enumerate(every)}
