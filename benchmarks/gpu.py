"""What a GPU makes of FiFA's defaults: each part beside its peer and its limit, in one run.

    python benchmarks/gpu.py [train|score|generate|rate|knn|compile|all] [--memory]
                             [--peer-script FILE]

- train: `fifa train` with no performance option (SD1.5's architecture, LoRA of rank 8, 512
  pixels, 32 pairs a step), with and without ``--draws 2``, beside diffusers' real
  train_diffusion_dpo.py at its README's settings (``--peer-script``; without one, a step that does
  the same, `train_step.py`) and beside the policy's forward and backward alone. A speed is the
  median of the steps after the first quarter; the time to the first step is told apart.
- score: `fifa score --margin pickscore` (CLIP ViT-H/14, 512-pixel JPEGs) beside the bare image
  tower at its best batch, decoding alone, and the loop of PickScore's README in float32.
- generate: the images of `fifa evaluate` beside the stock pipeline at several batches. Ours is
  timed from the end of its first batch to the end of its last, the file of each image included.
- rate: the default rater's language model beside a batched loop with `generate`.
- knn: the ten nearest of 2,000,000 vectors, exactly; of fewer beside faiss on the processor.
- compile (not in all): `fifa train --compile`, its first run and one that finds it compiled.
- --memory: what trainings take on smaller cards, which the allocator's limit imitates.

Every side runs in a process of its own; those of a part import their libraries together, while its
models and data are made. Weights are random, models and data are made on the way.
On a machine without CUDA everything is tiny: that shows that it runs, and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import report
from gpu_sides import (
    COMPILE_SECONDS,
    GB,
    HERE,
    MEMORY,
    SIDE_SECONDS,
    SIDES,
    memory_of,
    offline,
    sizes,
)


def new_process() -> subprocess.Popen[str]:
    """A process that imports what sides need, says so, and waits for one."""
    command, pipe = [sys.executable, str(HERE / "gpu_sides.py")], subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=offline())


def wait_for(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
    """The same process, once it has imported."""
    assert process.stdout is not None
    process.stdout.readline()
    return process


class Bench:
    """Runs sides, and prints each part's table and line of JSON.

    Parameters
    ----------
    folder
        Where models and data are.
    script
        Diffusers' train_diffusion_dpo.py; empty: a step that does the same.
    here
        Sides run in this process (for tests).
    """

    def __init__(self, folder: Path, script: str = "", here: bool = False) -> None:
        self.folder, self.script, self.here = folder, script, here
        self._waiting: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        """End processes that no side has taken."""
        for process in self._waiting:
            process.kill()
            process.communicate()

    def begin(self, sides: int, part: str = "") -> None:
        """Make a part's models and data, while the processes of its sides import together.

        So that imports are in no figure, and paid for once.
        """
        started = [] if self.here else [new_process() for _ in range(sides)]
        if part:
            self.side("make_world", part=part)
        self._waiting += map(wait_for, started)

    def side(self, name: str, **options: Any) -> dict[str, Any]:
        """What a side found; empty where it failed, and the others go on."""
        begun = time.perf_counter()
        if self.here:
            found = SIDES[name](self.folder, **options)
        else:
            process = self._waiting.pop() if self._waiting else wait_for(new_process())
            told = json.dumps([name, str(self.folder), options])
            seconds = COMPILE_SECONDS if options.get("compile") else SIDE_SECONDS
            try:
                printed, _ = process.communicate(told, timeout=seconds)
                found = json.loads(printed.splitlines()[-1])
            except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
                process.kill()  # one that hangs
                process.communicate()
                print(f"{name} failed: {str(error)[-300:]}", file=sys.stderr, flush=True)
                found = {}
        taken = time.perf_counter() - begun
        shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}
        print(f"[{taken:5.1f} s] {name} {options} {json.dumps(shown)}", file=sys.stderr, flush=True)
        return found

    def train(self) -> None:
        """`fifa train` beside the script and the policy alone."""
        self.begin(4, "train")
        ours = self.side("train_fifa", draws=0)
        draws = self.side("train_fifa", draws=2)
        policy = self.side("train_policy", pairs=int(ours.get("micro_batch", 0)))
        if self.script:
            title = "diffusers' script, its README's settings"
            peer = self.side("train_script", script=self.script)
        else:
            title, peer = "a step that does what the script does", self.side("train_step")
        rows: list[Sequence[object]] = [
            ("", "pairs/s", "mean", "of the peer", "first step s", "GB", "GB reserved")
        ]
        for label, found in (
            (title, peer),
            (f"fifa train (micro-batch {ours.get('micro_batch', 0)})", ours),
            (f"fifa train --draws 2 ({draws.get('micro_batch', 0)})", draws),
            ("the policy alone", policy),
        ):
            times = of(found, "pairs_s") / of(peer, "pairs_s")
            names = ("pairs_s", "mean_pairs_s", "first_step", "allocated", "reserved")
            speed, mean, first, peak, reserved = (f"{of(found, name):.1f}" for name in names)
            rows.append((label, speed, mean, f"{times:.2f}", first, peak, reserved))
        report(
            "gpu-train",
            rows,
            speedup=of(ours, "pairs_s") / of(peer, "pairs_s"),
            speedup_draws=of(draws, "pairs_s") / of(peer, "pairs_s"),
            of_limit=of(ours, "pairs_s") / of(policy, "pairs_s"),
            of_limit_draws=of(draws, "pairs_s") / of(policy, "pairs_s"),
            first_step=of(ours, "first_step"),
            peak_gb=of(ours, "allocated"),
        )

    def score(self) -> None:
        """The engine beside the tower, the decoder and the loop."""
        self.begin(4, "score")
        ours, tower = self.side("score_engine"), self.side("score_tower")
        decoder, loop = self.side("score_decoder"), self.side("score_loop")
        rows: list[Sequence[object]] = [("", "images/s", "fifa / it", "GB")]
        for label, found in (
            ("fifa score, defaults", ours),
            ("bare tower, bfloat16, best batch", tower),
            ("decoding alone", decoder),
            ("loop of PickScore's README, float32", loop),
        ):
            times = of(ours, "images_s") / of(found, "images_s")
            peak = f"{of(found, 'allocated'):.1f}"
            rows.append((label, f"{of(found, 'images_s'):,.1f}", f"{times:.2f}", peak))
        lesser = min(of(tower, "images_s"), of(decoder, "images_s"))
        report(
            "gpu-score",
            rows,
            of_limit=of(ours, "images_s") / lesser,
            of_tower=of(ours, "images_s") / of(tower, "images_s"),
            of_decoder=of(ours, "images_s") / of(decoder, "images_s"),
            speedup=of(ours, "images_s") / of(loop, "images_s"),
        )

    def generate(self) -> None:
        """Images of `fifa evaluate` beside the stock pipeline's."""
        self.begin(2, "generate")
        ours, stock = self.side("generate_fifa"), self.side("generate_stock")
        rows: list[Sequence[object]] = [("", "images/s", "fifa / it", "GB")]
        label = f"fifa evaluate ({of(ours, 'batch'):.0f} together)"
        rows.append((label, f"{of(ours, 'images_s'):.2f}", "", f"{of(ours, 'allocated'):.1f}"))
        for batch in sizes().pipelines:
            speed = of(stock, f"images_s_{batch}")
            times = f"{of(ours, 'images_s') / speed:.2f}"
            rows.append((f"stock pipeline, {batch} together", f"{speed:.2f}", times, ""))
        report("gpu-generate", rows, of_limit=of(ours, "images_s") / of(stock, "images_s"))

    def rate(self) -> None:
        """The local rater beside the batched loop."""
        self.begin(1, "rate")
        found = self.side("rate_prompts")
        ours, loop, limit = (of(found, f"{n}_prompts_s") for n in ("ours", "loop", "forward"))
        rows: list[Sequence[object]] = [
            ("", "prompts/s", "fifa / it"),
            ("local rater: 3 grades and perplexity", f"{ours:,.1f}", ""),
            ("batched loop with generate, 3 digits", f"{loop:,.1f}", f"{ours / loop:.2f}"),
            ("bare forward, ready batches", f"{limit:,.1f}", f"{ours / limit:.2f}"),
        ]
        report("gpu-rate", rows, speedup=ours / loop, of_limit=ours / limit)

    def knn(self) -> None:
        """Exact neighbours on the device beside faiss."""
        self.begin(1)
        found, size = self.side("knn_search"), sizes()
        rows: list[Sequence[object]] = [("", "s", "prompts/s")]
        for label, name, count in (
            (f"fifa, exact, {size.vectors:,} x 384", "all_device", size.vectors),
            (f"fifa, exact, {size.few_vectors:,} x 384", "few_device", size.few_vectors),
            ("faiss on the processor, the same", "few_faiss", size.few_vectors),
        ):
            seconds = of(found, name)
            rows.append((label, f"{seconds:.2f}", f"{count / seconds:,.0f}"))
        rows.append(("neighbours that are the same", f"{of(found, 'same'):.4%}", ""))
        report(
            "gpu-knn",
            rows,
            speedup=of(found, "few_faiss") / of(found, "few_device"),
            seconds=of(found, "all_device"),
            same=of(found, "same"),
            peak_gb=of(found, "allocated"),
        )

    def compile(self) -> None:
        """`fifa train --compile`, cold and warm, beside the same without."""
        self.begin(3, "train")
        rows: list[Sequence[object]] = [("fifa train", "pairs/s", "first step s")]
        found = {}
        for name, compiled in (("plain", False), ("cold", True), ("warm", True)):
            found[name] = self.side("train_fifa", draws=0, compile=compiled)
            speed, first = (of(found[name], what) for what in ("pairs_s", "first_step"))
            rows.append((name, f"{speed:.1f}", f"{first:.1f}"))
        speeds = {name: of(one, "pairs_s") for name, one in found.items()}
        report("gpu-compile", rows, speedup=speeds["warm"] / speeds["plain"])

    def memory(self) -> None:
        """What trainings take on smaller cards."""
        self.begin(len(MEMORY), "memory")
        rows: list[Sequence[object]] = [("", "phase", "s", "GB", "GB reserved")]
        found_peaks = {}
        for what, (title, card, *_) in MEMORY.items():
            found = self.side("memory", what=what)
            label = f"{title} on {card} GB (micro-batch {found.get('micro_batch', 0)})"
            if found.get("error"):
                label += f": {found['error']}"
            phases = found.get("phases", {})
            for phase, one in phases.items():
                cells = (one["seconds"], one["allocated"] / GB, one["reserved"] / GB)
                rows.append((label, phase, *(f"{cell:.1f}" for cell in cells)))
                label = ""
            peak = memory_of(phases) if phases and not found["error"] else {}
            found_peaks[f"{what}_gb"] = of(peak, "allocated")
            found_peaks[f"{what}_reserved_gb"] = of(peak, "reserved")
        report("gpu-memory", rows, **found_peaks)


