"""What the benchmarks share: timing in turn, peak memory, the table and the line of JSON."""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def median_time(function: Callable[[], object], rounds: int = 3) -> float:
    """The median of ``rounds`` calls, in seconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_mb() -> float:
    """The most memory this process has held so far, in MB.

    Linux's own count, as ``ru_maxrss`` begins with what the process that started this one held.
    """
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return int(line.split()[1]) / 1024


def report(name: str, rows: Sequence[Sequence[object]], **json_fields: float) -> None:
    """Print a table, then one line of JSON with ``name`` and ``json_fields`` (null for NaN)."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        print("  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)]))
    known = {k: None if math.isnan(v) else round(v, 3) for k, v in json_fields.items()}
    print(json.dumps({"name": name, **known}))
