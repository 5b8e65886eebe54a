"""What a run is told to cost, and the prices that are reckoned with."""

from __future__ import annotations

from dataclasses import field

from fifa.config.knobs import Knobs, NotNegative, Positive, knobs
from fifa.config.select import Compute, Read, Score, Select


@knobs
class Plan(Knobs):
    """What `fifa plan` reckons: the run of a recipe, and a training on what it keeps.

    Parameters
    ----------
    train
        A training to plan as well: a YAML file of options that ``fifa train --recipe`` takes, or a
        preset, paper-sd15, paper-sdxl or lora-small.
    model
        The model that it trains, where that file names none.
    prices
        A YAML file of prices (docs/plan.md); without one no money is told.
    seconds
        About how long to measure on a sample of SOURCE. What was measured is kept, so that a plan
        of another number of pairs takes seconds.
    fresh
        Measure again what is known from before.
    """

    train: str | None = None
    model: str | None = None
    prices: str | None = None
    seconds: Positive = 60.0
    fresh: bool = False
    read: Read = Read()
    score: Score = Score()
    select: Select = Select()
    compute: Compute = Compute()


@knobs
class Endpoint(Knobs):
    """What a model behind an endpoint costs.

    Parameters
    ----------
    input, output
        For a million tokens.
    answer
        Tokens of an answer, with what the model thinks before it.
    seconds
        That an answer takes.
    """

    input: NotNegative | None = None
    output: NotNegative | None = None
    answer: NotNegative | None = None
    seconds: NotNegative | None = None


@knobs
class Prices(Knobs):
    """Prices in one currency; what is not given is not told.

    Parameters
    ----------
    currency
        How it is written before a number.
    machine_hour
        An hour of this machine.
    disk_gb_month
        A GB on its disk for a month.
    network_gb
        A GB that is fetched.
    endpoints
        By the model's name, as it stands in ``openai:MODEL@URL``; ``default`` is for the others.
    """

    currency: str = "$"
    machine_hour: NotNegative | None = None
    disk_gb_month: NotNegative | None = None
    network_gb: NotNegative | None = None
    endpoints: dict[str, Endpoint] = field(default_factory=dict)
