"""Passes over samples of a source: what each step takes, timed by the step itself.

A few prompts with all their pairs go through `fifa.run.steps.filter_pairs`, and some of what it
keeps through `fifa train`, with few of them and with more. Of a step that took t_1 seconds for n_1
things and t_2 for n_2::

    each = (t_2 - t_1) / (n_2 - n_1),    start = t_0 - each * n_0

where t_0 is the first pass, in a process of its own, which also imports libraries and loads models.
What a step leaves on the disk is found alike.
"""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa

from fifa.config import Recipe, Score, Select, Train, changed
from fifa.config.knobs import Knobs
from fifa.config.train import STATS
from fifa.console import LOG_FILE, QUIET, echo, output
from fifa.data.table import FILES, Pairs, save_pairs
from fifa.errors import FifaError
from fifa.formatting import seconds, shorten
from fifa.run.bench import Rate, kept_rates, partial_training, step_seconds
from fifa.run.folder import start_run
from fifa.run.steps import filter_pairs
from fifa.scoring import engine_kept
from fifa.scoring.endpoint import VLLM
from fifa.scoring.specs import ENCODERS, IMAGE_ENCODERS, RATERS, REWARDS, Registry
from fifa.shards.files import digest, read_json_lines
from fifa.training.job import run_training

T = TypeVar("T")

FIRST = 2  # prompts that the smallest pass takes
PLACES = 4  # of a source that its sample is from
RANDOM = ("plan_0", "plan_1")  # columns of rewards that stand for a scorer which is timed elsewhere
RANDOM_MARGIN = f"column:raw:{','.join(RANDOM)}"
# Of a training, what does not change what a step of it takes
LENGTH = {"source", "steps", "epochs", "holdout", "validate_every", "stop", "save_every", "seed"}
OF_STEP = {  # what of a run folder a step leaves
    "read": (FILES["table"], FILES["prompts"], FILES["rejected"]),
    "margin": ("scores/margin*", "scores/images*", "scores/prompts*", "scores/unreadable*"),
    "diversity": ("scores/diversity*", "scores/embeddings*"),
    "quality": ("scores/quality*", "scores/ratings*"),
    "select": ("selection.parquet", "unreadable.parquet"),
    "export": ("subset/**/*",),
    "report": ("report.html",),
}


