"""Damage to every file of a run folder, and what the commands that read it make of that.

One byte is changed, or the second half cut off. Right is the same result, with or without making
the file again, or an error that names it; wrong is another result, or a traceback.

    python scripts/attack/folders.py --flips 20 --seed 0
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fifa.config import Read, Recipe, Score, Select
from fifa.console import LOG_FILE
from fifa.data.read import read_pairs
from fifa.errors import FifaError
from fifa.reporting.page import write_report
from fifa.run.folder import open_run, start_run
from fifa.run.steps import export_step, read_step, score_step, select_step
from fifa.selection.export import rebuild
from fifa.training.pairs import read_training_pairs

PAIRS = 24
RIGHT = {"same", "made again", "named", "told on the page"}
UNREAD = ("report.html", "README.md")  # for people: no command reads them
COLUMNS = {"prompt": "caption", "image_0": "jpg_0", "image_1": "jpg_1", "label": "label_0"}
COLUMNS |= {name: name for name in ("s_0", "s_1", "q", "v")}


def make_run(folder: Path) -> Path:
    """A finished run of `PAIRS` pairs with images, and its source beside it."""
    rng = np.random.default_rng(0)
    cells = [[_png(2 * i + side) for i in range(PAIRS)] for side in (0, 1)]
    table = {"jpg_0": cells[0], "jpg_1": cells[1], "label_0": [i % 2 for i in range(PAIRS)]}
    table |= {"caption": [f"a cat number {i // 2}" for i in range(PAIRS)]}
    table |= {name: rng.random(PAIRS) for name in ("s_0", "s_1", "q")}
    table |= {"v": rng.random((PAIRS, 4)).tolist()}
    pq.write_table(pa.table(table), folder / "source.parquet")
    filter_run(folder / "run")
    write_report(folder / "run")
    return folder / "run"


def filter_run(run: Path) -> None:
    """What `fifa filter` does, but for the page."""
    recipe = Recipe(
        read=Read(source=str(run.parent / "source.parquet"), columns=COLUMNS),
        score=Score(margin=("column:s_0,s_1",), quality="column:q", diversity="column:v", k=3),
        select=Select(keep=6),
    )
    going = start_run(run, recipe)
    pairs = read_step(going)
    scores = score_step(going, pairs)
    selection = select_step(going, pairs, scores)
    export_step(going, pairs=pairs, scores=scores, selection=selection)


def _train(run: Path) -> str:
    return read_training_pairs(run).digest


def _rebuild(run: Path) -> None:
    rebuild(run / "subset" / "subset.json", run / "subset")


COMMANDS: dict[str, Callable[[Path], object]] = {
    "filter": filter_run,
    "select": lambda run: select_step(open_run(run)),
    "export": lambda run: export_step(open_run(run)),
    "report": write_report,
    "rebuild": _rebuild,
    "train": _train,
    "read": lambda run: read_pairs(run / "subset").pairs_digest,
}


def results(run: Path, command: str, given: object) -> dict[str, object]:
    """What a command is for: what it returns, or the files that it leaves."""
    if isinstance(given, str):
        return {command: given}
    subset = sorted((run / "subset").rglob("*.*"))
    made = {"report": [run / "report.html"], "select": [run / "selection.parquet"]}.get(
        command, [run / "selection.parquet", *subset] if command == "filter" else subset
    )
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made}


def files_of(run: Path) -> list[str]:
    """The files that commands read."""
    files = (path for path in sorted(run.rglob("*")) if path.is_file())
    return [path.relative_to(run).as_posix() for path in files if path.name not in UNREAD]


def damages(size: int, flips: int, rng: random.Random) -> Iterator[Callable[[bytes], bytes]]:
    """The second half cut off, everything cut off, and single bytes changed."""
    yield lambda data: data[: len(data) // 2]
    yield lambda data: b""
    for _ in range(flips if size else 0):
        place, mask = rng.randrange(size), rng.randrange(1, 256)
        yield lambda data, p=place, m=mask: data[:p] + bytes([data[p] ^ m]) + data[p + 1 :]  # type: ignore[misc]


def attempt(run: Path, command: str, file: str, right: dict[str, object]) -> str:
    """What a command makes of a run with a damaged file: same, made again, named, or wrong."""
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            given = COMMANDS[command](run)
    except FifaError as error:
        return "named" if Path(file).name in str(error) else f"not named: {error}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    if results(run, command, given) != right:
        page = (run / "report.html").read_text("utf-8")
        told_there = any(words in page for words in ("log could not be read", "has no log"))
        if file == LOG_FILE and told_there:
            return "told on the page"
        return "another result"
    return "made again" if Path(file).name in told.getvalue() else "same"


def attack(
    world: Path, flips: int, seed: int, commands: list[str], each: int | None = None
) -> dict[str, Counter[str]]:
    """The verdicts by file; whatever is not in `RIGHT` is wrong.

    ``each``: draw so many commands a damage, not all.
    """
    run, rng = make_run(world), random.Random(seed)
    whole = run.rename(world / "whole")

    def afresh() -> Path:
        shutil.rmtree(run, ignore_errors=True)
        return Path(shutil.copytree(whole, run))

    right = {one: results(afresh(), one, COMMANDS[one](run)) for one in commands}
    found: dict[str, Counter[str]] = {}
    for file in files_of(whole):
        data = (whole / file).read_bytes()
        for damage in damages(len(data), flips, rng):
            for command in rng.sample(commands, each or len(commands)):
                (afresh() / file).write_bytes(damage(data))
                verdict = attempt(run, command, file, right[command])
                found.setdefault(file, Counter())[verdict] += 1
    return found


def _png(seed: int) -> bytes:
    data = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def main() -> None:
    """Print a line a file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flips", type=int, default=4, help="changed bytes a file and command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="+", default=list(COMMANDS), choices=list(COMMANDS))
    asked = parser.parse_args()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as world, contextlib.redirect_stderr(io.StringIO()):
        found = attack(Path(world), asked.flips, asked.seed, asked.commands)
    for file, verdicts in found.items():
        print(f"{file}: " + ", ".join(f"{n:,} {v}" for v, n in verdicts.most_common()))
    total = sum(found.values(), Counter())
    print("all: " + ", ".join(f"{n:,} {verdict}" for verdict, n in total.most_common(12)))


if __name__ == "__main__":
    main()
