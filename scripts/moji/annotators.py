"""What simulated annotators choose, and what a picture shows: for the builders of the feedback."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fifa.moji.annotators import ANNOTATORS, Annotators, looks, true_looks
from fifa.moji.world import WORLD


@dataclass(frozen=True)
class Shown:
    """The nearest true picture to each of n pictures.

    Attributes
    ----------
    object, background, style
        Its places in `WORLD`, int64 ``[n]``.
    distance
        How far it is, float64 ``[n]``.
    unsafe
        Whether its object is a weapon, a drug or a cigarette, bool ``[n]``.
    """

    object: np.ndarray
    background: np.ndarray
    style: np.ndarray
    distance: np.ndarray
    unsafe: np.ndarray


def shown(pictures: np.ndarray) -> Shown:
    """Which true picture each picture comes nearest to, uint8 ``[n, size, size, 3]``."""
    true, _ = true_looks()
    squares = (true**2).sum(1)
    nearest = np.empty(len(pictures), np.int64)
    d = np.empty(len(pictures))
    for start in range(0, len(pictures), 512):
        part = slice(start, start + 512)
        seen = looks(pictures[part])
        # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b, and |a|^2 is the same for all b
        nearest[part] = (squares - 2 * seen @ true.T).argmin(1)
        d[part] = np.linalg.norm(seen - true[nearest[part]], axis=1)
    scene, style = np.divmod(nearest, len(WORLD.styles))
    thing, ground = np.divmod(scene, len(WORLD.backgrounds))
    bad = np.array([bool(each.unsafe) for each in WORLD.objects])
    return Shown(thing, ground, style, d, bad[thing])


def choices(
    u0: np.ndarray,
    u1: np.ndarray,
    unsafe0: np.ndarray,
    unsafe1: np.ndarray,
    person: np.ndarray,
    rng: np.random.Generator,
    people: Annotators = ANNOTATORS,
) -> np.ndarray:
    """What annotators choose: 1 for the first picture, 0 for the second, 0.5 for a tie.

    Parameters
    ----------
    u0, u1
        The hidden utilities of both pictures, float64 ``[n]``.
    unsafe0, unsafe1
        Whether each shows a weapon, a drug or a cigarette, bool ``[n]``.
    person
        Who is asked, int64 ``[n]`` in ``range(people.people)``: the first are the careless
        ones, the last are the fond ones.
    rng
        The chance in it.
    people
        The constants.

    Returns
    -------
    numpy.ndarray
        float64 ``[n]``.
    """
    fond = person >= people.people - round(people.fond * people.people)
    gain = people.fondness * fond
    difference = (u0 + gain * unsafe0) - (u1 + gain * unsafe1)
    # Bradley-Terry: P(first) = sigmoid(difference / temperature), as logistic noise on it
    felt = difference + people.temperature * rng.logistic(size=len(difference))
    answer = np.where(felt > 0, 1.0, 0.0)
    careless = person < round(people.careless * people.people)
    turned = careless & (rng.random(len(answer)) < people.flip)
    answer = np.where(turned, 1 - answer, answer)
    return np.where(np.abs(felt) < people.tie, 0.5, answer)
