"""`fifa info`: what a folder of fifa's holds, what is stale, and what comes next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import pyarrow.parquet as pq

from fifa.config.train import FACTS_FILE, STATS, TRAIN_FILE
from fifa.config.tune import BEST_FILE, TUNE_FILE
from fifa.data.subset import SUBSET_FILE
from fifa.data.table import FILES, load_origin
from fifa.errors import FifaError
from fifa.evaluation.generate import FOLDER
from fifa.evaluation.models import BASE
from fifa.evaluation.results import is_evaluated, load_results
from fifa.evaluation.study import STUDY_FILE, Findings
from fifa.evaluation.vote.store import FILE as VOTES
from fifa.formatting import interval, percent, seconds
from fifa.reporting.loop import ROUND_FILE
from fifa.run.folder import SCORES_INDEX, STAMP, Run, check_run, open_run
from fifa.run.loop import LOOP_FILE
from fifa.run.steps import source_is_same
from fifa.selection.table import SELECTION_FILE, load_selection, reason_counts
from fifa.shards.files import read_json, read_json_lines, read_yaml
from fifa.shards.lock import holder

REWARD_FILE = "reward.json"
State = Literal["done", "open", "stale"]


@dataclass(frozen=True)
class Part:
    """A step's result in a folder.

    Parameters
    ----------
    name, found
        Which, and what is there.
    state
        ``done``; ``open``: not there yet, or not finished; ``stale``: made from something that has
        changed since.
    next
        The command that makes it, where it is not done.
    """

    name: str
    found: str
    state: State = "done"
    next: str = ""


@dataclass(frozen=True)
class Info:
    """What a folder holds.

    Parameters
    ----------
    folder, kind
        Where, and what it is.
    parts
        The results of its steps, in their order.
    writer
        The process that writes there now; None for none.
    """

    folder: Path
    kind: str
    parts: tuple[Part, ...]
    writer: str | None

    @property
    def next(self) -> list[str]:
        """Commands for what is not done; nothing while somebody writes."""
        return [] if self.writer else list(dict.fromkeys(p.next for p in self.parts if p.next))

    def plain(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**asdict(self), "next": self.next}


def info(folder: str | Path) -> Info:
    """What is in a folder; only footers and small files are read.

    Raises `FifaError` for a folder without anything of fifa's, and for one of another version.
    """
    folder = Path(folder)
    if folder.is_file():
        raise FifaError(
            "a file, not a folder", where=str(folder), do=f"fifa read {folder} --explain"
        )
    check_run(folder)
    for mark, (kind, parts) in KINDS.items():
        if (folder / mark).is_file():
            return Info(folder, kind, tuple(parts(folder)), holder(folder))
    raise FifaError(
        "no folder of fifa's",
        where=str(folder),
        do="name what `filter`, `train`, `evaluate`, `tune`, `loop` or `reward train` wrote",
    )


def info_text(found: Info) -> str:
    """The parts for a terminal, and what to do next."""
    width = max((len(part.name) for part in found.parts), default=0)
    lines = [f"{found.kind}: {found.folder}"]
    lines += [f"  {part.state:<5}  {part.name:<{width}}  {part.found}" for part in found.parts]
    lines += [f"{found.writer} is writing here"] if found.writer else []
    lines += ["next:", *(f"  {command}" for command in found.next)] if found.next else []
    return "\n".join(lines)


def _run(folder: Path) -> Iterator[Part]:
    if (folder / "recipe.yaml").is_file():
        yield from _filtered(open_run(folder))
    if is_evaluated(folder):
        yield from _evaluated(folder)
    yield from _report(folder)
    for path in sorted((*folder.glob(f"*/{TRAIN_FILE}"), *folder.glob(f"*/*/{TRAIN_FILE}"))):
        name = path.parent.relative_to(folder).as_posix()
        yield from (Part(name, p.found, p.state) for p in _training(path.parent))


def _filtered(run: Run) -> Iterator[Part]:
    at, source = _quoted(run.folder), _quoted(run.recipe.read.source)
    again = f"fifa filter --recipe {_quoted(run.folder / 'recipe.yaml')} --out {at}"
    if not (run.folder / FILES["table"]).is_file():
        yield Part("pairs", "none yet", "open", again)
        return
    count, origin = _rows(run.folder / FILES["table"]), load_origin(run.folder)
    same = source_is_same(origin)
    yield Part(
        "pairs",
        f"{count:,} of {origin.rows:,} rows of {source}" + ("" if same else ", which has changed"),
        "done" if same else "stale",
        "" if same else f"fifa filter --recipe {_quoted(run.folder / 'recipe.yaml')} --out ANOTHER",
    )
    margins = ", ".join(run.recipe.score.margin) or "no margin"
    asked = f"{margins}; quality {run.recipe.score.quality}; diversity {run.recipe.score.diversity}"
    if not (run.folder / SCORES_INDEX).is_file():
        yield Part("scores", f"not finished: {asked}", "open", f"fifa score {at}")
        return
    yield Part("scores", asked)
    if not (run.folder / SELECTION_FILE).is_file():
        yield Part("selection", "none yet", "open", f"fifa select {at}")
        return
    selection = load_selection(run.folder)
    counts = reason_counts(selection)
    kept = counts.pop("selected", 0)
    most = sorted(counts.items(), key=lambda item: -item[1])[:3]
    dropped = ", ".join(f"{n:,} {reason}" for reason, n in most)
    yield Part("selection", f"{kept:,} of {count:,} pairs kept" + (f"; {dropped}" if most else ""))
    subset = run.subset / SUBSET_FILE
    if not subset.is_file():
        yield Part("subset", "none yet", "open", f"fifa export {at}")
        return
    chosen = selection["pair_id"].filter(pc.equal(selection["status"].cast("string"), "selected"))
    listed = read_json(subset, "the subset")["pair_id"]
    if set(chosen.to_pylist()) == set(listed):
        command = f"fifa train {at} --model MODEL --out CHECKPOINT"
        yield Part("subset", f"{len(listed):,} pairs in {run.subset}", next=command)
    else:
        found = f"{len(listed):,} pairs of another selection"
        yield Part("subset", found, "stale", f"fifa export {at}")


def _evaluated(folder: Path) -> Iterator[Part]:
    again = f"fifa evaluate --recipe {_quoted(folder / FOLDER / 'evaluation.yaml')} "
    again += f"--out {_quoted(folder)}"
    try:
        results = load_results(folder / FOLDER)
    except FifaError as error:
        yield Part("evaluation", error.what, "open", again)
        return
    best = next((c for c in results.comparisons if c.theirs == BASE and not c.scale.picked), None)
    found = f"{', '.join(results.names)} on {results.prompts:,} prompts"
    if best:
        wins = f"{percent(best.wins.share)} ({interval(best.wins)})"
        found += f"; {best.ours} wins {wins} by {best.scale.name}"
    yield Part("evaluation", found)
    if (folder / FOLDER / VOTES).is_file():
        yield Part("votes", f"see fifa vote results {_quoted(folder)}")


def _report(folder: Path) -> Iterator[Part]:
    page = folder / "report.html"
    made_of = [folder / SELECTION_FILE, folder / FOLDER / "results.json"]
    there = [path.stat().st_mtime for path in made_of if path.is_file()]
    command = f"fifa report {_quoted(folder)}"
    if there and not page.is_file():
        yield Part("report", "none yet", "open", command)
    elif there and page.stat().st_mtime < max(there):
        yield Part("report", "older than what it shows", "stale", command)
    elif page.is_file():
        yield Part("report", str(page))


def _training(folder: Path) -> Iterator[Part]:
    train = read_yaml(folder / TRAIN_FILE, "the training")
    lines = read_json_lines(folder / STATS)[0] if (folder / STATS).is_file() else []
    last = lines[-1] if lines else {}
    at, model = _quoted(folder), _quoted(str(train["model"]))
    done = f"{last.get('step', 0):,} steps in {seconds(last.get('seconds', 0.0))}"
    if last.get("loss") is not None:
        done += f", loss {last['loss']:.4f}"
    if not (folder / FACTS_FILE).is_file():
        found = f"{done}; not finished"
        yield Part("training", found, "open", f"fifa train --recipe {at}/{TRAIN_FILE} --out {at}")
        return
    facts = read_json(folder / FACTS_FILE, "the training")
    if best := facts.get("best"):
        done += f"; lowest held-out loss {best['loss']:.4f} after step {best['step']:,}, in best/"
    old = _older(facts)
    yield Part(
        "training",
        f"{done}, {facts['pairs']:,} pairs" + (", which have been exported anew" if old else ""),
        "stale" if old else "done",
        f"fifa evaluate --base {model} --tuned {at} --prompts FILE --out RUN",
    )


def _older(facts: dict[str, Any]) -> bool:
    """Whether the subset that a training read is another one now."""
    source = Path(facts["source"])
    for path in (source / SUBSET_FILE, source / "subset" / SUBSET_FILE):
        if path.is_file() and facts.get("selection"):
            with suppress(FifaError):
                return bool(read_json(path, "the subset")["digest"] != facts["selection"]["digest"])
    return False


def _tuned(folder: Path) -> Iterator[Part]:
    at, best = _quoted(folder), folder / BEST_FILE
    if best.is_file():
        next_ = f"fifa train --recipe {_quoted(best)} --out CHECKPOINT"
        yield Part("search", f"finished: {best}", next=next_)
    else:
        again = f"fifa tune --recipe {at}/{TUNE_FILE} --out {at}"
        yield Part("search", "not finished", "open", again)


def _looped(folder: Path) -> Iterator[Part]:
    asked = read_yaml(folder / LOOP_FILE, "the loop", sealed=True)["rounds"]
    done = len(list(folder.glob(f"round-*/{ROUND_FILE}")))
    again = f"fifa loop {_quoted(folder / LOOP_FILE)} --out {_quoted(folder)}"
    state: State = "done" if done >= asked else "open"
    yield Part("rounds", f"{done:,} of {asked:,}", state, "" if state == "done" else again)
    if is_evaluated(folder):
        yield from _evaluated(folder)


def _studied(folder: Path) -> Iterator[Part]:
    found = Findings(folder)
    state: State = "done" if found.done >= found.cells else "open"
    again = "" if state == "done" else f"fifa study --out {_quoted(folder)}"
    yield Part("cells", f"{found.done:,} of {found.cells:,}", state, again)


def _subset(folder: Path) -> Iterator[Part]:
    facts = read_json(folder / SUBSET_FILE, "the subset")
    command = f"fifa train {_quoted(folder)} --model MODEL --out CHECKPOINT"
    yield Part("subset", f"{facts['pairs']:,} pairs of {facts['source']['source']}", next=command)


def _rewarded(folder: Path) -> Iterator[Part]:
    facts = read_json(folder / REWARD_FILE, "the reward model")
    accuracy = facts.get("accuracy")
    found = json.dumps(accuracy) if accuracy is not None else str(facts.get("kind", ""))
    command = f"fifa filter SOURCE --margin proxy:{_quoted(folder)} --out RUN"
    yield Part("reward model", found or "finished", next=command)


def _rows(path: Path) -> int:
    with pq.ParquetFile(path) as file:
        return int(file.metadata.num_rows)


def _quoted(path: str | Path) -> str:
    return shlex.quote(str(path))


KINDS = {  # by the file that tells, the more special first: a loop's folder is a run's, too
    LOOP_FILE: ("a loop", _looped),
    TUNE_FILE: ("a search", _tuned),
    STUDY_FILE: ("a study", _studied),
    TRAIN_FILE: ("a training", _training),
    STAMP: ("a run", _run),
    SUBSET_FILE: ("a subset", _subset),
    REWARD_FILE: ("a reward model", _rewarded),
}
