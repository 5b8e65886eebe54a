"""What a person sees while a step runs, and the facts that go into the run's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

LOG_FILE = "log.jsonl"  # in a run folder: a line a step, with its facts

_facts: ContextVar[dict[str, object] | None] = ContextVar("fifa_facts", default=None)


@contextmanager
def collect_facts() -> Iterator[dict[str, object]]:
    """Collect what `note` is told inside the block."""
    facts: dict[str, object] = {}
    token = _facts.set(facts)
    try:
        yield facts
    finally:
        _facts.reset(token)


def note(**facts: object) -> None:
    """Add facts about the step under way to the run's log; numbers told twice are added up.

    Outside a run this does nothing.
    """
    known = _facts.get()
    if known is None:
        return
    for name, value in facts.items():
        old = known.get(name)
        if isinstance(value, int | float) and isinstance(old, int | float):
            known[name] = old + value
        else:
            known[name] = value


def echo(text: str) -> None:
    """A line for the person at the terminal (standard error: results go to standard output)."""
    print(text, file=sys.stderr, flush=True)


@cache
def echo_once(text: str) -> None:
    """`echo`, the first time that a process says it."""
    echo(text)


@contextmanager
def quiet(*libraries: Any, warnings: bool = False) -> Iterator[None]:
    """Without the bars and notes of ``libraries`` (diffusers, transformers) inside the block.

    ``warnings`` stay where nothing here checks what they would warn of.
    """
    loggers = [library.utils.logging for library in libraries]
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in loggers]
    for log in loggers:
        log.disable_progress_bar()
        if not warnings:
            log.set_verbosity_error()
    try:
        yield
    finally:
        for log, level, bars in before:
            log.set_verbosity(level)
            if bars:
                log.enable_progress_bar()


@contextmanager
def progress(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows only if the block takes more than two seconds.

    Yields ``advance(n)``. On a terminal it is a bar; in a log, a line every 30 seconds.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    started = told = time.monotonic()
    done = 0
    bar: Progress | None = None

    def advance(n: int) -> None:
        nonlocal done, told, bar
        done += n
        now = time.monotonic()
        if console.is_terminal:
            if bar is None and now - started > 2:
                bar = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    console=console,
                    transient=True,
                )
                bar.add_task(what, total=total)
                bar.start()
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done)
        elif now - told > 30:
            told = now
            echo(f"{what}: {done:,}" + (f" of {total:,}" if total else ""))

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()