@dataclass(frozen=True)
class Passes:
    """Passes over samples of a source, and the rates that follow from them.

    Parameters
    ----------
    pairs
        Of the source: all of them, or a part of them.
    recipe
        What is to be done with them.
    budget
        Seconds that measuring may take, about.
    fresh
        Whether what is known is measured again.
    share
        Of the pairs, those that a judge is asked about.
    """

    pairs: Pairs
    recipe: Recipe
    budget: float
    fresh: bool
    share: float = 1.0

    def rates(self) -> dict[str, Rate]:
        """The rate of every step that runs here, by its name."""
        score, compute = self._measured, asdict(self.recipe.compute)
        origin = self.pairs.origin
        name = digest("filter", origin.fingerprint, asdict(score), compute)
        fills = any(one.startswith(VLLM) for one in (*score.margin, score.quality))
        measure = partial(apart, self._rates) if fills else self._rates
        return kept_rates(f"filter {name}", measure, self.fresh)

    @property
    def _measured(self) -> Score:
        """Of what scores, all that runs on this machine; `RANDOM` columns where no margin does."""
        score = self.recipe.score
        margin = tuple(one for one in score.margin if runs(REWARDS, one))
        quality = score.quality if runs(RATERS, score.quality) else "none"
        diversity = score.diversity if runs(ENCODERS, score.diversity) else "none"
        judges = [one for one in margin if REWARDS.parse(one).is_judge]
        share = self.share if judges else 1.0
        names = margin
        if not margin or (share < 1 and len(judges) == len(margin)):
            names = (RANDOM_MARGIN, *margin)  # a budget takes a cheaper one beside the judge
        return replace(score, margin=names, quality=quality, diversity=diversity, budget=share)

    def _rates(self) -> dict[str, Rate]:
        full = self._measured
        light = replace(full, margin=(RANDOM_MARGIN,), budget=1.0)
        # Each with the steps whose rates are taken from it, and its share of the time. Where the
        # export is not timed, nearly nothing is kept.
        parts = (
            (without_prompts(full), ("margin",), 0.3, FIRST),
            (replace(light, quality="none"), ("diversity",), 0.15, FIRST),
            (light, ("quality",), 0.35, FIRST),
            (without_prompts(light), ("read", "select", "export", "report"), 0.1, 1.0),
        )
        # an engine is loaded once for all passes: its loading is in the cold one
        with tempfile.TemporaryDirectory(prefix="fifa-") as name, engine_kept():
            echo(f"measuring on a sample, for about {seconds(self.budget)}")
            cold, first = self.fewest(partial(self.once, full, None, Path(name) / "cold"))
            rates: dict[str, Rate] = {}
            for score, steps, share, keep in parts:
                if getattr(full, steps[0], "") == "none":
                    continue
                work = partial(self.once, score, keep, Path(name) / steps[0])
                most, budget = self.pairs.prompts.num_rows, share * self.budget
                passes = grown(work, steps, first, most, budget)
                rates |= {step: rate_of(step, cold, [p[step] for p in passes]) for step in steps}
        return rates

    def training(self, train: Train) -> dict[str, Rate]:
        """The rates of a training on what is kept: see `training_rates`."""
        knobs = {name: value for name, value in asdict(train).items() if name not in LENGTH}

        def measure() -> dict[str, Rate]:
            with tempfile.TemporaryDirectory(prefix="fifa-") as folder:
                echo("measuring short trainings")
                return training_rates(self, train, 0.2 * self.budget, Path(folder))

        name = digest("train", self.pairs.origin.fingerprint, knobs)
        return kept_rates(f"train {name}", measure, self.fresh)

    def fewest(self, work: Callable[[int], T]) -> tuple[T, int]:
        """What ``work`` gives for `FIRST` prompts, or for more where it refuses so few; how many.

        A proxy wants labels to learn from, a selection pairs that are no ties.
        """
        prompts, most = FIRST, self.pairs.prompts.num_rows
        while True:
            try:
                return work(prompts), prompts
            except FifaError:
                if prompts >= min(most, 64 * FIRST):
                    raise
                prompts = min(most, 8 * prompts)

    def once(self, score: Score, keep: float | None, place: Path, prompts: int) -> dict[str, Taken]:
        """What each step of `filter_pairs` takes for so many prompts with all their pairs.

        ``keep`` is as in the recipe; None keeps all, in another process that has imported nothing.
        The run's folder is named by the prompts, in ``place``.
        """
        folder = place / str(prompts)
        pairs = sample_of(self.pairs, prompts)
        select = Select(keep=1.0 if keep is None else keep, anyway=True)
        recipe = replace(self.recipe, score=score, select=select)
        start_run(folder, recipe)
        save_pairs(pairs, folder)
        began = time.perf_counter()
        if keep is None:
            in_process("filter", recipe, folder)
        else:
            with output(QUIET):
                filter_pairs(recipe, folder)
        whole = time.perf_counter() - began
        lines = {line["step"]: line for line in read_json_lines(folder / LOG_FILE)[0]}
        took = {step: lines[step]["seconds"] for step in OF_STEP if step in lines}
        took |= {"read": 0.0, "report": whole - sum(took.values())}
        kept = lines["select"].get("selected", 0)
        counts = {"margin": len(pairs), "read": len(pairs), "select": kept, "export": kept}
        n = pairs.prompts.num_rows
        counts |= {"report": kept, "diversity": n, "quality": n}
        return {
            step: Taken(took[step], counts[step], _size(folder, patterns))
            for step, patterns in OF_STEP.items()
        }


@dataclass(frozen=True)
class Taken:
    """What a step took in a pass: seconds, for so many things, bytes left."""

    seconds: float
    count: int
    size: float


UNITS = {
    "margin": "pairs",
    "read": "pairs",
    "cache": "pairs",
    "diversity": "prompts",
    "quality": "prompts",
}


