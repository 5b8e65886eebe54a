"""Kill a command at random moments, resume it, compare every byte with an unbroken run.

    python scripts/kill.py --kills 20 -- SOURCE --margin ... --keep 0.1
    python scripts/kill.py --command evaluate --kills 10 -- --base ... --tuned ... --prompts ...

Each kill gets a folder of its own: the run starts, is killed (SIGKILL) after a time drawn
uniformly from an unbroken run's duration, and is started again until it ends. ``--chain`` kills
one and the same run again and again instead.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# What says when something was done, or how long it took, and so is never the same twice
TIMES = ("log.jsonl", "report.html", "*.sqlite")
TRAINING_FACTS = ("README.md", "train.json", "stats.jsonl", "digests.json")
TRAINING_TIMES = (*TRAINING_FACTS, "logs/*", "state/*/state.json")


def contents(run: Path, but: tuple[str, ...] = TIMES) -> dict[str, bytes]:
    """Every file of a run that has to be the same: all but those that tell times."""
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.is_file() and not any(path.relative_to(run).match(name) for name in but)
    }


def start(command: str, options: list[str], out: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-m", "fifa", command, *options, "--out", str(out)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode != 0:
        raise SystemExit(f"a run failed with {process.returncode}:\n{errors.decode()}")


def kill_and_resume(
    options: list[str],
    folder: Path,
    kills: int,
    seed: int = 0,
    chain: bool = False,
    command: str = "filter",
) -> list[tuple[float, list[str]]]:
    """``(moment, files that differ)`` for every kill; no file may differ.

    Raises `SystemExit` if a run that is not killed fails.
    """
    draw = random.Random(seed)
    but = TIMES + (TRAINING_TIMES if command == "train" else ())
    begun = time.monotonic()
    finish(start(command, options, folder / "unbroken"))
    duration = time.monotonic() - begun
    expected = contents(folder / "unbroken", but)
    results = []
    for number in range(kills):
        moment = draw.uniform(0, duration)
        out = folder / ("chain" if chain else f"killed-{number}")
        process = start(command, options, out)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if not chain or number == kills - 1:
            finish(start(command, options, out))
            found = contents(out, but)
            differ = [n for n in sorted({*expected, *found}) if expected.get(n) != found.get(n)]
            results.append((moment, differ))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--chain", action="store_true")
    parser.add_argument("--command", default="filter")
    parser.add_argument("options", nargs="+", help="what the command gets, after --")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = kill_and_resume(
            given.options, Path(folder), given.kills, given.seed, given.chain, given.command
        )
    for moment, differ in results:
        print(f"killed after {moment:6.2f} s: " + (", ".join(differ) or "the same bytes"))
    sys.exit(any(differ for _, differ in results))


if __name__ == "__main__":
    main()
