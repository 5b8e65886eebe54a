"""What a person sees while a step runs, and the facts that go into the run's log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

LOG_FILE = "log.jsonl"  # in a run folder: a line a step, with its facts
OUTPUT = "FIFA_OUTPUT"  # in the environment, so that worker processes have it: one of
QUIET, VERBOSE = "quiet", "verbose"
EVERY = 10.0  # seconds between two lines of progress in a log

_names: dict[str, str] = {}  # of folders that are known to people by other ones
_facts: ContextVar[dict[str, object] | None] = ContextVar("fifa_facts", default=None)
_steps: ContextVar[list[dict[str, Any]] | None] = ContextVar("fifa_steps", default=None)


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


@contextmanager
def collect_steps() -> Iterator[list[dict[str, Any]]]:
    """Collect the lines that the steps inside the block write into the run's log."""
    steps: list[dict[str, Any]] = []
    token = _steps.set(steps)
    try:
        yield steps
    finally:
        _steps.reset(token)


def step_ended(line: dict[str, Any]) -> None:
    """Take note of a step that ended, for `collect_steps` and ``--verbose``."""
    if (steps := _steps.get()) is not None:
        steps.append(line)
    facts = ", ".join(f"{name} {value}" for name, value in line.items() if name != "started")
    detail(facts)


@contextmanager
def output(how: str | None) -> Iterator[None]:
    """How much is said inside the block: `QUIET`, `VERBOSE`, or as before where it is None."""
    before = os.environ.get(OUTPUT)
    if how is not None:
        os.environ[OUTPUT] = how
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(OUTPUT, None)
        else:
            os.environ[OUTPUT] = before


def known_as(folder: str, name: str) -> None:
    """Say that people know a folder by another name, such as a URL of which it is a copy."""
    _names[folder] = name


def named(text: str) -> str:
    """A text with the names that people know."""
    for folder, name in _names.items():
        text = text.replace(folder, name)
    return text


def echo(text: str) -> None:
    """A line for the person at the terminal (standard error: results go to standard output)."""
    how = os.environ.get(OUTPUT)
    if how != QUIET:
        clock = time.strftime("%H:%M:%S ") if how == VERBOSE else ""
        print(clock + named(text), file=sys.stderr, flush=True)


def detail(text: str) -> None:
    """A line that only ``--verbose`` shows."""
    if os.environ.get(OUTPUT) == VERBOSE:
        echo(text)


@cache
def echo_once(text: str) -> None:
    """`echo`, the first time that a process says it."""
    echo(text)


@contextmanager
def quiet(*libraries: Any, warnings: bool = False) -> Iterator[None]:
    """Without the bars and notes of ``libraries`` (diffusers, transformers) inside the block.

    ``warnings`` stay where nothing here checks what they would warn of; with ``--verbose`` all do.
    """
    if os.environ.get(OUTPUT) == VERBOSE:
        yield
        return
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
def progress(what: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """A progress bar that shows only if the block takes more than two seconds.

    Yields ``advance(n)``. On a terminal it is a bar; in a log, a line every ten seconds with the
    rate and the time left. ``done`` of ``total`` were done before, and do not count for the rate.
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
    if os.environ.get(OUTPUT) == QUIET:
        yield lambda n: None
        return
    started = told = time.monotonic()
    before = done
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
        elif now - told >= EVERY:
            told = now
            echo(_progress_line(what, done, total, (done - before) / (now - started)))

    try:
        yield advance
    finally:
        if bar is not None:
            bar.stop()


def _progress_line(what: str, done: int, total: int | None, rate: float) -> str:
    """``training: 120 of 500 (24 %), 3.1/s, 2 min 03 s left``."""
    from fifa.formatting import seconds  # and with it jinja2

    each = f"{rate:,.0f}/s" if rate >= 10 else f"{rate:.1f}/s" if rate >= 1 else ""
    if not each and rate > 0:
        each = f"{1 / rate:.1f} s each"
    if not total:
        return ", ".join(filter(None, [f"{what}: {done:,}", each]))
    left = f"{seconds((total - done) / rate)} left" if rate > 0 and done < total else ""
    share = f"{what}: {done:,} of {total:,} ({done / total:.0%})"
    return ", ".join(filter(None, [share, each, left]))
