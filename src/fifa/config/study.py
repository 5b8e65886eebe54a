"""The study: arms x budgets x label noise x seeds."""

from __future__ import annotations

from dataclasses import asdict, field
from typing import Annotated, Any, Literal

from pydantic import Field

from fifa.config.evaluate import Evaluate
from fifa.config.knobs import Knobs, Option, Share, build, knobs
from fifa.config.select import Compute, Read, Score, Select
from fifa.config.train import Train
from fifa.errors import FifaError

Given = Annotated[dict[str, Any], Field(default_factory=dict)]
Budget = Annotated[float, Field(gt=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[\w.=+-]+$", max_length=60)]


@knobs
class Arm:
    """What an arm of a study does another way than the study's own sections.

    Parameters
    ----------
    score, select, train
        Knobs of these sections. One with ``select: {keep: 1.0}`` takes everything, whatever the
        budget is.
    """

    score: Given = field(default_factory=dict)
    select: Given = field(default_factory=dict)
    train: Given = field(default_factory=dict)

    def changes(self, section: Literal["score", "select", "train"], of: Any) -> Any:
        """``of`` with this arm's knobs of a section; null is a value here."""
        return _with(of, getattr(self, section))


@knobs
class Part:
    """Cells of a study that belong together: every arm at every budget, noise and seed.

    Parameters
    ----------
    name
        In the report.
    arms
        Their names.
    budgets
        Shares of all pairs.
    noise
        Shares of the untied labels that are turned round.
    seeds
        If none are given, the study's.
    train
        Knobs of the training, for all arms of the part; an arm's own come after them.
    """

    name: Name
    arms: Annotated[tuple[Name, ...], Field(min_length=1)]
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)]
    noise: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0,)
    seeds: tuple[int, ...] = ()
    train: Given = field(default_factory=dict)


@knobs
class Study(Knobs):
    """Trainings on many selections of one data set, by seed, and what their images are worth.

    ``read`` and ``score`` say where the pairs are and what scores them; ``select``, ``train`` and
    ``evaluate`` hold for every arm but for what it changes. The study itself sets what a section
    leaves empty: ``select.keep`` and both seeds, ``train.source``, ``evaluate.tuned``.

    Parameters
    ----------
    arms
        By name: an entry with ``score``, ``select`` and ``train``, each with some knobs of that
        section.
    parts
        What runs, in this order: entries with ``name``, ``arms``, ``budgets`` and, if need be,
        ``noise``, ``seeds`` and ``train``. A cell of two parts runs once.
    seeds
        Of the draws, the flips, the order and the noise of a training.
    against
        The arm that all others are compared with, beside the base.
    target
        The arms whose best result the others have to match, for the ratio of costs; of several,
        the one that gains most.
    judge
        ``moji``: the hidden utility and the classifiers of the small world, before the scorers.
    """

    arms: Annotated[dict[Name, Arm], Field(min_length=1)] = field(
        default_factory=lambda: {"fifa": Arm()}
    )
    parts: Annotated[tuple[Part, ...], Field(min_length=1)] = (
        Part(name="main", arms=("fifa",), budgets=(0.005,)),
    )
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    against: str | None = None
    target: Annotated[tuple[str, ...], Option(commas=True)] = ()
    judge: Literal["moji"] | None = None
    read: Read = Read()
    score: Score = Score()
    select: Select = Select()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        named = {name for part in self.parts for name in part.arms}
        named |= {name for name in (self.against, *self.target) if name}
        if unknown := sorted(named - set(self.arms)):
            raise FifaError(
                f"no arm is named {', '.join(unknown)}",
                do=f"take some of {', '.join(self.arms)}, or add it below arms",
            )
        names = [part.name for part in self.parts]
        if len(set(names)) < len(names):
            raise FifaError(f"two parts have the same name: {', '.join(names)}")
        for name, arm in self.arms.items():
            for section in ("score", "select", "train"):
                try:
                    arm.changes(section, getattr(self, section))
                except FifaError as error:
                    raise FifaError(f"arm {name}, {section}: {error.what}", do=error.do) from error
        for part in self.parts:
            try:
                _with(self.train, part.train)
            except FifaError as error:
                raise FifaError(f"part {part.name}, train: {error.what}") from error


def _with(of: Any, given: dict[str, Any]) -> Any:
    return build(type(of), asdict(of) | given, where="the study")
