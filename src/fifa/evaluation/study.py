"""What the cells of a study say together: by arm, budget and label noise."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import cached_property
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from fifa.config import Score, Select, Study, Train
from fifa.config.knobs import build
from fifa.errors import FifaError
from fifa.evaluation.crossed import NOTHING, Crossed, crossed, draws, spread_ends
from fifa.evaluation.measure import Scale
from fifa.evaluation.models import BASE
from fifa.evaluation.stats import outcomes
from fifa.evaluation.win_rates import LAST, UNSAFE
from fifa.shards.files import digest
from fifa.shards.ledger import Ledger

STUDY_FILE, TABLE = "study.yaml", "study.parquet"
ROWS, FEEDBACK, SCORED = "cells", "feedback", "scored.json"
NOISE = 2.0  # standard errors below the best checkpoint that are more than noise
IMAGE = pa.struct(
    [
        ("step", pa.int32()),
        ("prompt_id", pa.string()),
        ("seed", pa.int64()),
        ("category", pa.string()),
        ("unsafe_prompt", pa.bool_()),
        ("values", pa.list_(pa.float32())),  # in the order of ``scales``
    ]
)
DISTANCE = pa.struct([("prompt_id", pa.string()), ("distance", pa.float32())])
POINT = pa.struct([("step", pa.int32()), ("pairs", pa.float64()), ("seconds", pa.float64())])
CELL = pa.schema(
    [
        ("part", pa.string()),
        ("arm", pa.string()),
        ("budget", pa.float64()),  # share of all pairs; above 1 a count
        ("noise", pa.float64()),  # share of the untied labels that were turned round
        ("seed", pa.int64()),
        ("status", pa.string()),  # base, trained, diverged, refused
        ("reason", pa.string()),
        ("kept", pa.int64()),
        ("turned", pa.int64()),  # of them with a label that was turned round
        ("steps", pa.int64()),
        ("winner", pa.float64()),  # its error minus the base's, over the last quarter
        ("scoring", pa.float64()),  # seconds of: scoring all pairs and prompts
        ("selecting", pa.float64()),
        ("training", pa.float64()),
        ("imaging", pa.float64()),
        ("points", pa.list_(POINT)),  # of the training, at its checkpoints and at its end
        ("scales", pa.string()),  # JSON
        ("images", pa.list_(IMAGE)),
        ("distances", pa.list_(DISTANCE)),
    ]
)
Floats = npt.NDArray[np.float64]
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One training of a study, or the base's images.

    Parameters
    ----------
    part, arm, budget, noise, seed
        What it is.
    score, select, train
        All knobs.
    images
        Names how the images are made and judged.
    scoring
        Seconds that the scores took.
    """

    part: str
    arm: str
    budget: float
    noise: float
    seed: int
    score: Score
    select: Select
    train: Train
    images: str
    scoring: float = 0.0

    @property
    def group(self) -> tuple[str, float, float]:
        """Arm, budget and noise: what differs in the seed alone."""
        return self.arm, self.budget, self.noise

    @property
    def name(self) -> str:
        """For people."""
        noise = f", {self.noise:.0%} turned" if self.noise else ""
        return f"{self.arm}, {budget_text(self.budget)}{noise}, seed {self.seed}"

    @cached_property
    def key(self) -> str:
        """Names it and all that its row depends on."""
        if self.arm == BASE:
            return f"{BASE}-{digest(self.train.model, self.images)}"
        knobs = [told(one) for one in (self.score, self.select, self.train)]
        of = digest(*knobs, self.noise, self.images)
        return f"{self.arm}-{self.budget:g}-{self.noise:g}-{self.seed}-{of}"


def told(knobs: Any) -> dict[str, Any]:
    """The knobs that are not as they are by default, so that a new knob renames nothing."""
    default = type(knobs)()
    found = {}
    for name, value in vars(knobs).items():
        other = getattr(default, name)
        if value != other:
            found[name] = told(value) if is_dataclass(value) else value
    return found


def budget_text(budget: float) -> str:
    """``0.5 %``, or ``150 pairs``."""
    return f"{budget:,.0f} pairs" if budget > 1 else f"{100 * budget:g} %"


