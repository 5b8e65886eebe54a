"""What `fifa generate-pairs` does: a model's own images, judged, as a preference data set."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fifa.config import GENERATE_FILE, Compute, Evaluate, GeneratePairs, changed
from fifa.console import echo, note
from fifa.errors import FifaError
from fifa.evaluation.generate import generate
from fifa.evaluation.models import Model, find_models, name_checkpoints
from fifa.evaluation.pairs import (
    PAIRS_FILE,
    SCORES,
    Generated,
    choose_pairs,
    judge_images,
    read_generated,
    write_pairs,
)
from fifa.evaluation.prompts import Prompts, read_prompts
from fifa.evaluation.sampling import Settings, settings_for
from fifa.models.runtime import release_memory
from fifa.run.folder import log_step
from fifa.scoring.rewards import load_reward
from fifa.shards.executors import executor_of
from fifa.shards.files import check_free, check_same, digest, make_folder, sweep, write_yaml
from fifa.shards.lock import only_writer
from fifa.shards.sealed import DamagedError

CHOICE = ("per_prompt", "pairs", "min_margin", "first_seed")  # the other knobs are known by content
MADE = ".made"  # images, scores and log: hidden, as readers take every file below the folder


def generate_pairs(
    model: str | Path,
    prompts: str | Path,
    margin: str | Sequence[str],
    out: str | Path,
    *,
    compute: Compute | None = None,
    **knobs: Any,
) -> Generated:
    """Make a preference data set of a model's own images, which reward models judge.

    Parameters
    ----------
    model
        A folder in diffusers' layout, or a hub id.
    prompts
        Text, CSV, TSV, Parquet, JSON or JSON lines, or a folder of these.
    margin
        A reward model's spec, or several for a committee: ``pickscore``, ``hpsv2.1:FOLDER``,
        ``proxy:FOLDER``, ...
    out
        The data set's folder: ``pairs.parquet``, which `read_pairs`, `filter_pairs` and `train`
        take. What was stopped goes on where it was, and ends with the same bytes; what is
        finished is left alone.
    compute
        Where and how reward models run.
    **knobs
        ``tuned``, ``limit``, ``per_prompt``, ``pairs``, ``min_margin`` and ``first_seed`` of
        `fifa.config.GeneratePairs`, and every knob of its ``images`` (``steps``, ``guidance``,
        ``sampler``, ``width``, ``height``, ``batch``, ...).

    Returns
    -------
    Generated
        The file, the counts of what was made and left out, and the ``margin`` by which
        `filter_pairs` takes the rewards from the file.

    Raises
    ------
    FifaError
        For whatever a person can mend: a model, a judge or prompts that are not there, images
        that are not finite, images of which no pair can be made, a folder with other things in
        it. What was done until then is kept.
    """
    specs = (margin,) if isinstance(margin, str) else tuple(margin)
    given = {**knobs, "model": str(model), "prompts": str(prompts), "margin": specs}
    return run_generation(changed(GeneratePairs(), **given), out, compute=compute)


def run_generation(
    asked: GeneratePairs, out: str | Path, *, compute: Compute | None = None
) -> Generated:
    """Generate, judge and pair in the folder ``out``; see `generate_pairs`."""
    out = Path(out)
    with only_writer(out):
        compute = compute or Compute(device=asked.images.device, **asdict(asked.cluster))
        return _run(asked, out, compute)


@dataclass(frozen=True)
class Plan:
    """What images and pairs are made of.

    Parameters
    ----------
    prompts, model, settings
        Of the images.
    made_of
        What names these, the judges and the choice of pairs, as JSON: the same pairs are of the
        same.
    """

    prompts: Prompts
    model: Model
    settings: Settings
    made_of: dict[str, Any]


def plan_generation(asked: GeneratePairs, compute: Compute) -> Plan:
    """Look at all that is needed, before hours of images.

    Raises `FifaError` for a model, judges or prompts that are not there or do not fit.
    """
    judges = check_judges(asked.margin, compute)
    prompts = read_prompts(asked.prompts, limit=asked.limit)
    model = find_generator(asked)
    settings = settings_for(asked.images, model.base)
    made_of = {
        "knobs": {name: getattr(asked, name) for name in CHOICE},
        "weights": {model.name: model.weights},
        "settings": settings.identity,
        "prompts": {"content": digest(prompts.table.to_pylist())},
        "judges": judges,
    }
    return Plan(prompts, model, settings, made_of)


def find_generator(asked: GeneratePairs) -> Model:
    """The model that makes the images, named as the user would call it.

    Raises `FifaError` for one that is not there.
    """
    named = name_checkpoints([asked.tuned] if asked.tuned else [])
    base, *tuned = find_models(asked.model, named, asked.images)
    path = Path(asked.model).expanduser()
    name = path.resolve().name if path.exists() else asked.model
    return tuned[0] if tuned else replace(base, name=name)


def check_judges(specs: Sequence[str], compute: Compute) -> dict[str, str]:
    """What names each judge's weights and settings, by its spec.

    Raises `FifaError` for judges that cannot look at images: known before hours of images.
    """
    if len(set(specs)) < len(specs) or not specs:
        raise FifaError("every judge is given once, and there is at least one", do="--margin")
    options = {"device": compute.device, "dtype": compute.dtype}
    return {spec: digest(load_reward(spec, **options).identity) for spec in specs}


def _run(asked: GeneratePairs, out: Path, compute: Compute) -> Generated:
    if not (out / GENERATE_FILE).exists():
        check_free(out, "pairs of a model")
    planned = plan_generation(asked, compute)
    path, made = out / PAIRS_FILE, out / MADE
    if (found := _finished(path)) is not None:
        refuse_other(planned, found.facts, path)
        echo(f"these pairs are finished: {path}")
        return found
    make_folder(made)
    for folder in (out, made, made / SCORES):
        sweep(folder)
    write_yaml(out / GENERATE_FILE, asked.to_yaml())
    with log_step(made, "generate"), executor_of(compute) as executor:
        plan = Evaluate(seeds=asked.per_prompt, first_seed=asked.first_seed, generate=asked.images)
        sets = [planned.model], planned.prompts, planned.settings
        images = generate(plan, *sets, made, executor=executor)
    release_memory()  # of the pipeline, before judges look for theirs
    with log_step(made, "judge"):
        judged = judge_images(images, made, asked.margin, compute)
        choice = choose_pairs(judged, asked)
        facts = {"made_of": planned.made_of, "model": planned.model.name}
        done = write_pairs(path, judged, choice, made, facts)
        note(pairs=done.facts["pairs"], **choice.left_out)
    return done


def echo_generated(made: Generated) -> None:
    """Print what was made, and what was left out."""
    facts = made.facts
    echo(
        f"{facts['pairs']:,} pairs of {facts['images']:,} images of {facts['model']}, "
        f"{facts['prompts']:,} prompts"
    )
    for reason, count in sorted(facts["left_out"].items(), key=lambda item: (-item[1], item[0])):
        echo(f"  left out {count:>10,}  {reason}")
    margins = " ".join(f"--margin {spec}" for spec in made.margin)
    echo(f"the rewards are in it: fifa filter {made.path.parent} {margins} --out RUN")


def _finished(path: Path) -> Generated | None:
    """The pairs that were made; None where there are none yet, or they are damaged."""
    try:
        return read_generated(path)
    except DamagedError as error:
        if path.exists():
            echo(f"{error.where} is damaged, and made again")
        return None


def refuse_other(planned: Plan, facts: dict[str, Any], where: Path) -> None:
    """Raise `FifaError` unless the pairs with these facts are of what is planned."""
    there, asked = facts["made_of"], json.loads(json.dumps(planned.made_of))
    changes = [
        f"{part}.{name}: {there[part].get(name)!r} / {asked[part].get(name)!r}"
        for part in asked
        for name in asked[part] | there[part]
        if there[part].get(name) != asked[part].get(name)
    ]
    check_same("pairs that were made in another way", changes, where)
