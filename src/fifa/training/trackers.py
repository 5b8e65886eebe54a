"""Where the numbers of a training are shown while it runs: TensorBoard, W&B, trackio.

A tracker is started before anything is computed, so that one that does not start costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from fifa.config import Train
from fifa.console import echo
from fifa.errors import FifaError, brief
from fifa.models.optional import require
from fifa.shards.files import digest

Track = Callable[[int, dict[str, float]], object]  # what a tracker does with a step's numbers


def no_track(step: int, line: dict[str, float]) -> None:
    """What no tracker does with a step's numbers."""


@contextmanager
def tracking(train: Train, out: Path, step: int) -> Iterator[Track]:
    """The tracker that the training asks for, as long as the block lasts; ``step`` are done.

    One that fails later is left alone, which is told: ``stats.jsonl`` has all of it.

    Raises
    ------
    FifaError
        Where it is not installed, or does not start.
    """
    if train.tracker == "none":
        yield no_track
        return
    choose = f"pip install {train.tracker}, or choose another --tracker (none: stats.jsonl only)"
    module = require(train.tracker, what=f"the tracker {train.tracker}", do=choose)
    try:
        track, close = _started(module, train, out, step)
    except Exception as error:  # whatever a library of somebody else raises
        raise FifaError(
            f"the tracker {train.tracker} does not start: {brief(error)}",
            do="mend that (`wandb login`, or WANDB_MODE=offline, for Weights & Biases), or choose "
            "another --tracker (none: stats.jsonl only)",
        ) from error
    failed = False

    def careful(function: Callable[..., object], *arguments: object) -> None:
        nonlocal failed
        try:
            if not failed:
                function(*arguments)
        except Exception as error:
            failed = True
            echo(f"the tracker {train.tracker} failed, and gets no more: {brief(error)}")

    try:
        yield partial(careful, track)
    finally:
        careful(close)


def _started(module: Any, train: Train, out: Path, step: int) -> tuple[Track, Callable[[], object]]:
    """What a tracker does with a step's numbers, and at the end."""
    if train.tracker == "tensorboard":
        # what an interrupted run wrote beyond its last state is hidden
        purge = step + 1 if step else None
        api = require("torch.utils.tensorboard", "train")
        writer = api.SummaryWriter(str(out / "logs"), purge_step=purge)

        def log(step: int, line: dict[str, float]) -> None:
            for name, value in line.items():
                writer.add_scalar(name, value, step)

        return log, writer.close
    # Weights & Biases, or trackio, which has the same three functions
    name = f"{out.name}-{digest(train.to_yaml())[:6]}"
    folder = {"dir": str(out), "id": name} if train.tracker == "wandb" else {}
    module.init(project="fifa", name=name, config=asdict(train), resume="allow", **folder)
    return lambda step, line: module.log(line, step=step), module.finish