def cells_of(asked: Study) -> list[Cell]:
    """The base, then all cells in the order of the parts, seed by seed; none twice."""
    images = digest(told(asked.evaluate), asked.judge)
    base = Cell(BASE, BASE, 0.0, 0.0, 0, asked.score, asked.select, asked.train, images)
    found = {base.key: base}
    for part in asked.parts:
        of_part = build(Train, asdict(asked.train) | part.train, where=f"part {part.name}")
        for seed in part.seeds or asked.seeds:
            for noise in part.noise:
                for budget in part.budgets:
                    for name in part.arms:
                        arm = asked.arms[name]
                        given = {"keep": budget, **arm.select}
                        select = arm.changes("select", asked.select)
                        # a study measures what a margin near chance is worth
                        select = replace(select, keep=given["keep"], seed=seed, anyway=True)
                        train = replace(arm.changes("train", of_part), seed=seed, tracker="none")
                        score = arm.changes("score", asked.score)
                        keep = float(given["keep"])
                        cell = Cell(
                            part.name, name, keep, noise, seed, score, select, train, images
                        )
                        found.setdefault(cell.key, cell)
    return list(found.values())


@dataclass(frozen=True)
class Group:
    """The seeds of an arm at a budget and a noise.

    Parameters
    ----------
    part, arm, budget, noise
        What it is.
    planned
        How many seeds it is to have.
    rows
        The rows of `CELL` that there are, by seed.
    """

    part: str
    arm: str
    budget: float
    noise: float
    planned: int
    rows: dict[int, Row]

    @property
    def trained(self) -> dict[int, Row]:
        """Those that came to their end."""
        return {seed: row for seed, row in self.rows.items() if row["status"] == "trained"}

    def count(self, status: str) -> int:
        """Rows of a status."""
        return sum(row["status"] == status for row in self.rows.values())


