"""Two real processes that write into one folder, for every command that writes; and killed ones.

Right is one writer: the other ends with exit 1 and words that name the first one's process, or
works after it. What then lies there is what the commands leave that ended well, byte for byte but
for times. A writer that was killed leaves no lock, and the same command goes on.

    python scripts/attack/writers.py --tries 2 --seed 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from multiprocessing.process import BaseProcess
from pathlib import Path

import pyarrow.parquet as pq

from fifa.cli import main as fifa
from fifa.moji.family import CLIP, FEEDBACK, SD

PRELOADED = ["fifa.run.evaluation", "fifa.training.job", "fifa.scoring.rewards.finetune"]
PRELOADED += ["fifa.reporting.page", "fifa.selection.export", "diffusers", "peft"]
# What tells when something was done, or how long it took
TIMES = ("log.jsonl", "report.html", "README.md", "train.json", "stats.jsonl", "digests.json")
TIMES += ("state.json", "reward.json", ".fifa-lock*")
FILTER = "filter {source} --margin column:clipscore_0,clipscore_1 --quality column:proxy_0"
FILTER += " --diversity none --keep 0.2 --out {run}"
TRAIN = f"train {{subset}} --model {SD} --steps 3 --batch 2 --micro-batch 2 --device cpu --lr 1e-3"
TRAIN += " --save-every 1 --sample-every 0 --tracker none --out {run}"
EVALUATE = f"evaluate --base {SD} --tuned again={SD} --prompts {{prompts}} --seeds 2 --steps 2"
EVALUATE += f" --device cpu --batch 4 --encoder none --score clipscore:{CLIP} --out {{run}}"
REWARD = f"reward train {{source}} --base {CLIP} --parts heads --steps 3 --batch 8 --warmup 0"
REWARD += " --evaluate-every 2 --device cpu --out {run}"
# Pairs of commands, and what lies in the folder before
CASES = [
    (FILTER, FILTER, ""),
    (FILTER, "select {run} --keep 0.1", ""),
    (FILTER, "select {run} --keep 0.1", "filtered"),
    ("export {run}", "select {run} --keep 0.1", "filtered"),
    ("export {run}", "export {run}", "filtered"),
    ("select {run} --keep 0.1", "select {run} --keep 0.3", "filtered"),
    ("report {run}", FILTER, "filtered"),
    ("rebuild {subset}/subset.json --out {run}",) * 2 + ("",),
    (TRAIN, TRAIN, ""),
    (TRAIN, TRAIN.replace("1e-3", "1e-4"), ""),
    (EVALUATE, EVALUATE, ""),
    (EVALUATE, EVALUATE, "filtered"),
    (REWARD, REWARD, ""),
]


@dataclass
class World:
    """Where everything lies, and what commands leave there one after the other."""

    folder: Path
    known: dict[tuple[str, ...], dict[str, bytes]]
    took: dict[tuple[str, ...], float]  # seconds

    @property
    def run(self) -> Path:
        """The folder that is written into."""
        return self.folder / "here" / "run"

    def start(self, command: str) -> tuple[BaseProcess, Path]:
        """A process with a command, and the file with what it says."""
        names = {"source": self.folder / "source.parquet", "subset": self.folder / "subset"}
        words = command.format(run=self.run, prompts=self.folder / "prompts.txt", **names)
        said = Path(tempfile.mkstemp(dir=self.folder)[1])
        process = CONTEXT.Process(target=work, args=(words.split(), str(said)))
        process.start()
        return process, said

    def afresh(self, before: str) -> None:
        """The folder as it is before a try."""
        shutil.rmtree(self.run.parent, ignore_errors=True)
        self.run.parent.mkdir()
        if before:
            shutil.copytree(self.folder / before, self.run)

    def alone(self, before: str, *commands: str) -> dict[str, bytes]:
        """What is left where each command begins when the one before has ended."""
        if (before, *commands) not in self.known:
            self.afresh(before)
            began = time.monotonic()
            for command in commands:
                self.start(command)[0].join()
            self.took[before, *commands] = time.monotonic() - began
            self.known[before, *commands] = self.contents()
        return self.known[before, *commands]

    def contents(self) -> dict[str, bytes]:
        """Every file but those that tell times."""
        files = (path for path in sorted(self.run.parent.rglob("*")) if path.is_file())
        kept = (path for path in files if not any(path.match(name) for name in TIMES))
        return {str(path.relative_to(self.run.parent)): path.read_bytes() for path in kept}

    def locks(self) -> list[Path]:
        """The files that name who writes."""
        return sorted(self.run.parent.glob("run/.fifa-lock*")) + sorted(
            self.run.parent.glob(".fifa-lock*")
        )

    def wait_for_lock(self, process: BaseProcess) -> None:
        """Return once the process writes, or has ended."""
        while process.is_alive() and not self.locks():
            time.sleep(0.001)


CONTEXT = multiprocessing.get_context("forkserver")


def work(words: list[str], said: str) -> None:
    """Run a command in this process."""
    with Path(said).open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["fifa", *words]
    fifa()


def make_world(folder: Path) -> World:
    """A source, prompts, a filtered run and its subset."""
    world = World(folder, {}, {})
    pq.write_table(pq.read_table(FEEDBACK).slice(0, 360), folder / "source.parquet")
    (folder / "prompts.txt").write_text("a red apple\na dog on a blue background\n", "utf-8")
    world.alone("", FILTER)
    shutil.copytree(world.run, folder / "filtered")
    shutil.copytree(world.run / "subset", folder / "subset")
    return world


def together(world: World, case: tuple[str, str, str], pause: float | None) -> str:
    """The verdict on two commands, the second ``pause`` seconds after the first holds its lock.

    None: both begin at once.
    """
    *commands, before = case
    world.afresh(before)
    first, first_said = world.start(commands[0])
    if pause is not None:
        world.wait_for_lock(first)
        time.sleep(pause)
    second, second_said = world.start(commands[1])
    both = ((first, first_said, second), (second, second_said, first))
    for process, *_ in both:
        process.join()
    left, locks = world.contents(), world.locks()
    ended = [commands[i] for i, (process, *_) in enumerate(both) if process.exitcode == 0]
    right = any(left == world.alone(before, *order) for order in permutations(ended))
    if not ended or not right or locks:
        return "wrong: " + ("a lock is left" if right and ended else "the result of neither")
    if len(ended) == 2:
        return "one after the other"
    process, said, other = both[0] if first.exitcode else both[1]
    text = said.read_text("utf-8")
    if process.exitcode == 1 and re.search(rf"process {other.pid} on .* is writing here", text):
        return "one wrote, the other named it"
    if "Traceback" not in text and process.exitcode == 1:
        return "after the first: " + text.strip().partition("\n")[0][:90]
    return "wrong: " + text.strip()[-200:]


def killed(world: World, command: str, before: str, pause: float) -> str:
    """The verdict on a command that is killed ``pause`` seconds after it holds its lock."""
    expected = world.alone(before, command)
    world.afresh(before)
    process, _ = world.start(command)
    world.wait_for_lock(process)
    time.sleep(pause)
    process.kill()
    process.join()
    again, said = world.start(command)
    again.join()
    if again.exitcode != 0 or world.locks():
        return "killed, wrong: " + (said.read_text("utf-8").strip()[-200:] or "a lock is left")
    return "killed, goes on" if world.contents() == expected else "killed, wrong: another result"


def attack(
    folder: Path, tries: int, seed: int, cases: list[tuple[str, str, str]] | None = None
) -> Iterator[tuple[str, Counter[str]]]:
    """What was tried, and the verdicts on it; those with "wrong" in them are."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    CONTEXT.set_forkserver_preload(PRELOADED)
    world, draw = make_world(folder), random.Random(seed)
    for case in CASES if cases is None else cases:
        first, second, before = case
        world.alone(before, first)
        most = world.took[before, first] / 2
        name = " + ".join(command.partition(" -")[0].partition(" {")[0] for command in case[:2])
        name += ", other options" * (first != second and first[:6] == second[:6])
        name += f", in a {before} run" * bool(before)
        verdicts: Counter[str] = Counter()
        for number in range(tries):
            verdicts[together(world, case, draw.uniform(0, most) if number % 2 else None)] += 1
        verdicts[killed(world, first, before, draw.uniform(0, most))] += 1
        yield name, verdicts


def main() -> None:
    """Print a line a pair of commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=2, help="of each pair of commands")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    asked = parser.parse_args()
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(dir=place) as folder:
        for name, verdicts in attack(Path(folder), asked.tries, asked.seed):
            print(f"{name} | {_listed(verdicts)}", flush=True)
            total += verdicts
    print(f"all | {_listed(total)}")


def _listed(verdicts: Counter[str]) -> str:
    return ", ".join(f"{n:,} {verdict}" for verdict, n in verdicts.most_common())


if __name__ == "__main__":
    main()
