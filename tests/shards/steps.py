"""Steps for tests of executors; workers import them from here."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pyarrow as pa

from fifa.errors import FifaError


class Squares:
    """Squares numbers; dies once, by its own hand, where ``death`` names a file not there yet."""

    def __init__(self, death: Path | None = None, seconds: float = 0.0) -> None:
        self.death, self.seconds = death, seconds

    def begin(self, shard):
        return list(shard)

    def finish(self, begun):
        time.sleep(self.seconds)
        if self.death is not None and 7 in begun and not self.death.exists():
            self.death.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if isinstance(begun[0], str):
            raise FifaError("text cannot be squared", where=begun[0])
        return pa.table({"square": [n * n for n in begun]})


class Dying(Squares):
    def finish(self, begun):
        os.kill(os.getpid(), signal.SIGKILL)


class Waiting(Squares):
    """Says which process it is in, and then takes minutes."""

    def finish(self, begun):
        beside = self.death.with_suffix(".part")
        beside.write_text(str(os.getpid()))
        beside.rename(self.death)
        time.sleep(300)


SHARDS = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(12)]
KEYS = [f"{i:03}" for i in range(12)]
EXPECTED = [n * n for n in range(36)]


def squares_of(tables):
    return pa.concat_tables(list(tables))["square"].to_pylist()