def rate_of(step: str, cold: dict[str, Taken], passes: Sequence[Taken]) -> Rate:
    """A step's rate, from its cold pass and its smallest and its largest warm one.

    Where the largest took no longer than the smallest, all of its time counts for what it did: more
    than it would be, and the rate says so.
    """
    first, last = passes[0], passes[-1]
    more = last.count - first.count
    whole = last.seconds / max(1, last.count)
    each = (last.seconds - first.seconds) / more if more > 0 else whole
    size = (last.size - first.size) / more if more > 0 else last.size / max(1, last.count)
    of = f"the step itself, on {first.count:,} and on {last.count:,} of them"
    if more <= 0:
        of = f"the step itself, on {last.count:,} of them"
    elif each <= 0:
        each, of = whole, f"{of}: at most, as more took no longer; measure longer with --seconds"
    size, unit = max(0.0, size), UNITS.get(step, "kept pairs")
    start = max(0.0, cold[step].seconds - each * cold[step].count)
    return Rate(start, each, unit, of, size)


def grown(
    work: Callable[[int], dict[str, Taken]],
    steps: Sequence[str],
    first: int,
    most: int,
    budget: float,
) -> list[dict[str, Taken]]:
    """Passes over ``first`` prompts and then more, until one takes a third of the time longer.

    At least two of them, unless ``first`` is all that there are. Loading a model takes as long in
    every pass, so it is what comes on top that has to be long enough to be told from noise.
    """
    passes: list[dict[str, Taken]] = []
    prompts, spent = first, 0.0

    def more(names: Sequence[str]) -> float:
        """Seconds that some steps of the last pass took longer than in the first."""
        return time_of(passes[-1], names) - time_of(passes[0], names)

    while True:
        passes.append(work(prompts))
        spent += time_of(passes[-1], list(passes[-1]))
        told = more(steps) > budget / 3 or (len(passes) > 1 and spent > 2 * budget)
        if prompts >= most or told:
            return passes
        if len(passes) == 1:  # what each takes is not known yet
            wanted = prompts * 16 * budget / max(spent, 1e-6)
        else:  # half of the time on top, and not more than all of it with all other steps
            rates = ((more(steps), budget / 2), (more(list(passes[-1])), budget))
            room = min(part * (prompts - first) / max(took, 1e-6) for took, part in rates)
            wanted = first + room
        prompts = min(most, max(2 * prompts, int(min(16 * prompts, wanted))))


def without_prompts(score: Score) -> Score:
    """Without a rater and an encoder."""
    return replace(score, quality="none", diversity="none")


def time_of(taken: dict[str, Taken], steps: Sequence[str]) -> float:
    """Seconds of some steps of a pass."""
    return sum(taken[step].seconds for step in steps)


