"""`fifa train` as the command line runs it, with the time and the device memory of its phases.

    python benchmarks/phases.py RECORD.json BYTES train SOURCE --model MODEL --out OUT ...

``BYTES`` of device memory are all that the process may take, as on a smaller card (0: all there
is). Nothing inside of a step is touched: a phase is a call of one function.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

# The functions below `fifa.training` and the phase that each is; one inside another is apart.
PHASES = {
    "backbones.parts:ModelFolder.model": "loading",
    "job:encode": "encoding",
    "job:precompute": "reference",
    "loop:find_fit": "search",
    "loop:Loop.run": "training",
}
NOTHING = {"seconds": 0.0, "allocated": 0.0, "reserved": 0.0}


class Phases:
    """Seconds, and peaks of device memory in bytes, by the name of a phase."""

    def __init__(self) -> None:
        import torch

        self.cuda = torch.cuda if torch.cuda.is_available() else None
        self.found: dict[str, dict[str, float]] = {"other": dict(NOTHING)}
        self._open, self._since = ["other"], time.perf_counter()

    def wrapped(self, function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        """The function, whose calls are ``phase``."""

        def call(*arguments: Any, **options: Any) -> Any:
            self.mark()
            self._open.append(phase)
            self.found.setdefault(phase, dict(NOTHING))
            try:
                return function(*arguments, **options)
            finally:
                self.mark()
                self._open.pop()

        return call

    def mark(self) -> None:
        """Give what has been since the last mark to the phase that is open."""
        if self.cuda is not None and self.cuda.is_initialized():
            self.cuda.synchronize()
            self.keep()
            self.cuda.memory.reset_peak_memory_stats()
        now = time.perf_counter()
        self.found[self._open[-1]]["seconds"] += now - self._since
        self._since = now

    def keep(self) -> None:
        """Give the peaks since they were last begun anew to the phase that is open."""
        own = self.found[self._open[-1]]
        own["allocated"] = max(own["allocated"], self.cuda.max_memory_allocated())
        own["reserved"] = max(own["reserved"], self.cuda.max_memory_reserved())


@contextmanager
def timed_phases() -> Iterator[Phases]:
    """`PHASES` timed, as long as the block lasts."""
    phases, before = Phases(), []

    def replaced(place: Any, name: str, function: Callable[..., Any]) -> None:
        before.append((place, name, getattr(place, name)))
        setattr(place, name, function)

    for where, phase in PHASES.items():
        module, _, name = where.partition(":")
        *owner, last = f"fifa.training.{module}.{name}".rsplit(".", 1)
        place = resolve_name(*owner)
        if hasattr(place, last):
            replaced(place, last, phases.wrapped(getattr(place, last), phase))
        else:
            print(f"phases: no {where}", file=sys.stderr)
    if phases.cuda is not None:  # whoever else begins peaks anew takes none away

        def reset(*arguments: Any) -> None:
            phases.keep()
            phases.cuda.memory.reset_peak_memory_stats(*arguments)

        replaced(phases.cuda, "reset_peak_memory_stats", reset)
    try:
        yield phases
    finally:
        phases.mark()
        for place, name, function in before:
            setattr(place, name, function)


def train_in_phases(arguments: Sequence[str], limit: int = 0) -> dict[str, Any]:
    """Run `fifa` with some arguments in this process.

    Returns
    -------
    dict
        ``error`` (empty, or what `fifa` refused or failed with), ``seconds``, ``first_step`` (from
        the beginning to the first line of ``stats.jsonl``) and ``phases``.
    """
    begun = time.perf_counter()
    import torch

    from fifa.cli.commands import cli
    from fifa.errors import FifaError

    if limit and torch.cuda.is_available():
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))
    out = Path(arguments[list(arguments).index("--out") + 1])
    found: dict[str, Any] = {"error": ""}
    done = threading.Event()

    def watch() -> None:
        stats = out / "stats.jsonl"
        while not done.wait(0.01):
            if stats.exists() and stats.stat().st_size:
                found["first_step"] = time.perf_counter() - begun
                return

    watcher = threading.Thread(target=watch, daemon=True)
    with timed_phases() as phases:
        watcher.start()
        try:
            cli(list(arguments), standalone_mode=False)
        except FifaError as error:
            found["error"] = str(error)
        finally:
            done.set()
            watcher.join()
    return {**found, "seconds": time.perf_counter() - begun, "phases": phases.found}


if __name__ == "__main__":
    record, limit, *told = sys.argv[1:]
    Path(record).write_text(json.dumps(train_in_phases(told, int(limit))))
