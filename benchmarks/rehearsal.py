"""The whole way for ten million pairs: `fifa filter` of scored references, its seconds and memory.

    python benchmarks/rehearsal.py [--pairs 10000000] [--folder DIR]
    python benchmarks/rehearsal.py --pairs 250000 --ray

One command reads the pairs, takes margins, ratings and embeddings from columns, finds every
prompt's neighbours, selects, exports references and writes the report. It is run at a hundredth
and a tenth of the size too, and the table is printed after each; the exponent of a step is the
slope of its processor time over the pairs, both in logarithms: on a machine that others use too,
seconds say less. The source is made first: Pick-a-Pic's shape in Parquet, five pairs a prompt,
image ids and URLs of no images, two rewards, a rating and an embedding of MiniLM's size in every
row.

`--ray` runs one size twice: in one process, and on a cluster of four nodes that loses one of them
every minute (`--every`). It compares the bytes of everything that both have written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common import report
from fifa.shards.files import content_digest

ROWS = 100_000  # of a file
PAIRS_A_PROMPT = 5
WIDTH = 384  # numbers of an embedding, as MiniLM has
TOPICS, STYLES = 512, 16  # prompts lie around topics, in the directions of styles
WORDS = [f"{a}{b}{c}" for a in "bcdfghjklm" for b in ("ar", "il", "os", "un") for c in "adeiou"]
HOST = "https://example.org/images/"
CARRIED = {"embedding": "embedding"}
SCORES = ("--margin", "column:score_0,score_1", "--quality", "column:rating")
HOW = ("log.jsonl", "recipe.yaml", "report.html")  # a run's files that tell times and executor
NODES, STORE = 4, 1 << 30  # of the simulated cluster, and bytes of each node's object store
STEPS = ("read", "margin", "diversity", "quality", "select", "export", "report")
EVERY = 0.1  # seconds between two looks at a process


def make(folder: Path, pairs: int) -> None:
    """Write the source, a file in memory at a time; the same pairs are the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    world = np.random.default_rng(0)
    topics, styles = (_unit(world.standard_normal((n, WIDTH))) for n in (TOPICS, STYLES))
    for file, start in enumerate(range(0, pairs, ROWS)):
        path = folder / f"train-{file:05d}.parquet"
        if not path.exists():
            table = _rows(file, min(ROWS, pairs - start), topics, styles)
            temporary = path.with_suffix(".part")
            pq.write_table(table, temporary, row_group_size=20_000, compression="zstd")
            temporary.replace(path)


