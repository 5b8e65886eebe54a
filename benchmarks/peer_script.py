"""A training script of somebody else, run as it is, with the time of each of its steps.

    python benchmarks/peer_script.py RECORD.json SCRIPT ARGUMENT ...

The script has to train through accelerate. A step's time is when its optimiser has stepped and
the device has done all of it. Weights & Biases, which diffusers' script imports and does not need,
is stood in for where it is not installed.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, module_from_spec
from pathlib import Path
from typing import Any

BEGUN = time.perf_counter()


def run_script(script: str, arguments: list[str], record: Path) -> None:
    """Run ``script`` as the main program; ``record`` gets its steps' times and its peak memory."""
    import torch
    from accelerate.optimizer import AcceleratedOptimizer

    if find_spec("wandb") is None:
        sys.modules["wandb"] = module_from_spec(ModuleSpec("wandb", None))
    cuda = torch.cuda if torch.cuda.is_available() else None
    times: list[float] = []
    step = AcceleratedOptimizer.step

    def timed(self: Any, *given: Any, **options: Any) -> Any:
        found = step(self, *given, **options)
        if self.gradient_state.sync_gradients:  # else it only accumulates
            if cuda:
                cuda.synchronize()
            times.append(time.perf_counter() - BEGUN)
        return found

    AcceleratedOptimizer.step = timed
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        AcceleratedOptimizer.step = step
        peak = {
            "allocated": cuda.max_memory_allocated() if cuda else 0,
            "reserved": cuda.max_memory_reserved() if cuda else 0,
        }
        record.write_text(json.dumps({"times": times, **peak}))


if __name__ == "__main__":
    run_script(sys.argv[2], sys.argv[3:], Path(sys.argv[1]))
