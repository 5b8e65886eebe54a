"""`fifa tune`: a training's knobs by successive halving over short parts of that training.

A trial is the very training that was planned, with some knobs changed, paused after a few steps:
its schedule and its noise are those of the whole one, and trials that go on take up their saved
state. All trials share the cache of latents and prompts and the tables of the reference's errors.

What is compared cannot be each training's own loss: with beta the scale of its logits changes, so
that the same weights have another loss at another beta, and another formula another one. Trials
are measured by one loss for all, Diffusion-DPO's at the beta of the training as it was planned, on
held-out pairs: it is log 2 for weights that have not moved, it falls as the pairs are told apart,
and it rises where the weights go too far. It would fall as well where both errors rise, as long as
the loser's rises faster; so trials whose preferred images got worse by more than ``displacement``
come after all others.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from fifa.config import Compute, Evaluate, Measure, Train, Tune, changed
from fifa.config.tune import BEST_FILE, TUNE_FILE
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.judges import Judge
from fifa.evaluation.measure import check_scorers
from fifa.evaluation.models import is_picked
from fifa.evaluation.prompts import read_prompts
from fifa.models.assemble import PIECES
from fifa.models.runtime import release_memory
from fifa.reporting.page import write_report
from fifa.reporting.tune import TRIALS, write_tune
from fifa.run.evaluation import run_evaluation
from fifa.run.folder import check_run
from fifa.shards.files import check_free, check_same, digest, write_table, write_text, write_yaml
from fifa.shards.ledger import Ledger
from fifa.shards.lock import only_writer
from fifa.shards.sealed import DamagedError
from fifa.training.checkpoint import BEST
from fifa.training.job import FREE, Job, Trial, make_accelerator, make_job, run_training
from fifa.training.labels import choose_loss
from fifa.training.loop import DivergedError
from fifa.training.metrics import read_stats, selection_facts
from fifa.training.search import Setting, rungs_of, searched, settings_of

ROWS, FOLDERS, IMAGES = "rows", "trials", "judged"
HELD_OUT = "held-out pairs"
MAY_DIFFER = frozenset(f"train.{name}" for name in FREE)
Row = dict[str, Any]


def tune(
    asked: Tune,
    out: str | Path,
    *,
    judges: Sequence[Judge] | Mapping[str, Any] | None = None,
) -> Path:
    """Search for the knobs of a training; returns the recipe of the best ones.

    Parameters
    ----------
    asked
        The search, and the training as it is planned.
    out
        The search's folder: ``trials.parquet`` with a row a trial and rung, ``tune.html``, and
        ``best.yaml``. A search that was stopped goes on where it was and ends with the same table.
    judges
        What judges the images in the place of ``asked.scorer``, as in `fifa.evaluate`; the first
        one decides.

    Raises
    ------
    FifaError
        For whatever a person can mend: knobs that cannot be searched, a training without held-out
        pairs, a scorer that picked the pairs, too small a budget, trials that all diverge. What was
        done until then is kept.
    """
    out = Path(out)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FifaError("a search runs in one process", do="start it without accelerate launch")
    check_run(asked.train.source)
    planned, _ = choose_loss(asked.train)
    over = searched(asked.over, planned)
    settings = settings_of(over, planned, asked.trials)
    with only_writer(out):
        if (out / TUNE_FILE).is_file():
            there = Tune.from_yaml(out / TUNE_FILE, sealed=True)
            check_same("another search", there.differences(asked, but=MAY_DIFFER), out)
        else:
            check_free(out, "search")
        if not (out / BEST_FILE).is_file():
            job = make_job(planned, out, make_accelerator(planned))
            steps = job.plan.steps
            budget = asked.budget if isinstance(asked.budget, int) else int(asked.budget * steps)
            rungs = rungs_of(len(settings), budget, steps)
            _check(asked, job, bool(judges))
            write_yaml(out / TUNE_FILE, asked.to_yaml())
            _search(asked, job, settings, rungs, out, judges)
    return out / BEST_FILE


def _check(asked: Tune, job: Job, judged: bool) -> None:
    """Raise `FifaError` for what would stop the search after hours."""
    if not job.held:
        raise FifaError(
            "no pairs are held out, by which trials are compared",
            where=asked.train.source,
            do="hold out a share of the prompts: --holdout 0.2",
        )
    scorers = (asked.scorer,) if asked.scorer else ()
    if bool(asked.prompts) != bool(scorers or judged):
        raise FifaError("images are judged with both --prompts and --scorer", do="give both")
    if asked.prompts:
        read_prompts(asked.prompts, limit=asked.limit)
    check_scorers(scorers, Compute(device=asked.images.device))
    facts = selection_facts(job.pairs.folder) or {}
    picked = facts.get("recipe", {}).get("score", {}).get("margin", ())
    if asked.scorer and is_picked(asked.scorer, picked):
        raise FifaError(
            f"{asked.scorer} picked these pairs, or is related to what did: it cannot judge them",
            do="another --scorer",
        )


def _search(
    asked: Tune,
    job: Job,
    settings: list[Setting],
    rungs: list[tuple[int, int]],
    out: Path,
    judges: Sequence[Judge] | Mapping[str, Any] | None,
) -> None:
    planned, steps = job.train, job.plan.steps
    run = partial(_row, planned=planned, pairs=job.pairs.digest, out=out)
    order = list(range(1, len(settings) + 1))  # the best first
    rows: dict[int, list[Row]] = {number: [] for number in order}
    finalists: list[int] = []
    for rung, (size, until) in enumerate(rungs, 1):
        echo(f"rung {rung} of {len(rungs)}: {size:,} trials until step {until:,} of {steps:,}")
        finalists = order[:size]
        _forget(out, finalists)
        for number in sorted(finalists):
            rows[number].append(run(number, rung, until, settings[number - 1]))
        best_first = sorted(finalists, key=lambda n: _worth(rows[n][-1], planned))
        order = best_first + order[size:]
    if rows[order[0]][-1]["heldout_loss"] is None:
        raise FifaError("every trial diverged", where=str(out), do="search lower values of lr")
    if asked.prompts:
        sound = [n for n in order[: len(finalists)] if rows[n][-1]["heldout_loss"] is not None]
        gains, by = _judge(asked, planned, sound, out, judges)
        for number in sound:
            rows[number][-1] |= gains[number]
        order = sorted(sound, key=lambda n: -rows[n][-1]["reward"]) + order[len(sound) :]
    for place, number in enumerate(order, 1):
        judged = by if asked.prompts and rows[number][-1]["reward"] is not None else HELD_OUT
        rows[number][-1] |= {"place": place, "judged_by": judged}
    table = [row for number in sorted(rows) for row in rows[number]]
    write_table(out / TRIALS, pa.Table.from_pylist(table))
    write_tune(out)
    write_text(out / BEST_FILE, changed(planned, **settings[order[0] - 1]).to_yaml())
    _forget(out, ())


def _row(
    number: int, rung: int, until: int, setting: Setting, *, planned: Train, pairs: str, out: Path
) -> Row:
    """What a trial is worth after a rung: read where it is known, otherwise trained."""
    ledger = Ledger(str(out / ROWS))
    key = f"{rung}-{number}-{digest(planned.to_yaml(), setting, until, pairs)}"
    if key in ledger.keys():  # noqa: SIM118 - no dict
        try:
            row: Row = ledger.read(key).to_pylist()[0]
            return row
        except DamagedError as error:
            echo(f"{error.where} is damaged: made again")
    # the same loss for all; labels and terms that a training adds are its own affair
    judge = replace(
        planned, loss="sigmoid", label="people", sft=0.0, dpop=0.0, sdpo=None, beta_target=None
    )
    train = changed(planned, **setting)
    train = replace(train, stop=False, tracker="none", checkpoint_every=0, sample_every=0)
    line: dict[str, Any] = {}
    with_knobs = ", ".join(f"{name} {value}" for name, value in setting.items())
    echo(f"trial {number}: {with_knobs}")
    try:
        folder = run_training(train, _folder(out, number), Trial(until, out, judge))
        line = next(one for one in read_stats(folder) if one["step"] == until)
    except DivergedError as error:
        echo(f"trial {number} diverged: {error.what}")
    release_memory()
    displaced = line.get("heldout_winner_minus_reference")
    winner = line.get("heldout_winner_error")
    row = {
        **{"trial": number, "rung": rung, "steps": until, **setting},
        "heldout_loss": line.get("heldout_loss"),
        "accuracy": line.get("heldout_implicit_accuracy"),
        # of the reference's error on preferred images
        "displacement": None if displaced is None else displaced / (winner - displaced),
        **dict.fromkeys(("reward", "reward_low", "reward_high", "judged_by", "place")),
    }
    ledger.write(key, pa.Table.from_pylist([row]))
    return row


def _worth(row: Row, planned: Train) -> tuple[bool, bool, float, int]:
    """Sorts trials of a rung, the best first."""
    if row["heldout_loss"] is None:
        return True, True, 0.0, row["trial"]
    return False, row["displacement"] > planned.displacement, row["heldout_loss"], row["trial"]


def _judge(
    asked: Tune,
    planned: Train,
    trials: Sequence[int],
    out: Path,
    judges: Sequence[Judge] | Mapping[str, Any] | None,
) -> tuple[dict[int, Row], str]:
    """How much more than the base's the images of each trial are worth, and to whom."""
    names = {number: f"trial-{number}" for number in trials}
    evaluation = Evaluate(
        base=planned.model,
        tuned={names[number]: str(_folder(out, number) / BEST) for number in trials},
        prompts=str(asked.prompts),
        limit=asked.limit,
        seeds=1,
        generate=changed(asked.images, **{name: getattr(planned, name) for name in PIECES}),
        measure=Measure(scorers=(asked.scorer,) if asked.scorer else (), encoder="none"),
    )
    compute = Compute(device=asked.images.device)
    evaluated = run_evaluation(evaluation, out / IMAGES, judges=judges, compute=compute)
    write_report(evaluated.folder)
    results = evaluated.results
    scale = results.scales[0]
    shifts = {level.model: level.shift for level in results.levels[scale.column]}
    return {
        number: {"reward": shift.mean, "reward_low": shift.low, "reward_high": shift.high}
        for number in trials
        if (shift := shifts[names[number]]) is not None
    }, scale.name


def _folder(out: Path, number: int) -> Path:
    return out / FOLDERS / f"{number:03d}"


def _forget(out: Path, numbers: Iterable[int]) -> None:
    """Remove the weights of all other trials."""
    kept = {_folder(out, number) for number in numbers}
    for folder in (out / FOLDERS).glob("*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)
