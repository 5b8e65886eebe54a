"""Answers of endpoints, kept by content in SQLite the moment they arrive."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path

from fifa.errors import FifaError
from fifa.scoring.rubric import Answer
from fifa.shards.files import digest

FILE = "ratings.sqlite"


class Answers:
    """What was asked and answered.

    Parameters
    ----------
    folder
        Where ``ratings.sqlite`` is kept; None keeps answers in memory.
    """

    def __init__(self, folder: Path | None) -> None:
        self.path = folder / FILE if folder else None
        try:
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
        except (sqlite3.Error, OSError) as error:
            raise FifaError(
                f"cannot open the cache of ratings: {error}",
                where=str(self.path),
                do="delete the file if it is damaged, or choose another --out",
            ) from error

    def get(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers known for ``keys``."""
        known = {}
        for i in range(0, len(keys), 500):
            some = keys[i : i + 500]
            marks = ",".join("?" * len(some))
            rows = self.base.execute(
                f"SELECT key, answer FROM answers WHERE key IN ({marks})", some
            )
            known.update({key: Answer.model_validate_json(answer) for key, answer in rows})
        return known

    def put(self, key: str, model: str, answer: Answer) -> None:
        """Keep an answer; raises `FifaError` where there is no room for it."""
        row = (key, model, answer.model_dump_json())
        try:
            self.base.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?)", row)
        except sqlite3.Error as error:
            raise FifaError(
                f"cannot keep a rating: {error}",
                where=str(self.path),
                do="free space and run again: what was answered before is kept",
            ) from error

    def close(self) -> None:
        """Close the file."""
        self.base.close()


def answer_key(identity: dict[str, object], prompt: str) -> str:
    """Names a question: model, rubric and parameters in ``identity``, and the prompt itself."""
    return digest(identity, prompt.encode("utf-8", "surrogatepass"))
