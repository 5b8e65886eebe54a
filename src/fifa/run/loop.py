"""`fifa loop`: generate, judge, filter, train and evaluate, round after round, as one recipe.

The model of a round makes the images of the next one, which trains it further: the weights that
a round trained become those of a whole pipeline, on which the next round trains a new LoRA, or all
weights, and which is its reference model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

from fifa.config import Compute, Evaluate, Loop, Measure, Read, Recipe, changed
from fifa.console import echo
from fifa.errors import FifaError
from fifa.evaluation.judges import Judge
from fifa.evaluation.measure import check_scorers
from fifa.evaluation.merge import INDEX, merge_checkpoint
from fifa.evaluation.models import find_models
from fifa.evaluation.pairs import Generated
from fifa.evaluation.prompts import read_prompts
from fifa.evaluation.results import Results
from fifa.models.assemble import PIECES
from fifa.models.runtime import release_memory
from fifa.reporting.loop import ROUND_FILE, write_loop
from fifa.reporting.page import write_report
from fifa.run.evaluation import check_evaluation, run_evaluation
from fifa.run.folder import begin, log_step
from fifa.run.generation import plan_generation, refuse_other, run_generation
from fifa.run.steps import filter_pairs, train
from fifa.scoring import check_score
from fifa.scoring.specs import REWARDS
from fifa.shards.files import check_same, read_json, write_json, write_yaml
from fifa.shards.lock import only_writer

LOOP_FILE = "loop.yaml"
GENERATED, CHECKPOINT, PIPELINE = "generated", "checkpoint", "pipeline"  # of a round's folder
# Sections that may change between two calls: neither decides what a model is trained on
FREE = ("rounds", "evaluate.", "compute.")
REQUIRED = ("generate.model", "generate.prompts", "generate.margin", "evaluate.prompts")
MODELS = ("generate.images", "train", "evaluate.generate")
OWN = (
    *("generate.tuned", "train.source", "train.model", "evaluate.base", "evaluate.tuned"),
    # every round begins with another model: `fifa convert` makes the first one of pieces
    *(
        f"{at}.{name}"
        for at in ("generate.images", "train", "evaluate.generate")
        for name in PIECES
    ),
)


@dataclass(frozen=True)
class Looped:
    """A loop that is done.

    Parameters
    ----------
    folder
        Its folder; ``folder / "loop.html"`` is the page.
    models
        The pipeline of each round's model, in diffusers' layout.
    results
        The evaluation of all rounds against the base.
    """

    folder: Path
    models: tuple[Path, ...]
    results: Results


def loop(
    recipe: Loop | str | Path,
    out: str | Path,
    *,
    rounds: int | None = None,
    judges: Sequence[Judge] | Mapping[str, Any] | None = None,
) -> Looped:
    """Make pairs of a model's own images, train on the best of them, and do it again.

    Parameters
    ----------
    recipe
        `fifa.config.Loop`, or a YAML file of one.
    out
        The loop's folder: ``round-1``, ``round-2``, ... are run folders, and it is itself the
        run folder of the evaluation of all rounds. A loop that was stopped goes on where it was,
        with the bytes of one that was not; finished rounds are left alone.
    rounds
        How many rounds there are in all; None: as the recipe says.
    judges
        For the evaluation, beside reward models, as in `fifa.evaluate`.

    Raises
    ------
    FifaError
        For whatever a person can mend; what was done until then is kept.
    """
    recipe = recipe if isinstance(recipe, Loop) else Loop.from_yaml(Path(recipe))
    recipe = changed(recipe, rounds=rounds)
    folder = Path(out).resolve()  # rounds name each other's folders in their recipes
    with only_writer(folder):
        evaluation = _plan(recipe, folder, bool(judges))
        done = _finished(folder)
        for number in range(done + 1, recipe.rounds + 1):
            echo(f"\nround {number} of {recipe.rounds}")
            _round(number, recipe, folder)
            results = _evaluate(evaluation, number, folder, judges, recipe.compute)
        if recipe.rounds <= done:
            results = _evaluate(evaluation, done, folder, judges, recipe.compute)
        count = max(done, recipe.rounds)
        models = tuple(_pipeline(folder, number) for number in range(1, count + 1))
        return Looped(folder, models, results)


def _plan(recipe: Loop, folder: Path, judged: bool) -> Evaluate:
    """Check all that can be known to be wrong before hours of work; the evaluation's knobs.

    Raises `FifaError`; also for a folder with rounds of another recipe.
    """
    made, asked = recipe.generate, recipe.evaluate
    if lacks := [name for name in REQUIRED if not attrgetter(name)(recipe)]:
        raise FifaError(f"the recipe has no {', '.join(lacks)}", do="add it to the recipe")
    if given := [name for name in OWN if attrgetter(name)(recipe)]:
        raise FifaError(
            f"the loop itself sets {', '.join(given)}",
            do="leave it out: a loop begins with a whole pipeline, generate.model; of pieces "
            "fifa convert makes one",
        )
    begin(folder)
    path = folder / LOOP_FILE
    if path.is_file() and _finished(folder):
        differences = Loop.from_yaml(path, sealed=True).differences(recipe)
        bound = [one for one in differences if not one.startswith(FREE)]
        check_same("rounds of another recipe", bound, folder)
    planned = plan_generation(made, recipe.compute)
    if _finished(folder):
        first = _place(folder, 1) / ROUND_FILE
        refuse_other(planned, read_json(first, "the round", sealed=True), first)
    check_score(recipe.score)
    looking = [spec for spec in recipe.score.margin if REWARDS.parse(spec).entry.maker]
    check_scorers(looking, recipe.compute)
    read_prompts(asked.prompts)
    usual = asked.measure.scorers == Measure().scorers and judged
    scorers = () if usual or asked.measure.scorers == ("none",) else asked.measure.scorers
    picked = (*made.margin, *recipe.score.margin, *asked.measure.picked)
    evaluation = changed(
        asked,
        base=made.model,
        scorers=tuple(dict.fromkeys((*made.margin, *scorers))),
        picked=tuple(dict.fromkeys(picked)),
    )
    check_evaluation(evaluation, recipe.compute)
    write_yaml(path, recipe.to_yaml())
    return evaluation


def _finished(folder: Path) -> int:
    """How many rounds are finished, from the first on; one without its pipeline is not."""
    number = 0
    while (_place(folder, number + 1) / ROUND_FILE).is_file():
        if not (_pipeline(folder, number + 1) / INDEX).is_file():
            break
        number += 1
    return number


def _place(folder: Path, number: int) -> Path:
    return folder / f"round-{number}"


def _pipeline(folder: Path, number: int) -> Path:
    return _place(folder, number) / CHECKPOINT / PIPELINE


def _round(number: int, recipe: Loop, folder: Path) -> None:
    """One round, from prompts to a pipeline; ``round.json`` last."""
    place = begin(_place(folder, number))
    made = _generate(number, recipe, folder)
    release_memory()
    score = recipe.score if recipe.score.margin else replace(recipe.score, margin=made.margin)
    read = Read(source=str(made.path))
    filter_pairs(Recipe(read, score, recipe.select, recipe.compute), place)
    model = recipe.generate.model if number == 1 else str(_pipeline(folder, number - 1))
    checkpoint = train(place, model, place / CHECKPOINT, recipe.train)
    release_memory()
    with log_step(place, "merge"):
        _, trained = find_models(model, {f"round-{number}": str(checkpoint)})
        merge_checkpoint(trained, _pipeline(folder, number))
    facts = read_json(place / "subset" / "subset.json", "the subset")
    write_json(place / ROUND_FILE, {**made.facts, "kept": len(facts["pair_id"])}, sealed=True)


def _generate(number: int, recipe: Loop, folder: Path) -> Generated:
    """The round's pairs: images of the model before it, from noise that is new."""
    asked = recipe.generate
    before = number - 1
    tuned = f"round-{before}={_pipeline(folder, before)}" if before else None
    first = asked.first_seed + before * asked.per_prompt
    asked = replace(asked, tuned=tuned, first_seed=first)
    return run_generation(asked, _place(folder, number) / GENERATED, compute=recipe.compute)


def _evaluate(
    asked: Evaluate,
    rounds: int,
    folder: Path,
    judges: Sequence[Judge] | Mapping[str, Any] | None,
    compute: Compute,
) -> Results:
    """All rounds so far against the base; images and numbers that are there are read."""
    tuned = {f"round-{n}": str(_pipeline(folder, n)) for n in range(1, rounds + 1)}
    asked = changed(asked, tuned=tuned)
    results = run_evaluation(asked, folder, judges=judges, compute=compute).results
    release_memory()
    write_report(folder)
    echo(f"round {rounds}: {write_loop(folder)}")
    return results