PARTS = ("train", "score", "generate", "rate", "knn")


def roomy_folder() -> str | None:
    """A folder in memory with room for all models: their writing is no figure, and takes minutes.

    Nor is their reading: from a disk it would be from its cache, as they were just written.
    """
    place = Path("/dev/shm")
    room = place.is_dir() and shutil.disk_usage(place).free > 32 * GB
    return str(place) if room else None


def of(found: dict[str, Any], name: str) -> float:
    """A number that a side found; NaN where it has none."""
    return float(found.get(name, math.nan))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=[*PARTS, "compile", "all"], default="all")
    parser.add_argument("--memory", action="store_true", help="only what trainings take of memory")
    parser.add_argument("--peer-script", default="", help="diffusers' train_diffusion_dpo.py")
    parser.add_argument("--folder", type=Path, help="keep models and data here")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    import torch

    if torch.cuda.is_available():
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    else:
        print("no CUDA device: everything is tiny, and no figure means anything", flush=True)
    with tempfile.TemporaryDirectory(dir=roomy_folder()) as temporary:
        parts = ["memory"] if given.memory else PARTS if given.part == "all" else [given.part]
        begun = time.perf_counter()
        with Bench(given.folder or Path(temporary), given.peer_script, given.here) as bench:
            for part in parts:
                getattr(bench, part)()
                now = time.perf_counter()
                print(f"({part} took {now - begun:.0f} s)\n", flush=True)
                begun = now


if __name__ == "__main__":
    main()