class Findings:
    """All numbers of a study so far.

    Parameters
    ----------
    folder
        The study's; `FifaError` where there is none.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / STUDY_FILE).is_file():
            raise FifaError("no study here", where=str(folder), do="`fifa study RECIPE --out ...`")
        self.asked = Study.from_yaml(folder / STUDY_FILE, sealed=True)
        ledger, cells = Ledger(str(folder / ROWS)), cells_of(self.asked)
        done = ledger.keys()
        self.tables = [ledger.read(cell.key) for cell in cells if cell.key in done]
        rows = {
            cell.key: row
            for cell, table in zip(
                [cell for cell in cells if cell.key in done], self.tables, strict=True
            )
            for row in table.to_pylist()
        }
        self.base = rows.get(cells[0].key)
        self.cells, self.done = len(cells) - 1, len(rows) - bool(self.base)  # without the base
        groups: dict[tuple[str, float, float], list[Cell]] = {}
        for cell in cells[1:]:
            groups.setdefault(cell.group, []).append(cell)
        self.groups = {
            key: Group(
                of[0].part,
                *key,
                len(of),
                {cell.seed: rows[cell.key] for cell in of if cell.key in rows},
            )
            for key, of in groups.items()
        }
        self.scales = [Scale(**one) for one in json.loads(self.base["scales"])] if self.base else []
        images = self.base["images"] if self.base else []
        self.prompts = list(dict.fromkeys(image["prompt_id"] for image in images))
        self._place = {prompt: i for i, prompt in enumerate(self.prompts)}
        category = {image["prompt_id"]: image["category"] for image in images}
        unsafe = {image["prompt_id"]: bool(image["unsafe_prompt"]) for image in images}
        self.unsafe = np.array([unsafe[prompt] for prompt in self.prompts], bool)
        names = [category[prompt] for prompt in self.prompts]
        self.categories = {
            name: np.array([one == name for one in names])
            for name in dict.fromkeys(names)
            if name is not None
        }
        self._known: dict[tuple[int, int], Floats] = {}

    @property
    def rewards(self) -> list[int]:
        """The places of the scales on which higher is better; the first one decides."""
        found = [i for i, scale in enumerate(self.scales) if scale.type == "reward"]
        return sorted(found, key=lambda i: self.scales[i].picked)

    def values(self, row: Row, scale: int, step: int | None = None) -> Floats:
        """[prompts, images] of a training at its end or at a step; NaN where none was made."""
        known = (id(row), scale if step is None else -1 - 1000 * step - scale)
        if known not in self._known:
            step = (row["steps"] or 0) if step is None else step
            found: list[list[float]] = [[] for _ in self.prompts]
            for image in row["images"] or ():
                if image["step"] == step:
                    found[self._place[image["prompt_id"]]].append(image["values"][scale])
            most = max(map(len, found), default=0)
            table = np.full((len(found), most), np.nan)
            for place, numbers in enumerate(found):
                table[place, : len(numbers)] = numbers
            self._known[known] = table
        return self._known[known]

    def ordinary(self) -> npt.NDArray[np.bool_]:
        """Which prompts are not unsafe."""
        return ~self.unsafe

    def against(
        self,
        group: Group,
        other: Group | None = None,
        *,
        scale: int | None = None,
        wins: bool = False,
        of: npt.NDArray[np.bool_] | None = None,
    ) -> Crossed:
        """How much more the images of a group are worth than the base's, or another group's.

        Parameters
        ----------
        group, other
            Compared seed by seed; None is the base.
        scale
            Its place; None is the first reward.
        wins
            The share of images that are better, instead of the mean difference.
        of
            Which prompts; None: those that are not unsafe.
        """
        if self.base is None or not self.rewards:
            return NOTHING
        place = self.rewards[0] if scale is None else scale
        mask = self.ordinary() if of is None else of
        rows = []
        for seed, row in group.trained.items():
            theirs = self.base if other is None else other.trained.get(seed)
            if theirs is not None:
                ours, them = self.values(row, place), self.values(theirs, place)
                tie = self.scales[place].tie
                one = outcomes(ours.ravel(), them.ravel(), tie) if wins else (ours - them).ravel()
                rows.append(one.reshape(ours.shape).mean(1)[mask])
        if not rows:
            return NOTHING
        return crossed(np.stack(rows), *((0, 1) if wins else ()))

    def unsafe_rate(self, group: Group | None, of: npt.NDArray[np.bool_]) -> Crossed:
        """The share of unsafe images of a group, or of the base, on some prompts."""
        places = [i for i, scale in enumerate(self.scales) if scale.type == "unsafe"]
        if self.base is None or not places or not of.any():
            return NOTHING
        rows = list(group.trained.values()) if group else [self.base]
        found = [(self.values(row, places[0]) > UNSAFE).mean(1)[of] for row in rows]
        return crossed(np.stack(found), 0, 1) if found else NOTHING

    def unsafe_shift(self, group: Group, of: npt.NDArray[np.bool_]) -> Crossed:
        """The same, minus the base's."""
        places = [i for i, scale in enumerate(self.scales) if scale.type == "unsafe"]
        if self.base is None or not places or not of.any() or not group.trained:
            return NOTHING
        base = (self.values(self.base, places[0]) > UNSAFE).mean(1)[of]
        rows = group.trained.values()
        found = [(self.values(row, places[0]) > UNSAFE).mean(1)[of] - base for row in rows]
        return crossed(np.stack(found), -1, 1)

    def diversity(self, group: Group) -> Crossed:
        """How much further apart the images of a prompt are than the base's."""
        if self.base is None or not self.base["distances"] or not group.trained:
            return NOTHING
        base = {one["prompt_id"]: one["distance"] for one in self.base["distances"]}
        found = [
            [one["distance"] - base[one["prompt_id"]] for one in row["distances"]]
            for row in group.trained.values()
        ]
        return crossed(np.array(found, float))

    def curve(self, group: Group) -> tuple[list[int], Floats]:
        """Steps, and gains [seeds, steps, prompts] on the prompts of the checkpoints."""
        rows = list(group.trained.values())
        if self.base is None or not rows or not self.rewards:
            return [], np.empty((0, 0, 0))
        scale = self.rewards[0]
        steps = sorted({image["step"] for image in rows[0]["images"]})
        base = self.values(self.base, scale)
        found = np.stack(
            [
                np.stack([(self.values(row, scale, step) - base).mean(1) for step in steps])
                for row in rows
            ]
        )
        whole = ~np.isnan(found).any((0, 1)) & self.ordinary()
        return steps, found[:, :, whole]

    def best(self, group: Group) -> float:
        """The gain of a group's best checkpoint, `_best`; -inf where there is none."""
        gains = self.curve(group)[1]
        return _best(gains)[1] if gains.size else -inf

    def spread(self, group: Group) -> Crossed:
        """The standard deviation of the final gain over seeds, its interval by chi-square."""
        if self.base is None or not self.rewards or len(group.trained) < 2:
            return NOTHING
        scale, mask = self.rewards[0], self.ordinary()
        gains = [np.nanmean(self.values(row, scale)[mask]) for row in group.trained.values()]
        deviation = float(np.std(gains, ddof=1))
        low, high = (deviation * end for end in spread_ends(len(gains) - 1))
        return Crossed(deviation, low, high, len(gains), int(mask.sum()))

    def last_spread(self, group: Group) -> float:
        """The standard deviation over a training's last checkpoints, the mean over seeds."""
        _, gains = self.curve(group)
        if gains.size == 0 or gains.shape[1] < 3:
            return float("nan")
        return float(gains.mean(2)[:, -LAST:].std(1, ddof=1).mean())

    def fallen(self, group: Group) -> tuple[int, int]:
        """How many trainings end below their best checkpoint by more than noise, and of how many.

        By more than `NOISE` standard errors of the difference over prompts. One that diverged is
        among them.
        """
        steps, gains = self.curve(group)
        diverged = group.count("diverged")
        if len(steps) < 2 and not diverged:
            return 0, 0
        below = diverged
        for one in gains:
            lost = one[one.mean(1).argmax()] - one[-1]
            error = lost.std(ddof=1) / np.sqrt(len(lost))
            below += bool(lost.mean() > NOISE * error and lost.mean() > 0)
        return below, len(gains) + diverged

    def cost(self, group: Group, target: Group, samples: int = 2000) -> Costs | None:
        """What a group needs to match the best of another, as a share of what that needed.

        The target's best checkpoint is chosen on one half of the prompts and its gain read on the
        other, and the reverse: a maximum over noisy values is too high otherwise. None where
        either has no checkpoints.
        """
        steps, ours = self.curve(group)
        theirs_at, theirs = self.curve(target)
        if not steps or not theirs_at or ours.shape[2] != theirs.shape[2]:
            return None
        second, other_second = _step_seconds(group), _step_seconds(target)
        before = float(np.mean([_before(row) for row in group.trained.values()]))
        there = float(np.mean([_before(row) for row in target.trained.values()]))

        def ratios(a: Floats, b: Floats) -> tuple[float, float]:
            best, value = _best(b)
            met = [step for step, gain in zip(steps, a.mean((0, 2)), strict=True) if gain >= value]
            if value <= 0:
                return 0.0, 0.0  # the target is no better than the base
            if not met:
                return inf, inf
            need = theirs_at[best]
            seconds = (before + met[0] * second) / (there + need * other_second)
            return met[0] / need, seconds

        drawn = [
            ratios(ours[i][:, :, p], theirs[j][:, :, p])
            for i, j, p in zip(
                draws(len(ours), 1, samples, 1)[0],
                draws(len(theirs), 1, samples, 2)[0],
                draws(1, ours.shape[2], samples, 3)[1],
                strict=True,
            )
        ]
        points = ratios(ours, theirs)
        low, high = np.quantile(np.array(drawn), [0.025, 0.975], axis=0, method="nearest")
        seeds, prompts = len(ours), ours.shape[2]
        by = [Crossed(points[i], float(low[i]), float(high[i]), seeds, prompts) for i in range(2)]
        return Costs(by[0], by[1], _best(theirs)[1])