def _rows(file: int, rows: int, topics: np.ndarray, styles: np.ndarray) -> pa.Table:
    rng = np.random.default_rng([1, file])
    prompts = -(-rows // PAIRS_A_PROMPT)
    others = rng.integers(0, prompts, rows - prompts)
    of_pair = np.sort(np.concatenate([np.arange(prompts), others]))
    words = (pa.array(WORDS).take(pa.array(rng.integers(0, len(WORDS), prompts))) for _ in range(9))
    number = pa.array(np.arange(prompts) + file * ROWS // PAIRS_A_PROMPT).cast(pa.string())
    text = pc.binary_join_element_wise(*words, number, " ")
    uids = _uids(rng, rows + prompts)
    first = np.arange(rows) + of_pair  # pair i of a prompt compares its images i and i + 1
    twice = rng.choice(np.arange(1, rows), rows // 2000, replace=False)
    first[twice], of_pair[twice] = first[twice - 1], of_pair[twice - 1]
    zero, one = (uids.take(pa.array(first + side)) for side in (0, 1))
    label = rng.choice(np.float32([1, 0, 0.5]), rows, p=[0.44, 0.44, 0.12])
    scores = rng.normal(size=(2, rows)).astype(np.float32)
    scores[0] += label - 0.5
    near = topics[rng.integers(0, TOPICS, prompts)] * 0.6
    near += _unit(rng.standard_normal((prompts, STYLES)) @ styles) * 0.7
    near += _unit(rng.standard_normal((prompts, WIDTH))) * 0.35
    vectors = _unit(near).astype(np.float16)[of_pair]
    lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH)
    return pa.table(
        {
            "caption": text.take(pa.array(of_pair)),
            "image_0_uid": zero,
            "image_1_uid": one,
            "image_0_url": pc.binary_join_element_wise(HOST, zero, ".png", ""),
            "image_1_url": pc.binary_join_element_wise(HOST, one, ".png", ""),
            "label_0": label,
            "label_1": 1 - label,
            "score_0": scores[0],
            "score_1": scores[1],
            "rating": rng.uniform(1, 5, prompts).astype(np.float32)[of_pair],
            "embedding": lists.cast(pa.list_(pa.float16())),
        }
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _uids(rng: np.random.Generator, n: int) -> pa.Array:
    """Random ids of 36 characters, as UUIDs are written."""
    text = np.full((n, 36), ord("-"), np.uint8)
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    places = [i for i in range(36) if i not in (8, 13, 18, 23)]
    text[:, places] = digits[rng.integers(0, 16, (n, 32), dtype=np.uint8)]
    ends = np.arange(n + 1, dtype=np.int32) * 36
    return pa.StringArray.from_buffers(n, pa.py_buffer(ends), pa.py_buffer(text))


@dataclass
class Watched:
    """What a command took: seconds and peak MB a step, of its own process and of its children."""

    seconds: dict[str, float] = field(default_factory=dict)
    busy: dict[str, float] = field(default_factory=dict)  # processor time of all its threads
    peak: dict[str, float] = field(default_factory=dict)  # resident, files that it has mapped too
    own: dict[str, float] = field(default_factory=dict)  # resident, without files
    children: float = 0.0  # the most that all of them held together
    size: float = 0.0  # MB in the run folder
    used: float = 0.0  # processor time so far

    def see(self, step: str, process: psutil.Process) -> None:
        """Look at the process now."""
        with contextlib.suppress(psutil.NoSuchProcess, OSError, KeyError):  # it is at its end
            known = dict(
                line.split(":", 1)
                for line in Path(f"/proc/{process.pid}/status").read_text().splitlines()
            )
            resident, own = (int(known[name].split()[0]) / 1024 for name in ("VmRSS", "RssAnon"))
            self.peak[step] = max(self.peak.get(step, 0), resident)
            self.own[step] = max(self.own.get(step, 0), own)
            below = [child.memory_info().rss for child in process.children(recursive=True)]
            self.children = max(self.children, sum(below) / 2**20)
            self.used = sum(process.cpu_times()[:2])


def watch(
    command: list[str],
    run: Path,
    environment: dict[str, str] | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Watched:
    """Run a command and look at it; a line in the run's log ends a step."""
    found, log = Watched(), run / "log.jsonl"
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command,
            stdout=said,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
        )
        seen, looked = psutil.Process(process.pid), 0
        last, used = time.perf_counter(), 0.0
        step = STEPS[0]
        while process.poll() is None:
            found.see(step, seen)
            meanwhile()
            lines = log.read_text().splitlines() if log.exists() else []
            for line in lines[looked:]:
                now = time.perf_counter()
                name = json.loads(line)["step"]
                found.seconds[name], last = now - last, now
                found.busy[name], used = found.used - used, found.used
                step = STEPS[min(STEPS.index(name) + 1, len(STEPS) - 1)]
            looked = len(lines)
            time.sleep(EVERY)
        found.seconds[step], found.busy[step] = time.perf_counter() - last, found.used - used
        said.seek(0)
        text = said.read()
    print(text.rstrip(), flush=True)
    if process.returncode:
        raise SystemExit(f"the command ended with {process.returncode}")
    found.size = sum(path.stat().st_size for path in run.rglob("*") if path.is_file()) / 2**20
    return found


def filter_command(source: Path, run: Path, keep: float) -> list[str]:
    return [
        *(sys.executable, "-m", "fifa", "filter", str(source), *SCORES),
        *(word for name, column in CARRIED.items() for word in ("--columns", f"{name}={column}")),
        *("--diversity", "column:embedding", "--keep", str(keep), "--out", str(run)),
    ]


def rehearse(folder: Path, pairs: int, keep: float) -> Watched:
    """Make the source of one size, and run the command."""
    source, run = folder / f"source-{pairs}", folder / f"run-{pairs}"
    start = time.perf_counter()
    make(source, pairs)
    size = sum(path.stat().st_size for path in source.iterdir()) / 2**30
    print(f"{pairs:,} pairs in {size:.2f} GiB, made in {time.perf_counter() - start:.0f} s")
    shutil.rmtree(run, ignore_errors=True)
    return watch(filter_command(source, run, keep), run)


def exponent(pairs: list[int], values: list[float]) -> float:
    """The slope of log values over log pairs; NaN for one size."""
    if len(pairs) < 2:
        return math.nan
    return float(np.polyfit(np.log(pairs), np.log(np.maximum(values, 1e-9)), 1)[0])


def tabulate(found: dict[int, Watched]) -> None:
    """Print a row a step: its processor time at each size and their exponent; of the largest size
    also seconds and peak memory."""
    sizes, last = list(found), found[max(found)]
    head = [*(f"{n:,}" for n in sizes), "exponent", "seconds", "MB", "without files"]
    rows: list[list[object]] = [["processor time", *head]]

    def row(name: str, busy: list[float], seconds: float, peak: float, own: float) -> None:
        cells = [f"{s:.1f} s" for s in busy]
        told = f"{exponent(sizes, busy):.2f}"
        rows.append([name, *cells, told, f"{seconds:.0f} s", f"{peak:,.0f}", f"{own:,.0f}"])

    for step in (step for step in STEPS if step in last.seconds):
        busy = [found[n].busy[step] for n in sizes]
        row(step, busy, last.seconds[step], last.peak.get(step, 0), last.own.get(step, 0))
    whole = [sum(found[n].busy.values()) for n in sizes]
    peaks = [max(found[n].peak.values()) for n in sizes]
    seconds, own = sum(last.seconds.values()), max(last.own.values())
    row("all", whole, seconds, peaks[-1], own)
    rows.append(["peak memory", *(f"{mb:,.0f} MB" for mb in peaks), *[""] * 4])
    rows.append(["run folder", *(f"{found[n].size:,.0f} MB" for n in sizes), *[""] * 4])
    told = {"seconds": seconds, "processor_seconds": whole[-1], "peak_mb": peaks[-1]}
    report("rehearsal", rows, **told, exponent=exponent(sizes, whole), own_mb=own)


class Nodes:
    """A Ray cluster on this machine: a head, which works on nothing, and four nodes of a processor.

    Parameters
    ----------
    every
        Seconds after which one node, the oldest, is killed and another one started in its place.
    """

    def __init__(self, every: float) -> None:
        from ray.cluster_utils import Cluster

        plain = {"object_store_memory": STORE, "include_dashboard": False}
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **plain})
        self.nodes = [self._start() for _ in range(NODES)]
        self.every, self.killed = every, 0
        self._due = time.perf_counter() + every

    def _start(self) -> Any:
        return self.cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def kill(self) -> None:
        """Kill the oldest node if it is time."""
        if time.perf_counter() >= self._due:
            self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)
            self.nodes.append(self._start())
            self.killed, self._due = self.killed + 1, time.perf_counter() + self.every

    def close(self) -> None:
        """End the cluster."""
        self.cluster.shutdown()