def sample_of(pairs: Pairs, prompts: int) -> Pairs:
    """Some prompts with all their pairs, neighbours at `PLACES` places; random rewards beside.

    A part of a larger sample is in it, so that what is read from a disk is partly there already.
    """
    n, length = pairs.prompts.num_rows, max(1, prompts // PLACES)
    begins = [place * n // PLACES for place in range(PLACES)][: max(1, prompts)]
    rows = np.unique(np.concatenate([np.arange(one, min(n, one + length)) for one in begins]))
    old = pairs.table["prompt_index"].to_numpy()
    number = np.full(n, -1, np.int32)
    number[rows] = np.arange(len(rows))
    table = pairs.table.filter(pa.array(number[old] >= 0))
    place = table.schema.get_field_index("prompt_index")
    index = pa.array(number[table["prompt_index"].to_numpy()], pa.int32())
    table = table.set_column(place, table.schema.field(place), index)
    rng = np.random.default_rng(0)
    for name in RANDOM:
        table = table.append_column(name, pa.array(rng.standard_normal(len(table))))
    return replace(pairs, table=table, prompts=pairs.prompts.take(pa.array(rows)))


def _size(folder: Path, patterns: Sequence[str]) -> int:
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sum(path.stat().st_size for path in files)


def runs(registry: Registry, text: str) -> bool:
    """Whether a scorer, rater or encoder runs on this machine without a download."""
    if text == "none":
        return False
    spec = registry.parse(text)
    if spec.name == VLLM and find_spec("vllm") is None:
        return False
    if spec.name == "openai" or (spec.is_judge and spec.name != VLLM):
        return False
    models = [spec.model or spec.entry.hub]
    if spec.name == "proxy" and spec.at:
        models = [IMAGE_ENCODERS.parse(spec.at).model]
    if spec.is_column or spec.by_generator:
        models = []
    return all(is_here(model) for model in models if model)


def is_here(model: str) -> bool:
    """Whether a model is a folder or file of this machine, or in the hub's cache."""
    if Path(model).expanduser().exists():
        return True
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    with suppress(OSError, ValueError, HfHubHTTPError):
        return any(Path(snapshot_download(model, local_files_only=True)).rglob("*.safetensors"))
    return False


def training_rates(passes: Passes, train: Train, budget: float, folder: Path) -> dict[str, Rate]:
    """The rates of a training: of what comes before its first step, and of its steps.

    Short trainings on what a selection keeps of a few and of more prompts; the first of them in a
    process of its own. The rates are those of the ``cache`` (all but the steps), of a ``pair`` of a
    step, of a ``state`` and of the ``weights``, of which only the size is known.
    """
    most = passes.pairs.prompts.num_rows
    score = without_prompts(Score(margin=(RANDOM_MARGIN,)))
    # In random order only what the few steps take would be encoded, and not all that is kept.
    every = changed(train, order="hard-first") if train.order == "random" else train

    def subset(prompts: int) -> tuple[Path, int]:
        taken = passes.once(score, 1.0, folder / "run", prompts)
        return folder / "run" / str(prompts) / "subset", taken["export"].count

    def trained(source: Path, steps: int, batch: int, out: Path) -> float:
        """Seconds without those of the steps."""
        short = partial_training(changed(every, source=str(source)), steps, batch)
        began = time.perf_counter()
        if out.name == "cold":
            in_process("train", short, out)
        else:
            with output(QUIET):
                run_training(short, out)
        whole = time.perf_counter() - began
        return whole - float(read_json_lines(out / STATS)[0][-1]["seconds"])

    def before(prompts: int) -> dict[str, Taken]:
        source, kept = subset(prompts)
        out = folder / f"before-{prompts}"
        return {"cache": Taken(trained(source, 3, least, out), kept, _size(out, ("cache/*",)))}

    (source, few), prompts = passes.fewest(subset)
    least = min(train.batch, few, 2)
    cold = trained(source, 3, least, folder / "cold")
    step = step_seconds(folder / "cold") / least
    found = [one["cache"] for one in grown(before, ["cache"], prompts, most, budget / 2)]
    batch = max(1, min(train.batch, int(budget / 4 / step)))
    steps = max(4, min(40, int(budget / 2 / (step * batch))))
    out = folder / "steps"
    trained(source, steps, batch, out)
    state = _size(out, ("state/**/*",))
    weights = _size(out, ("*.safetensors", "unet/*.safetensors", "transformer/*.safetensors"))
    how = f"{steps:,} steps of {batch:,} pairs"
    return {
        "cache": rate_of("cache", {"cache": Taken(cold, few, 0)}, found),
        "pair": Rate(0.0, step_seconds(out) / batch, "pairs", how),
        "state": Rate(0.0, 0.0, "states", how, state),
        "weights": Rate(0.0, 0.0, "weights", how, weights),
    }


def apart(measure: Callable[[], T]) -> T:
    """What ``measure`` gives in a process of its own.

    vLLM fills the device's memory until its process ends, and trainings are timed later.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as worker:
        return worker.submit(measure).result()


def in_process(command: str, knobs: Knobs, out: Path) -> None:
    """Run a command of fifa's in a process of its own; raises the `FifaError` that it ends with."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as recipe:
        recipe.write(knobs.to_yaml())
        recipe.flush()
        words = [command, "--recipe", recipe.name, "--out", str(out), "--quiet", "--json"]
        asked = [sys.executable, "-m", "fifa", *words]
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode:
        try:
            raise FifaError(**json.loads(done.stdout)["error"])
        except (ValueError, KeyError, TypeError) as error:
            what = f"fifa {command} ended with {done.returncode}: {shorten(done.stderr[-300:])}"
            raise FifaError(what) from error
