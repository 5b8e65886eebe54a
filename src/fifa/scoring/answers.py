"""Answers of endpoints, kept by content in SQLite the moment they arrive."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fifa.errors import FifaError

FILE = "ratings.sqlite"


class Answers:
    """What was asked and answered, as JSON.

    Parameters
    ----------
    folder
        Where ``ratings.sqlite`` is kept; None keeps answers in memory.

    Raises `FifaError`, here and in `put`, where the file is damaged or there is no room for it.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / FILE if folder else None
        with self._failing("cannot open the cache of ratings", "delete the file if it is damaged"):
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
            # One thread at a time uses it, but not always the one that opened it (a notebook).
            self.base = sqlite3.connect(
                self.path or ":memory:", isolation_level=None, timeout=60, check_same_thread=False
            )
            # WAL: a kill loses at most the answer being written, and readers never wait.
            self.base.execute("PRAGMA journal_mode = WAL")
            self.base.execute("PRAGMA synchronous = NORMAL")
            self.base.execute(
                "CREATE TABLE IF NOT EXISTS answers"
                " (key TEXT PRIMARY KEY, model TEXT, answer TEXT) WITHOUT ROWID"
            )

    def get(self, keys: Sequence[str]) -> dict[str, str]:
        """The answers known for ``keys``."""
        known: dict[str, str] = {}
        for i in range(0, len(keys), 500):
            some = keys[i : i + 500]
            marks = ",".join("?" * len(some))
            query = f"SELECT key, answer FROM answers WHERE key IN ({marks})"
            known.update(self.base.execute(query, some).fetchall())
        return known

    def put(self, key: str, model: str, answer: str) -> None:
        """Keep an answer."""
        with self._failing("cannot keep a rating", "free space; what was answered before is kept"):
            row = (key, model, answer)
            self.base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)

    def close(self) -> None:
        """Close the file."""
        self.base.close()

    @contextmanager
    def _failing(self, what: str, do: str) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise FifaError(f"{what}: {error}", where=str(self.path), do=do) from error