@dataclass(frozen=True)
class Costs:
    """Ratios of steps and of seconds; infinite where the target is not reached, 0 where it is 0."""

    steps: Crossed
    seconds: Crossed
    target: float


def _best(gains: Floats) -> tuple[int, float]:
    """The best checkpoint and its gain, of [seeds, steps, prompts], cross-fitted over prompts."""
    means = gains.mean(0)  # [steps, prompts]
    halves = means[:, ::2].mean(1), means[:, 1::2].mean(1)
    values = [read[choose.argmax()] for choose, read in (halves, halves[::-1])]
    return int(means.mean(1).argmax()), float(np.mean(values))


def _step_seconds(group: Group) -> float:
    """Seconds of a step, the mean over the trainings."""
    found = [row["points"][-1] for row in group.trained.values()]
    return float(np.mean([point["seconds"] / point["step"] for point in found]))


def _before(row: Row) -> float:
    """Seconds before the training itself: scoring, where the selection looks at scores."""
    return float((row["scoring"] or 0) + (row["selecting"] or 0))


def summary(findings: Findings) -> pa.Table:
    """A row a cell, `CELL`, with its own gain and win rate on ordinary prompts."""
    gains: list[float | None] = []
    wins: list[float | None] = []
    table = pa.concat_tables(findings.tables) if findings.tables else CELL.empty_table()
    for row in table.select(["arm", "budget", "noise", "seed", "status"]).to_pylist():
        group = findings.groups.get((row["arm"], row["budget"], row["noise"]))
        one = None
        if group and row["status"] == "trained":
            one = replace(group, rows={row["seed"]: group.rows[row["seed"]]})
        gains.append(findings.against(one).mean if one else None)
        wins.append(findings.against(one, wins=True).mean if one else None)
    table = table.append_column("gain", pa.array(gains, pa.float64()))
    return table.append_column("wins", pa.array(wins, pa.float64()))
