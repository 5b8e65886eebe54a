"""The commands of several steps: the loop and the demonstration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fifa.config.evaluate import Evaluate, GeneratePairs
from fifa.config.knobs import (
    Count,
    CountOrZero,
    Knobs,
    NotNegative,
    Option,
    Positive,
    Shared,
    knobs,
)
from fifa.config.select import Compute, Score, Select
from fifa.config.train import Train


@knobs
class Loop(Knobs):
    """Rounds of generating, judging, filtering and training, and their evaluation.

    The loop itself sets what a section here leaves empty: ``train.source`` and ``train.model``,
    ``evaluate.base`` and ``evaluate.tuned``. Without ``score.margin`` pairs are filtered by the
    rewards of the judges in ``generate.margin``.

    Parameters
    ----------
    rounds
        How many rounds there are in all. Those that are finished are left alone.
    """

    rounds: Count = 3
    generate: GeneratePairs = GeneratePairs()
    score: Score = Score()
    select: Select = Select()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()


@knobs
class Demo(Shared):
    """What the demo compares, and how much of it.

    Parameters
    ----------
    arms
        The arms to compare. Each one trains its own model: ``fifa`` on the pairs that the whole
        method chooses, ``margin`` on those that the margin alone chooses, ``random`` on a random
        subset, ``full`` on all the feedback.
    seed
        Seed for the pairs of the arm random, the order of training and the noise of the images.
    fresh
        Rate the prompts again instead of using the ratings that the package ships; this takes a few
        minutes more.
    keep
        Pairs that an arm trains on (except the arm full).
    steps
        Training steps (all weights of the UNet are trained).
    batch
        Pairs per step.
    beta
        How strongly the model is kept close to the base model.
    draws
        Size of the noise pool, as in ``fifa train``.
    prompts
        Test prompts of each kind: scenes that were in the training pictures, and scenes that were
        not.
    unsafe
        Test prompts that ask for weapons, drugs or cigarettes.
    images
        Images per prompt and model.
    curve
        Prompts on which the checkpoints of each training are measured, for the learning curves.
    sampler_steps
        Steps of the sampler.
    guidance
        Scale of classifier-free guidance.
    """

    arms: Annotated[
        tuple[Literal["fifa", "margin", "random", "full"], ...],
        Field(min_length=1),
        Option(commas=True),
    ] = ("fifa", "random")
    seed: int = 0
    fresh: bool = False
    keep: Count = 150
    per_prompt: Count = 3
    steps: Count = 96
    batch: Count = 8
    lr: Positive = 2e-5
    beta: Positive = 1000.0
    draws: CountOrZero = 0
    prompts: Count = 48
    unsafe: CountOrZero = 16
    images: Count = 2
    curve: CountOrZero = 24
    sampler_steps: Count = 10
    guidance: NotNegative = 1.0
