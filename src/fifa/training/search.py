"""Which settings a search tries, and how many steps each gets: successive halving.

Karnin et al. 2013; Jamieson and Talwalkar 2016 (arXiv 1502.07943).
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from itertools import product
from math import ceil, prod
from typing import Any

from fifa.config import Train, changed
from fifa.errors import FifaError
from fifa.training.batches import seed_of

# Knobs that change neither the pairs nor what a step costs or draws
SEARCHED = (
    *("lr", "schedule", "warmup", "weight_decay", "beta1", "beta2", "clip", "ema"),
    *("loss", "beta", "beta_target", "sdpo", "dpop", "poly", "mapo", "sft", "label_scale"),
    *("rank", "alpha", "lora_dropout"),
)
SPAN = 10.0  # of a range without ends: from the training's own value over this to as many times it
WITH_SPAN = ("lr", "beta")
KEPT = 3  # one in so many trials goes on
Values = tuple[str, ...] | tuple[float, float]  # written values, or the ends of a range
Setting = dict[str, Any]


def searched(over: Sequence[str], train: Train) -> dict[str, Values]:
    """What is searched, by knob: ``("lr=1e-6..1e-4", "beta=500", "2000")`` has a range and a list.

    Raises `FifaError` for what is no such thing, and for knobs that cannot be searched.
    """
    if not any(over):
        raise FifaError("no knob to search", do="--over lr,beta")
    written: dict[str, list[str]] = {}
    name = ""
    for piece in ",".join(over).split(","):
        key, equals, value = (part.strip() for part in piece.partition("="))
        if equals or key in SEARCHED or not name:
            name, key = key, value
            if name in written:
                raise FifaError(f"--over has {name} twice", do="name every knob once")
            written[name] = []
        if key:
            written[name].append(key)
    return {name: _values(name, values, train) for name, values in written.items()}


def _values(name: str, values: list[str], train: Train) -> Values:
    if name not in SEARCHED:
        raise FifaError(
            f"--over cannot search {name!r}"[:200], do=f"knobs to search: {', '.join(SEARCHED)}"
        )
    if not values and name not in WITH_SPAN:
        raise FifaError(
            f"--over {name} has no values", do=f"give a list or a range: {name}=LOW..HIGH"
        )
    if not values:
        middle = getattr(train, name)
        return middle / SPAN, middle * SPAN
    if ".." not in values[0]:
        for value in values:
            changed(train, **{name: value})  # says what is wrong with it
        return tuple(values)
    try:
        low, high = map(float, values[0].split(".."))
    except ValueError:
        low, high = 0.0, 0.0
    if len(values) > 1 or not 0 < low < high < float("inf"):
        raise FifaError(
            f"no range: {name}={','.join(values)}"[:200],
            do=f"a range is {name}=LOW..HIGH, both above 0",
        )
    if isinstance(getattr(train, name), int):
        raise FifaError(f"{name} takes whole numbers, and no range", do=f"a list: {name}=4,8,16")
    for end in (low, high):
        changed(train, **{name: end})
    return low, high


def settings_of(over: Mapping[str, Values], train: Train, trials: int) -> list[Setting]:
    """The settings to try, all different, the training's own first.

    Every combination of lists where there are ``trials`` or fewer; otherwise a Latin hypercube:
    each range is cut into as many parts as there are trials, on a log scale, and each part is
    tried once.
    """
    own = {name: getattr(train, name) for name in over}
    count = trials - 1
    lists = [values for values in over.values() if isinstance(values[0], str)]
    if len(lists) == len(over) and prod(map(len, lists)) <= trials:
        drawn = [dict(zip(over, values, strict=True)) for values in product(*lists)]
    else:
        columns = [
            _column(values, count, seed_of("search", train.seed, name))
            for name, values in over.items()
        ]
        drawn = [dict(zip(over, row, strict=True)) for row in zip(*columns, strict=True)]
    found = [own]
    for one in drawn:
        made = changed(train, **one)
        typed = {name: getattr(made, name) for name in over}
        if typed not in found:
            found.append(typed)
    return found


def _column(values: Values, count: int, seed: int) -> list[Any]:
    draw = random.Random(seed)
    order = list(range(count))
    draw.shuffle(order)
    if isinstance(values[0], str):
        return [values[place % len(values)] for place in order]
    low, high = values
    # low (high / low)^((i + 1/2) / n), three digits of it
    return [float(f"{low * (high / low) ** ((place + 0.5) / count):.3g}") for place in order]


def rungs_of(trials: int, budget: int, steps: int) -> list[tuple[int, int]]:
    """For each rung how many trials are in it, and the step that each of them reaches.

    Every rung has the same share of the budget. None has a single trial, which would decide
    nothing. Raises `FifaError` for a budget of less than a step a trial.
    """
    sizes = [trials]
    while (size := ceil(sizes[-1] / KEPT)) > 1:
        sizes.append(size)
    found, reached = [], 0
    for size in sizes:
        reached = min(steps, reached + budget // (len(sizes) * size))
        found.append((size, reached))
    if found[0][1] < 1:
        raise FifaError(
            f"{budget:,} steps are too few for {trials:,} trials",
            do="a larger --budget, or fewer --trials",
        )
    return found
