"""`fifa plan` against what it foretells: is every step within a quarter of its time?

In turn, `--rounds` times, in processes of their own: `fifa plan` measures anew and tells the time
of every step, then `fifa filter` and `fifa train` take it. The source is the small world's
feedback, `--copies` times with other prompts; the plan sees a sample of it. With `--clock
processor` all processes read processor time for the time of day (their children's too), which says
what the plan is worth where others use the machine meanwhile.

    python benchmarks/plan.py --clock processor
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from common import report
from fifa.moji.family import CLIP, FEEDBACK, SD

CLOCK = """
import resource, time
def perf_counter():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)
time.perf_counter = perf_counter
"""
CHANGED = ("caption", "image_0_uid", "image_1_uid", "best_image_uid")
SHORT = 3.0  # seconds; steps below are told, and count in the sum only


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="that the plan measures")
    parser.add_argument("--keep", type=int, default=600)
    parser.add_argument("--clock", choices=("wall", "processor"), default="wall")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = make_source(folder / "source.parquet", asked.copies)
        environment = {**os.environ, "FIFA_CACHE": str(folder / "cache")}
        clock = time.perf_counter
        if asked.clock == "processor":
            (folder / "sitecustomize.py").write_text(CLOCK)
            paths = [str(folder), os.environ.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
            made: dict[str, float] = {}
            exec(CLOCK.replace("time.perf_counter = perf_counter", ""), made)
            clock = made["perf_counter"]

        def run(*words: object) -> tuple[dict, float]:
            command = [sys.executable, "-m", "fifa", *map(str, words), "--json", "--quiet"]
            began = clock()
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            if done.returncode:
                sys.exit(done.stderr)
            return json.loads(done.stdout), clock() - began

        recipe = [source, "--margin", f"clipscore:{CLIP}", "--keep", asked.keep]
        told: list[dict[str, float]] = []
        took: list[dict[str, float]] = []
        for number in range(asked.rounds):
            plan = [*recipe, "--model", SD, "--seconds", asked.seconds, "--fresh"]
            found, spent = run("plan", *plan)
            print(f"round {number + 1}: planned in {spent:.0f} s", file=sys.stderr)
            told.append({step["name"]: step["seconds"] for step in found["steps"]})
            out, trained = folder / f"run-{number}", folder / f"trained-{number}"
            filtered, whole = run("filter", *recipe, "--out", out)
            real = {step["step"]: step["seconds"] for step in filtered["steps"]}
            real["report"] = whole - sum(real.values())
            _, whole = run("train", out, "--model", SD, "--out", trained)
            lines = [json.loads(line) for line in (trained / "stats.jsonl").open()]
            real["training"] = lines[-1]["seconds"]
            real["encode"] = whole - real["training"]
            took.append(real)
            print(json.dumps({"told": told[-1], "took": real}), file=sys.stderr, flush=True)
    rows = [
        ("step", *(cell for i in range(asked.rounds) for cell in (f"told {i + 1}", "took", "%")))
    ]
    worst, fields = 0.0, {}
    for step in [*told[0], "together"]:
        row = [step]
        for plan_, real in zip(told, took, strict=True):
            a, b = (sum(d.values()) if step == "together" else d[step] for d in (plan_, real))
            row += [f"{a:.1f}", f"{b:.1f}", f"{100 * (a / b - 1):+.0f}"]
            if b >= SHORT:
                worst = max(worst, abs(a / b - 1))
        fields[step] = math.prod(
            (sum(p.values()) if step == "together" else p[step])
            / (sum(r.values()) if step == "together" else r[step])
            for p, r in zip(told, took, strict=True)
        ) ** (1 / asked.rounds)
        rows.append(tuple(row))
    report("plan", rows, worst_of_long_steps=worst, **fields)


def make_source(path: Path, copies: int) -> Path:
    """The feedback several times, each time with other prompts and other ids of images."""
    table = pq.read_table(FEEDBACK)
    parts = []
    for number in range(copies):
        part = table
        for name in table.column_names:
            is_text = pa.types.is_string(table.schema.field(name).type)
            if number and is_text and name in CHANGED:
                again = pa.array([f"{text} ({number})" for text in table[name].to_pylist()])
                part = part.set_column(part.schema.get_field_index(name), name, again)
        parts.append(part)
    pq.write_table(pa.concat_tables(parts), path)
    return path


if __name__ == "__main__":
    main()
