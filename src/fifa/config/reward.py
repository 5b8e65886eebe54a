"""Fitting a proxy reward model, and a rubric for a judge."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Literal

from pydantic import Field

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
from fifa.config.select import Compute, Read
from fifa.errors import FifaError


@knobs
class Reward(Shared):
    """A training of a reward model.

    Parameters
    ----------
    base
        ``features`` trains a small head on frozen features; MODEL (a folder or hub id) fine-tunes
        that transformers CLIP.
    image
        Head: the frozen image encoder, one of `fifa.scoring.specs.IMAGE_ENCODERS.forms`.
    text
        Head: the frozen text encoder, one of `fifa.scoring.specs.ENCODERS.made`, none.
    folds
        Head: the number of cross-validation folds (over prompts) by which it is chosen.
    parts
        CLIP: what is trained, ``full`` (all weights) or ``heads`` (both projections and
        logit_scale).
    lr
        CLIP: learning rate; it falls linearly to 0 after the warm-up.
    weight_decay
        CLIP: weight decay.
    warmup
        CLIP: steps of linear warm-up.
    steps
        CLIP: largest number of steps.
    batch
        CLIP: pairs per step.
    clip
        CLIP: largest norm of the gradient.
    bf16
        CLIP: use bfloat16 autocast.
    held_out
        CLIP: share of the prompts that are held out for evaluation.
    evaluate_every
        CLIP: steps between two evaluations on the held-out prompts. The best weights are kept.
    patience
        CLIP: stop after this many evaluations without an improvement.
    seed
        Seed for the folds, the order of training and the bootstrap.
    """

    read: Read = Read()
    base: str = "features"
    image: str = "efficientnet-lite0"
    text: str = "minilm"
    folds: Annotated[int, Field(ge=2)] = 5
    parts: Literal["full", "heads"] = "full"
    lr: NotNegative = 3e-6
    weight_decay: NotNegative = 0.3
    warmup: CountOrZero = 500
    steps: Count = 4000
    batch: Count = 128
    clip: Positive = 1.0
    bf16: bool = False
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    evaluate_every: Count = 100
    patience: Count = 10
    seed: int = 0
    device: str | None = None

    def __post_init__(self) -> None:
        if self.warmup >= self.steps:
            raise FifaError(
                f"{self.warmup} warm-up steps, but only {self.steps} steps",
                do="fewer warm-up steps, or more steps",
            )

    @property
    def shared(self) -> bool:
        """Whether both frozen encoders are towers of one CLIP, so that images fit prompts."""
        return self.image == self.text and self.image.startswith("clip:")

    def settings(self) -> dict[str, Any]:
        """The knobs that this kind of training reads, for the card and for file names."""
        head = ("image", "text", "folds")
        if self.base == "features":
            return {name: getattr(self, name) for name in ("base", *head, "seed")}
        return {k: v for k, v in asdict(self).items() if k not in (*head, "read", "device")}


@knobs
class Rubric(Knobs):
    """A rubric of yes-or-no questions, learned from people's labels.

    Parameters
    ----------
    judge
        The vision-language judge that answers the questions, for example ``vlm:MODEL@URL``.
    questions
        A text file with a question per line. If not given, the judge is shown some labelled pairs
        and writes the questions.
    count
        How many questions it writes.
    limit
        Labelled pairs that it answers them for, drawn at random.
    folds
        The number of cross-validation folds (over prompts) by which the penalty is chosen.
    seed
        Seed for the pairs, the folds and the bootstrap.
    """

    judge: Annotated[str, Option(required=True)] = ""
    questions: str | None = None
    count: Count = 20
    limit: Count = 300
    folds: Annotated[int, Field(ge=2)] = 5
    seed: int = 0
    read: Read = Read()
    compute: Compute = Compute()

    def settings(self) -> dict[str, Any]:
        """The knobs that make the rubric, for its card."""
        return {name: getattr(self, name) for name in ("judge", "count", "limit", "folds", "seed")}