def digests(run: Path) -> dict[str, str]:
    """What is in every file that a run has written, but for those that tell how it was run."""
    files = (path for path in run.rglob("*") if path.is_file() and path.name not in HOW)
    return {path.relative_to(run).as_posix(): content_digest(path) for path in sorted(files)}


def compare(folder: Path, pairs: int, keep: float, every: float) -> None:
    """Run one size here and on a cluster that loses nodes; print both and whether they agree."""
    here = rehearse(folder, pairs, keep)
    source, run = folder / f"source-{pairs}", folder / f"ray-{pairs}"
    shutil.rmtree(run, ignore_errors=True)
    nodes = Nodes(every)
    with contextlib.closing(nodes):
        command = filter_command(source, run, keep)
        command += ["--executor", "ray", "--actors", str(NODES), "--num-cpus", "1"]
        there = watch(command, run, {"RAY_ADDRESS": nodes.cluster.address}, nodes.kill)
        killed = nodes.killed
    expected, found = digests(folder / f"run-{pairs}"), digests(run)
    same = sum(found.get(name) == digest for name, digest in expected.items())
    rows: list[list[object]] = [[f"{pairs:,} pairs", "one process", f"{NODES} Ray nodes"]]
    both = [(step, here.seconds[step], there.seconds[step]) for step in STEPS]
    rows += [[step, f"{one:.0f} s", f"{two:.0f} s"] for step, one, two in both]
    for what, peaks in (("peak memory", "peak"), ("without mapped files", "own")):
        most = (max(getattr(w, peaks).values()) for w in (here, there))
        rows.append([what, *(f"{mb:,.0f} MB" for mb in most)])
    rows.append(["nodes killed", 0, killed])
    rows.append(["the same files", "", f"{same} of {len(expected)}"])
    report("rehearsal-ray", rows, killed=killed, same=same, files=len(expected))
    if found != expected:
        raise SystemExit("the bytes differ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10_000_000)
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--only", action="store_true", help="this size alone")
    parser.add_argument("--ray", action="store_true", help="beside a cluster that loses nodes")
    parser.add_argument("--every", type=float, default=60.0, help="seconds between two losses")
    parser.add_argument("--folder", type=Path, help="keep source and runs here")
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if given.ray:
            compare(folder, given.pairs, given.keep, given.every)
            return
        sizes = [given.pairs] if given.only else [given.pairs // n for n in (100, 10, 1)]
        found: dict[int, Watched] = {}
        for n in sizes:
            found[n] = rehearse(folder, n, given.keep)
            tabulate(found)


if __name__ == "__main__":
    main()
